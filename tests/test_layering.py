"""The house: which rooms there are, in which order they may use each other, and how large they may become."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What stands further down may import what stands above it, and nothing else of the project. Modules of one room may
# import each other, but not in a circle.
ORDER = (
    *("storage", "cli", "training", "losses", "configs", "sources", "backbones", "models", "inputs", "evaluation"),
    *(
        "guidance",
        "data",
        "multirun",
        "drawing",
        "pages",
        "vqa",
        "regions",
        "branches",
        "answering",
        "finetune",
        "serving",
        "sharing",
        "tuning",
    ),
    *("baseline", "main", "app", "compare", "predict", "protocol", "report", "search"),
)
PROGRAMS = ("app", "baseline", "compare", "main", "predict", "protocol", "report", "search")
# Where an import is limited beyond the order: what these may use of the project, rooms or modules.
ONLY = {
    "storage": set(),
    "cli": {"storage"},
    "training": {"storage"},  # so that another program can train anything by it
    "losses": set(),
    "inputs": {"storage", "training", "backbones"},  # plain arguments, no options, no data set
    "backbones": {"storage"},
    "drawing": {"evaluation.metrics"},
    "pages": {
        "drawing",
        "storage",
        "cli",
        "configs",
        "sources.scores",
        "evaluation",
        "multirun",
    },  # run folders are read through their files alone
    "evaluation.metrics": set(),
    "evaluation.ridge": set(),
    "vqa": {"storage"},
    "regions": {"storage", "training", "backbones", "inputs", "vqa"},
    "branches": set(),
    "answering": {
        *("storage", "cli", "training", "backbones", "inputs", "evaluation.metrics", "evaluation.ridge"),
        *("multirun", "drawing", "pages", "vqa", "regions", "branches"),
    },
    "guidance.presets": {"cli", "configs"},
}
# So that --help, mistakes in flags, and pages answer at once.
FREE_OF_TORCH = (
    *("configs", "answering.configs", "cli.options", "cli.parser", "cli.errors", "cli.memo"),
    *("storage.atomic", "storage.locks", "storage.messages", "storage.plain_files", "storage.json_files"),
    *("storage.tables", "storage.chunks", "storage.image_files"),
    *("training.signals", "guidance.presets", "guidance.advice", "guidance.diagnosis", "guidance.arguments"),
    *("serving.commands", "tuning.arguments", "evaluation.metrics", "evaluation.probes", "multirun.comparison"),
    *(
        "multirun.summaries",
        "sources.demo",
        "sources.labels",
        "sources.scores",
        "sources.examples",
        "drawing.figures",
        "pages.report",
        "report",
        "compare",
    ),
)
# The standard library alone.
BARE = ("configs", "answering.configs", "guidance.arguments", "serving.commands", "tuning.arguments")
MOST_AT_THE_TOP, MOST_IN_A_ROOM = 12, 10
LONGEST_FILE = 660  # the options, which are one idea; all others stay below 600
LONGEST = 60  # lines of a function, docstring included
LONGEST_RUN = 80  # lines of baseline.run and main.run, the visible paths
# Where "cuda" is spelt, beside the choices of --device.
KNOWS_CUDA = {("training.devices", "start_runtime")}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_names() -> list[str]:
    """Dotted names of all modules of the project but its tests, tools and benchmarks."""
    rooms = [path.parent.name for path in sorted(ROOT.glob("*/__init__.py"))]
    inside = [f"{room}.{path.stem}" for room in rooms for path in sorted((ROOT / room).glob("[!_]*.py"))]
    return [path.stem for path in sorted(ROOT.glob("*.py"))] + inside


MODULES = module_names()
ROOMS = sorted({name.partition(".")[0] for name in MODULES if "." in name})


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def tree(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imported(code: ast.AST) -> set[str]:
    """Dotted names of every import, wherever it stands: in functions and under `if` too."""
    found = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {"."} if node.level else {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                found.add(str(ast.literal_eval(node.args[0])))
    return found


def ours(names: set[str]) -> set[str]:
    """Those of imported names that are modules of the project, without what is imported from them."""
    found = set()
    for name in names:
        known = [module for module in MODULES if name == module or name.startswith(f"{module}.")]
        found |= {max(known, key=len)} if known else {name} & {"tests", "tools", "bench", "conftest", "."}
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


def used_by(module: str) -> set[str]:
    """The modules of the project that one imports."""
    return ours(imported(tree(module)))


def test_every_room_has_its_place_in_the_order():
    assert {room_of(module) for module in MODULES} == set(ORDER)
    assert set(PROGRAMS) < set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    own = ORDER.index(room_of(module))
    others = {name for name in used_by(module) if room_of(name) != room_of(module)}
    assert {name for name in others if room_of(name) not in ORDER[:own]} == set()


@pytest.mark.parametrize("place", ONLY)
def test_a_place_uses_of_the_project_only_what_it_may(place):
    inside = [module for module in MODULES if module == place or room_of(module) == place]
    assert inside
    used = {name for module in inside for name in used_by(module) if name != place and room_of(name) != place}
    assert {name for name in used if not {name, room_of(name)} & ONLY[place]} == set()


def test_only_what_trains_is_used_by_other_programs():
    used = {name for module in MODULES for name in used_by(module)}
    assert used & set(PROGRAMS) == {"baseline", "main"}


def test_no_modules_import_each_other_in_a_circle():
    left = {module: used_by(module) for module in MODULES}
    while free := [module for module, used in left.items() if not used & set(left)]:
        for module in free:
            del left[module]
    assert left == {}


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
    assert imported(ast.parse(code)) == {"a.b", "d", "e.f.g", "h", "i.j", "l", "m.n", "."}


@pytest.mark.parametrize("module", BARE)
def test_what_must_answer_at_once_needs_the_standard_library_alone(module):
    needed, todo = set(), {module}
    while todo:
        needed |= todo
        todo = {name for done in todo for name in used_by(done)} - needed

    outside = {name.partition(".")[0] for done in needed for name in imported(tree(done))}
    assert outside - sys.stdlib_module_names - {room_of(name) for name in MODULES} == set()


def test_rooms_and_files_are_small():
    sizes = {module: len(path_of(module).read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert {module: size for module, size in sizes.items() if size > LONGEST_FILE} == {}
    assert sum("." not in module for module in MODULES) <= MOST_AT_THE_TOP
    assert {room: n for room in ROOMS if (n := sum(room_of(m) == room for m in MODULES)) > MOST_IN_A_ROOM} == {}


def test_no_module_is_a_drawer_for_anything():
    words = {word for module in MODULES for word in module.lower().split(".")}
    assert not words & {"utils", "util", "helpers", "helper", "common", "misc", "base", "core"}


def test_rooms_export_nothing_but_their_docstring():
    """Which says in a few lines what the room is for, what comes in and what goes out."""
    for room in ROOMS:
        code = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
        text = ast.get_docstring(code) or ""
        assert len(code.body) == 1 and "In: " in text and "Out: " in text, room


def test_cuda_is_spelt_in_one_function_and_in_the_choices_of_the_flags():
    places = []
    for module in MODULES:
        code = tree(module)
        prose = docstrings(code)
        owner = {id(node): name for name, function in functions(code) for node in ast.walk(function)}
        for node in ast.walk(code):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                place = (module, owner.get(id(node), ""))
                if "cuda" in node.value.lower() and place not in KNOWS_CUDA and not module.endswith("configs"):
                    places.append(f"{module}:{node.lineno}")
    assert places == []
    assert all(name in dict(functions(tree(module))) for module, name in KNOWS_CUDA)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "training.devices"])
def test_only_one_module_asks_torch_about_gpus(module):
    attributes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)]
    assert [f"line {node.lineno}" for node in attributes if node.attr == "cuda"] == []


def test_functions_are_short():
    limits = {("baseline", "run"): LONGEST_RUN, ("main", "run"): LONGEST_RUN}
    offenders = []
    for module in MODULES:
        for name, function in functions(tree(module)):
            assert function.end_lineno is not None
            lines = function.end_lineno - function.lineno + 1
            if lines > limits.get((module, name), LONGEST):
                offenders.append(f"{module}.{name}: {lines} lines")
    assert offenders == []


def test_everything_public_says_what_it_is():
    silent = []
    for module in MODULES:
        code = tree(module)
        public = [
            node for node in code.body if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        ]
        silent += [f"{module}.{node.name}" for node in public if not ast.get_docstring(node)]
        silent += [] if ast.get_docstring(code) else [module]
    assert silent == []


def test_each_module_has_a_docstring_of_its_own():
    texts = [ast.get_docstring(tree(module)) for module in MODULES]
    assert len(set(texts)) == len(texts)


PROBE = """
import importlib, json, logging, os, random, sys

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
        importlib.import_module(name)
    before = state()
    for name in ours:
        importlib.import_module(name)
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
    own = {*sys.stdlib_module_names, *(room_of(module) for module in MODULES)}
    return sorted(name for name in found if name.partition(".")[0] not in own)


def test_importing_every_module_does_nothing_else(tmp_path):
    """In a fresh process: no argument is read, no generator drawn from, no file made, nothing printed."""
    cwd, answer = tmp_path / "cwd", tmp_path / "answer.json"
    cwd.mkdir()
    rest = [module for module in MODULES if module not in FREE_OF_TORCH]
    steps = {"bare": list(BARE), "free of torch": list(FREE_OF_TORCH), "all": rest}
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
    assert found["bare"] == []
    assert not {"torch", "open_clip", "transformers"} & set(found["free of torch"])
    assert {"torch", "open_clip"} <= set(found["all"])
    assert (found["gpu started"], found["log handlers"]) == (False, [])
    assert found["argv"] == ["probe", "--no_such_flag", "-h"]
