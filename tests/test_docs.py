"""Every command in the README and the docs is understood as it stands there, and is run on small data and models."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import hub_server
import pandas as pd
import pytest
from conftest import ROOT

import baseline
from answering import configs as vqa_configs
from cli.parser import flag_words
from configs import OPTIONS, TrainingConfig
from guidance import arguments, presets
from serving import commands
from sources import demo
from tuning import arguments as tuning_arguments

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
PROGRAMS = ("python", "torchrun", "make", "pip", "tensorboard", "source", "scripts/")
OF_OTHERS = {  # flags
    *("--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--logdir"),
    *("--signal", "--array", "--gpus", "--cpus", "--time"),
}
SMALL = "--image_size 56 --batch_size 16 --cache_dir {cache} --overwrite"
TINY = "--clip_model tiny --clip_pretrained assets"


def blocks(text: str) -> Iterator[list[str]]:
    """Indented blocks of a page, as lists of lines without the indentation."""
    for is_code, lines in itertools.groupby(text.splitlines(), key=lambda line: line.startswith("    ")):
        if is_code:
            yield [line[4:] for line in lines]


def commands_of(page: Path) -> list[str]:
    """The commands of a page, a line each."""
    found = []
    for lines in blocks(page.read_text(encoding="utf-8")):
        whole = "\n".join(lines).replace("\\\n", " ")
        plain = [re.sub(r"^srun |\s+# .*", "", line) for line in whole.splitlines()]
        said = [line for line in plain if line.startswith(PROGRAMS)]
        found += [" ".join(line.split()) for line in said]
    return found


def spaces() -> list[str]:
    """The space files that the docs show."""
    text = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    return ["\n".join(lines) for lines in blocks(text) if lines[0].startswith('{"lr"')]


ALL = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
SETS_UP = ("make", "pip", "source")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with as much of the files that commands name as is looked at before anything is computed."""
    place = tmp_path_factory.mktemp("named")
    for run in ("a", "b", "demo"):
        best = place / "runs" / run / "best"
        best.mkdir(parents=True)
        (best / "scorer.json").write_text("{}")
        (best.parent / "config.json").write_text(json.dumps(TrainingConfig().to_json()))
    (place / "space.json").write_text(spaces()[-1], encoding="utf-8")
    (place / "passwords").write_text("me:s3cret\n", encoding="utf-8")
    return place


def check_words(script: str, words: list[str]) -> None:
    """Raise ValueError, or fail, unless a program takes these words."""
    words = [word for word in words if word != "..."]
    if script == "baseline.py":
        arguments.parse_args(words)
    elif script == "search.py":
        tuning_arguments.parse_search_args(words)
    elif script == "predict.py":
        commands.parse_predict_args(words)
    elif script == "app.py":
        commands.parse_app_args(words)
    elif script == "main.py":
        vqa_configs.parse_args(words)
    elif script == "data.py":
        assert words[0] == "describe"
        arguments.parse_args(words[1:])
    elif script == "tools/compare_options.py":
        own, flags = words[: words.index("--")], words[words.index("--") + 1 :]
        sides = [word.partition("=")[2] for word in own if word.startswith("--with_flags=")]
        assert sides
        for side in ("", *sides):
            arguments.parse_args([*flags, *shlex.split(side)])
    else:
        assert script in ("report.py", "compare.py") and (ROOT / script).is_file()
        assert words and not any(word.startswith("-") for word in words)  # run folders


@pytest.mark.parametrize("command", [command for command in ALL if not command.startswith(SETS_UP)])
def test_a_command_in_the_docs_is_understood(command: str, named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(named)
    program, script, *words = shlex.split(command)
    if program == "tensorboard":
        assert (script, len(words)) == ("--logdir", 1)
        return
    if program == "torchrun":
        while script.startswith("--"):
            assert script.partition("=")[0] in OF_OTHERS
            script, *words = words
    else:
        assert program == "python", "a kind of command that this test does not know yet"
    check_words(script, words)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands name: data sets, images, tables and finished runs."""
    place = tmp_path_factory.mktemp("world")
    for folder, seed in (("data", 0), ("AGIQA-3K", 0), ("AIGCIQA2023", 1), ("KonIQ-10k", 2)):
        csv, images = demo.write_demo_set(place / folder / "drawn", num_prompts=8, seed=seed)
        table = pd.read_csv(csv)
        images.rename(place / folder / "images")
        if folder == "AGIQA-3K":
            table = table.assign(std_quality=0.5, std_align=0.5)
        if folder == "AIGCIQA2023":
            names = {"mos_quality": "quality_mos", "mos_align": "correspondence_mos"}
            table = table.rename(columns=names).assign(authenticity_mos=50.0, quality_std=1.0, correspondence_std=1.0)
        name = "data.csv"
        if folder == "KonIQ-10k":
            table = table.rename(columns={"name": "image_name", "mos_quality": "MOS"}).assign(SD=0.5)
            name = "koniq10k_scores_and_distributions.csv"
        table.to_csv(place / folder / name, index=False)
    shutil.copytree(place / "AIGCIQA2023" / "images", place / "images")
    unseen = pd.read_csv(place / "AIGCIQA2023" / "data.csv")
    scores = {"quality_mos": "mos_quality", "correspondence_mos": "mos_align"}
    unseen.rename(columns=scores)[["name", "prompt", "mos_quality", "mos_align"]].to_csv(place / "mine.csv")
    unseen[["name", "prompt"]].to_csv(place / "prompts.csv", index=False)
    for name, image in zip("ab", sorted((place / "images").iterdir()), strict=False):
        shutil.copy(image, place / f"{name}.png")
    (place / "space.json").write_text(spaces()[-1], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for folder, lr in (("runs/demo", "3e-4"), ("runs/a", "1e-3"), ("runs/b", "3e-3")):
            words = f"--dataset agiqa-3k --data_root AGIQA-3K {TINY} --freeze_clip --epochs 1 --lr {lr}"
            baseline.main([*words.split(), *SMALL.format(cache=place / "cache").split(), "--output_dir", folder])
    return place


def fitted(words: list[str], world: Path) -> list[str]:
    """The flags of baseline.py, made small: those that are added at the end win."""
    words = [word for word in words if word != "..."]
    if words[:1] == ["--resume"]:  # brings its own options
        return words
    small = SMALL.format(cache=world / "cache").split()
    if "--demo" in words:  # whose hundreds of images take their time
        place = words.index("--demo")
        del words[place : place + (2 if words[place + 1 : place + 2] == ["drawn"] else 1)]
        words = ["--data_csv_path", "data/data.csv", "--image_base_dir", "data/images", *TINY.split(), *words]
    if words[-2:] != ["--preset", "list"]:
        small += [*TINY.split(), "--epochs", "1"]
    if "--data_csv_path" not in words and "--dataset" not in words:
        small += ["--data_csv_path", "data/data.csv", "--image_base_dir", "data/images"]
    if "--resume" in words:
        small.remove("--overwrite")
    if "--repeats" in words:
        small += ["--repeats", "2"]
    return [*words, *small]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        command
        for command in ALL
        if not command.startswith((*SETS_UP, "python main.py"))  # tests/answering runs these
        and not command.endswith("...")
        and "--storage postgresql:" not in command  # tests/tuning/test_postgresql.py has a server
    ],
)
def test_a_command_in_the_docs_works(command: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    program, *words = shlex.split(command)
    if program == "tensorboard":
        checked = [sys.executable, "-m", "tensorboard.main", "--inspect", *words]
        assert subprocess.run(checked, capture_output=True, timeout=120).returncode == 0
        return
    if program == "torchrun":
        several, script, *words = words
        assert several.startswith("--nproc_per_node=")
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*start, str(ROOT / script), *fitted(words, world), "--output_dir", "runs/several"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return
    assert program == "python", "a kind of command that this test cannot run yet"
    script, *words = words
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if script == "app.py":  # which runs until it is stopped, and is driven in a browser by its own tests
        assert list(ROOT.glob("tests/**/test_app.py"))
        assert words[0] == "--checkpoint" and Path(words[1]).is_dir()
    elif script == "tools/compare_options.py":
        own, flags = words[: words.index("--")], words[words.index("--") + 1 :]
        sides = [word for word in own if word.startswith("--with_flags")]
        module.main([sides[0], "--seeds", "1", "2", "--", *fitted(flags, world)])
    elif "me/my-scorer" in " ".join(words):
        with hub_server.served() as hub:
            hub_server.use(hub, world / "hub", monkeypatch)
            module.main(["--checkpoint", "runs/demo/best", "--push_to_hub", "me/my-scorer", "--yes"])
            module.main([*words, "--yes"] if "--push_to_hub" in words else words)
    elif script == "search.py" and "--program" in words:
        monkeypatch.setattr("regions.demo_set.NUM_IMAGES", 32)
        module.main([*words, "--cache_dir", str(world / "small"), "--epochs", "1", "--trials", "2", "--seeds", "0"])
    elif script == "search.py":
        small = shlex.join(fitted(words, world))
        small = small.replace(" --overwrite", "").replace(" --batch_size 16", "").split()  # which may be searched
        module.main([*small, "--trials", "2", "--seeds", "0"])
    elif script == "baseline.py":
        with pytest.raises(SystemExit, match="0") if "list" in words else nullcontext():
            module.main(fitted(words, world))
    else:
        module.main(with_real_roots(words))


def with_real_roots(words: list[str]) -> list[str]:
    """The same, with the folders of the data sets that are named for letters such as A,B."""
    folders = {"agiqa-3k": "AGIQA-3K", "aigciqa2023": "AIGCIQA2023", "koniq-10k": "KonIQ-10k"}
    if "--data_root" in words:
        names = words[words.index("--dataset") + 1].split(",")
        words[words.index("--data_root") + 1] = ",".join(folders[name] for name in names)
    return words


@pytest.mark.parametrize("command", [command for command in ALL if command.startswith(SETS_UP)])
def test_what_sets_up_names_what_is_there(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "pip":
        assert words[1:] == ["install", "."] or (words[1:3] == ["install", "-r"] and (ROOT / words[3]).is_file())
    else:
        assert words[1].startswith(".venv/")


def test_the_space_files_in_the_docs_can_be_read(tmp_path: Path) -> None:
    assert len(spaces()) == 2
    for number, text in enumerate(spaces()):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        words = ["--space", str(path), "--output_dir", str(tmp_path / "out"), "--demo"]
        found = tuning_arguments.parse_search_args(words).space
        assert found is not None and found["lr"].log


def test_the_python_in_the_readme_runs(demo_set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    small = SMALL.format(cache=tmp_path / "cache").split()
    baseline.main([*paths, *TINY.split(), *small, "--freeze_clip", "--epochs", "1", "--output_dir", "runs/demo"])
    for name, image in zip("ab", sorted(demo_set[1].iterdir()), strict=False):
        shutil.copy(image, f"{name}.png")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next("\n".join(lines) for lines in blocks(text) if lines[0].startswith("from predict"))
    exec(compile(code, "README.md", "exec"), {})
    assert "pred_quality" in capsys.readouterr().out


def test_every_flag_in_the_docs_exists() -> None:
    known = {  # of answer.py, tools/ and bench/
        *("--described", "--with_flags", "--seeds"),
        *("--model", "--num_images", "--cases", "--ours_only", "--before"),
    }
    parsers = (
        *(arguments.build_parser(), tuning_arguments.build_search_parser()),
        *(commands.build_predict_parser(), commands.build_app_parser(), vqa_configs.parser()),
    )
    for parser in parsers:
        known |= set(parser._option_string_actions)
    for page in PAGES:
        flags = set(re.findall(r"(?<![\w-])--[a-z]\w+", page.read_text(encoding="utf-8")))
        assert flags - known - OF_OTHERS == set(), page.name


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(goal), f"{page.name}: {target}"


def test_the_presets_in_the_docs_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    for name, settings in presets.PRESETS.items():
        row = next(line for line in text.splitlines() if line.startswith("| ") and f"`{name}`" in line.split("|")[1])
        assert shlex.split(row.split("|")[3].strip(" `")) == flag_words(settings, OPTIONS, {}), name
