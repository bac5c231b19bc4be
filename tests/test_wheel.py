"""The wheel: how imports are rewritten, and that what is installed works anywhere and stands in nobody's way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from tiny_run import TINY, data_flags

from tools.wheel import backend
from tools.wheel.package import commands

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r'^(image-scores-\w+) = "(.+)"$', PYPROJECT, re.MULTILINE))
(VERSION,) = re.findall(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)
OWN = {"data", "models", "storage"}
BUILD = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir"]
HOSTILE = "raise SystemExit('a module of the user was imported')"

# -- rewriting


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import data", "from image_scores import data"),
        ("import data as d", "from image_scores import data as d"),
        ("import storage.atomic", "import image_scores.storage.atomic; from image_scores import storage"),
        ("import storage.atomic as a", "import image_scores.storage.atomic as a"),
        ("import os, data", "import os; from image_scores import data"),
        ("import os, \\\n  data\nx = 1", "import os; from image_scores import data \\\n\nx = 1"),
        ("from storage.atomic import a, b", "from image_scores.storage.atomic import a, b"),
        ("from storage import atomic as a", "from image_scores.storage import atomic as a"),
        ("from storage import (\n  a,\n  b,\n)", "from image_scores.storage import (\n  a,\n  b,\n)"),
        ("def f():\n  import data", "def f():\n  from image_scores import data"),
        ("if TYPE_CHECKING:\n  from models import M", "if TYPE_CHECKING:\n  from image_scores.models import M"),
        ("if 1: import data; import models", "if 1: from image_scores import data; from image_scores import models"),
        ('"""图"""; import data  # 图', '"""图"""; from image_scores import data  # 图'),
        ("import data\r\nx = 1\r\n", "from image_scores import data\r\nx = 1\r\n"),
    ],
)
def test_an_import_of_the_project_is_one_of_the_package(code: str, expected: str) -> None:
    assert backend.with_package(code.encode(), OWN).decode() == expected


@pytest.mark.parametrize(
    "code",
    [
        *("import os", "import database", "import os.data", "from database import data", "from os import storage"),
        *("from . import data", "from .storage import a", "data = 1\ndata.import_ = 2", "# import data"),
        '"""from storage import a\nimport data"""',
    ],
)
def test_everything_else_stays_as_it_is(code: str) -> None:
    assert backend.with_package(code.encode(), OWN).decode() == code


def test_commands_in_texts_are_those_that_are_installed() -> None:
    text = b"python data.py describe; python score.py; data.py; pip install -r requirements-extra.txt"
    expected = b"image-scores-data describe; python score.py; data.py; pip install 'image-scores[extra]'"
    assert backend.with_commands(text, ["data", "models"]) == expected


FORMS = """
import alpha, os
import alpha as other
import room.inner
import room.inner as inside
from room import inner
from room.inner import NAME as name

def late():
    if os:
        import alpha; from room.inner import NAME
    return alpha.NAME, NAME

found = [alpha.NAME, other.NAME, room.inner.NAME, inside.NAME, inner.NAME, name, *late()]
if __name__ == "__main__":
    print(found)
"""


def test_a_rewritten_program_does_what_it_did(tmp_path: Path) -> None:
    sources = {"alpha.py": "NAME = 'alpha'", "room/__init__.py": "", "room/inner.py": "NAME = 'inner'"}
    sources |= {"program.py": FORMS, "assets/a.txt": ""}
    for name, code in sources.items():
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_text(code)
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    backend.write_package(tmp_path / "checkout", site / "image_scores")
    for name in ("alpha", "room"):
        elsewhere.mkdir(exist_ok=True)
        (elsewhere / f"{name}.py").write_text(HOSTILE)
    before = [sys.executable, str(tmp_path / "checkout" / "program.py")]
    after = [sys.executable, "-m", "image_scores.program"]
    said = [
        subprocess.run(command, cwd=elsewhere, env={"PYTHONPATH": str(site)}, capture_output=True, text=True)
        for command in (before, after)
    ]
    assert said[0].stdout == said[1].stdout == f"{['alpha', 'alpha', *['inner'] * 4, 'alpha', 'inner']}\n", said


@pytest.mark.slow
def test_every_line_stays_where_it_is(tmp_path: Path) -> None:
    backend.write_package(ROOT, tmp_path / "image_scores")
    modules = sorted(
        [*ROOT.glob("*.py"), *(path for room in ROOT.glob("*/__init__.py") for path in room.parent.glob("*.py"))]
    )
    assert len(modules) > 100
    for path in modules:
        before, after = (
            place.read_text(encoding="utf-8").splitlines()
            for place in (path, tmp_path / "image_scores" / path.relative_to(ROOT))
        )
        assert len(before) == len(after), path
        changed = {new for old, new in zip(before, after, strict=True) if old != new}
        assert all("image_scores" in line or "image-scores" in line for line in changed), path


def test_no_module_of_the_project_is_imported_by_a_string() -> None:
    """Which would not be rewritten."""
    own = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for path in (*ROOT.glob("*.py"), *(path for room in own for path in ROOT.glob(f"{room}/**/*.py"))):
        text = path.read_text(encoding="utf-8")
        assert not {*re.findall(r"(?:import_module|__import__|run_module)\(\s*f?[\"'](\w+)", text)} & own, path


# -- what it says of itself


def test_every_program_is_a_command() -> None:
    programs = [path.stem for path in sorted(ROOT.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
    expected = {f"image-scores-{name}": f"image_scores.commands:{name}" for name in programs}
    assert expected == SCRIPTS
    assert all(callable(getattr(commands, name)) for name in programs)


def test_an_editable_install_is_refused_in_a_line_before_anything_is_downloaded() -> None:
    for hook in (backend.get_requires_for_build_editable, backend.build_editable):
        with pytest.raises(SystemExit, match=r"^error: -e cannot work: .*pip install \. .*python baseline\.py$"):
            hook("folder")


# -- built and installed


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and a folder to work in that holds modules with the names of the project's."""

    environment: Path
    folder: Path

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run what is in its bin/ and return how it ended."""
        command = [str(self.environment / "bin" / name), *words]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)

    def out(self, name: str, *words: str) -> str:
        """What it prints; it must succeed."""
        done = self.run(name, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*BUILD, str(folder), str(ROOT)], check=True, capture_output=True)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own, which sees the libraries of this one."""
    here = Installed(tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("user"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", here.environment], check=True)
    site = Path(here.out("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(here.environment), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    hidden = ("queue",) if sys.version_info >= (3, 11) else ()  # of Python, which older ones would find here with -m
    for name in ("data", "models", "configs", "storage", "training", "search", "main", *hidden):
        (here.folder / f"{name}.py").write_text(HOSTILE)
    return here


@pytest.fixture(scope="module")
def trained(installed: Installed, demo_set: tuple[Path, Path]) -> str:
    """What training said that left runs/tiny."""
    return installed.out("image-scores-baseline", *data_flags(demo_set), *TINY, "--output_dir", "runs/tiny")


@pytest.mark.slow
def test_the_wheel_holds_one_package_and_nothing_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        code = {name: archive.read(name).decode() for name in names if name.endswith((".py", ".j2"))}
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.partition("/")[0] for name in names} == {
        "image_scores",
        f"image_scores-{VERSION}.dist-info",
    }
    assert not {name.split("/")[1] for name in names} & {"tests", "tools", "bench", "docs", "__pycache__"}
    commands = "|".join(name.rpartition("-")[2] for name in SCRIPTS)
    assert [name for name, text in code.items() if re.search(rf"python[\"', ]+({commands})\.py", text)] == []
    assert "from image_scores.predict import Scorer" in code["image_scores/sharing/templates/model_card.md.j2"]
    assert [name for name, text in code.items() if "requirements-extra" in text] == []
    assert "Requires-Dist: torch>=" in metadata and "Requires-Dist: pytest" not in metadata
    assert re.search("^Requires-Dist: optuna.*; extra == 'extra'$", metadata, re.MULTILINE)
    assert metadata.count("License-File: ") == len([ROOT / "LICENSE", *ROOT.glob("assets/*/LICENSE")])


@pytest.mark.slow
def test_the_wheel_from_the_source_archive_is_the_same(wheel: Path, tmp_path: Path) -> None:
    build = "import sys; from hatchling.build import build_sdist; print(build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as file:
        assert {"README.md", "tests", "docs", "Makefile"} <= {name.split("/")[1] for name in file.getnames()}
    subprocess.run([*BUILD, str(tmp_path / "again"), str(archive)], check=True, capture_output=True)
    assert (tmp_path / "again" / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_pip_says_in_a_line_why_an_editable_install_cannot_be(installed: Installed) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(installed.environment), "install", "--no-build-isolation"]
    done = subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 1 and "[1 lines of output]\n      error: -e cannot work" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", SCRIPTS)
def test_an_installed_command_says_how_it_is_called(installed: Installed, command: str) -> None:
    done = installed.run(command, "--help")
    said = done.stdout + done.stderr
    assert f"usage: {command} " in said and "python " not in said and "Traceback" not in said


EVERY_MODULE = """
import importlib, pkgutil, sys, image_scores
assert "torch" not in sys.modules  # which comes with Scorer
for module in pkgutil.walk_packages(image_scores.__path__, "image_scores."):
    importlib.import_module(module.name)
print(*sys.modules)
"""


@pytest.mark.slow
def test_nothing_is_installed_that_others_might_call_the_same(installed: Installed) -> None:
    names = sorted(
        {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    )
    code = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert installed.out("python", "-I", "-c", code) == "[]\n"
    loaded = set(installed.out("python", "-I", "-c", EVERY_MODULE).split())
    assert not loaded & set(names) and {f"image_scores.{name}" for name in names} <= loaded


@pytest.mark.slow
def test_an_installed_run_is_the_same_as_one_of_the_checkout(installed, trained, demo_set) -> None:
    checkout = [
        sys.executable,
        str(ROOT / "baseline.py"),
        *data_flags(demo_set),
        *TINY,
        "--output_dir",
        "runs/checkout",
    ]
    subprocess.run(checkout, cwd=installed.folder, check=True, capture_output=True)
    one, other = (pd.read_csv(installed.folder / "runs" / name / "predictions.csv") for name in ("tiny", "checkout"))
    pd.testing.assert_frame_equal(one, other)
    page = (installed.folder / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "image-scores-baseline --config runs/tiny/config.json" in page and "baseline.py" not in page
    config = (installed.folder / "runs" / "tiny" / "config.json").read_text(encoding="utf-8")
    assert f'"image_scores": "{VERSION}"' in config and '"git_revision": ""' in config
    assert "image_scores" not in (installed.folder / "runs" / "checkout" / "config.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_scorer_is_there_from_any_folder(installed, trained, demo_set) -> None:
    image = sorted(demo_set[1].iterdir())[0]
    code = (
        "from image_scores import Scorer; from image_scores.serving import scorer; assert Scorer is scorer.Scorer\n"
        f"print(Scorer.load('runs/tiny/best').score([{str(image)!r}], ['a red circle']).to_numpy()[0].tolist())"
    )
    scores = np.array(ast.literal_eval(installed.out("python", "-I", "-c", code)))
    table = installed.out(
        "image-scores-predict", "--checkpoint", "runs/tiny/best", str(image), "--prompt", "a red circle"
    )
    assert np.allclose(scores, [float(value) for value in table.split()[-2:]], atol=1e-4)


@pytest.mark.slow
def test_the_workers_of_an_installed_search_are_installed_ones(installed, demo_set) -> None:
    few = ["--trials", "2", "--workers", "2", "--seeds", "0", "--epochs", "1"]
    tiny = ["--clip_model", "tiny", "--clip_pretrained", "none", "--image_size", "56"]
    said = installed.out("image-scores-search", *data_flags(demo_set), *tiny, *few, "--output_dir", "runs/search")
    assert {"trial 0", "trial 1"} <= {line[:7] for line in said.splitlines()}
    assert "image-scores-baseline --" in said
