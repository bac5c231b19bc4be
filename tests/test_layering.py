"""The layout of the project as a table, held against the code."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Place:
    """A module's layer, what it may import from the project and, where that is limited, from outside."""

    layer: int
    project: frozenset[str] = frozenset()
    outside: frozenset[str] | None = None  # beside the standard library; None: anything


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYOUT = {
    "reading": Place(-1, outside=names("")),  # below all: options are read from files too
    "configs": Place(0, names("reading"), outside=names("")),  # so that --help answers at once
    "metrics": Place(0, outside=names("numpy scipy")),
    "losses": Place(0, outside=names("torch")),
    "labels": Place(0, outside=names("numpy pandas scipy")),
    "simple_statistics": Place(0, outside=names("torch")),
    "demo": Place(1, names("locking writing"), outside=names("numpy PIL")),
    "tables": Place(1, names("reading"), outside=names("pandas")),
    "sizes": Place(1, names("reading"), outside=names("torch")),
    "backbones": Place(2, names("reading sizes")),
    "models": Place(0, outside=names("numpy open_clip torch")),
    "calibration": Place(0, outside=names("numpy sklearn")),
    "image_files": Place(0, outside=names("numpy PIL")),
    "images": Place(1, names("image_files"), outside=names("numpy PIL torch torchvision")),
    "features": Place(1, names("locking writing"), outside=names("safetensors torch")),
    "locking": Place(0, outside=names("")),
    "kept": Place(1, names("configs"), outside=names("")),
    "scores": Place(0, outside=names("")),
    # None of these knows CLIP, and the engine and checkpoints know nothing of images either.
    "data": Place(2, names("images reading scores"), outside=names("numpy pandas sklearn")),
    "commands": Place(1, names("configs"), outside=names("")),
    "advice": Place(1, names("configs"), outside=names("")),
    "diagnosis": Place(2, names("advice configs scores"), outside=names("")),
    "tracking": Place(0, outside=names("mlflow torch wandb")),
    "compare": Place(2, names("configs metrics reading scores tables"), outside=names("numpy pandas")),
    "inputs": Place(2, names("features images"), outside=names("numpy pandas torch")),
    "engine": Place(1, names("metrics"), outside=names("numpy torch")),
    "writing": Place(0, outside=names("")),
    "signals": Place(0, outside=names("")),
    "checkpoint": Place(
        2, names("configs locking reading tables writing"), outside=names("numpy pandas safetensors torch")
    ),
    "resuming": Place(3, names("checkpoint engine signals"), outside=names("numpy torch")),
    "parts": Place(3, names("checkpoint reading tables writing"), outside=names("pandas")),
    "described": Place(3, names("backbones checkpoint compare configs models sizes"), outside=names("")),
    "caching": Place(
        3, names("engine features images inputs models simple_statistics"), outside=names("numpy torch tqdm")
    ),
    "sources": Place(3, names("configs data demo images labels reading tables"), outside=names("pandas")),
    "reporting": Place(3, names("calibration data metrics scores"), outside=names("numpy pandas")),
    "describe": Place(4, names("configs data scores sources"), outside=names("numpy pandas")),
    "feeding": Place(
        4,
        names("backbones caching checkpoint configs data engine features images inputs kept models tables"),
        outside=names("numpy pandas torch"),
    ),
    "starting": Place(
        5,
        names("backbones checkpoint configs data described evaluation feeding kept models reporting"),
        outside=names("numpy torch"),
    ),
    "protocol": Place(
        4,
        names("checkpoint compare configs data engine metrics reading reporting scores signals writing"),
        outside=names("numpy pandas"),
    ),
    "figures": Place(1, names("metrics"), outside=names("matplotlib numpy")),
    "report": Place(
        3,
        names("compare configs figures image_files metrics reading scores tables writing"),
        outside=names("jinja2 matplotlib numpy pandas"),
    ),
    "evaluation": Place(
        4, names("checkpoint data images labels metrics reading reporting scores tables"), outside=names("numpy pandas")
    ),
}
LAYOUT |= {
    "baseline": Place(6, frozenset(LAYOUT)),
    "predict": Place(
        5,
        names(
            "backbones checkpoint commands configs data described engine evaluation images inputs models parts "
            "image_files reporting scores signals"
        ),
    ),
}
LAYOUT |= {
    "space": Place(1, names("configs reading"), outside=names("")),  # so that search.py --help answers at once
    "sensitivity": Place(2, names("space"), outside=names("matplotlib numpy optuna pandas sklearn")),
    "search": Place(
        7,
        names(
            "baseline checkpoint compare configs engine kept locking protocol reading sensitivity signals sources "
            "space starting writing"
        ),
        outside=names("numpy optuna pandas sqlalchemy torch"),
    ),
    "explain": Place(6, names("images predict reporting scores"), outside=names("numpy pandas PIL")),
    "app": Place(
        7,
        names(
            "checkpoint commands configs data explain image_files images predict reading reporting scores signals "
            "tables"
        ),
    ),
}
HANDS_OVER = {("data", "describe")}  # what a file's last lines may call, being the name of a program
FREE_OF_TORCH = [
    "reading",
    "tables",
    "configs",
    "scores",
    "writing",
    "signals",
    "locking",
    "commands",
    "advice",
    "diagnosis",
    "metrics",
    "demo",
    "calibration",
    "figures",
    "image_files",
    "report",
]
LONGEST = 60  # lines of a function, docstring included
LONGEST_RUN = 120  # lines of baseline.run, the one visible path
KNOWS_CUDA = {("engine", "start_runtime")}  # beside the choices of --device, which are in configs

Function = ast.FunctionDef | ast.AsyncFunctionDef


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imported(code: ast.AST) -> set[str]:
    """The top-level names of every import, wherever it stands: in functions and under `if` too."""
    found = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                found.add(str(ast.literal_eval(node.args[0])).partition(".")[0])
    return found


def functions(code: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its dotted name, those in classes and in functions too."""
    for node in ast.iter_child_nodes(code):
        if isinstance(node, Function):
            yield f"{inside}{node.name}", node
        name = f"{inside}{node.name}." if isinstance(node, Function | ast.ClassDef) else inside
        yield from functions(node, name)


def docstrings(code: ast.AST) -> set[int]:
    """Identities of the constants that are docstrings."""
    holders = [node for node in ast.walk(code) if isinstance(node, Function | ast.ClassDef | ast.Module)]
    first = [node.body[0] for node in holders if ast.get_docstring(node, clean=False) is not None]
    return {id(statement.value) for statement in first if isinstance(statement, ast.Expr)}


def test_every_module_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(LAYOUT)


def test_the_table_lets_a_module_import_lower_layers_only():
    for module, place in LAYOUT.items():
        assert all(LAYOUT[name].layer < place.layer for name in place.project), module


@pytest.mark.parametrize("module", LAYOUT)
def test_a_module_imports_from_the_project_what_its_place_allows(module):
    ours = {path.stem for path in ROOT.glob("*.py")} | {"tests", "tools", "conftest", "."}
    handed = {name for caller, name in HANDS_OVER if caller == module}
    assert (imported(tree(module)) & ours) - handed <= LAYOUT[module].project


@pytest.mark.parametrize(("caller", "name"), HANDS_OVER)
def test_a_file_hands_over_in_its_last_lines_only(caller, name):
    code = tree(caller)
    *body, last = code.body
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    assert name in imported(last) and name not in imported(ast.Module(body, []))


@pytest.mark.parametrize("module", [module for module, place in LAYOUT.items() if place.outside is not None])
def test_a_module_imports_from_outside_what_its_place_allows(module):
    assert imported(tree(module)) - sys.stdlib_module_names - set(LAYOUT) <= LAYOUT[module].outside


def test_imports_are_found_wherever_they_stand():
    code = """
import a.b as c, d
from e.f import g
if __name__ == "__main__":
    import h
def run():
    from i import j
    class K:
        import l
    __import__("m.n")
from . import o
"""
    assert imported(ast.parse(code)) == {"a", "d", "e", "h", "i", "l", "m", "."}


def test_no_module_is_a_drawer_for_anything():
    stems = {path.stem.lower() for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not stems & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_cuda_is_spelt_in_one_function_and_in_the_choices_of_the_flags():
    places = []
    for module in LAYOUT:
        code = tree(module)
        prose = docstrings(code)
        owner = {id(node): name for name, function in functions(code) for node in ast.walk(function)}
        for node in ast.walk(code):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                place = (module, owner.get(id(node), ""))
                if "cuda" in node.value.lower() and place not in KNOWS_CUDA and module != "configs":
                    places.append(f"{module}.py:{node.lineno}")
    assert places == []
    assert all(name in dict(functions(tree(module))) for module, name in KNOWS_CUDA)


@pytest.mark.parametrize("module", [module for module in LAYOUT if module != "engine"])
def test_only_the_engine_asks_torch_about_gpus(module):
    attributes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)]
    assert [f"line {node.lineno}" for node in attributes if node.attr == "cuda"] == []


def test_functions_are_short():
    limits = {("baseline", "run"): LONGEST_RUN}
    offenders = []
    for module in LAYOUT:
        for name, function in functions(tree(module)):
            assert function.end_lineno is not None
            lines = function.end_lineno - function.lineno + 1
            if lines > limits.get((module, name), LONGEST):
                offenders.append(f"{module}.{name}: {lines} lines")
    assert offenders == []


def test_everything_public_says_what_it_is():
    silent = []
    for module in LAYOUT:
        code = tree(module)
        public = [
            node for node in code.body if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        ]
        silent += [f"{module}.{node.name}" for node in public if not ast.get_docstring(node)]
        silent += [] if ast.get_docstring(code) else [module]
    assert silent == []


PROBE = """
import json, logging, os, random, sys

sys.argv = ["probe", "--no_such_flag", "-h"]
found = {"changed": []}


def state():
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    parts = {"random": random.getstate()}
    if numpy:
        parts["numpy"] = [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()]
    if torch:
        parts["torch"] = torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.is_grad_enabled()
    return {name: repr(part) for name, part in parts.items()}


# Other people's modules come first: what they do when imported is not ours to mend.
for step, (outside, ours) in json.loads(os.environ["STEPS"]).items():
    for name in outside:
        __import__(name)
    before = state()
    for name in ours:
        __import__(name)
    after = state()
    found["changed"] += [f"{part} by {ours}" for part in before if before[part] != after[part]]
    found[step] = sorted({"torch", "numpy", "pandas", "open_clip", "transformers"} & set(sys.modules))

found["gpu started"] = sys.modules["torch"].cuda.is_initialized()
found["log handlers"] = [str(handler) for handler in logging.getLogger().handlers]
found["argv"] = sys.argv
with open(os.environ["ANSWER"], "w") as file:
    json.dump(found, file)
"""


def outside_modules(modules: list[str]) -> list[str]:
    """What these modules import, when they are imported, from beyond the standard library and the project."""
    found = set()
    for node in (node for module in modules for node in tree(module).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return sorted(name for name in found if name.partition(".")[0] not in {*sys.stdlib_module_names, *LAYOUT})


def test_importing_every_module_does_nothing_else(tmp_path):
    """In a fresh process: no argument is read, no generator drawn from, no file made, nothing printed."""
    cwd, answer = tmp_path / "cwd", tmp_path / "answer.json"
    cwd.mkdir()
    rest = [module for module in LAYOUT if module not in FREE_OF_TORCH]
    steps = {"configs": ["configs"], "free of torch": FREE_OF_TORCH, "all": rest}
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "STEPS": json.dumps({name: [outside_modules(ours), ours] for name, ours in steps.items()}),
        "ANSWER": str(answer),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(cwd.iterdir()) == []
    found = json.loads(answer.read_text())
    assert found["changed"] == []
    assert found["configs"] == []
    assert not {"torch", "open_clip", "transformers"} & set(found["free of torch"])
    assert {"torch", "open_clip"} <= set(found["all"])
    assert (found["gpu started"], found["log handlers"]) == (False, [])
    assert found["argv"] == ["probe", "--no_such_flag", "-h"]
