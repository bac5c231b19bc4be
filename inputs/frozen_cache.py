"""What frozen layers compute is computed once: which activations are cached, under which recipe, and where.

A tower's frozen stages in front (`towers.frozen_stages`) always give the same for the same input. With all of CLIP
frozen that is the embedding; otherwise the activations that enter the first trained block. Statistics of those stages
lie beside them, see `Layout`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache as cache_calls
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from backbones import towers
from inputs.batches import DroppedRows
from inputs.image_sources import CachedSource, Layout, PixelSource, View
from inputs.texts import TextTable
from inputs.transfer import Rows, chunks, run_ahead
from storage.feature_cache import FeatureCache, FeatureSet, key_of
from training.devices import Runtime

ROOT = Path(__file__).resolve().parent.parent
# What the cached values depend on besides weights and inputs: this code, and the libraries it calls.
CODE = ("backbones/*.py", "inputs/*.py", "storage/feature_cache.py", "storage/image_files.py")
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "pillow")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_IMAGES = 8  # through a convolutional tower at once: three times as fast as 64
RESIDENT_SHARE = 0.5  # of the free GPU memory beside the reserve; the activations of training need the rest


@dataclass(frozen=True)
class Caching:
    """How activations are cached."""

    cache: FeatureCache
    runtime: Runtime
    dtype: str  # of DTYPES, or "auto"
    identity: Mapping[str, Any]  # what the recipes of both towers have in common
    batch_size: int
    reserve: float  # bytes of GPU memory that training will take for gradients and the optimiser
    keep_decoded: bool  # whether images will be decoded again, for another stage
    fingerprint: Callable[[nn.Module, int], str]  # of the weights of a tower's first stages, see `fingerprint`
    dropping: DroppedRows  # which rows may be left out if their images can no longer be read

    def fits_device(self, num_bytes: float) -> bool:
        """Whether so much may be held in the GPU's memory; on a CPU that is the page cache's business."""
        free = self.runtime.free_memory() - self.reserve
        return self.runtime.device.type != "cpu" and num_bytes <= RESIDENT_SHARE * free

    def dtype_of(self, tower: nn.Module, num_stages: int, example: Tensor) -> torch.dtype:
        """What the activations behind a tower's first stages, such as `example`, are kept as."""
        # Embeddings are small, and rounding them would tie scores that differ.
        is_embedding = num_stages == towers.num_stages(tower)
        return example.dtype if is_embedding else DTYPES.get(self.dtype, example.dtype)

    def open(self, num_stages: int, shape: Sequence[int], dtype: torch.dtype, **details: Any) -> FeatureSet:
        """The cached rows of a tower's first stages."""
        return self.cache.open({**self.identity, "stages": num_stages, **details}, shape, dtype)

    def fill(
        self,
        sets: Sequence[FeatureSet],
        needed: Callable[[], int],
        wanted: Callable[[], Rows],
        compute: Callable[[Rows], None],
    ) -> bool:
        """Let `compute` add what is `wanted` and still missing: each process its share, then what others could not.

        Another run that adds to the same recipes is waited for first.

        Args:
            sets: the recipes.
            needed: how many bytes are missing.

        Returns:
            Whether there is room for them; if not, nothing was added.
        """
        runtime = self.runtime
        is_any_missing = any(runtime.of_all(needed() > 0))  # processes need not share the folder
        with self.cache.alone(sets) if runtime.is_main and is_any_missing else nullcontext():
            if not runtime.of_main(lambda: not needed() or self.cache.make_room(needed())):
                return False
            refresh(sets)
            runtime.barrier()  # all have looked at what is there
            todo = wanted()
            compute(todo[runtime.rank :: runtime.world])
            runtime.barrier()
            refresh(sets)
            compute(wanted())  # nothing, unless processes do not share the folder
            runtime.barrier()  # all have written: the lock is there for all of them
        return True


def refresh(sets: Iterable[FeatureSet]) -> None:
    """Take notice of what other processes have added."""
    for features in sets:
        features.refresh()


def digest_of_code(*patterns: str) -> str:
    """SHA-256 over files of this project, by patterns from its root."""
    files = (path for pattern in patterns for path in sorted(ROOT.glob(pattern)))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def identity(clip_config: Mapping[str, Any], runtime: Runtime) -> dict[str, Any]:
    """What cached values of a CLIP depend on, but for weights, stages and inputs."""
    return {
        "clip": clip_config,
        "device": runtime.device.type,
        "precision": runtime.precision,
        "code": digest_of_code(*CODE),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def build_caching(clip_config: Mapping[str, Any], runtime: Runtime, cache: FeatureCache, batch_size: int) -> Caching:
    """How what a frozen network makes of whole images is kept, in half precision where it is no embedding."""
    return Caching(
        cache=cache,
        runtime=runtime,
        dtype="fp16",
        identity=identity(clip_config, runtime),
        batch_size=batch_size,
        reserve=0,
        keep_decoded=False,
        fingerprint=cache_calls(fingerprint),  # of weights that stay as they are
        dropping=DroppedRows(),
    )


def fingerprint(tower: nn.Module, num_stages: int) -> str:
    """SHA-256 over the weights of a tower's first stages."""
    return fingerprint_of(towers.stage_state(tower, num_stages))


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over named weights."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_encoder(
    visual: nn.Module, num_stages: int, runtime: Runtime, *, with_statistics: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The first stages of an image tower, for pixels (B, 3, S, S) or several views (B, V, 3, S, S).

    It gives activations and the statistics of the stages, of which there are none without `with_statistics`.
    """

    @torch.inference_mode()
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        several = pixels.ndim == 5
        images = pixels.flatten(0, 1) if several else pixels
        # On a CPU feature maps should stay in its caches.
        at_once = CPU_IMAGES if images.device.type == "cpu" and towers.convolutions(visual) else len(images)
        with runtime.autocast():
            pieces = [
                towers.run_observed(visual, piece, 0, num_stages, with_statistics=with_statistics)
                for piece in images.split(at_once)
            ]
        found = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        image, statistics = (values.unflatten(0, pixels.shape[:2]) if several else values for values in found)
        return image, statistics

    return encode


def cache_images(
    caching: Caching,
    visual: nn.Module,
    pixels: PixelSource,
    *,
    rows_of: Mapping[View, Rows],
    evaluation: Mapping[str, Any] | str,
    augmentation: Mapping[str, Any],
    observe: Callable[[Rows, list[Tensor]], None],
    with_statistics: bool = False,
) -> CachedSource | str:
    """Compute what is missing of the frozen stages' activations of images.

    Args:
        rows_of: for each view (None: the evaluation view, 0..V-1: training views) the rows that will be asked for.
        evaluation, augmentation: what the evaluation view and training views depend on.
        observe: is shown all rows that are decoded, with their images.
        with_statistics: whether the statistics of those stages are needed, see `towers.statistics_of`.

    Returns:
        The source of activations, or why there is none.
    """
    runtime, num_stages = caching.runtime, towers.frozen_stages(visual)
    if num_stages == 0:
        return "no frozen layers in front"

    encode = image_encoder(visual, num_stages, runtime, with_statistics=with_statistics)
    visual.eval()
    source = open_source(
        caching,
        visual,
        pixels,
        encode,
        rows_of=rows_of,
        of_views=(evaluation, augmentation),
        statistics=with_statistics,
    )

    def needed() -> int:
        return source.size({view: source.missing(view) for view in rows_of})

    def wanted() -> Rows:
        return caching.dropping.left(np.unique(np.concatenate([source.missing(view) for view in rows_of])).astype(int))

    def encode_rows(pixels: Tensor, view: View) -> Tensor:
        image, statistics = encode(pixels)
        return source.layouts[view is not None].pack(image.to(source.evaluation.dtype), statistics)

    compute = partial(add_views, source, pixels, encode_rows, caching, observe)
    if not caching.fill([source.evaluation, source.training], needed, wanted, compute):
        return f"would take {needed() / 1e9:.1f} GB, more than --cache_max_gb or the disk has left"
    source.rows_of = {view: caching.dropping.left(rows) for view, rows in rows_of.items()}
    if caching.fits_device(source.size(source.rows_of)):
        source.move_to_device()
    return source


def open_source(
    caching: Caching,
    visual: nn.Module,
    pixels: PixelSource,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    rows_of: Mapping[View, Rows],
    of_views: tuple[Mapping[str, Any] | str, Mapping[str, Any]],
    statistics: bool,
) -> CachedSource:
    """The source of activations as far as they are in the cache; see `cache_images`."""
    views, num_stages = pixels.views, towers.frozen_stages(visual)
    counts = (views.count(None), views.count(0))
    shape = (3, views.image_size, views.image_size)
    several = {count: (count,) if count > 1 else () for count in counts}
    found = {n: encode(torch.zeros(1, *several[n], *shape, device=caching.runtime.device)) for n in several}
    examples = [found[count] for count in counts]
    layouts = [Layout(tuple(image.shape[1:]), tuple(numbers.shape[1:])) for image, numbers in examples]
    dtype = caching.dtype_of(visual, num_stages, examples[0][0])
    details = {"weights": caching.fingerprint(visual, num_stages), "input": "image", "image_size": views.image_size}
    sets = [
        caching.open(
            num_stages,
            layout.pack(image.to(dtype), numbers).shape[1:],
            dtype,
            **details,
            statistics=statistics,
            view=view,
        )
        for layout, (image, numbers), view in zip(layouts, examples, of_views, strict=True)
    ]
    return CachedSource(
        (sets[0], sets[1]),
        [file.digest for file in pixels.store.files],
        rows_of=rows_of,
        stage=num_stages,
        device=caching.runtime.device,
        dtype=examples[0][0].dtype,
        layouts=(layouts[0], layouts[1]),
        counts=counts,
        is_embedding=num_stages == towers.num_stages(visual),
    )


def add_views(
    source: CachedSource,
    pixels: PixelSource,
    encode: Callable[[Tensor, View], Tensor],
    caching: Caching,
    observe: Callable[[Rows, list[Tensor]], None],
    rows: Rows,
) -> None:
    """Decode some rows once and add those of their views that are missing."""
    store = pixels.store
    todo = {view: set(source.missing(view).tolist()) for view in source.rows_of}

    def load(piece: Rows) -> tuple[Rows, list[Tensor]]:
        left, decoded = caching.dropping.load(piece, lambda rows: store.load(rows, keep=caching.keep_decoded))
        return left, decoded or []

    pieces = run_ahead(load, chunks(rows, caching.batch_size), caching.runtime.num_ahead)
    with tqdm(total=len(rows), unit="img", leave=False, disable=caching.runtime.hide_progress) as bar:
        for loaded, decoded in pieces:
            image_of = dict(zip(loaded.tolist(), decoded, strict=True))

            def watch(rows: Rows, image_of: dict[int, Tensor] = image_of) -> None:
                observe(rows, [image_of[row] for row in rows.tolist()])

            piece, _ = caching.dropping.load(loaded, watch)
            images = [image_of[row].to(caching.runtime.device) for row in piece.tolist()]
            for view, rows_left in todo.items():
                places = [place for place, row in enumerate(piece) if int(row) in rows_left]
                if places:
                    features, keys = source.keys(piece[places], view)
                    digests = [store.files[row].digest for row in piece[places]]
                    features.add(keys, encode(pixels.views([images[place] for place in places], digests, view), view))
            bar.update(len(loaded))
    source.evaluation.flush()
    source.training.flush()


def cache_texts(caching: Caching, text: nn.Module, table: TextTable) -> str:
    """Compute what is missing of the frozen stages' activations of a table's texts, and put them into the table.

    Returns:
        Why nothing is cached; "" if it is.
    """
    runtime, num_stages = caching.runtime, towers.frozen_stages(text)
    if num_stages == 0:
        table.enter_at(0, None)
        return "no frozen layers in front"
    longest = int(table.lengths.max())

    @torch.inference_mode()
    def encode(tokens_PN: Tensor) -> Tensor:
        with runtime.autocast():
            return towers.run_text(text, tokens_PN, tokens_PN, 0, num_stages)

    text.eval()
    example = encode(table.tokens_UN[:1, :longest])
    weights = caching.fingerprint(text, num_stages)
    dtype = caching.dtype_of(text, num_stages, example)
    features = caching.open(num_stages, example.shape[1:], dtype, weights=weights, input="text")
    keys = [key_of(row.tobytes()) for row in table.host_tokens_UN.numpy()]
    total = len(keys) * features.row_bytes
    # They are used from memory, on a GPU its own.
    fits = runtime.agree(runtime.device.type == "cpu" or caching.fits_device(total))

    def needed() -> int:
        return len(features.missing(keys)) * features.row_bytes

    def wanted() -> Rows:
        return np.array(features.missing(keys), dtype=int)

    def compute(numbers: Rows) -> None:
        for chunk in chunks(numbers[np.argsort(table.lengths[numbers], kind="stable")], caching.batch_size):
            length = int(table.lengths[chunk].max())
            values = encode(table.tokens_UN[torch.from_numpy(chunk).to(runtime.device), :length])
            if values.ndim == 3:  # nothing looks at what stands behind the end of a text
                values = nn.functional.pad(values, (0, 0, 0, longest - length))
            features.add([keys[number] for number in chunk], values)
        features.flush()

    if not fits or not caching.fill([features], needed, wanted, compute):
        table.enter_at(0, None)
        return f"would take {total / 1e9:.1f} GB, more than the GPU, --cache_max_gb or the disk has left"
    table.enter_at(num_stages, features.stack(keys).to(runtime.device), example.dtype)
    return ""
