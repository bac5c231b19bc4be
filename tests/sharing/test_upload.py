"""`sharing/upload.py` and `card.py`: what is sent to the hub is shown before, scores the same, and tells no secrets."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import yaml
from conftest import ROOT
from hub_server import Hub
from tiny_run import finished_run, load, loaded

import predict
from pages.run_data import read_run
from serving.scorer import Scorer
from sharing import card, upload
from training import checkpoints

NAME = "me/scorer"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub where "me" is logged in."""
    with hub_server.served() as found:
        hub_server.use(found, tmp_path / "home", monkeypatch)
        yield found


@pytest.fixture
def run(demo_set) -> Path:
    """A finished run that nobody changes."""
    return finished_run(demo_set)


@pytest.fixture
def push(run, monkeypatch) -> Callable[..., None]:
    """A function that runs predict.py --push_to_hub with more flags, the scorer being loaded before."""
    monkeypatch.setattr(Scorer, "load", lambda place, **how: loaded(place))

    def call(*flags: str, name: str = NAME) -> None:
        predict.main(["--checkpoint", str(run / "best"), "--push_to_hub", name, *flags])

    return call


@pytest.fixture
def small(monkeypatch) -> None:
    """Files of a few bytes in the place of a checkpoint's."""

    def write(place: Path, folder: Path) -> None:
        folder.mkdir()
        for name in ("scorer.json", "model.safetensors"):
            (folder / name).write_bytes(b"{}")

    monkeypatch.setattr(upload, "write_public", write)


@pytest.fixture
def refused(push, small, capsys) -> Callable[..., str]:
    """A function that expects a push to be refused in one line, and returns it."""

    def check(*flags: str, **how: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            push(*flags, **how)
        message = capsys.readouterr().err.splitlines()[-1]  # below what the library's progress bars leave
        assert caught.value.code == 2
        assert message.startswith("error: --push_to_hub"), message
        return message

    return check


def metadata_of(text: str) -> dict[str, Any]:
    """The YAML at the top of a card."""
    return yaml.safe_load(text.split("---\n")[1])


def test_a_scorer_that_was_sent_comes_back_to_the_bit_privately_and_without_paths(hub, run, demo_set, push, capsys):
    push("--yes", "--license", "mit")
    said = capsys.readouterr().out
    sent = hub.repos[NAME]
    assert sent.private and set(sent.files) == {".gitattributes", "README.md", "model.safetensors", "scorer.json"}
    text = sent.files["README.md"].decode()
    assert all(line.strip() in said for line in text.splitlines())
    for name in ("README.md", "model.safetensors", "scorer.json"):
        assert f"file      {name}, {len(sent.files[name]):,} bytes" in said
        assert str(run.parent).encode() not in sent.files[name]
        assert min(demo_set[1].iterdir()).stem.encode() not in sent.files[name]
    assert said.index("new, private; as me") < said.index(f"sent: {hub.url}/{NAME}")

    images = sorted(demo_set[1].iterdir())[:3]
    found = load(f"hf-hub:{NAME}", device="cpu").score(images, "a red circle")
    assert found.equals(loaded(run / "best").score(images, "a red circle"))


def test_a_card_says_what_the_run_has_measured(hub, run, push, small):
    push("--yes", "--license", "cc-by-4.0")
    text = hub.repos[NAME].files["README.md"].decode()
    results = json.loads((run / "results.json").read_text())
    found = metadata_of(text)
    assert (found["license"], found["library_name"], found["pipeline_tag"]) == (
        *("cc-by-4.0", "pytorch", "image-classification"),
    )
    assert "datasets" not in found  # a table of one's own
    ((model, part),) = [(model, part) for model in found["model-index"] for part in model["results"]]
    assert (model["name"], part["dataset"]["name"], part["dataset"]["split"]) == ("scorer", "data.csv", "test")
    measured = {metric["name"]: metric for metric in part["metrics"]}
    for task, title in (("q", "quality"), ("c", "consistency")):
        for key, name in (("srocc", "SROCC"), ("plcc", "PLCC")):
            metric = measured.pop(f"{name} of {title}")
            assert metric["value"] == results["test"][f"{key}_{task}"]
            assert metric["args"]["interval_95"] == results["certainty"][task]["intervals"][key]
    assert not measured
    for words in ("| `pred_quality` | quality | ", "ridge probe", "split by prompt", "`cc-by-4.0`, as stated by", NAME):
        assert words in text


def test_a_card_of_a_checkpoint_alone_says_that_nothing_is_known(hub, run, push, tmp_path):
    scorer = loaded(run / "best")
    text = card.card_text(scorer, None, name="scorer", repository=NAME)
    assert not {"license", "metrics", "datasets", "model-index"} & set(metadata_of(text))
    assert "Not known: no `results.json`" in text and "None was stated." in text and "onnx" not in text.lower()


def test_a_card_names_known_data_sets_and_the_fold_that_was_measured(run):
    found = read_run(run)
    found.options.update(dataset="agiqa-3k,csv,koniq-10k")
    found.results.update(test={}, certainty={}, sets={})
    said = card.metadata(loaded(run / "best"), found, "x", "", library="pytorch").to_dict()
    assert said["datasets"] == ["agiqa-3k", "koniq-10k"]
    assert {part["dataset"]["split"] for part in said["model-index"][0]["results"]} == {"validation"}
    assert all("args" not in metric for part in said["model-index"][0]["results"] for metric in part["metrics"])


def test_each_of_several_data_sets_has_its_own_measures(run):
    found = read_run(run)
    part = {"test": {"srocc_q": 0.5}, "certainty": {}, "generators": {}}
    found.results.update(sets={"AGIQA-3K": part})
    said = card.metadata(loaded(run / "best"), found, "x", "", library="pytorch").to_dict()
    own = said["model-index"][0]["results"][1]
    assert (own["dataset"]["name"], own["dataset"]["type"]) == ("AGIQA-3K", "agiqa-3k")
    assert [(metric["type"], metric["value"]) for metric in own["metrics"]] == [("spearmanr", 0.5)]


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("ViT-L/14 (openai)", "ViT-L/14 (openai)"),
        ("hf-hub:org/name (its own weights)", "hf-hub:org/name (its own weights)"),
        ("org/name (openai)", "org/name (openai)"),
        ("local-dir:/home/x/clip (its own weights)", "clip (its own weights)"),
        ("local-dir:clip", "clip"),
        ("ViT-B-32 (/home/x/weights.pt)", "ViT-B-32 (weights.pt)"),
        ("/home/x/runs/a", "a"),
        ("../secret/a", "a"),
        ("deep/er/runs/a", "a"),
        ("tests/sharing", "sharing"),  # which is there
    ],
)
def test_paths_of_this_machine_keep_their_last_part_alone(text, public, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert card.public_source(text) == public


def test_a_description_and_a_tokenizer_go_without_paths(run, tmp_path):
    folder = Path(shutil.copytree(run / "best", tmp_path / "best"))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    state, description = checkpoints.load_weights(folder)[1:]
    description["clip"]["model_cfg"]["text_cfg"]["hf_model_name"] = str(tmp_path / "tower")
    description["source"] = f"local-dir:{tmp_path} (its own weights)"
    own = folder / "tokenizer"
    checkpoints.save_weights(folder, state, description, lambda made: shutil.copytree(own, made / own.name))
    upload.write_public(folder, tmp_path / "out")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(files) == {"model.safetensors", "scorer.json", "tokenizer.json"}
    assert not any(str(tmp_path.parent).encode() in content for content in files.values())
    assert checkpoints.load_weights(tmp_path / "out")[2]["clip"]["model_cfg"]["text_cfg"]["hf_model_name"] == "tower"


def test_nothing_is_sent_before_somebody_agrees(hub, push, refused, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert "nobody is at a terminal to agree to this; nothing was sent; add --yes" in refused()
    for answer in ("no\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", terminal(answer))
        assert "nothing was sent" in refused()
    assert hub.sent == [] and hub.repos == {}
    monkeypatch.setattr("sys.stdin", terminal("Yes\n"))
    push()
    assert "send this? yes or no: " in capsys.readouterr().out and NAME in hub.repos


def terminal(text: str) -> io.StringIO:
    """A terminal at which somebody types this."""
    found = io.StringIO(text)
    found.isatty = lambda: True  # type: ignore[method-assign]
    return found


def test_who_may_see_it_is_said_and_changed_by_public_alone(hub, push, refused, capsys):
    push("--yes")
    push("--yes")
    assert "replacing what is there, private; as me" in capsys.readouterr().out and hub.repos[NAME].private
    push("--yes", "--public")
    assert "which becomes public with all that came before; as me" in capsys.readouterr().out
    assert not hub.repos[NAME].private
    hub.asked.clear()
    assert "everybody sees it; add --public, or choose another name" in refused("--yes")
    assert hub.sent == []
    push("--yes", "--public", name="me/other")
    assert "new, public; as me" in capsys.readouterr().out and not hub.repos["me/other"].private


def test_a_repository_of_something_else_stays_and_one_of_a_scorer_is_replaced(hub, push, refused):
    hub.add(NAME, {"config.json": b"{}"}, private=True)
    assert "holds other things than a scorer; choose a new name" in refused("--yes")
    assert hub.sent == []
    hub.add(NAME, {"scorer.json": b"{}", "tokenizer/vocab.json": b"{}", "notes.txt": b"mine"}, private=True)
    push("--yes")
    assert set(hub.repos[NAME].files) == {
        *(".gitattributes", "README.md", "model.safetensors", "scorer.json", "notes.txt"),
    }


def test_an_upload_that_was_cut_goes_on_where_it_was(hub, push, refused):
    hub.failing = {"/commit/main": 418}
    assert f"{hub.url} answers 418 (out of order)" in refused("--yes")
    assert len(hub.stored) == 1
    hub.failing.clear()
    hub.asked.clear()
    push("--yes")
    assert not any("/stored/" in line for line in hub.sent)
    assert "model.safetensors" in hub.repos[NAME].files


@pytest.mark.parametrize(
    ("token", "name", "flags", "message"),
    [
        ("", NAME, "", "needs a login: hf auth login, or HF_TOKEN with a token that may write"),
        ("hf_nobody", NAME, "", "the login is not accepted: hf auth login --force, or another HF_TOKEN"),
        (hub_server.WRITER, "others/scorer", "", "your login may not do that (You don't have the rights to create"),
        (hub_server.WRITER, "me--/scorer", "", "Repo id must use alphanumeric chars"),
        (hub_server.WRITER, NAME, "--license=gpl", '"license" must be one of'),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(hub, refused, monkeypatch, token, name, flags, message):
    hub_server.log_in(monkeypatch, token)
    assert message in refused("--yes", *flags.split(), name=name)


def test_without_a_network_a_push_is_refused_in_a_line(hub, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (" in refused("--yes")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in refused("--yes")


@pytest.mark.slow
def test_the_programs_send_and_score_as_their_environment_says(run, demo_set, tmp_path):
    image = str(min(demo_set[1].iterdir()))

    def call(*words: str, **more: str) -> str:
        own = (
            hub_server.environment(hub, tmp_path)
            | {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
            | more
        )
        command = [sys.executable, str(ROOT / "predict.py"), *words]
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with hub_server.served() as hub:
        call("--checkpoint", str(run), "--push_to_hub", NAME, "--yes")
        fetched = call("--checkpoint", f"hf-hub:{NAME}", image)
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        assert hub.repos[NAME].private
    assert fetched == call("--checkpoint", str(run), image)
    assert fetched == call("--checkpoint", f"hf-hub:{NAME}", image, HF_HUB_OFFLINE="1")
