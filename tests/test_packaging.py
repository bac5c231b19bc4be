"""What the code imports, what the requirements ask for and what the constraints pin agree."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import audit

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12")
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "open_clip": "open-clip-torch", "yaml": "pyyaml"}


def read_requirements(name: str) -> dict[str, list[Requirement]]:
    """Requirements by canonical name, those of an included file (-r) with them."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        entry = line.split("#")[0].strip()
        if entry.startswith("-r "):
            found.update(read_requirements(entry.removeprefix("-r ").strip()))
        elif entry:
            requirement = Requirement(entry)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def imported_distributions(path: Path) -> set[str]:
    """Third-party distributions that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    ours = {module.stem for module in (*ROOT.glob("*.py"), *path.parent.glob("*.py"), *ROOT.glob("tests/**/*.py"))}
    ours |= {package.parent.name for package in ROOT.glob("*/__init__.py")} | {"tests", "tools"}
    roots = {name.split(".")[0] for name in names} - ours - set(sys.stdlib_module_names)
    return {canonicalize_name(DISTRIBUTIONS.get(root, root)) for root in roots}


@pytest.mark.parametrize(
    ("places", "requirements"),
    [
        (
            ["*.py", *(f"{package.parent.name}/*.py" for package in ROOT.glob("*/__init__.py"))],
            "requirements-extra.txt",
        ),
        (["bench/*.py"], "requirements.txt"),
        (["tests/**/*.py", "tools/**/*.py"], "requirements-dev.txt"),
    ],
    ids=["programs and rooms", "benchmarks", "tests and tools"],
)
def test_every_import_is_required(places: list[str], requirements: str) -> None:
    asked = read_requirements(requirements).keys()
    paths = [path for place in places for path in ROOT.glob(place)]
    assert paths
    missing = {path.relative_to(ROOT): imported_distributions(path) - asked for path in paths}
    missing = {path: distributions for path, distributions in missing.items() if distributions}
    assert not missing, f"add to {requirements}: {missing}"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_once_within_its_range(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = read_requirements("constraints.txt")
    for name, requirements in read_requirements("requirements-dev.txt").items():
        pinned = [pin for pin in pins.get(name, []) if not pin.marker or pin.marker.evaluate(environment)]
        assert len(pinned) == 1, f"constraints.txt pins {name} {len(pinned)} times on Python {python}"
        for requirement in requirements:
            version = str(pinned[0].specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{requirement} refuses {pinned[0]}"


def test_constraints_are_exact() -> None:
    for pins in read_requirements("constraints.txt").values():
        for pin in pins:
            assert re.fullmatch(r"==[\d.]+(\.post\d+)?", str(pin.specifier)), (
                f"constraints.txt: {pin} is not one release"
            )


def test_continuous_integration_runs_tests_and_lint() -> None:
    script = ROOT / ".ci" / "run"
    commands = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    for target in ("test", "test-slow", "lint", "audit"):
        assert re.search(rf"^(step )?make {target}\b", commands, re.MULTILINE)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def release(name: str, *vulnerabilities: str) -> dict[str, object]:
    """A release as pip-audit's report has it."""
    vulns = [{"id": identifier, "fix_versions": ["2"]} for identifier in vulnerabilities]
    return {"name": name, "version": "1", "vulns": vulns}


UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("releases", "code", "said"),
    [
        ([release("a"), release("b")], 0, "audit: 2 of 2 releases looked up, 0 known vulnerabilities"),
        ([release("a", "V-1"), UNKNOWN], 1, "1 of 2 releases looked up, 1 known vulnerabilities; not: c\na 1: V-1"),
        ([UNKNOWN], 0, "audit skipped: the data on vulnerabilities cannot be reached"),
        ([release("a", "V-0")], 0, "0 known"),
    ],
)
def test_an_audit_fails_for_what_it_finds_and_says_what_it_does_not_know(monkeypatch, releases, code, said) -> None:
    monkeypatch.setitem(audit.KNOWN, "V-0", "nothing here calls it")
    found = audit.verdict({"dependencies": releases})
    assert found[0] == code and said in found[1]


@pytest.mark.parametrize(
    ("stderr", "code", "said"),
    [
        ("...\nrequests.exceptions.ConnectionError: no route", 0, "audit skipped: the data"),
        ("ModuleNotFoundError: No module named pip_audit", 1, "audit failed: ModuleNotFoundError"),
    ],
)
def test_an_audit_without_a_report_is_skipped_aloud_or_fails(monkeypatch, capsys, stderr, code, said) -> None:
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    assert audit.main() == code and capsys.readouterr().out.startswith(said)
