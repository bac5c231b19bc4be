"""`towers`: left and entered again between any two blocks, frozen stages in front, padding, memory, compiled blocks."""

from __future__ import annotations

import copy
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from small_models import (
    BATCH,
    CONTEXT,
    EMBED_DIM,
    END,
    IMAGE_LAYERS,
    TEXT_LAYERS,
    VOCAB,
    build_clip,
    build_model,
    images,
    lora_model,
    prompts,
    stir,
    timm_clip,
    train_steps,
    trained_names,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
from backbones.freezing import add_lora, freeze_backbone
from backbones.towers import (
    activation_bytes,
    compile_blocks,
    frozen_stages,
    num_stages,
    num_statistics,
    observed_blocks,
    pools_one_token,
    run_image,
    run_observed,
    run_text,
    stage_state,
    statistics_of,
    trims_exactly,
)
from inputs.texts import TextTable

# -- encoding text


def selected(clip: open_clip.CustomTextCLIP, tokens_PN: torch.Tensor) -> torch.Tensor:
    """Prompts as a step gets them: without the padding that all of them share, if the tower cannot see it."""
    trim = trims_exactly(clip.text)
    table = TextTable([str(row) for row in range(len(tokens_PN))], lambda texts: tokens_PN, tokens_PN.device, trim=trim)
    return table.select(np.arange(len(tokens_PN)))["text"]


def embedded(clip: open_clip.CustomTextCLIP, tokens_PN: torch.Tensor) -> torch.Tensor:
    return build_model(clip).eval().encode_text(selected(clip, tokens_PN))


@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 5}, {"proj_bias": True}, {"proj_type": "none"}])
def test_trimmed_padding_changes_no_text_embedding(text):
    clip = build_clip(text={**text, "width": EMBED_DIM if "proj_type" in text else 32}).eval()
    assert trims_exactly(clip.text)
    for tokens in (prompts(2), prompts(2, 7, 0), prompts(CONTEXT - 1, 3)):
        if "eos_id" in text:  # an end token that is not the highest: every prompt begins with a higher one
            tokens[tokens == END] = text["eos_id"]
            tokens[:, 0] = torch.where(tokens[:, 0] == text["eos_id"], tokens[:, 0], END)
        expected = clip.encode_text(tokens, normalize=True)
        torch.testing.assert_close(embedded(clip, tokens), expected, atol=1e-6, rtol=0)


def test_only_as_many_tokens_as_the_longest_prompt_has_are_computed():
    clip, lengths = build_clip(), []
    clip.text.token_embedding.register_forward_hook(lambda module, given, out: lengths.append(given[0].shape[1]))
    embedded(clip, prompts(2, 6, 4))
    assert lengths == [7]


def test_a_prompt_that_holds_token_zero_keeps_its_end():
    """Token 0 is the padding and also "!" inside a word of CLIP's vocabulary."""
    clip, tokens = build_clip().eval(), prompts(6)
    tokens[0, 2:5] = 0
    torch.testing.assert_close(embedded(clip, tokens), clip.encode_text(tokens, normalize=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_towers_that_see_the_padding_are_not_trimmed_and_run_as_a_whole(text):
    clip = build_clip(text=text).eval()
    assert not trims_exactly(clip.text)
    assert num_stages(clip.text) == 1
    tokens = prompts(2, 4)
    assert torch.equal(selected(clip, tokens), tokens)
    torch.testing.assert_close(embedded(clip, tokens), clip.encode_text(tokens, normalize=True))


# -- stages


TOWERS = {
    "image": {},
    "image, mean pooling": {"pool_type": "avg"},
    "image, norm after pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "image, attention pooling": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "text": {},
    "text, projection with bias": {"proj_bias": True},
    "text, named end token": {"pool_type": "eos", "eos_id": END},
}


def tower_and_runs(kind: str) -> tuple[open_clip.CustomTextCLIP, nn.Module, Any, torch.Tensor]:
    """A CLIP in eval mode, one of its towers, what takes (x, start, stop) through it, and its embeddings of BATCH."""
    pictures, tokens, _ = BATCH
    if kind.startswith("image"):
        clip = build_clip(vision=TOWERS[kind]).eval()
        whole = clip.encode_image(pictures, normalize=True)
        return clip, clip.visual, lambda x, start, stop: run_image(clip.visual, x, start, stop), whole
    clip = build_clip(text=TOWERS[kind]).eval()
    padded = F.pad(tokens, (0, CONTEXT - tokens.shape[1]))
    whole = clip.encode_text(padded, normalize=True)
    return clip, clip.text, lambda x, start, stop: run_text(clip.text, x, tokens, start, stop), whole


def entry(kind: str) -> torch.Tensor:
    return BATCH[0 if kind.startswith("image") else 1]


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_left_and_entered_again_at_any_stage_gives_the_whole(kind):
    _, tower, run, whole = tower_and_runs(kind)
    num = num_stages(tower)
    assert num == (IMAGE_LAYERS if kind.startswith("image") else TEXT_LAYERS) + 1
    torch.testing.assert_close(run(entry(kind), 0, num), whole, atol=1e-6, rtol=0)
    seen = []
    for stage in range(num + 1):
        x = run(entry(kind), 0, stage)
        torch.testing.assert_close(run(x, stage, num), whole, atol=1e-6, rtol=0)
        seen.append(x)
    for one, other in pairwise(seen):  # every stage does something
        assert one.shape != other.shape or not torch.allclose(one, other, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("kind", ["image", "image, attention pooling", "text"])
def test_what_leaves_a_stage_depends_on_every_weight_of_the_stages_before_and_on_no_other(kind, lora):
    clip, tower, run, _ = tower_and_runs(kind)
    if lora:
        add_lora(clip, 2, num_layers=1)
        stir(clip)  # factors that are zero hide each other
    parameters = dict(tower.named_parameters())
    for stage in range(1, num_stages(tower) + 1):
        names = set(stage_state(tower, stage)) & set(parameters)
        before = run(entry(kind), 0, stage)
        for name, parameter in parameters.items():
            kept = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
            assert torch.equal(run(entry(kind), 0, stage), before) == (name not in names), (stage, name)
            parameter.copy_(kept)
    assert names == set(parameters)


def stages_of(clip: open_clip.CustomTextCLIP) -> tuple[int, int]:
    return frozen_stages(clip.visual), frozen_stages(clip.text)


def test_full_fine_tuning_leaves_no_stage_frozen_and_a_frozen_clip_all():
    clip = build_clip()
    freeze_backbone(clip)
    assert stages_of(clip) == (0, 0)
    freeze_backbone(clip, everything=True)
    assert stages_of(clip) == (IMAGE_LAYERS + 1, TEXT_LAYERS + 1)


@pytest.mark.parametrize("num_layers", range(IMAGE_LAYERS + 1))
def test_partial_freezing_leaves_as_many_stages_frozen_as_blocks(num_layers):
    clip = build_clip()
    freeze_backbone(clip, num_layers=num_layers)
    assert stages_of(clip) == (num_layers, min(num_layers, TEXT_LAYERS))


@pytest.mark.parametrize("num_layers", [None, *range(IMAGE_LAYERS + 1)])
def test_lora_leaves_the_stages_before_its_first_block_frozen_and_a_tower_without_any_as_a_whole(num_layers):
    clip = lora_model(num_layers).clip
    untouched = num_layers or 0
    expected = [untouched if untouched < depth else depth + 1 for depth in (IMAGE_LAYERS, TEXT_LAYERS)]
    assert stages_of(clip) == tuple(expected)


def test_random_patches_leave_no_stage_frozen_unless_all_are():
    clip = build_clip({"patch_dropout": 0.5})
    freeze_backbone(clip, num_layers=2)
    assert stages_of(clip) == (0, 2)
    freeze_backbone(clip, everything=True)
    assert stages_of(clip) == (IMAGE_LAYERS + 1, TEXT_LAYERS + 1)


def bert_clip(folder: Path) -> open_clip.CustomTextCLIP:
    """A CLIP whose text tower is one of Hugging Face's."""
    import transformers  # takes seconds

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    transformers.BertConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=CONTEXT).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_proj_type": "linear", "hf_model_pretrained": False}
    return build_clip(text=text)


@pytest.mark.parametrize("kind", ["timm", "hugging face"])
def test_towers_of_other_kinds_are_one_stage(kind, tmp_path):
    clip = {"timm": timm_clip, "hugging face": lambda: bert_clip(tmp_path)}[kind]().eval()
    tower = clip.text if kind == "hugging face" else clip.visual
    assert num_stages(tower) == 1
    freeze_backbone(clip)
    assert frozen_stages(tower) == 0
    next(tower.parameters()).requires_grad_(False)
    assert frozen_stages(tower) == 0
    tower.requires_grad_(False)
    assert frozen_stages(tower) == 1
    assert set(stage_state(tower, 1)) == set(tower.state_dict()) and not stage_state(tower, 0)
    model = build_model(clip).eval()
    if kind == "hugging face":
        tokens = prompts(3, 5)
        found, expected = model.encode_text(tokens), clip.encode_text(tokens, normalize=True)
        again = model.encode_text(found, 1)
    else:
        found, expected = model.encode_image(images(2, 64)), clip.encode_image(images(2, 64), normalize=True)
        again = model.encode_image(found, 1)
    torch.testing.assert_close(found, expected)
    assert torch.equal(again, found)
    assert not found.requires_grad


FREEZINGS = {
    "full": {},
    "heads only": {"everything": True},
    "no block": {"num_layers": 0},
    "two blocks": {"num_layers": 2},
    "three blocks": {"num_layers": 3},
    "LoRA": {"lora": None},
    "LoRA behind two blocks": {"lora": 2},
}


def frozen_model(freezing: str, clip: open_clip.CustomTextCLIP | None = None) -> models.ScoreModel:
    how = FREEZINGS[freezing]
    model = build_model(clip)
    if "lora" in how:
        add_lora(model.clip, 2, num_layers=how["lora"])
    else:
        freeze_backbone(model.clip, **how)
    stir(model.heads)
    return model


def gradients(model: models.ScoreModel, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    ((scores["q"] - 1) ** 2 + (scores["c"] - 1) ** 2).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> None:
    assert {name for name, value in found.items() if value is None} == {n for n, v in expected.items() if v is None}
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(
                found[name], value, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("freezing", FREEZINGS)
def test_training_changes_what_leaves_a_trained_stage_and_nothing_before(freezing):
    model = frozen_model(freezing)
    visual, text = model.clip.visual, model.clip.text

    @torch.no_grad()
    def leaving() -> list[list[torch.Tensor]]:
        model.eval()
        return [
            [run_image(visual, BATCH[0], 0, stage) for stage in range(num_stages(visual) + 1)],
            [run_text(text, BATCH[1], BATCH[1], 0, stage) for stage in range(num_stages(text) + 1)],
        ]

    before = leaving()
    train_steps(model, 2)
    for tower, old, new in zip((visual, text), before, leaving(), strict=True):
        moved = [not torch.equal(one, other) for one, other in zip(old, new, strict=True)]
        frozen = frozen_stages(tower)
        assert moved == [False] * (frozen + 1) + [True] * (num_stages(tower) - frozen)


@pytest.mark.parametrize("freezing", FREEZINGS)
def test_frozen_stages_keep_no_activations_and_the_rest_gets_the_gradients_of_a_plain_pass(freezing):
    model = frozen_model(freezing).train()
    entered, left = {}, {}
    for tower in (model.clip.visual, model.clip.text):
        for number, block in enumerate(tower.transformer.resblocks):
            key = (tower, number)  # the last block is run in pieces: its first and last piece tell of it
            block.ln_1.register_forward_pre_hook(lambda _, x, key=key: entered.update({key: x[0].grad_fn is not None}))
            block.ls_2.register_forward_hook(lambda _, x, y, key=key: left.update({key: y.grad_fn is not None}))
    found = gradients(model, model(*BATCH))
    assert len(entered) == len(left) == sum(len(t.transformer.resblocks) for t in (model.clip.visual, model.clip.text))
    for tower, number in entered:
        frozen = frozen_stages(tower)
        assert entered[tower, number] == (number > frozen or freezing == "full")
        assert left[tower, number] == (number >= frozen)
    assert len(entered) == IMAGE_LAYERS + TEXT_LAYERS
    pictures, tokens, prompt_of = BATCH
    image_BE = model.clip.encode_image(pictures, normalize=True)
    text_BE = model.clip.encode_text(F.pad(tokens, (0, CONTEXT - tokens.shape[1])), normalize=True)
    expected = gradients(model, model.score(image_BE, text_BE[prompt_of]))
    assert_same_gradients(found, expected)
    assert {name for name, value in found.items() if value is not None} == trained_names(model)


@pytest.mark.parametrize("freezing", FREEZINGS)
def test_gradient_checkpointing_recomputes_trained_blocks_only_and_changes_no_gradient(freezing):
    model = frozen_model(freezing).train()
    calls: dict[nn.Module, int] = {}
    blocks = [*model.clip.visual.transformer.resblocks, *model.clip.text.transformer.resblocks]
    for block in blocks:
        block.ln_1.register_forward_pre_hook(lambda module, given: calls.update({module: calls.get(module, 0) + 1}))
    expected = gradients(model, model(*BATCH))
    assert list(calls.values()) == [1] * len(blocks)
    calls.clear()
    model.clip.set_grad_checkpointing(True)
    assert_same_gradients(gradients(model, model(*BATCH)), expected)
    frozen = [frozen_stages(tower) for tower in (model.clip.visual, model.clip.text)]
    passes = [
        2 if number >= first_trained else 1
        for depth, first_trained in zip((IMAGE_LAYERS, TEXT_LAYERS), frozen, strict=True)
        for number in range(depth)
    ]
    assert [calls[block.ln_1] for block in blocks] == passes
    calls.clear()
    with torch.no_grad():
        model(*BATCH)
    assert list(calls.values()) == [1] * len(blocks)


@pytest.fixture
def dynamo() -> Any:
    """The statistics of a compiler that knows nothing yet and would rather fail than give up on a block."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def compiled_twin(model: models.ScoreModel) -> models.ScoreModel:
    twin = copy.deepcopy(model)
    compile_blocks(twin.clip)
    blocks = [*twin.clip.visual.transformer.resblocks, *twin.clip.text.transformer.resblocks]
    assert all(block._compiled_call_impl is not None for block in blocks)
    return twin


OTHER_BATCH = (images(3), prompts(1, 8, 4)[:, :9], torch.tensor([0, 2, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("freezing", ["full", "two blocks"])
def test_compiled_blocks_learn_the_same_under_the_same_names(freezing, monkeypatch, dynamo):
    """Traced as for the compiler, which would take a minute, but run step by step."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, **how, backend="aot_eager"))
    model = frozen_model(freezing).train()
    twin, before = compiled_twin(model), dynamo["unique_graphs"]
    assert list(twin.state_dict()) == list(model.state_dict())
    for batch in (BATCH, OTHER_BATCH):
        expected, found = model(*batch), twin(*batch)
        for name in ("q", "c"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
        assert_same_gradients(gradients(twin, found), gradients(model, expected))
    assert dynamo["unique_graphs"] > before


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("gcc", "cc", "clang", "g++", "c++"))), reason="there is no C compiler")
def test_compiled_blocks_score_the_same(dynamo):
    model = frozen_model("full").eval()
    twin = compiled_twin(model)
    before = dynamo["unique_graphs"]
    expected, found = model(*BATCH), twin(*BATCH)
    for name in ("q", "c"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
    assert dynamo["unique_graphs"] == before + 2  # one for each tower, whose blocks share it


# -- statistics


@pytest.mark.parametrize(
    ("depth", "observed"),
    [
        (1, []),
        (2, [0]),
        (3, [0, 1]),
        (6, [0, 1, 2, 3, 4]),
        (12, [1, 3, 5, 7, 9]),
        (24, [3, 7, 11, 15, 19]),
        (32, [4, 9, 14, 19, 24, 29]),
    ],
)
def test_about_every_sixth_of_a_transformer_is_observed_but_not_its_end(depth, observed):
    visual = build_clip({"layers": depth, "width": 16}).visual
    assert observed_blocks(visual) == observed
    assert num_statistics(visual) == 2 * 16 * len(observed)


@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (3, 1 + 24, 5)], ids=["map", "tokens"])
def test_statistics_are_mean_and_deviation_over_space(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1
    array = x.double().numpy()
    space = (2, 3) if x.ndim == 4 else 1
    array = array if x.ndim == 4 else array[:, 1:]  # without the class token
    expected = np.concatenate([array.mean(axis=space), array.std(axis=space)], axis=1)
    np.testing.assert_allclose(statistics_of(x).numpy(), expected, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        found = statistics_of(x.to(dtype))
        assert found.dtype == torch.float32 and torch.equal(found, statistics_of(x.to(dtype).float()))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5, 3)], ids=["map", "tokens"])
def test_a_map_that_is_constant_has_a_gradient(shape):
    x = torch.full(shape, 0.7, requires_grad=True)
    found = statistics_of(x)
    torch.testing.assert_close(found, torch.tensor([0.7] * 3 + [0.0] * 3).expand(2, -1), atol=2e-4, rtol=0)
    found.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


OBSERVED = ["image", "image, mean pooling", "image, attention pooling"]


@torch.no_grad()
@pytest.mark.parametrize("kind", OBSERVED)
def test_statistics_are_those_of_what_hooks_see(kind):
    clip, visual, _, whole = tower_and_runs(kind)
    seen: dict[int, np.ndarray] = {}
    for number, block in enumerate(visual.transformer.resblocks):
        block.register_forward_hook(lambda _, x, y, number=number: seen.update({number: y.double().numpy()}))
    clip.encode_image(BATCH[0])
    patches = [seen[number][:, 1:] for number in (0, 1)]
    expected = np.concatenate([part for x in patches for part in (x.mean(axis=1), x.std(axis=1))], axis=1)
    image, found = run_observed(visual, BATCH[0], 0, num_stages(visual))
    torch.testing.assert_close(image, whole, atol=1e-6, rtol=0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert found.shape == (len(image), num_statistics(visual))


@torch.no_grad()
@pytest.mark.parametrize("kind", OBSERVED)
def test_statistics_of_a_tower_left_and_entered_again_are_those_of_the_whole(kind):
    _, visual, run, _ = tower_and_runs(kind)
    num = num_stages(visual)
    whole, expected = run_observed(visual, BATCH[0], 0, num)
    for stage in range(num + 1):
        middle, early = run_observed(visual, BATCH[0], 0, stage)
        assert torch.equal(middle, run(BATCH[0], 0, stage))
        image, late = run_observed(visual, middle, stage, num)
        torch.testing.assert_close(image, whole, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.cat([early, late], dim=1), expected, atol=1e-6, rtol=0)
        assert early.shape[1] == 2 * 32 * min(stage, 2)


@torch.no_grad()
def test_a_tower_that_runs_as_a_whole_has_no_statistics():
    visual = timm_clip().visual.eval()
    assert observed_blocks(visual) == [] and num_statistics(visual) == 0
    image, found = run_observed(visual, images(2, 64), 0, 1)
    assert torch.equal(image, run_image(visual, images(2, 64), 0, 1)) and found.shape == (2, 0)


def test_statistics_of_recomputed_blocks_have_the_same_gradients():
    grads = []
    for recomputes in (False, True):
        clip = build_clip()
        clip.set_grad_checkpointing(recomputes)
        image, statistics = run_observed(clip.visual.train(), BATCH[0], 0, IMAGE_LAYERS + 1)
        (image[:, 0].sum() + statistics.square().sum()).backward()
        grads.append({name: parameter.grad for name, parameter in clip.visual.named_parameters()})
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, atol=1e-5, rtol=1e-4)


# -- learning rates and parameter counts


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_the_last_block_is_computed_for_the_token_that_is_read_where_there_is_one(kind):
    _, tower, run, _ = tower_and_runs(kind)
    depth = num_stages(tower) - 1
    whole = tower.transformer.resblocks[-1]
    seen: list[tuple[int, ...]] = []
    hook = whole.mlp.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    left = run(entry(kind), 0, depth)
    hook.remove()
    assert (left.ndim == 2) == pools_one_token(tower) == (seen[0][1] == 1)


class Operations(TorchDispatchMode):
    """Collects the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_frozen_weights_are_not_copied_for_every_token():
    clip = build_clip().eval().requires_grad_(False)
    pixels, tokens = images(2), prompts(3, 10)
    with Operations() as done, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image = run_image(clip.visual, pixels, 0, num_stages(clip.visual))
        text = run_text(clip.text, tokens, tokens, 0, num_stages(clip.text))
        assert "aten.addmm.default" in done.names and "aten.bmm.default" not in done.names
        whole = (
            F.normalize(clip.encode_image(pixels).float(), dim=-1),
            F.normalize(clip.encode_text(tokens).float(), dim=-1),
        )
    for found, expected in zip((image, text), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # bf16


# -- memory


def bytes_kept(tower: nn.Module, num_images: int) -> int:
    """What autograd keeps of a forward pass for the backward pass, without the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*tower.parameters(), *tower.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tower(torch.randn(num_images, 3, *tower.image_size))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("name", "quick_gelu"), [("tiny", False), ("small", False), ("small", True)])
@pytest.mark.parametrize("num_trained", [0, 1, 3, None])
def test_the_memory_of_an_image_is_about_what_autograd_keeps(name, quick_gelu, num_trained):
    if name == "tiny":
        config = json.loads((ROOT / "assets" / "tiny-clip" / "open_clip_config.json").read_text())["model_cfg"]
    else:
        vision = {"layers": 6, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 96}
        config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": {"layers": 1, "width": 32, "heads": 2}}
    tower = open_clip.CLIP(**{**config, "quick_gelu": quick_gelu}).visual.train()
    blocks = tower.transformer.resblocks
    if num_trained is not None:
        tower.requires_grad_(False)
        for block in blocks[len(blocks) - num_trained :]:
            block.requires_grad_(True)
    expected = activation_bytes(tower, torch.float32)
    kept = (bytes_kept(tower, 6) - bytes_kept(tower, 2)) / 4
    if num_trained == 0:
        assert kept == expected == 0
    else:
        assert expected / 1.2 < kept < expected * 1.2
    assert activation_bytes(tower, torch.bfloat16) == expected / 2


def test_the_memory_of_a_tower_without_such_blocks_is_unknown():
    assert activation_bytes(nn.Linear(3, 4), torch.float32) == 0
