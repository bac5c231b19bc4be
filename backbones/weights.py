"""Files of weights: found, read without running code from them, and brought into open_clip's form.

Read are safetensors, pickled state dicts, shards of either with their index, and TorchScript archives as OpenAI
published them; in open_clip's, OpenAI's and transformers' names, wrapped as training programs do.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file
from torch import Tensor

from backbones.download import first_line
from backbones.transformers_format import state_from_transformers
from storage.json_files import MOST_JSON, read_json
from storage.messages import first_five, quoted
from storage.tensors import weight_shapes

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # of weights, the best first
INDEX = ".index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
# What libraries call the weights of a whole model, the best first.
USUAL = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
# What they put beside it.
NO_WEIGHTS = re.compile(
    r"optim\w*|(.*[._-])?scheduler\w*|rng_state\w*|random_states?\w*|training_args|trainer_state|scaler|adapter_model|.*[._-]optim\w*"
)
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # keys that a training program puts weights under
PREFIXES = ("module.", "model.", "clip.", "_orig_mod.")  # of names, by modules that hold the model
OPENAI = ("input_resolution", "context_length", "vocab_size")  # numbers that only OpenAI's own files have among weights
NO_PARAMETERS = ("attn_mask", "position_ids", "n_averaged")  # buffers that are made anew


@dataclass(frozen=True)
class Weights:
    """Tensors under open_clip's names."""

    tensors: Mapping[str, Tensor]
    wrappers: tuple[str, ...] = ()  # keys and prefixes that they stood under
    is_openai: bool = False  # OpenAI's own file, whose models have QuickGELU
    notes: tuple[str, ...] = ()


def find_weights(folder: Path) -> Path:
    """The weights of a folder: a file, or the index of several. Raises ValueError for none, or for more than one."""
    models: dict[str, list[Path]] = {}  # name of the model -> its files, the best first
    for suffix in SUFFIXES:
        whole_first = sorted(folder.glob(f"*{suffix}"), key=lambda path: (SHARD.fullmatch(path.name) is not None, path))
        for path in [*whole_first, *sorted(folder.glob(f"*{suffix}{INDEX}"))]:
            shard = SHARD.fullmatch(path.name)
            stem = shard["stem"] if shard else path.name.removesuffix(INDEX).removesuffix(suffix)
            if not NO_WEIGHTS.fullmatch(stem):
                models.setdefault(stem, []).append(path)
    for stem in USUAL:
        if stem in models:
            return models[stem][0]
    if len(models) > 1:
        names = first_five([paths[0].name for paths in models.values()])
        raise ValueError(f"{folder}: {len(models)} files may be the weights: {names}; name one with --clip_pretrained")
    for paths in models.values():
        return paths[0]
    raise ValueError(
        f"{folder}: no weights file in it, such as model.safetensors; --clip_pretrained none starts at random"
    )


def shards_of(path: Path) -> list[Path]:
    """The files that hold a model together, of which one or their index is given. Raises ValueError, OSError."""
    shard = SHARD.fullmatch(path.name)
    index = path.with_name(f"{shard['stem']}{shard['suffix']}{INDEX}") if shard else path
    if index.name.endswith(INDEX) and index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, Mapping) else []
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{index}: has no weight_map of files beside it")
    elif shard:
        count = int(shard["count"])
        names = [f"{shard['stem']}-{number:05}-of-{count:05}{shard['suffix']}" for number in range(1, count + 1)]
    else:
        return [path]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of its {len(names)} shards are missing: {first_five(missing)}")
    return [path.parent / name for name in names]


def read_weights(path: Path) -> Weights:
    """The weights in a file, or in the shards that it belongs to; never runs code from it. Raises ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is said in our one line
            files = shards_of(path)
            found: dict[Any, Any] = {}
            for file in files:
                found |= content_of(file)
            tensors, wrappers, is_openai = unwrapped(found)
            if not tensors:
                raise ValueError("it holds no weights")
            refuse_claims(tensors, sum(file.stat().st_size for file in files))
    except Exception as error:  # pickle, zip and safetensors errors share no base; the cause is kept
        reason = first_line(error)
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            reason = f"it holds more than tensors; save its state_dict() as .safetensors. {reason}"
        raise ValueError(f"{path}: cannot be read as weights ({reason})") from error
    notes: tuple[str, ...] = ()
    if "vision_model.embeddings.class_embedding" in tensors:
        try:
            tensors, left = state_from_transformers(tensors)
        except KeyError as error:
            raise ValueError(f"{path}: weights in transformers' form without {error}") from None
        if left:
            notes = (f"{path.name}: {len(left)} tensor(s) that are no part of a CLIP left out: {first_five(left)}",)
    if wrappers:
        notes += (f"{path.name}: weights taken out of {' and '.join(map(quoted, wrappers))}",)
    return Weights(tensors, wrappers, is_openai, notes)


def content_of(path: Path) -> Mapping[Any, Any]:
    """What a file of weights holds, by name. Raises ValueError, OSError, and others of pickle, zip and safetensors."""
    if path.suffix == ".safetensors":
        weight_shapes(path)
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if is_script(archive):
                return script_tensors(archive)
            if sum(entry.file_size for entry in archive.infolist()) > 2 * path.stat().st_size:  # torch packs nothing
                raise ValueError("a compressed archive")
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, not weights by name")
    return found


def unwrapped(found: Mapping[Any, Any]) -> tuple[dict[str, Tensor], tuple[str, ...], bool]:
    """Tensors by name, what they were wrapped in, and whether they are OpenAI's own. Raises ValueError."""
    wrappers: list[str] = []
    while odd := [name for name, value in found.items() if not is_weight(name, value)]:
        if {"state", "param_groups"} <= set(found):
            raise ValueError("it holds the state of an optimiser, not weights")
        inside = [key for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        seen = f", under {' and '.join(map(quoted, wrappers))}" if wrappers else ""
        if len(inside) > 1:
            raise ValueError(f"it has weights under {' and '.join(map(quoted, inside))}{seen}; save one of them alone")
        if not inside:
            raise ValueError(f"{odd[0]!r} is no named tensor{seen}")
        wrappers.append(inside[0])
        found = found[inside[0]]
    tensors = {name: value for name, value in found.items() if last_part(name) not in NO_PARAMETERS}
    while tensors and (prefix := next((each for each in PREFIXES if all(n.startswith(each) for n in tensors)), "")):
        wrappers.append(prefix)
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    is_openai = set(OPENAI) <= set(tensors)
    return {name: value for name, value in tensors.items() if name not in OPENAI}, tuple(wrappers), is_openai


def is_weight(name: Any, value: Any) -> bool:
    """Whether an entry of a state dict is a tensor under a name, or one of OpenAI's numbers."""
    return isinstance(name, str) and (isinstance(value, Tensor) or (last_part(name) in OPENAI and type(value) is int))


def last_part(name: str) -> str:
    """What a tensor is called in its module."""
    return name.rpartition(".")[2]


def refuse_claims(tensors: Mapping[str, Tensor], num_bytes: int) -> None:
    """Raise ValueError for a tensor that claims to be larger than the files it came from."""
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.itemsize > num_bytes:
            raise ValueError(f"{name!r} claims {tensor.numel()} values")


# -- TorchScript


class Storage(NamedTuple):
    """Values in an archive."""

    dtype: torch.dtype
    key: str
    length: int


class View(NamedTuple):
    """A tensor in an archive."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ScriptUnpickler(pickle.Unpickler):
    """Reads the tree of modules in a TorchScript archive: dicts of values, tensors as views. Knows no code at all."""

    def __init__(self, content: bytes) -> None:
        super().__init__(BytesIO(content))

        class Module:  # one of its own, because a pickle can change its attributes
            state: Any = None

            def __setstate__(self, state: Any) -> None:
                self.state = state

        self.module = Module

    def find_class(self, module: str, name: str) -> Any:
        """What the few names stand for that such a tree is made of."""
        if module == "__torch__" or module.startswith("__torch__."):
            return self.module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: View(storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"a TorchScript archive with {module}.{name} among its values")

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a tensor is a view of."""
        _, dtype, key, _, length = pid
        return Storage(dtype, key, length)


def is_script(archive: zipfile.ZipFile) -> bool:
    """Whether a zip file is a TorchScript archive."""
    return any(re.fullmatch(r"[^/]+/(code/.+|constants\.pkl)", name) for name in archive.namelist())


def script_tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive, named as in a state dict; its code is left unread.

    Raises:
        ValueError, KeyError, pickle.UnpicklingError, and others: it is damaged, packed, or holds other values.
    """
    root = archive.namelist()[0].partition("/")[0]
    tree = archive.getinfo(f"{root}/data.pkl")
    if tree.file_size > MOST_JSON:
        raise ValueError(f"a TorchScript archive whose modules take {tree.file_size} bytes")
    unpickler = ScriptUnpickler(archive.read(tree))
    views: dict[str, View] = {}
    todo, seen = [("", unpickler.load())], set()
    while todo:
        prefix, value = todo.pop()
        if isinstance(value, View):
            views[prefix] = value
        elif isinstance(value, unpickler.module) and isinstance(value.state, dict) and id(value) not in seen:
            seen.add(id(value))
            todo += [(f"{prefix}.{name}".lstrip("."), part) for name, part in value.state.items()]
    if not views:
        raise ValueError("a TorchScript archive without tensors")
    storages = {view.storage: storage_of(archive, root, view.storage) for view in views.values()}
    return {name: tensor_of(view, storages[view.storage]) for name, view in views.items()}


def storage_of(archive: zipfile.ZipFile, root: str, storage: Storage) -> Tensor:
    """The values of a storage. Raises ValueError if they are not there as they are described."""
    entry = archive.getinfo(f"{root}/data/{storage.key}")
    if entry.compress_size != entry.file_size or entry.file_size != storage.length * storage.dtype.itemsize:
        raise ValueError(
            f"a TorchScript archive that describes {storage.length} values and holds {entry.file_size} bytes"
        )
    if not storage.length:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(archive.read(entry)), dtype=storage.dtype)


def tensor_of(view: View, values: Tensor) -> Tensor:
    """A tensor of an archive. Raises ValueError if it is larger than its storage."""
    numbers = [view.offset, *view.size, *view.stride]
    if any(type(number) is not int or number < 0 for number in numbers) or len(view.size) != len(view.stride):
        raise ValueError("a TorchScript archive with a tensor of no shape")
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
    if 0 not in view.size and last >= len(values):
        raise ValueError("a TorchScript archive with a tensor larger than its storage")
    return torch.as_strided(values, view.size, view.stride, view.offset)


def openai_config(weights: Weights) -> dict[str, Any]:
    """The architecture of one of OpenAI's models, in open_clip's form, as the shapes of its weights tell.

    Raises:
        KeyError, IndexError: they are not those of a whole model.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    width, context = shapes["ln_final.weight"][0], shapes["positional_embedding"][0]
    text = {
        "context_length": context,
        "vocab_size": shapes["token_embedding.weight"][0],
        "width": width,
        "heads": max(1, width // 64),
        "layers": count_blocks(shapes, r"transformer\.resblocks\.(\d+)\..+"),
    }
    vision: dict[str, Any] = {"image_size": native_pixels(shapes)}
    if "visual.proj" in shapes:
        vision |= {
            "width": shapes["visual.conv1.weight"][0],
            "head_width": min(64, shapes["visual.conv1.weight"][0]),
            "patch_size": shapes["visual.conv1.weight"][-1],
            "layers": count_blocks(shapes, r"visual\.transformer\.resblocks\.(\d+)\..+"),
        }
    else:
        layers = [count_blocks(shapes, rf"visual\.layer{stage}\.(\d+)\..+") for stage in (1, 2, 3, 4)]
        vision |= {"width": shapes["visual.layer1.0.conv1.weight"][0], "patch_size": None, "layers": layers}
    return {
        "embed_dim": shapes["text_projection"][1],
        "quick_gelu": True,
        "vision_cfg": vision,
        "text_cfg": text,
    }


def count_blocks(shapes: Mapping[str, Any], pattern: str) -> int:
    """How many blocks have weights: the number in a name that a pattern tells is that of its block."""
    return len({found[1] for name in shapes if (found := re.fullmatch(pattern, name))})


def native_pixels(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Pixels per side that one of OpenAI's models was trained at, by its position table. Raises KeyError."""
    table = shapes.get("visual.positional_embedding") or shapes["visual.attnpool.positional_embedding"]
    grid = math.isqrt(table[0] - 1)
    return grid * (shapes["visual.conv1.weight"][-1] if "visual.positional_embedding" in shapes else 32)


# -- into a model


def load_state(
    clip: open_clip.CustomTextCLIP, tensors: Mapping[str, Tensor], what: str, wrappers: Sequence[str] = ()
) -> None:
    """Load tensors in open_clip's form strictly; position tables are interpolated to the built size.

    Args:
        wrappers: what the tensors were taken out of, for the message.

    Raises:
        ValueError: names or shapes do not fit.
    """
    state = dict(tensors)
    try:
        if "positional_embedding" in state:
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        state.pop("text.transformer.embeddings.position_ids", None)  # older exports of Hugging Face text towers
        for name in ("logit_scale", "logit_bias"):
            own = getattr(clip, name, None)
            if name in state and own is not None:
                state[name] = state[name].reshape(own.shape)
        for name in ("visual.positional_embedding", "text.positional_embedding"):
            if name in state:
                state[name] = state[name].float()  # half precision cannot be interpolated on a CPU
        resize_pos_embed(state, clip)
        misfit = misfits(clip.state_dict(), state)
        if not misfit:
            clip.load_state_dict(state, strict=True)
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        misfit = first_line(error)
    if misfit:
        inside = f"; they were taken out of {' and '.join(map(quoted, wrappers))}" if wrappers else ""
        raise ValueError(f"the weights do not fit {what}: {misfit}{inside}")


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected or of another shape among given weights, in words; "" if nothing is."""
    shapes = {name: (tuple(given[name].shape), tuple(own[name].shape)) for name in own if name in given}
    odd = [f"{name} is {has}, must be {wanted}" for name, (has, wanted) in shapes.items() if has != wanted]
    found = [
        f"{len(names)} {word} ({first_five(names) if len(names) < 3 else names[0] + ', ...'})"
        for word, names in (
            ("missing", [name for name in own if name not in given]),
            ("unexpected", [name for name in given if name not in own]),
            ("of another shape", odd),
        )
        if names
    ]
    for prefix in PREFIXES:
        if 0 < (count := sum(name.startswith(prefix) for name in given)) < len(given):
            found.append(f"{prefix!r} stands before {count} of {len(given)} names")
    return ", ".join(found)
