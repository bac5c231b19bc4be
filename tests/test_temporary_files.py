"""The tests themselves: what they and the processes that they start leave lies in pytest's own folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def test_temporary_files_lie_in_the_folder_of_the_session(tmp_path_factory):
    code = "import tempfile; print(tempfile.mkdtemp())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for folder in (done.stdout.strip(), tempfile.mkdtemp()):
        assert Path(folder).is_relative_to(tmp_path_factory.getbasetemp())
