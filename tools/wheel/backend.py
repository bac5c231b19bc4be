"""Builds the wheel by hatchling: all code in one package, so that nothing called `data` or `models` is installed.

In a checkout the rooms and the files at the top are packages and modules of their own. In the wheel they lie in
`image_scores`; what they import of each other is written so, line by line, and so are the commands that they name.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from hatchling.build import (
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

__all__ = ["build_sdist", "build_wheel", "get_requires_for_build_sdist", "get_requires_for_build_wheel"]

PACKAGE = "image_scores"
COMMAND = "image-scores"
EXTRA = "requirements-extra.txt"
OWN_FILES = Path(__file__).with_name("package")  # what the package has beside the code of the checkout


def build_editable(*args: object) -> NoReturn:
    """Refuse an editable install: it would show the checkout as it is, where no package has that name."""
    raise SystemExit(
        f"error: -e cannot work: {PACKAGE} is made when the wheel is built. "
        "pip install . installs a copy; a checkout needs no install: python baseline.py"
    )


get_requires_for_build_editable = build_editable  # which is asked first, before anything is downloaded


class Requirements(MetadataHookInterface):
    """Tells hatchling what to require: what the requirements files do, but for what only tests need."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add to the metadata."""
        needed, extra = (requirements(Path(self.root, name)) for name in ("requirements.txt", EXTRA))
        metadata["dependencies"] = [line for line in needed if not line.startswith("pytest")]
        metadata["optional-dependencies"] = {"extra": extra}


def requirements(path: Path) -> list[str]:
    """The requirements in a file, without those that it includes."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


class Package(BuildHookInterface[Any]):
    """Gives hatchling the package to put into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make it in a temporary folder."""
        self.temporary = tempfile.TemporaryDirectory()
        folder = Path(self.temporary.name, PACKAGE)
        write_package(Path(self.root), folder)
        build_data["force_include"][str(folder)] = PACKAGE

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        self.temporary.cleanup()


def write_package(root: Path, folder: Path) -> None:
    """Write the code of a checkout, and the files that come with it, as the package `folder`, which it makes."""
    modules = [path.stem for path in root.glob("*.py")]
    rooms = [path.parent.name for path in root.glob("*/__init__.py")]
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(OWN_FILES, folder, ignore=without_caches)
    for name in modules:
        shutil.copy(root / f"{name}.py", folder)
    for name in (*rooms, "assets"):
        shutil.copytree(root / name, folder / name, ignore=without_caches)
    for path in folder.rglob("*.py"):
        path.write_bytes(with_commands(with_package(path.read_bytes(), {*modules, *rooms}), modules))
    imports = re.compile(rf"\bfrom ({'|'.join(modules)}) import\b".encode())
    for path in folder.rglob("*.md.j2"):  # which show code, too, but are none
        code = imports.sub(rf"from {PACKAGE}.\1 import".encode(), path.read_bytes())
        path.write_bytes(with_commands(code, modules))


def with_commands(code: bytes, modules: Collection[str]) -> bytes:
    """The code, saying how installed commands are run, where it says how scripts are, and how to install the rest."""
    code = re.sub(rf"\bpython ({'|'.join(modules)})\.py\b".encode(), rf"{COMMAND}-\1".encode(), code)
    return code.replace(f"pip install -r {EXTRA}".encode(), f"pip install '{COMMAND}[extra]'".encode())


def with_package(code: bytes, own: Collection[str]) -> bytes:
    """The code, importing `own` modules and packages from PACKAGE; every line stays where it is."""
    starts = [0]
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    statements = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(statements, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        assert node.end_lineno and node.end_col_offset
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        code = code[:start] + rewritten(node, code[start:end], own) + code[end:]
    return code


def rewritten(node: ast.Import | ast.ImportFrom, text: bytes, own: Collection[str]) -> bytes:
    """The text of a statement, importing from PACKAGE what is `own`."""
    if isinstance(node, ast.ImportFrom):
        is_own = not node.level and str(node.module).partition(".")[0] in own
        return re.sub(rb"^from[\s\\]+", rb"\g<0>" + f"{PACKAGE}.".encode(), text) if is_own else text
    if not any(alias.name.partition(".")[0] in own for alias in node.names):
        return text
    return "; ".join(imported(alias, own) for alias in node.names).encode() + b" \\\n" * text.count(b"\n")


def imported(alias: ast.alias, own: Collection[str]) -> str:
    """What does in the wheel what `import alias` does in a checkout."""
    top, _, inside = alias.name.partition(".")
    renamed = f" as {alias.asname}" if alias.asname else ""
    if top not in own:
        return f"import {alias.name}{renamed}"
    if not inside:
        return f"from {PACKAGE} import {top}{renamed}"
    return f"import {PACKAGE}.{alias.name}" + (renamed or f"; from {PACKAGE} import {top}")
