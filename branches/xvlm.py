"""X-VLM for questions about images (Zeng et al., Multi-Grained Vision Language Pre-Training, 2022).

A Swin transformer sees the image, a BERT whose upper half looks at it reads the question, and a decoder that looks at
what was read says how likely each answer is, word by word. Weights are read from X-VLM's own files, which hold them
under the names `vision_encoder.*`, `text_encoder.*` and `text_decoder.*`.

Shapes: B questions, I images, L tokens of a question, P patches, C width of a patch, D width of a token; A answers of T
tokens, k of them tried, K right ones. Tokens are padded on the right with 0. Images are squares of `image_res` pixels,
normalised by the mean and deviation of CLIP's.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from timm.models.swin_transformer import SwinTransformer
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from branches.bert import PAD, Bert, BertConfig, BertDecoder, present

PATCH = 4  # pixels; every stage of the Swin transformer but the first halves the grid
WINDOWS = {224: 7, 384: 12, 480: 15}  # of X-VLM's own sizes of images
LEAST = 1e-10  # probability of an answer that is not tried
MOST_LOGITS = 2**27  # numbers that are computed at once when answers are tried
MOST_BYTES = 2**20  # of a file of options
HEADS = ("vision_proj", "text_proj", "itm_head", "bbox_head", "temp")  # of pretraining, without use for questions
BUFFERS = ("attn_mask", "relative_position_index", "position_ids")  # which are computed, in files or not
BIAS_TABLE = "relative_position_bias_table"
CROSS_KEY_VALUE = re.compile(r"text_decoder\..*\.crossattention\.self\.(key|value)\.(weight|bias)")
DOWNSAMPLE = re.compile(r"(?P<before>vision_encoder\.|^)layers\.(?P<stage>\d+)\.downsample\.")
LEFT_OUT, SPACES = ",.'!?\"()*#:;~", "-/"  # characters of questions


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of the vision encoder, called as in X-VLM's config_swinB_480.json, whose values they have by default.

    Raises:
        ValueError: they do not go together.
    """

    image_res: int = 480
    window_size: int = 15
    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths has {len(self.depths)} numbers and num_heads {len(self.num_heads)}")
        if self.image_res % self.stride:
            raise ValueError(f"image_res {self.image_res} is no multiple of {self.stride} pixels")
        for stage, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**stage % heads:
                raise ValueError(f"embed_dim {self.embed_dim} * {2**stage} is no multiple of {heads} num_heads")

    @property
    def stride(self) -> int:
        """Pixels of a patch's side, as it comes out."""
        return PATCH * 2 ** (len(self.depths) - 1)

    @property
    def width(self) -> int:
        """Numbers of a patch, as it comes out."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)


@dataclass(frozen=True)
class XvlmConfig:
    """What X-VLM's YAML says of the network, and of how it is asked.

    Raises:
        ValueError: sizes do not go together.
    """

    vision: SwinConfig = SwinConfig()
    text: BertConfig = field(default_factory=lambda: BertConfig(encoder_width=SwinConfig().width))
    num_dec_layers: int = 6
    k_test: int = 128  # answers that are tried for each question
    max_tokens: int = 40  # of a question
    text_encoder: str = "data/bert-base-uncased"  # folder of the vocabulary

    def __post_init__(self) -> None:
        if self.text.encoder_width != self.vision.width:
            raise ValueError(f"encoder_width {self.text.encoder_width} is not {self.vision.width}, that of the images")

    @property
    def decoder(self) -> BertConfig:
        """Sizes of the decoder, all of whose layers look at the question."""
        width = self.text.hidden_size
        return replace(self.text, num_hidden_layers=self.num_dec_layers, fusion_layer=0, encoder_width=width)


def read_config(path: Path) -> XvlmConfig:
    """X-VLM's YAML, such as VQA_480.yaml, and the JSON files that it names, where they are found beside it.

    Raises:
        ValueError: a file cannot be read, or a value is not of its kind; one line that names the file and the key.
    """
    found = read_options(path)
    for key, supported in (("use_clip_vit", False), ("use_roberta", False), ("use_swin", True)):
        if found.get(key, supported) is not supported:
            raise ValueError(f"{path}: {key} must be {str(supported).lower()}: only Swin and BERT are known here")
    if "image_res" not in found:
        raise ValueError(f"{path}: has no image_res")
    image_res = taken(SwinConfig, found, path)["image_res"]
    vision_path, vision = beside(path, found, "vision_config")
    if vision_path is None:
        if image_res not in WINDOWS:
            known = ", ".join(map(str, WINDOWS))
            raise ValueError(f"{path}: vision_config is not there, and image_res {image_res} is none of {known}")
        vision = {"image_res": image_res, "window_size": WINDOWS[image_res]}
    elif vision.setdefault("image_res", image_res) != image_res:
        raise ValueError(f"{vision_path}: image_res is not {image_res}, as {path} has it")
    swin = build_config(SwinConfig, vision_path or path, taken(SwinConfig, vision, vision_path or path))
    if found.get("patch_size", swin.stride) != swin.stride:
        raise ValueError(f"{path}: patch_size is not {swin.stride}, that of the vision encoder")
    text_path, text = beside(path, found, "text_config")
    if text.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{text_path}: hidden_act is not 'gelu'")
    sizes = taken(BertConfig, text, text_path or path) | {"encoder_width": swin.width}
    bert = build_config(BertConfig, text_path or path, sizes)
    return build_config(XvlmConfig, path, taken(XvlmConfig, found, path) | {"vision": swin, "text": bert})


def read_options(path: Path) -> dict[str, Any]:
    """The names and values of a YAML or JSON file. Raises ValueError."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"has more than {MOST_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(found, dict):
            raise ValueError("holds no names with values")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return found


def beside(path: Path, found: Mapping[str, Any], key: str) -> tuple[Path | None, dict[str, Any]]:
    """The JSON file that a YAML names, looked for beside it and from the folder above; None and {} if there is none."""
    name = found.get(key, "")
    if not isinstance(name, str):
        raise ValueError(f"{path}: {key} is no path")
    places = (path.parent / Path(name).name, path.parent / name, path.parent.parent / name)
    try:
        there = [place for place in places if name and place.is_file()]
    except OSError as error:  # too long, or not for us to see
        raise ValueError(f"{path}: {key} is no path ({error.strerror})") from None
    return (there[0], read_options(there[0])) if there else (None, {})


def taken(kind: type, found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Those of the options in a file that a dataclass has as fields. Raises ValueError for one of another kind."""
    values = {}
    for each in fields(kind):
        if each.name not in found or each.name in ("vision", "text"):
            continue
        value, default = found[each.name], each.default
        if isinstance(default, tuple):
            fits, wanted = is_list_of_counts(value), "a list of positive integers"
            value = tuple(value) if fits else value
        elif isinstance(default, int):
            fits = type(value) is int and value >= (each.name != "fusion_layer")
            wanted = "a positive integer"
        elif isinstance(default, float):
            fits, wanted = type(value) in (int, float) and 0 <= value < 1, "a number from 0 to 1"
        else:
            fits, wanted = isinstance(value, str), "a text"
        if not fits:
            raise ValueError(f"{path}: {each.name} must be {wanted}")
        values[each.name] = value
    return values


def is_list_of_counts(value: object) -> bool:
    """Whether a value is a list of positive integers, and not empty."""
    return isinstance(value, list) and bool(value) and all(type(each) is int and each > 0 for each in value)


def build_config(kind: type, path: Path, values: Mapping[str, Any]) -> Any:
    """A dataclass of values from a file. Raises ValueError, naming the file, if they do not go together."""
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class Tokenizer:
    """Texts as tokens of BERT's vocabulary, put together as X-VLM learned them."""

    def __init__(self, path: Path) -> None:
        """Read a vocabulary: vocab.txt, or the folder that holds it. Raises ValueError."""
        path = path / "vocab.txt" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file (BERT's vocabulary, a word in each line)")
        try:
            words = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
        numbers = {word: number for number, word in enumerate(words)}
        lacking = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in numbers]
        if lacking or numbers["[PAD]"] != PAD:
            reason = f"lacks {', '.join(lacking)}" if lacking else "[PAD] is not its first line"
            raise ValueError(f"{path}: no vocabulary of BERT: {reason}")
        self.words = words
        self.begin, self.end = numbers["[CLS]"], numbers["[SEP]"]
        self.pieces = BertWordPieceTokenizer(numbers)

    def save(self, folder: Path) -> None:
        """Write the vocabulary into a folder. Raises OSError."""
        (folder / "vocab.txt").write_text("\n".join(self.words) + "\n", encoding="utf-8")

    def questions(self, texts: Sequence[str], max_tokens: int = 40) -> Tensor:
        """[CLS] and the words of each question -> (B, L)."""
        return self.rows([clean_question(text) for text in texts], max_tokens, [])

    def answers(self, texts: Sequence[str], max_tokens: int = 40) -> Tensor:
        """[CLS], the words of each answer, [SEP] -> (A, T)."""
        return self.rows(texts, max_tokens, [self.end])

    def rows(self, texts: Sequence[str], max_tokens: int, end: list[int]) -> Tensor:
        """Texts between [CLS] and an end, at most so many tokens in all -> a row for each, padded."""
        found = self.pieces.encode_batch(list(texts), add_special_tokens=False)
        most = max_tokens - 1 - len(end)
        return pad_sequence([torch.tensor([self.begin, *each.ids[:most], *end]) for each in found], True, PAD)


def clean_question(text: str) -> str:
    """A question in small letters, without punctuation, as X-VLM learned them."""
    table = str.maketrans(SPACES, " " * len(SPACES), LEFT_OUT)
    return " ".join(text.lower().translate(table).split())


class VisionEncoder(SwinTransformer):
    """timm's Swin transformer, whose patches come out as a sequence behind their mean."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__(
            img_size=config.image_res,
            patch_size=PATCH,
            num_classes=0,
            global_pool="",
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.num_heads,
            window_size=config.window_size,
        )

    def forward(self, images_ICHW: Tensor) -> Tensor:
        """(I, 3, image_res, image_res) -> (I, 1 + P, C)."""
        patches = self.forward_features(images_ICHW).flatten(1, 2)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)


class Xvlm(nn.Module):
    """Images and questions in, how likely each answer is out."""

    def __init__(self, config: XvlmConfig) -> None:
        """Build with fresh weights."""
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(config.vision)
        self.text_encoder = Bert(config.text)
        self.text_decoder = BertDecoder(config.decoder)

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass, instead of keeping what they were computed from."""
        return self.text_encoder.encoder.recomputes

    @recomputes.setter
    def recomputes(self, value: bool) -> None:
        self.text_encoder.encoder.recomputes = self.text_decoder.bert.encoder.recomputes = value
        self.vision_encoder.set_grad_checkpointing(value)

    def read(self, questions_BL: Tensor, images: Tensor, images_B: Tensor | None = None) -> Tensor:
        """Questions and images (I, 3, H, W), or what the vision encoder has made of these (I, 1 + P, C) -> (B, L, D).

        images_B tells which of the images each question is about; without it, each is about its own.
        """
        seen_IPC = images if images.dim() == 3 else self.vision_encoder(images)
        seen_BPC = seen_IPC if images_B is None else seen_IPC.index_select(0, images_B)
        return self.text_encoder(questions_BL, seen_BPC)

    def forward(
        self,
        questions_BL: Tensor,
        images: Tensor,
        answers_KT: Tensor,
        weights_K: Tensor,
        questions_K: Tensor,
        images_B: Tensor | None = None,
    ) -> Tensor:
        """Loss: the sum over right answers of weight * -log p(answer | question, image), by the number of questions.

        Args:
            images, images_B: as `read` has them.
            answers_KT: right answers of all questions, one after the other.
            weights_K: how right each is.
            questions_K: which question each answers.
        """
        states_BLD = self.read(questions_BL, images, images_B)
        return self.losses(states_BLD, present(questions_BL), answers_KT, weights_K, questions_K).mean()

    def losses(
        self, states_BLD: Tensor, mask_BL: Tensor, answers_KT: Tensor, weights_K: Tensor, questions_K: Tensor
    ) -> Tensor:
        """What `read` makes of questions, which tokens these have, and right answers as in `forward` -> (B,) losses."""
        states, mask = (each.index_select(0, questions_K) for each in (states_BLD, mask_BL))
        losses_K = weights_K * self.text_decoder.loss(answers_KT, states, mask)
        return losses_K.new_zeros(len(states_BLD)).index_add(0, questions_K, losses_K)

    def rank(
        self,
        questions_BL: Tensor,
        images: Tensor,
        answers_AT: Tensor,
        k_test: int | None = None,
        images_B: Tensor | None = None,
    ) -> Tensor:
        """Questions, images (as `read` has them), all answers -> (B, A) log-probabilities of these, in mode `eval`.

            s = log p(first token) + log p(answer)      for those k answers whose first token is the likeliest
            log-probabilities = log softmax(s)          and log(1e-10) for all others, below which none falls

        so that the first token counts twice, as it did when X-VLM was measured. k is config.k_test if not given.
        """
        states_BLD = self.read(questions_BL, images, images_B)
        return spread(*self.try_answers(states_BLD, present(questions_BL), answers_AT, k_test), len(answers_AT))

    def try_answers(
        self, states_BLD: Tensor, mask_BL: Tensor, answers_AT: Tensor, k_test: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `rank`, from what `read` makes of questions: the k answers tried, and log softmax(s): (B, k) each."""
        begin_B1 = answers_AT[:1, :1].expand(len(states_BLD), 1)
        first_BV = self.text_decoder(begin_B1, states_BLD, mask_BL)[:, 0].log_softmax(dim=-1)
        k = min(self.config.k_test if k_test is None else k_test, len(answers_AT))
        first_Bk, tried_Bk = first_BV[:, answers_AT[:, 1]].topk(k, dim=1)
        at_once = max(1, MOST_LOGITS // (len(states_BLD) * answers_AT.shape[1] * first_BV.shape[1]))
        rest_Bk = []
        for some_Bk in tried_Bk.split(at_once, dim=1):
            losses = self.text_decoder.loss(answers_AT[some_Bk].flatten(0, 1), states_BLD, mask_BL, given=2)
            rest_Bk.append(losses.view(some_Bk.shape))
        return tried_Bk, (2 * first_Bk - torch.cat(rest_Bk, dim=1)).log_softmax(dim=-1)


def spread(tried_Bk: Tensor, log_p_Bk: Tensor, num_answers: int) -> Tensor:
    """Log-probabilities of the answers that were tried (B, k) -> of all (B, A); none is below that of the untried."""
    least = math.log(LEAST)
    found_BA = log_p_Bk.new_full((len(tried_Bk), num_answers), least)
    return found_BA.scatter(1, tried_Bk, log_p_Bk.clamp_min(least))


def swin_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of X-VLM's Swin transformer under timm's names; what has these already stays as it is.

    Both call the halving of the grid `layers.i.downsample`, which X-VLM has at the end of stage i, from 0 on, and timm
    at the beginning of the next one. What is computed when the network is built is left out.
    """
    kept = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in BUFFERS}
    stages = {int(found["stage"]) for found in map(DOWNSAMPLE.search, kept) if found is not None}
    return move_downsampling(kept, 1 if 0 in stages else 0)


def swin_to_xvlm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round, of weights that do have timm's names."""
    return move_downsampling(state, -1)


def move_downsampling(state: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """Weights with `downsample` so many stages further on."""

    def moved(found: re.Match[str]) -> str:
        return f"{found['before']}layers.{int(found['stage']) + stages}.downsample."

    return {DOWNSAMPLE.sub(moved, name): tensor for name, tensor in state.items()}


def resize_bias_table(table_SH: Tensor, size: int) -> Tensor:
    """(S, H) biases of the relative positions in a square window -> (size, H), those of another one.

    Table and window are S = (2 * window - 1)^2; between its values, a table is a bicubic surface.
    """
    side, new_side = math.isqrt(table_SH.shape[0]), math.isqrt(size)
    if side == new_side:
        return table_SH
    surface = table_SH.float().T.reshape(1, -1, side, side)
    surface = F.interpolate(surface, (new_side, new_side), mode="bicubic", align_corners=False)
    return surface.flatten(2)[0].T.to(table_SH.dtype)


def from_pretraining(state: Mapping[str, Tensor], fusion_layer: int) -> dict[str, Tensor]:
    """Weights of X-VLM as it was pretrained, with captions, arranged for questions.

    The text encoder is taken as it is, and its upper layers, from the first that looks at images, are the decoder's
    too; these look at something else from now on, so that their keys and values begin afresh.
    """
    made = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part != "text_encoder":
            made[name] = tensor
            continue
        if rest.startswith("cls."):
            made[f"text_decoder.{rest}"] = tensor
            continue
        rest = rest.removeprefix("bert.")
        made[f"text_encoder.{rest}"] = tensor
        if layer := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", rest):
            number = int(layer[1]) - fusion_layer
            if number < 0:
                continue
            rest = f"encoder.layer.{number}.{layer[2]}"
        if not CROSS_KEY_VALUE.fullmatch(decoder := f"text_decoder.bert.{rest}"):
            made[decoder] = tensor
    return made


def load_checkpoint(path: Path, model: Xvlm) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Weights of a file of X-VLM's, or of our own, made to fit a model: what its `load_state_dict` takes.

    Files of pretraining are told by their names; those weights that they have not are the model's own, and are named
    too. Tables of biases are resized to the model's windows.

    Raises:
        ValueError: the file cannot be read, or holds other weights; one line that names the file.
    """
    own = model.state_dict()
    state = {name: tensor for name, tensor in read_checkpoint(path).items() if name.partition(".")[0] not in HEADS}
    fresh: frozenset[str] = frozenset()
    if any(name.startswith("text_encoder.bert.") for name in state):
        state = from_pretraining(state, model.config.text.fusion_layer)
        fresh = frozenset(name for name in own if CROSS_KEY_VALUE.fullmatch(name))
        state = {name: own[name] for name in fresh} | state
    state = swin_to_timm(state)
    head = "text_decoder.cls.predictions."
    if f"{head}bias" in state:  # which is one with the other, that not every file has
        state.setdefault(f"{head}decoder.bias", state[f"{head}bias"])
    for name, tensor in state.items():
        if name.endswith(BIAS_TABLE) and name in own and tensor.dim() == 2 and is_odd_square(tensor.shape[0]):
            state[name] = resize_bias_table(tensor, own[name].shape[0])
    problems = []
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"lacks {few(missing)}")
    if unexpected := sorted(state.keys() - own.keys()):
        problems.append(f"has {few(unexpected)} beside them")
    unlike = [name for name in own if name in state and state[name].shape != own[name].shape]
    if unlike:
        sizes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in unlike]
        problems.append(f"has other sizes: {few(sizes)}")
    if problems:
        raise ValueError(f"{path}: no weights of this X-VLM: {'; '.join(problems)}")
    return state, fresh


def few(items: Sequence[str]) -> str:
    """The first three of a list, long ones cut, and how many more there are."""
    texts = ", ".join(item[:150].replace("\n", " ") for item in items[:3])
    return f"{texts} and {len(items) - 3} more" if len(items) > 3 else texts


def is_odd_square(size: int) -> bool:
    """Whether a table of so many rows is one of a square window."""
    side = math.isqrt(size)
    return side * side == size and side % 2 == 1


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that torch has saved, as they were named before they were spread over devices.

    Never runs code from it. What holds more than the weights has these as "model".

    Raises:
        ValueError: the file cannot be read, or holds anything else; one line that names the file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file (X-VLM's weights)")
    most = path.stat().st_size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is said in our one line
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if sum(entry.file_size for entry in archive.infolist()) > 2 * most:  # torch packs nothing
                        raise ValueError("a compressed archive")
            found = torch.load(path, map_location="cpu", weights_only=True)
        found = found["model"] if isinstance(found, Mapping) and "model" in found else found
        check_tensors(found, most)
    except Exception as error:  # pickle and zip errors share no base; the cause is kept
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{path}: cannot be read as weights ({reason[:160].rstrip('.')})") from error
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def check_tensors(found: object, most_bytes: int) -> None:
    """Raise ValueError unless something is named tensors, none of which claims to be larger than its file."""
    if not isinstance(found, Mapping) or not found:
        raise ValueError("holds no named tensors")
    items: Iterable[tuple[object, object]] = found.items()
    for name, tensor in items:
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{str(name)[:60]!r} is no named tensor")
        if tensor.numel() * tensor.itemsize > most_bytes:
            raise ValueError(f"{name[:60]!r} claims {tensor.numel()} values")
