"""`branches/xvlm.py`: against timm and plain loops, its files to and fro, and indifferent to padding and company."""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertTokenizer

import branches.xvlm as xvlm
from branches.bert import BertConfig
from branches.xvlm import SwinConfig, Tokenizer, Xvlm, XvlmConfig, load_checkpoint, read_checkpoint, read_config

SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
WIDTH = 16
WORDS = "[PAD] [UNK] [CLS] [SEP] what is the colour shape of a red blue green box ball dog s ##s yes no two light dark"
YAML = """
train_file: ['data/finetune/vqa_train.json',
             'data/finetune/vg_qa.json']
answer_list: 'data/finetune/answer_list.json'
vision_config: 'configs/config_swinB_480.json'
use_clip_vit: False
use_swin: True
image_res: 480
patch_size: 32
use_roberta: False
text_config: 'configs/config_bert.json'  # or another
text_encoder: 'data/bert-base-uncased'
num_dec_layers: 6
max_tokens: 40
k_test: 128
optimizer: {opt: adamW, lr: 5e-5, weight_decay: 0.01, lr_mult: 2}
"""


def config(image_res: int = 32, window_size: int = 4, **changes: Any) -> XvlmConfig:
    vision = SwinConfig(image_res, window_size, **SWIN)
    text = BertConfig(
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=20,
        vocab_size=len(WORDS.split()),
        max_position_embeddings=16,
        fusion_layer=1,
        encoder_width=WIDTH,
    )
    return XvlmConfig(vision, text, **{"num_dec_layers": 2, "k_test": 4} | changes)


def build(seed: int = 0, **changes: Any) -> Xvlm:
    """A model whose weights are large enough for everything to matter."""
    torch.manual_seed(seed)
    model = Xvlm(config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of a tiny vocabulary, read from the folder that holds it."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")
    return Tokenizer(folder)


@pytest.fixture
def asked(words: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Three questions of different lengths, an image for each, and the answers."""
    questions = words.questions(["What is the colour of the box?", "Is the ball red", "Dogs"])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return questions, images, words.answers(ANSWERS)


ANSWERS = ["red", "light blue", "light red", "dark blue box", "yes", "no", "dogs", "two"]


def padded(tokens: Tensor, more: int = 3) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(len(tokens), more)], dim=1)


def as_xvlm_saves(model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names, and with the buffers, that X-VLM's files have; written out here once more."""
    state = {}
    for name, tensor in model.state_dict().items():
        number = re.search(r"vision_encoder\.layers\.(\d+)\.downsample", name)
        if number is not None:
            name = name.replace(f"layers.{number[1]}.down", f"layers.{int(number[1]) - 1}.down")
        state[f"module.{name}"] = tensor
        if name.endswith("relative_position_bias_table"):
            state[f"module.{name.replace('bias_table', 'index')}"] = torch.zeros(16, 16, dtype=torch.long)
    state["module.vision_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    for name in ("text_encoder.embeddings", "text_decoder.bert.embeddings"):
        state[f"module.{name}.position_ids"] = torch.arange(16)[None]
    assert "module.vision_encoder.layers.0.downsample.reduction.weight" in state
    return state


def as_pretraining_saves(model: Xvlm, layers: int = 3) -> dict[str, Tensor]:
    """Weights of a text encoder that predicts words, the heads of pretraining, and no decoder."""
    state = {}
    for name, tensor in as_xvlm_saves(model).items():
        name = name.removeprefix("module.")
        if name.startswith("text_encoder."):
            state[name.replace("text_encoder.", "text_encoder.bert.")] = tensor
        elif name.startswith("text_decoder.cls."):
            state[name.replace("text_decoder.", "text_encoder.")] = torch.randn_like(tensor)
        elif not name.startswith("text_decoder."):
            state[name] = tensor
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    state["text_encoder.cls.predictions.decoder.weight"] = words
    state["text_encoder.cls.predictions.decoder.bias"] = state["text_encoder.cls.predictions.bias"]
    heads = {"vision_proj.weight": WIDTH, "text_proj.bias": 4, "temp": 1, "itm_head.0.weight": 6, "bbox_head.3.bias": 4}
    return state | {name: torch.zeros(size) for name, size in heads.items()}


def test_the_vision_encoder_is_timms_with_the_mean_of_the_patches_first():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "window_size": 4}
    oracle = timm.create_model("swin_base_patch4_window7_224", num_classes=0, img_size=64, **sizes).eval()
    saved = {f"vision_encoder.{name}": tensor for name, tensor in xvlm.swin_to_xvlm(oracle.state_dict()).items()}
    names = [name for name in saved if "downsample" in name]
    assert {name.split(".")[2] for name in names} == {"0", "1"}
    vision = xvlm.VisionEncoder(SwinConfig(64, **sizes)).eval()
    state = xvlm.swin_to_timm(saved)
    vision.load_state_dict({name.removeprefix("vision_encoder."): tensor for name, tensor in state.items()})
    images = torch.randn(2, 3, 64, 64)
    found, expected = vision(images), oracle.forward_features(images).flatten(1, 2)
    assert found.shape == (2, 1 + 16, 32)
    assert (found[:, 1:] - expected).abs().max() == 0
    torch.testing.assert_close(found[:, 0], expected.mean(dim=1))


def test_names_of_swin_weights_go_to_timm_and_back():
    model = build().vision_encoder
    own = model.state_dict()
    there = xvlm.swin_to_xvlm(own)
    assert set(there) != set(own)
    for state in (there, own):  # what has timm's names already keeps them
        back = xvlm.swin_to_timm({**state, "layers.0.blocks.1.attn_mask": torch.zeros(1)})
        assert list(back) == list(own) and all(back[name] is state.get(name, back[name]) for name in own)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_of_xvlm_makes_an_equal_model(tmp_path, asked, wrapped):
    saved, model = build(seed=0), build(seed=1)
    state = as_xvlm_saves(saved)
    torch.save({"model": state, "config": {"lr": 5e-5}} if wrapped else state, tmp_path / "model_state_9.th")
    before = model.rank(*asked)
    model.load_state_dict(load_checkpoint(tmp_path / "model_state_9.th", model)[0], strict=True)
    assert (model.rank(*asked) - before).abs().max() > 0.1
    torch.testing.assert_close(model.rank(*asked), saved.rank(*asked), atol=0, rtol=0)


def test_a_file_of_our_own_makes_an_equal_model(tmp_path, asked):
    saved, model = build(seed=0), build(seed=1)
    state = saved.state_dict()
    del state["text_decoder.cls.predictions.decoder.bias"]  # which is also called bias
    torch.save(state, tmp_path / "own.pt")
    model.load_state_dict(load_checkpoint(tmp_path / "own.pt", model)[0])
    torch.testing.assert_close(model.rank(*asked), saved.rank(*asked), atol=0, rtol=0)


def test_what_was_pretrained_becomes_encoder_and_decoder(tmp_path):
    pretrained, model = build(seed=0), build(seed=1, image_res=64, window_size=8)
    state = as_pretraining_saves(pretrained)
    torch.save({"model": state}, tmp_path / "pretrained.th")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(load_checkpoint(tmp_path / "pretrained.th", model)[0])
    after = model.state_dict()
    fresh = set()
    for name, tensor in after.items():
        encoder = name.replace("text_decoder.bert.", "text_encoder.bert.").replace("text_decoder.", "text_encoder.")
        if name.startswith("text_decoder.bert.encoder.layer."):
            number = int(name.split(".")[4])
            encoder = encoder.replace(f"layer.{number}", f"layer.{number + 1}")
        if name.startswith("text_encoder."):
            encoder = name.replace("text_encoder.", "text_encoder.bert.")
        if name.startswith("vision_encoder."):
            continue
        if ".crossattention.self." in name and name.startswith("text_decoder") and "query" not in name:
            fresh.add(name.rpartition(".self.")[2])
            assert tensor.equal(before[name]), name
        else:
            assert tensor.equal(state[encoder]), name
    assert fresh == {"key.weight", "key.bias", "value.weight", "value.bias"}
    small, large = (each.vision_encoder.layers[0].blocks[0].attn for each in (pretrained, model))
    assert large.relative_position_bias_table.shape == (15**2, 2) and small.window_size == (4, 4)
    own, resized = small.relative_position_bias_table, large.relative_position_bias_table
    torch.testing.assert_close(resized, xvlm.resize_bias_table(own, 15**2), atol=0, rtol=0)
    assert model.vision_encoder.layers[1].downsample.norm.weight.equal(
        pretrained.vision_encoder.layers[1].downsample.norm.weight
    )


def test_tables_of_biases_are_resized_as_surfaces():
    table = torch.randn(13**2, 4)
    assert xvlm.resize_bias_table(table, 13**2) is table
    expected = resize_rel_pos_bias_table_simple(table, (15, 15), (29**2, 4))
    torch.testing.assert_close(xvlm.resize_bias_table(table, 29**2), expected)
    assert xvlm.resize_bias_table(table.half(), 29**2).dtype == torch.float16
    flat = torch.tensor([1.0, -2.0]).expand(13**2, 2)
    torch.testing.assert_close(xvlm.resize_bias_table(flat, 29**2), flat[:1].expand(29**2, 2))
    slope = torch.arange(13.0)[:, None].expand(13, 13).flatten()  # rises with the distance down
    slopes = torch.stack([slope, slope.view(13, 13).T.flatten()], dim=1)
    found = xvlm.resize_bias_table(slopes, 29**2).view(29, 29, 2)
    torch.testing.assert_close(found[14, 14], torch.tensor([6.0, 6.0]))
    assert found[5:-5, :, 0].diff(dim=0).min() > 0.3 and found[:, :, 0].diff(dim=1).abs().max() < 1e-4
    torch.testing.assert_close(found[..., 1], found[..., 0].T)


def naive_rank(model: Xvlm, question: Tensor, image: Tensor, answers: Tensor, k: int) -> list[float]:
    """Log-probabilities of all answers to one question (L,), each answer scored by itself, token by token."""
    question = question[question > 0][None]
    states = model.text_encoder(question, model.vision_encoder(image[None]))

    @torch.no_grad()
    def log_probabilities(tokens: list[int]) -> Tensor:
        return model.text_decoder(torch.tensor([tokens]), states)[0, -1].log_softmax(dim=-1)

    rows = [[token for token in row.tolist() if token] for row in answers]
    first = [float(log_probabilities(row[:1])[row[1]]) for row in rows]
    scores = {}
    for number in sorted(range(len(rows)), key=lambda each: -first[each])[:k]:
        row = rows[number]
        whole = sum(float(log_probabilities(row[:place])[row[place]]) for place in range(1, len(row)))
        scores[number] = first[number] + whole
    total = math.log(sum(math.exp(score) for score in scores.values()))
    return [max(scores[n] - total, math.log(1e-10)) if n in scores else math.log(1e-10) for n in range(len(rows))]


@pytest.mark.parametrize("k", [1, 3, 8, 100])
def test_ranking_is_that_of_a_plain_loop(asked, k):
    model, (questions, images, answers) = build(), asked
    keep = [0, 1, 3, 4, 5, 6, 7]  # without two that have the first token in common, of which a cut could take either
    found = model.rank(questions, images, answers[keep], k)
    expected = [naive_rank(model, *each, answers[keep], k) for each in zip(questions, images, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    assert (found > math.log(1e-10)).sum(dim=1).max() <= k


def test_answers_that_begin_alike_are_told_apart(asked):
    model, (questions, images, answers) = build(), asked
    expected = [naive_rank(model, *each, answers, 8) for each in zip(questions, images, strict=True)]
    found = model.rank(questions, images, answers, 8)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert (found[:, 1] - found[:, 2]).abs().min() > 1e-3


def test_the_number_of_answers_tried_is_that_of_the_config_if_not_given(asked):
    model = build(k_test=2)
    torch.testing.assert_close(model.rank(*asked), model.rank(*asked, 2))
    assert (model.rank(*asked) - model.rank(*asked, 8)).abs().max() > 1


def test_no_answer_that_is_tried_falls_below_those_that_are_not(asked):
    model = build()
    with torch.no_grad():
        model.text_decoder.cls.predictions.transform.LayerNorm.weight.mul_(40)  # very sure of itself
    found = model.rank(*asked, 8)
    assert found.min() == torch.tensor(math.log(1e-10)) and found.max() <= 0


@pytest.mark.parametrize("most", [1, 2000, 4000])
def test_answers_tried_in_several_turns_rank_as_all_at_once(asked, monkeypatch, most):
    model = build()
    expected = model.rank(*asked, 7)
    monkeypatch.setattr(xvlm, "MOST_LOGITS", most)
    torch.testing.assert_close(model.rank(*asked, 7), expected, atol=1e-5, rtol=1e-5)


def test_a_question_is_answered_alike_alone_in_a_batch_and_padded(asked):
    model, (questions, images, answers) = build(), asked
    together = model.rank(questions, images, answers)
    longer = model.rank(padded(questions), images, padded(answers))
    torch.testing.assert_close(longer, together, atol=1e-5, rtol=1e-5)
    for row in range(3):
        question = questions[row][questions[row] > 0][None]
        alone = model.rank(question, images[row : row + 1], answers)
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-5)


def test_questions_about_one_image_are_answered_as_each_with_an_image_of_its_own(asked):
    model, (questions, images, answers) = build(), asked
    of_question = torch.tensor([1, 0, 1])
    expected = model.rank(questions, images[of_question], answers)
    seen = model.vision_encoder(images[:2])
    for shared in (images[:2], seen):
        found = model.rank(questions, shared, answers, images_B=of_question)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    right, weights, whose = answers[:3], torch.ones(3), torch.arange(3)
    loss = model(questions, images[of_question], right, weights, whose)
    torch.testing.assert_close(model(questions, seen, right, weights, whose, of_question), loss)


def test_image_and_question_matter(asked):
    model, (questions, images, answers) = build(), asked
    expected = model.rank(questions, images, answers)
    assert (model.rank(questions, images.flip(0), answers) - expected)[[0, 2]].abs().amax(dim=1).min() > 0.1
    assert (model.rank(questions.flip(0), images, answers) - expected)[[0, 2]].abs().amax(dim=1).min() > 0.1


class Transfers(TorchDispatchMode):
    """Counts the numbers that are fetched from a device one by one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_ranking_waits_for_no_single_number(asked):
    model = build()
    with Transfers() as transfers, torch.no_grad():
        model.rank(*asked)
        assert transfers.count == 0
        torch.ones(1).item()
    assert transfers.count == 1


def test_the_loss_is_the_weighted_mean_over_questions_of_a_plain_loop(asked):
    model, (questions, images, answers) = build(), asked
    right = {0: [(1, 0.6), (3, 0.3)], 1: [(4, 1.0)], 2: [(6, 0.5), (0, 0.25), (7, 0.25)]}
    expected = torch.tensor(0.0)
    for question, pairs in right.items():
        tokens = questions[question][questions[question] > 0][None]
        states = model.text_encoder(tokens, model.vision_encoder(images[question][None]))
        for number, weight in pairs:
            row = answers[number][answers[number] > 0]
            logs = model.text_decoder(row[None], states)[0].log_softmax(dim=-1)
            expected = expected - weight * sum(logs[n - 1, row[n]] for n in range(1, len(row))) / 3
    order = [(question, *pair) for question, pairs in right.items() for pair in pairs]
    whose, numbers, weights = zip(*order, strict=True)
    given = answers[list(numbers)], torch.tensor(weights), torch.tensor(whose)
    torch.testing.assert_close(model(questions, images, *given), expected, atol=1e-5, rtol=1e-5)
    longer = model(padded(questions), images, padded(given[0]), *given[1:])
    torch.testing.assert_close(longer, expected, atol=1e-5, rtol=1e-5)


def test_every_weight_is_trained_and_layers_may_be_computed_again(asked):
    model, (questions, images, answers) = build(), asked
    found = []
    for recomputes in (False, True):
        model.recomputes = recomputes
        assert model.recomputes is recomputes
        model.zero_grad()
        model(questions, images, answers[:3], torch.ones(3), torch.arange(3)).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1])
    for name, gradient in found[0].items():
        assert gradient.isfinite().all() and (gradient.abs().sum() > 0 or "key.bias" in name), name


def test_it_learns_answers_that_need_both_question_and_image(words):
    torch.manual_seed(0)
    model = Xvlm(config(k_test=8)).eval()  # without dropout, as there are four examples
    images = torch.stack([torch.full((3, 32, 32), value) for value in (-1.0, 1.0)])
    questions = words.questions(["what colour", "what colour", "what shape", "what shape"])
    answers, right = words.answers(ANSWERS), torch.tensor([1, 3, 6, 0])
    inputs = questions, images, answers[right], torch.ones(4), torch.arange(4), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(70):
        optimizer.zero_grad()
        loss = model(*inputs)
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    assert model.rank(questions, images, answers, images_B=inputs[-1]).argmax(dim=1).equal(right)


def test_texts_become_tokens_as_in_transformers(words, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")
    oracle = BertTokenizer.from_pretrained(str(tmp_path))
    texts = ["What is the  COLOUR of the box?", "dogs", "Zebra's, box-ball/dog"]
    cleaned = ["what is the colour of the box", "dogs", "zebras box ball dog"]
    assert [xvlm.clean_question(text) for text in texts] == cleaned
    expected = oracle(cleaned, padding=True, return_tensors="pt").input_ids
    found = words.questions(texts)
    assert found.tolist() == expected.masked_fill(expected == words.end, 0)[:, :-1].tolist()
    assert words.answers(texts[:2]).tolist() == oracle(texts[:2], padding=True, return_tensors="pt").input_ids.tolist()
    assert words.answers(["red", ""]).tolist() == [[2, 11, 3], [2, 3, 0]]
    assert words.questions(texts, max_tokens=4).tolist() == found[:, :4].tolist()
    assert words.answers(["light blue box"], max_tokens=4)[0, -1] == words.end
    assert len(words.words) == len(WORDS.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"red\nblue\n", "lacks \\[PAD\\], \\[UNK\\], \\[CLS\\], \\[SEP\\]"),
        (b"[UNK]\n[PAD]\n[CLS]\n[SEP]\n", "\\[PAD\\] is not its first line"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/vocab.txt: .*{message}"):
        Tokenizer(tmp_path)


def test_xvlms_own_options_are_read_with_or_without_the_files_that_they_name(tmp_path):
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "VQA_480.yaml"
    path.write_text(YAML)
    assert read_config(path) == XvlmConfig()
    path.write_text(YAML.replace("480", "384"))
    assert read_config(path).vision == SwinConfig(384, 12)
    path.write_text(YAML.replace("k_test: 128", "k_test: 5").replace("num_dec_layers: 6", "num_dec_layers: 2"))
    swin = {"image_res": 480, "window_size": 15, "vision_width": 192, "depths": [2, 2, 6, 2]}
    swin |= {"embed_dim": 96, "num_heads": [3, 6, 12, 24]}
    (tmp_path / "configs" / "config_swinB_480.json").write_text(json.dumps(swin))
    bert = {"hidden_size": 64, "num_attention_heads": 4, "layer_norm_eps": 1e-12, "fusion_layer": 0, "encoder_width": 9}
    (tmp_path / "config_bert.json").write_text(json.dumps(bert))  # not where the YAML says
    found = read_config(path)
    assert (found.vision.depths, found.vision.num_heads) == ((2, 2, 6, 2), (3, 6, 12, 24))
    assert found.text == BertConfig(encoder_width=768)
    (tmp_path / "config_bert.json").rename(tmp_path / "configs" / "config_bert.json")
    found = read_config(path)
    assert found.text == BertConfig(64, num_attention_heads=4, fusion_layer=0, encoder_width=768)
    assert (found.k_test, found.decoder.num_hidden_layers, found.decoder.encoder_width) == (5, 2, 64)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("image_res: 480", "image_res: many", "image_res must be a positive integer"),
        ("image_res: 480", "image_res: 512", "vision_config is not there, and image_res 512 is none of 224, 384, 480"),
        ("image_res: 480", "", "has no image_res"),
        ("k_test: 128", "k_test: 0", "k_test must be a positive integer"),
        ("k_test: 128", "k_test: true", "k_test must be a positive integer"),
        ("max_tokens: 40", "max_tokens: [40]", "max_tokens must be a positive integer"),
        ("text_encoder: 'data", "text_encoder: 7 #", "text_encoder must be a text"),
        ("patch_size: 32", "patch_size: 16", "patch_size is not 32"),
        ("use_roberta: False", "use_roberta: True", "use_roberta must be false"),
        ("use_swin: True", "use_swin: False", "use_swin must be true"),
        ("vision_config: 'configs", "vision_config: 7 #", "vision_config is no path"),
        ("vision_config: 'configs", "vision_config: '" + "a" * 5000, "vision_config is no path"),
        (YAML, "- a\n- b", "holds no names with values"),
        (YAML, "a: [", "while parsing a flow node expected the node content"),
        (YAML, "a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        (YAML, "[" * 5000, "recursion"),
        (YAML, "a: " + "b" * 2**20, "has more than 1048576 bytes"),
    ],
)
def test_what_is_no_such_yaml_is_refused_in_one_line(tmp_path, old, new, message):
    path = tmp_path / "VQA_480.yaml"
    path.write_text(YAML.replace(old, new))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}") as found:
        read_config(path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config_swinB_480.json", '{"image_res": 384}', "image_res is not 480"),
        ("config_swinB_480.json", '{"depths": [2, 2]}', "depths has 2 numbers and num_heads 4"),
        ("config_swinB_480.json", '{"depths": [2, "2", 18, 2]}', "depths must be a list of positive integers"),
        ("config_swinB_480.json", '{"embed_dim": 6}', "embed_dim 6 \\* 1 is no multiple of 4 num_heads"),
        ("config_swinB_480.json", '{"depths": [], "num_heads": []}', "depths must be a list of positive integers"),
        ("config_swinB_480.json", "{", "Expecting property name"),
        ("config_bert.json", '{"hidden_act": "relu"}', "hidden_act is not 'gelu'"),
        ("config_bert.json", '{"hidden_dropout_prob": 1.5}', "hidden_dropout_prob must be a number from 0 to 1"),
        ("config_bert.json", '{"hidden_size": 700}', "hidden_size 700 is no multiple of 12 heads"),
    ],
)
def test_files_that_a_yaml_names_are_refused_by_their_own_name(tmp_path, name, content, message):
    (tmp_path / "VQA_480.yaml").write_text(YAML)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}: {message}"):
        read_config(tmp_path / "VQA_480.yaml")


def test_other_sizes_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="image_res 100 is no multiple of 32 pixels"):
        SwinConfig(image_res=100)
    with pytest.raises(ValueError, match="encoder_width 768 is not 1024, that of the images"):
        XvlmConfig(text=BertConfig())


class Malicious:
    """Creates a file when it is unpickled by something that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    for number, save in enumerate((torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)))):
        path = tmp_path / f"{number}.th"
        save({"model": Malicious(tmp_path / "run")}, path)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: cannot be read as weights \\(.*\\)$"):
            read_checkpoint(path)
        assert not (tmp_path / "run").exists()


def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.th"
    cases: list[tuple[Any, str]] = [
        (b"no weights", "cannot be read as weights \\("),
        (b"", "cannot be read as weights \\("),
        ({}, "holds no named tensors"),
        ([torch.zeros(1)], "holds no named tensors"),
        ({"model": {"a": 1}}, "'a' is no named tensor"),
        ({"a": torch.zeros(1).expand(10**6)}, "'a' claims 1000000 values"),
    ]
    for content, message in cases:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}") as found:
            read_checkpoint(path)
        assert "\n" not in str(found.value)
    for missing in (tmp_path / "none.th", tmp_path):
        with pytest.raises(ValueError, match=f"^{re.escape(str(missing))}: there is no such file"):
            read_checkpoint(missing)


def test_a_compressed_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.th")
    with (
        zipfile.ZipFile(tmp_path / "plain.th") as plain,
        zipfile.ZipFile(tmp_path / "packed.th", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    read_checkpoint(tmp_path / "plain.th")
    with pytest.raises(ValueError, match=r"packed\.th: cannot be read as weights \(a compressed archive\)"):
        read_checkpoint(tmp_path / "packed.th")


def test_other_weights_are_refused_by_their_names(tmp_path):
    model, path = build(), tmp_path / "x.th"
    state = as_xvlm_saves(model)

    def message(**changes: Tensor | None) -> str:
        changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        torch.save(changed, path)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: no weights of this X-VLM: ") as found:
            load_checkpoint(path, model)
        return str(found.value).partition("X-VLM: ")[2]

    norm = "module.vision_encoder.norm.weight"
    table = "vision_encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    assert message(**{norm: None}) == "lacks vision_encoder.norm.weight"
    assert message(**{norm: None, "a.b": torch.zeros(1)}) == "lacks vision_encoder.norm.weight; has a.b beside them"
    sizes = "has other sizes: vision_encoder.norm.weight (3,) for (16,)"
    assert message(**{norm: torch.zeros(3)}) == sizes
    assert message(**{f"module.{table}": torch.zeros(50, 2)}) == f"has other sizes: {table} (50, 2) for (49, 2)"
    assert message(**{f"module.{table}": torch.zeros(25, 3)}) == f"has other sizes: {table} (49, 3) for (49, 2)"
    extra = {f"z{number}\nz": torch.zeros(1) for number in range(5)}
    assert message(**extra) == "has z0 z, z1 z, z2 z and 2 more beside them"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"lacks .* and [0-9]+ more; has weight beside them$"):
        load_checkpoint(path, model)
