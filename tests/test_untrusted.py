"""What somebody else has written runs no code, fetches nothing, takes little memory, and is refused in a line."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import socket
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import pytest
import torch
from conftest import scored_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import baseline
import configs
import predict
from backbones import build, loading, names, weights
from finetune import initial_model
from guidance import arguments
from multirun import comparison, protocol, summaries
from pages import run_data
from serving import answers, scorer
from sources.examples import prompt_keys
from sources.seen import prompts_seen_by, seen_by
from storage import chunks, tables, tensors
from training import checkpoints
from tuning import programs

TINY = ["--clip_model", "tiny", "--clip_pretrained", "none", "--image_size", "56", "--freeze_clip", "--epochs", "1"]
FORMULAS = ("=1+1", "+1", "-1", "@a", "'=1", "plain")


@pytest.fixture(scope="module")
def run(tmp_path_factory, module_dataset) -> Path:
    """The folder of a finished run on images and prompts that begin as formulas do. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("untrusted") / "run"
    baseline.main([*module_dataset, *TINY, "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def module_dataset(tmp_path_factory) -> list[str]:
    """Flags of a data set whose names and prompts begin as formulas do."""
    folder = tmp_path_factory.mktemp("set")
    rows = scored_rows()
    for number, row in enumerate(rows):
        row["name"] = f"{FORMULAS[number % len(FORMULAS)]}-{number}.png"
        row["prompt"] = f"{FORMULAS[number // 3 % len(FORMULAS)]} {row['prompt']}"
        Image.new("RGB", (32, 32), (9 * number, 90, 30)).save(folder / row["name"])
    pd.DataFrame(rows).to_csv(folder / "data.csv", index=False)
    return ["--data_csv_path", str(folder / "data.csv"), "--image_base_dir", str(folder)]


@pytest.fixture
def best(run, tmp_path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(run / "best", tmp_path / "best"))


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """Every other machine that was asked for; nobody is at the keyboard."""
    calls: list[Any] = []

    def refuse(*address: Any, **options: Any) -> Any:
        calls.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    return calls


def scores_in(folder: Path) -> pd.DataFrame:
    """The test scores of a run, as a comparison reads them."""
    return comparison.scores_of(folder, comparison.read_predictions(folder))


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The one line with which a call is refused."""
    message = told(call, *args, **options)
    assert message, "it was not refused"
    return message


def told(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The one line with which a call is refused, "" if it is not."""
    try:
        call(*args, **options)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message and len(message) < 1000
    return message


# -- code


class Evil:
    """What makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def malicious(marker: Path, form: str) -> bytes:
    if form == "pickle":
        return pickle.dumps({"state_dict": Evil(marker)})
    buffer = io.BytesIO()
    torch.save({"state_dict": Evil(marker)}, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


FORMS = ("pickle", "zip", "old torch")


@pytest.fixture(params=FORMS)
def evil(request, tmp_path) -> Any:
    """The bytes of a pickle that would make a file, which in the end is not there."""
    marker = tmp_path / "marker"
    content = malicious(marker, request.param)
    yield content
    assert not marker.exists()


def test_the_pickle_of_these_tests_does_make_its_file(tmp_path):
    for number, form in enumerate(FORMS):
        marker = tmp_path / f"{number}"
        content = malicious(marker, form)
        torch.load(io.BytesIO(content), weights_only=False) if form != "pickle" else pickle.loads(content)
        assert marker.exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "scorer.json", "tokenizer/tokenizer.json", "tokenizer/vocab.json"]
)
def test_a_pickle_in_a_checkpoint_is_refused(best, evil, name):
    (best / name).parent.mkdir(exist_ok=True)
    (best / name).write_bytes(evil)
    assert str(best) in refusal(scorer.Scorer.load, best)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt", ""])
def test_a_pickle_as_weights_is_refused(tmp_path, evil, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(evil)
    assert str(path) in refusal(loading.load_backbone, "ViT-B-32", str(path), image_size=224)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A small CLIP in transformers' form, with its tokenizer being CLIP's own."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8)
    folder = tmp_path_factory.mktemp("hf")
    CLIPModel(config).save_pretrained(folder)
    return folder


IN_FOLDERS = {
    "transformers": [
        *("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"),
        *("preprocessor_config.json", "processor_config.json"),
    ],
    "open_clip": ["open_clip_config.json", "open_clip_model.safetensors", "model.pt", "model.pth", "model.bin"],
}


@pytest.mark.parametrize(("form", "name"), [(form, name) for form, names in IN_FOLDERS.items() for name in names])
def test_a_pickle_in_the_folder_of_a_clip_is_refused(tmp_path, hf_folder, evil, asked, form, name):
    source = hf_folder if form == "transformers" else names.EMBEDDED["tiny"]
    folder = Path(shutil.copytree(source, tmp_path / "clip"))
    if name.endswith(("bin", "pt", "pth")):
        for path in folder.glob("*.safetensors"):
            path.unlink()
    (folder / name).write_bytes(evil)
    refusal(loading.load_backbone, f"local-dir:{folder}", "openai", image_size=32)
    assert asked == []


CODE = "open({marker!r}, 'w')\nclass Own:\n    pass\n"
CALLED_FOR = {
    "auto_map": {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own", "AutoModel": "own.Own"},
    "tokenizer_class": "Own",
    "trust_remote_code": True,
}


def bring_code(folder: Path, marker: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    (folder / "tokenizer_config.json").write_text(json.dumps(CALLED_FOR))


def describe(best: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = best / "scorer.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    state, _ = tensors.read_tensors(best / "model.safetensors")  # whose checksums anybody can compute
    tensors.write_tensors(best / "model.safetensors", state, {"files": checkpoints.digests_of_files(best)})


@pytest.mark.parametrize("asks", [{}, {"tokenizer_kwargs": {"trust_remote_code": True}}])
@pytest.mark.parametrize("name", [{}, {"hf_tokenizer_name": "own"}])
def test_code_beside_a_tokenizer_is_not_run(best, tmp_path, asked, asks, name):
    bring_code(best / "tokenizer", tmp_path / "marker")
    describe(best, lambda found: found["clip"]["model_cfg"]["text_cfg"].update(**asks, **name))
    assert str(best) in refusal(scorer.Scorer.load, best)
    assert not (tmp_path / "marker").exists() and asked == []


def test_code_beside_a_text_tower_is_not_run(best, tmp_path, asked):
    bring_code(best / "tokenizer", tmp_path / "marker")
    (best / "tokenizer" / "config.json").write_text(json.dumps({**CALLED_FOR, "model_type": "own"}))
    describe(best, lambda found: found["clip"]["model_cfg"]["text_cfg"].update(hf_model_name="own"))
    assert "a text tower of type 'own'" in refusal(scorer.Scorer.load, best)
    assert not (tmp_path / "marker").exists() and asked == []


def test_code_in_the_folder_of_a_clip_is_not_run(tmp_path, hf_folder, asked):
    folder = Path(shutil.copytree(hf_folder, tmp_path / "clip"))
    bring_code(folder, tmp_path / "marker")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **CALLED_FOR}))
    refusal(loading.load_backbone, str(folder), "openai", image_size=32)
    assert not (tmp_path / "marker").exists() and asked == []


# -- the network


@pytest.mark.parametrize("name", ["org/tower", "tower", "hf-hub:org/tower", "best/tokenizer", 3])
@pytest.mark.parametrize("key", ["hf_model_name", "hf_tokenizer_name"])
def test_a_description_fetches_nothing(best, asked, monkeypatch, key, name):
    monkeypatch.chdir(best.parent)  # where "best/tokenizer" could be the name of a repository
    describe(best, lambda found: found["clip"]["model_cfg"]["text_cfg"].update({key: name}))
    if key == "hf_model_name":
        assert "no text tower" in refusal(scorer.Scorer.load, Path("best"))
    else:
        scorer.Scorer.load(Path("best"))  # with the tokenizer that was saved, which here is open_clip's own
    assert asked == []


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "timm/resnet18", "local-dir:/", 3])
def test_an_image_tower_from_elsewhere_is_refused(best, asked, name):
    describe(best, lambda found: found["clip"]["model_cfg"]["vision_cfg"].update(timm_model_name=name))
    refusal(scorer.Scorer.load, best)
    assert asked == []


@pytest.mark.parametrize("part", [{"hf_model_name": "org/tower"}, {"hf_tokenizer_name": "org/tokens"}])
def test_the_config_of_a_folder_fetches_nothing(tmp_path, asked, part):
    folder = Path(shutil.copytree(names.EMBEDDED["tiny"], tmp_path / "clip"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"].update(part)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refusal(loading.load_backbone, f"local-dir:{folder}", "openai", image_size=56)
    assert asked == []


# -- JSON


def nested(depth: int) -> str:
    return '{"a":' + "[" * depth + "]" * depth + "}"


HOSTILE_JSON = {
    "deep": nested(200_000),
    "huge integer": '{"a": 1' + "0" * 30 + "}",
    "integer of many digits": '{"a": 1' + "0" * 5000 + "}",
    "infinite": '{"a": 1e999}',
    "NaN": '{"a": NaN}',
    "Infinity": '{"a": -Infinity}',
    "twice": '{"a": 1, "a": 2}',
    "twice within": '{"b": [{"a": 1, "a": 2}]}',
    "list": "[1, 2]",
    "text": '"' + "x" * 100_000 + '"',
    "null": "null",
    "half a character": '{"a": "\\udc00"}',
    "no UTF-8": b"\xff\xfe{}",
    "empty": "",
    "open": '{"a": {',
}


def finished(folder: Path) -> Any:
    config = arguments.parse_args(["--demo"])
    return protocol.finished_runs(protocol.SCORER, folder.parent, {folder.name: config})


def part_of(folder: Path) -> None:
    chunks.Chunks(folder / "x.csv", {"a": 1}).check()


# What reads a file of a run, and where it is.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "scorer.json": ("best/scorer.json", scorer.Scorer.load),
    "--config": ("config.json", lambda folder: arguments.load_options(folder / "config.json")),
    "--space": ("space.json", lambda folder: programs.SCORER.read_space(folder / "space.json", frozenset())),
    "report, config": ("config.json", run_data.read_run),
    "report, results": ("results.json", run_data.read_run),
    "summary": ("summary.json", summaries.read_summary),
    "finished parts, config": ("config.json", finished),
    "finished parts, results": ("results.json", finished),
    "seen by": ("config.json", seen_by),
    "job": (".x.csv.parts/job.json", part_of),
    "page": ("results.json", lambda folder: answers.read_test_fold(folder)),
    "open_clip": ("clip/open_clip_config.json", lambda folder: names.from_folder(folder / "clip")),
    "transformers": ("clip/config.json", lambda folder: names.from_folder(folder / "clip")),
}


@pytest.mark.parametrize("reader", READERS)
def test_hostile_json_is_refused_by_its_file(run, tmp_path, reader):
    name, read = READERS[reader]
    folder = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("figures", "*.html")))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    for content in HOSTILE_JSON.values():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        message = refusal(read, folder)
        assert path.name in message or str(path.parent) in message
    path.write_bytes(b" ")
    os.truncate(path, 2**40)  # a hole: no disk is taken, and none must be read
    refusal(read, folder)
    path.unlink()
    os.mkfifo(path)  # would be waited for for ever
    refusal(read, folder)


@pytest.mark.parametrize("name", ["splits.csv", "predictions.csv", "metrics.csv", "best/model.safetensors"])
def test_a_pipe_in_a_run_is_not_waited_for(run, tmp_path, name):
    folder = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("figures", "*.html")))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    readers = {"best/model.safetensors": scorer.Scorer.load, "splits.csv": seen_by}
    refusal(readers.get(name, run_data.read_run), folder)
    if name == "predictions.csv":
        refusal(scores_in, folder)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every part of nested JSON values is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, item in items for leaf in leaves(item, (*path, key)))]


ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    2**62,
    1e300,
    -0.5,
    "",
    "x",
    [],
    {},
    [[]],
    ["a"],
    {"a": {}},
    [0, 0, 0],
    "é\x00\x1b[31m",
]


@given(st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_description_with_any_part_changed_loads_or_is_refused_in_a_line(best, run, data):
    found = json.loads((run / "best" / "scorer.json").read_text())
    place = data.draw(st.sampled_from([leaf for leaf in leaves(found) if leaf]))
    part = found
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = data.draw(st.sampled_from(ODD))
    (best / "scorer.json").write_text(json.dumps(found))
    told(scorer.Scorer.load, best)


# -- weights


def safetensors(header: Any, body: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        safetensors(b""),
        safetensors(b"\xff\xfe{}"),
        safetensors(b"[]"),
        safetensors(b'{"a": {}, "a": {}}'),
        safetensors(nested(100_000).encode()),
        safetensors({"a": []}),
        safetensors({"a": entry(dtype="F33")}),
        safetensors({"a": entry(dtype=3)}),
        safetensors({"a": entry(shape=[2, 3])}),
        safetensors({"a": entry(shape=[-2, -2])}),
        safetensors({"a": entry(shape=[2**62, 2**62])}),
        safetensors({"a": entry(shape=[1e3])}),
        safetensors({"a": entry(shape="22")}),
        safetensors({"a": entry(data_offsets=[0, 2**60])}),
        safetensors({"a": entry(data_offsets=[16, 0])}),
        safetensors({"a": entry(), "b": entry()}),
        safetensors({"a": entry(data_offsets=[0])}),
        safetensors({"a": entry()}, b"\0" * 8),
        safetensors({"a": entry()}, b"\0" * 32),
        safetensors({"__metadata__": 3, "a": entry()}),
        safetensors({}, b""),
    ],
)
def test_hostile_weights_are_refused(best, content):
    (best / "model.safetensors").write_bytes(content)
    assert str(best) in refusal(scorer.Scorer.load, best)
    path = best.parent / "w.safetensors"
    path.write_bytes(content)
    assert str(path) in refusal(weights.read_weights, path) or content == safetensors({}, b"")


def test_weights_of_another_kind_of_number_load_or_are_refused(best):
    state = checkpoints.load_weights(best)[1]
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        save_file({name: value.to(dtype) for name, value in state.items()}, best / "model.safetensors")
        told(scorer.Scorer.load, best)


def used() -> int:
    """The most memory that this process has taken so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


BOMBS: dict[str, Callable[[dict[str, Any]], object]] = {
    "layers": lambda found: found["clip"]["model_cfg"]["vision_cfg"].update(layers=10**9),
    "layers in a list": lambda found: found["clip"]["model_cfg"]["vision_cfg"].update(layers=[10**9] * 4),
    "width": lambda found: found["clip"]["model_cfg"]["vision_cfg"].update(width=64 * 10**5),
    "width, allowed": lambda found: found["clip"]["model_cfg"]["text_cfg"].update(width=49408, heads=2),
    "mlp_ratio": lambda found: found["clip"]["model_cfg"]["vision_cfg"].update(mlp_ratio=1e9),
    "vocab_size": lambda found: found["clip"]["model_cfg"]["text_cfg"].update(vocab_size=10**12),
    "context_length": lambda found: found["clip"]["model_cfg"]["text_cfg"].update(context_length=49408),
    "embed_dim": lambda found: found["clip"]["model_cfg"].update(embed_dim=10**11),
    "image_size": lambda found: found.update(image_size=56 * 10**5),
    "patch_size": lambda found: (
        found.update(image_size=4096),
        found["clip"]["model_cfg"]["vision_cfg"].update(patch_size=1, pos_embed_type="sin_cos_2d"),
    ),
    "hidden_q": lambda found: found["model"].update(hidden_q=10**12),
    "extra": lambda found: found["model"].update(extra=[f"score{number}" for number in range(100_000)]),
    "refinement": lambda found: found["model"].update(
        residual=False, refinement={"layers": 10**9, "heads": 1, "dim": 64}
    ),
    "test_crops": lambda found: found.update(test_crops=10**6),
    "bpe_path": lambda found: found["clip"]["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"bpe_path": "/dev/zero"}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_description_of_far_more_than_the_weights_is_refused_before_memory_is_taken(best, bomb):
    describe(best, BOMBS[bomb])
    before = used()
    assert str(best) in refusal(scorer.Scorer.load, best)
    config = configs.TrainingConfig(demo="drawn", init_from=str(best))
    assert str(best) in refusal(initial_model.load_first_stage, config, Namespace())
    assert used() - before < 300e6


@pytest.mark.parametrize(
    ("key", "value"), [("layers", 10**9), ("width", 10**7), ("mlp_ratio", 1e8), ("patch_size", 0), ("head_width", 0)]
)
@pytest.mark.parametrize("pretrained", ["openai", "none"])
def test_the_config_of_a_folder_is_held_against_its_weights_too(tmp_path, key, value, pretrained):
    folder = Path(shutil.copytree(names.EMBEDDED["tiny"], tmp_path / "clip"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"][key] = value
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    before = used()
    refusal(loading.load_backbone, f"local-dir:{folder}", pretrained, image_size=56)
    assert used() - before < 300e6


@pytest.mark.parametrize("part", [{"num_hidden_layers": 10**6}, {"vocab_size": 10**10}, {"hidden_size": 2**20}])
def test_so_is_one_in_transformers_form(tmp_path, hf_folder, part):
    folder = Path(shutil.copytree(hf_folder, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(part)
    (folder / "config.json").write_text(json.dumps(config))
    before = used()
    refusal(loading.load_backbone, str(folder), "openai", image_size=32)
    assert used() - before < 300e6


def test_weights_that_unpack_to_more_than_they_are_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "w.pt", "w", 8) as packed:
        for item in plain.infolist():
            packed.writestr(item.filename, plain.read(item))
    assert "a compressed archive" in refusal(weights.read_weights, tmp_path / "w.pt")
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "v.pt")
    assert "claims 1000000000 values" in refusal(weights.read_weights, tmp_path / "v.pt")
    torch.save({"a": "text"}, tmp_path / "t.pt")
    assert "is no named tensor" in refusal(weights.read_weights, tmp_path / "t.pt")


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "convnext_base", "ViT-B-16-SigLIP"])
def test_what_open_clip_builds_is_not_larger_than_its_own_weights(name):
    config = {"model_cfg": open_clip.get_model_config(name)}
    size = config["model_cfg"]["vision_cfg"]["image_size"]
    with torch.device("meta"):
        clip = build.build_clip(json.loads(json.dumps(config)), image_size=size)
    shapes = {key: tuple(value.shape) for key, value in clip.state_dict().items()}
    build.check_size(config, name, shapes, image_size=size)
    config["model_cfg"]["embed_dim"] *= 1000
    refusal(build.check_size, config, name, shapes, image_size=size)


# -- tables and terminals


def test_names_and_prompts_that_begin_as_formulas_go_through_a_run(run, module_dataset, tmp_path, capsys):
    names = set(pd.read_csv(Path(module_dataset[1]), dtype=str)["name"])
    for file in ("splits.csv", "predictions.csv"):
        raw = pd.read_csv(run / file, dtype=str, keep_default_na=False)
        assert not raw.apply(lambda column: column.str.match(r"[=+@\t\r]|-[^\d]")).any(axis=None)
        assert set(raw["name"]) != names
    found = run_data.read_run(run)
    assert set(found.files) == names == set(found.predictions["name"])
    assert {prompt[0] for prompt in found.predictions["prompt"]} == {"=", "+", "-", "@", "'", "p"}
    assert set(scores_in(run).index) < names
    seen = prompts_seen_by(run)
    assert seen and seen <= set(prompt_keys(found.predictions))
    baseline.main([*module_dataset, *TINY, "--split_file", str(run / "splits.csv"), "--dry_run"])
    out = tmp_path / "scores.csv"
    csv, folder = module_dataset[1], module_dataset[3]
    predict.main(
        ["--checkpoint", str(run), "--csv", csv, "--image_dir", folder, "--out", str(out), "--chunk_size", "9"]
    )
    assert pd.read_csv(out, dtype=str)["name"].str.match(r"'|plain").all()
    assert tables.read_csv(out)["name"].tolist() == pd.read_csv(csv, dtype=str)["name"].tolist()


def test_control_characters_reach_no_terminal(run, tmp_path, capsys):
    name = "\x1b[31m\x07\u202ered\x9b.png"
    Image.new("RGB", (32, 32)).save(tmp_path / name)
    (tmp_path / "a.csv").write_text(f"name,prompt\n{name},x\n", encoding="utf-8")
    predict.main(["--checkpoint", str(run), "--csv", str(tmp_path / "a.csv")])
    (tmp_path / name).unlink()
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", str(run), "--csv", str(tmp_path / "a.csv")])
    for text in capsys.readouterr():
        assert "\\x1b[31m" in text and "\\u202e" in text
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(text.rpartition("\r")[2])
