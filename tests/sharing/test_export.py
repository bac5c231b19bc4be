"""`sharing/export.py`: what is exported scores as the Scorer does, where there is no torch."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import ROOT
from exported import bare_python, run_bare, script
from PIL import Image
from small_models import build_clip, build_model
from torch import nn

import baseline
import predict
from evaluation.metrics import srocc
from pages.run_data import Run
from serving import commands
from serving.scorer import Scorer
from sharing import export
from sharing.card import card_text
from sharing.folder import importable
from sharing.graph import GRAPH_FILE, ScoreGraph
from storage.image_files import FORMATS

CLOSE = 1e-4  # MOS units
DEMO = ROOT / "assets" / "agiqa-demo"
SCORE = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
from score import Scorer
rows = json.load(open(sys.argv[2]))
scorer = Scorer(sys.argv[1])
parts = [scorer.score(rows["path"][i : i + 25], rows["prompt"][i : i + 25]) for i in range(0, len(rows["path"]), 25)]
found = {name: [float(value) for part in parts for value in part[name]] for name in parts[0]}
print(json.dumps({"scores": found, "torch": importlib.util.find_spec("torch") is not None}))
"""


@pytest.fixture(scope="module")
def lite_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the lite CLIP, kept frozen, so with a kernel as its base, on real images."""
    folder = tmp_path_factory.mktemp("lite") / "run"
    flags = ["--demo", "--freeze_clip", "--epochs", "1", "--no_report", "--cache_dir", str(folder.with_name("cache"))]
    baseline.main([*flags, "--output_dir", str(folder)])
    return folder


@pytest.mark.slow
def test_a_real_run_scores_the_same_without_torch(lite_run, tmp_path, capsys):
    predict.main(["--checkpoint", str(lite_run / "best"), "--export", str(tmp_path / "out")])
    said = capsys.readouterr().out
    table = pd.read_csv(DEMO / "data.csv").head(100)
    rows = {"path": [str(DEMO / "images" / name) for name in table["name"]], "prompt": table["prompt"].tolist()}
    rows["prompt"][3] = ""
    expected = Scorer.load(lite_run, device="cpu").score(rows["path"], rows["prompt"])
    assert expected["pred_quality"].nunique() > 90
    pd.Series(rows).to_json(tmp_path / "rows.json")
    found = run_bare(
        bare_python(tmp_path / "venv", "score.py"), SCORE, str(tmp_path / "out"), str(tmp_path / "rows.json")
    )
    assert not found["torch"]
    for name in ("pred_quality", "pred_align"):
        np.testing.assert_allclose(found["scores"][name], expected[name], atol=CLOSE, rtol=0)
    assert np.isnan(found["scores"]["pred_align"][3])
    assert "on 63 images of the run's test fold:\n  pred_quality: SROCC 1.0000, off by at most" in said

    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| `pred_align` | consistency | 0.1787 | 4.181 | yes |" in card and "ridge probe" in card
    assert "196 for training, 63 for choosing the epoch, 63 for the test" in card


def scorer(model: Any, image_size: int, scales: Sequence[str] = "qc", crops: int = 0, **preprocess: Any) -> Scorer:
    """A scorer of a small model with random weights."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(
                (0.3 if name.startswith("clip") else 0.1) * torch.randn(parameter.shape, generator=generator)
            )
        if getattr(model.heads, "base_kernel", None) is not None:
            model.heads.base_kernel.bias_q.fill_(0.5)
    description = {
        "clip": {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], **preprocess}},
        "image_size": image_size,
        "scales": {task: {"low": 1, "high": 5} for task in scales},
        "test_crops": crops,
    }
    return Scorer(
        model.eval(),
        open_clip.SimpleTokenizer(context_length=TEXT["context_length"]),
        description,
        device="cpu",
        amp="off",
    )


TEXT = {"vocab_size": 49408, "context_length": 30}
SMALL: dict[str, Callable[[], Scorer]] = {
    "crops, kernel": lambda: scorer(
        build_model(build_clip(text=TEXT), stage_width=128, base="kernel", kernel_images=40, global_view=True),
        32,
        crops=4,
    ),
    "levels": lambda: scorer(
        build_model(build_clip(text=TEXT), prompt_levels=True), 32, resize_mode="longest", interpolation="bilinear"
    ),
    "levels, quality alone": lambda: scorer(build_model(build_clip(text=TEXT), prompt_levels=True), 32, "q", crops=3),
    "probe, another score": lambda: scorer(
        build_model(build_clip(text=TEXT), base="probe", extra=["mos_x"]), 32, ["q", "c", "mos_x"]
    ),
    "refined": lambda: scorer(
        build_model(build_clip(text=TEXT), residual=False, refinement={"layers": 1, "heads": 2, "dim": 8}), 32
    ),
    "text that looks both ways": lambda: scorer(
        build_model(build_clip(text={**TEXT, "no_causal_mask": True, "pool_type": "last"})), 32, resize_mode="squash"
    ),
    "consistency alone": lambda: scorer(build_model(build_clip(text=TEXT)), 32, "c"),
}


def test_scores_beyond_the_scale_are_clamped_as_the_scorer_clamps_them(pictures):
    own = SMALL["probe, another score"]()
    prompts = ["a cat", "a dog", "night", "a red car", "rain", "two men", "x"]
    with torch.no_grad():
        own.model.heads.base_c.weight.mul_(300)
    known = own.score(pictures, prompts, clamp=False)["pred_align"]
    with torch.no_grad():
        own.model.heads.base_c.bias.sub_((known.mean() - 3) / 4)
    expected = own.score(pictures, prompts)["pred_align"]
    assert {1, 5} <= set(expected)
    take, decode = script("score.py")["take_views"], script("score.py")["decode"]
    views = [take(decode(path, FORMATS, 32), 32, "shortest", "bicubic", True, None) for path in pictures]
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack(views))
        found = ScoreGraph(own, torch.float32)(pixels, own.tokenize(prompts), torch.arange(7)[:, None])[1]
    np.testing.assert_allclose(found, expected, atol=1e-3)  # 300 times as steep


def exported_scorer(folder: Path) -> Any:
    with importable(folder):
        return runpy.run_path(str(folder / "score.py"))["Scorer"](folder)


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Seven images of different sizes and kinds, some far larger and some smaller than a model looks at."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (height, width) in enumerate(
        [(20, 30), (40, 33), (33, 70), (300, 200), (32, 32), (250, 251), (31, 90)]
    ):
        few = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        path = tmp_path / f"{number}.{'jpg' if number % 2 else 'png'}"
        few.resize((width, height)).save(path)
        paths.append(str(path))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
def test_all_kinds_of_scorers_score_the_same(kind, tmp_path, pictures):
    own = SMALL[kind]()
    folder = tmp_path / "out"
    folder.mkdir()
    export.write_scorer(own, folder, "float32")
    other = exported_scorer(folder)
    prompts = ["a cat", "two dogs, don’t bark", "", "a cat", " ", "x " * 99, "a &amp; b"]
    expected = own.score(pictures, prompts)
    for rows in (slice(0, 7), slice(3, 4), slice(5, 7)):
        found = other.score(pictures[rows], prompts[rows])
        assert set(found) == set(expected.columns[expected.notna().any()])
        for name, values in found.items():
            assert expected[name].std() > 100 * CLOSE and not expected[name].isin([1, 5]).any()
            np.testing.assert_allclose(values, expected[name][rows], atol=CLOSE, rtol=0)
    if "q" in own.scales:
        without = other.score(pictures, [""] * len(pictures))
        np.testing.assert_allclose(without["pred_quality"], own.score(pictures)["pred_quality"], atol=CLOSE, rtol=0)
        assert np.isnan(without.get("pred_align", np.nan)).all()


class Undecided(nn.Module):
    """A tower that asks for a value before it knows the image."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, E)."""
        return image.mean(dim=(2, 3)) if image.sum() > 0 else image.amax(dim=(2, 3))


def test_a_tower_that_cannot_be_followed_is_refused_in_one_line(tmp_path):
    own = SMALL["probe, another score"]()
    own.model.clip.visual = Undecided()
    with pytest.raises(ValueError, match="--export: TextTransformer or Undecided cannot be exported") as caught:
        export.write_scorer(own, tmp_path, "float32")
    assert "\n" not in str(caught.value)


def test_a_card_says_what_is_not_known_and_repeats_no_markup():
    own = SMALL["probe, another score"]()
    own.description["source"] = "a | <script>`\nCLIP"
    card = card_text(own, None, name="x", graph="scorer.onnx", precision="int8")
    assert "Not known: no `results.json` lay beside the checkpoint." in card
    assert "not compared with those of the run." in card
    assert "a \\| &lt;script>' CLIP with small heads on its embeddings, as ONNX in int8." in card
    assert "| `pred_x` | mos_x | 1 | 5 | no |" in card


def test_images_to_compare_on_are_those_named_or_of_the_test_fold(tmp_path):
    named = commands.parse_predict_args(["--checkpoint", "r", "--export", "o", "--image_dir", "d", "--prompt", "a cat"])
    found = export.samples_of(named, [f"{number}.png" for number in range(150)], None)
    assert (found.paths[0], len(found.paths), set(found.prompts)) == ("d/0.png", 100, {"a cat"})

    table = pd.DataFrame({"name": list("abc"), "prompt": list("xyz"), "split": ["test", "val", "test"]})
    (tmp_path / "a").touch()
    files = {name: (str(tmp_path / name), "") for name in "abc"}
    run = Run(tmp_path, {}, {}, {"test": {"srocc_q": 1.0}}, pd.DataFrame(), table, files)
    plain = commands.parse_predict_args(["--checkpoint", "r", "--export", "o"])
    found = export.samples_of(plain, [], run)
    assert (found.source, found.paths, found.prompts) == ("images of the run's test fold", [str(tmp_path / "a")], ["x"])
    assert export.samples_of(plain, [], None).paths == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_smaller_variants_rank_as_the_whole_one(precision, lite_run, tmp_path, capsys):
    whole = GRAPH_FILE
    words = ["--checkpoint", str(lite_run), "--precision", precision, "--export", str(tmp_path / "out")]
    predict.main([*words, "--image_dir", str(DEMO / "images"), "--prompt", "a cat"])
    said = capsys.readouterr().out
    assert f"out: {precision}, " in said and "on 100 named images:" in said
    own = Scorer.load(lite_run, device="cpu")
    names = sorted(path.name for path in (DEMO / "images").iterdir())[:40]
    paths = [str(DEMO / "images" / name) for name in names]
    found = exported_scorer(tmp_path / "out").score(paths, ["a cat"] * 40)
    expected = own.score(paths, "a cat")
    for name, values in found.items():
        assert 0 < np.abs(values - expected[name]).max() < 0.5
        assert srocc(values, expected[name]) > 0.98
    assert (tmp_path / "out" / whole).stat().st_size < 0.9 * (lite_run / "best" / "model.safetensors").stat().st_size
