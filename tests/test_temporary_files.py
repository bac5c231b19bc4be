"""The tests themselves: what they and the processes that they start leave lies in a folder that goes with them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import TEMPORARY


def test_temporary_files_lie_in_the_folder_of_the_session():
    code = "import tempfile; print(tempfile.mkdtemp())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for folder in (done.stdout.strip(), tempfile.mkdtemp()):
        assert Path(folder).is_relative_to(os.environ["TMPDIR"])
        assert Path(os.environ["TMPDIR"]).is_relative_to(TEMPORARY) and os.environ["TMPDIR"] != str(TEMPORARY)
