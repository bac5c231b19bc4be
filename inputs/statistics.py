"""Simple statistics of an image, the least that a quality predictor has to beat; and those of a whole data set."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inputs.batches import DroppedRows
from inputs.decoding import as_tensor, decode, reduction
from inputs.image_store import ImageStore, Unreadable
from inputs.transfer import Rows, chunks
from storage.feature_cache import FeatureCache

STATISTICS_CODE = ("storage/image_files.py", "inputs/decoding.py", "inputs/statistics.py")
ROOT = Path(__file__).resolve().parent.parent

NAMES = (
    "brightness",  # mean luma
    "contrast",  # standard deviation of luma
    "entropy",  # of luma in 64 bins, in bits
    "dark",  # share of pixels below 5 % luma
    "bright",  # share above 95 %
    "saturation",  # mean of largest minus smallest channel
    "colourfulness",  # Hasler and Süsstrunk, Measuring colourfulness in natural images, 2003
    "gradient",  # mean magnitude of the difference to the right and lower neighbour
    "sharpness",  # logarithm of the variance of the Laplacian
    "noise",  # mean magnitude of the diagonal Haar detail
    "blockiness",  # logarithm of steps across borders of 8 x 8 blocks over all steps
    "size",  # logarithm of the shorter side in pixels
)
LUMA = (0.299, 0.587, 0.114)
CENTRE = 256  # pixels per side that are looked at: not resized, which would hide sharpness and noise
BLOCK = 8


def simple_statistics(image: Tensor) -> Tensor:
    """(3, H, W) uint8 -> (12,) float32, in the order of NAMES."""
    height, width = image.shape[1:]
    # Whole blocks are left out on each side, so that the grid of a JPEG stays where it is.
    top, left = ((max(0, side - CENTRE) // 2) // BLOCK * BLOCK for side in (height, width))
    rgb = image[:, top : top + CENTRE, left : left + CENTRE].float() / 255
    red, green, blue = rgb
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    share = torch.histc(luma, bins=64, min=0, max=1) / luma.numel()
    entropy = -(share * torch.log2(share.clamp(min=1e-12))).sum()
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = torch.hypot(red_green.std(correction=0), yellow_blue.std(correction=0))
    colourfulness = spread + 0.3 * torch.hypot(red_green.mean(), yellow_blue.mean())
    across, down = luma.diff(dim=1).abs(), luma.diff(dim=0).abs()
    inner = F.pad(luma[None, None], (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    laplacian = F.conv2d(inner, kernel)
    detail = luma[:-1, :-1] - luma[:-1, 1:] - luma[1:, :-1] + luma[1:, 1:]
    values = (
        luma.mean(),
        luma.std(correction=0),
        entropy,
        (luma < 0.05).float().mean(),
        (luma > 0.95).float().mean(),
        (rgb.amax(dim=0) - rgb.amin(dim=0)).mean(),
        colourfulness,
        (mean_or_zero(across) + mean_or_zero(down)) / 2,
        torch.log(laplacian.var(correction=0) + 1e-6),
        mean_or_zero(detail.abs()) / 2,
        torch.log((border_step(across) + border_step(down.T)) / 2),
        torch.log(torch.tensor(float(min(height, width)))),
    )
    return torch.stack(values).float()


def mean_or_zero(values: Tensor) -> Tensor:
    """The mean; 0 of nothing, where an image is a single row or column."""
    return values.mean() if values.numel() else torch.tensor(0.0)


def border_step(steps_HW: Tensor) -> Tensor:
    """Mean step across borders of blocks over the mean of all along the second dimension; 1 if flat or no border."""
    at_border = steps_HW[:, BLOCK - 1 :: BLOCK]
    if not at_border.numel():
        return torch.tensor(1.0)
    return (at_border.mean() + 1e-3) / (steps_HW.mean() + 1e-3)


class ImageStatistics:
    """Simple statistics of all images of a store, each computed when its image is decoded anyway, or at the end."""

    def __init__(self, store: ImageStore, cache: FeatureCache | None, dropping: DroppedRows | None = None) -> None:
        """`cache` keeps them for other runs; None keeps nothing. `dropping`: which rows may be left out."""
        code = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in STATISTICS_CODE))
        recipe = {"what": "simple statistics", "code": code.hexdigest(), "pillow": version("pillow")}
        self.store = store
        self.cache = cache
        self.dropping = dropping or DroppedRows()
        self.features = cache.open(recipe, (len(NAMES),), torch.float32) if cache else None
        self.computed: dict[str, Tensor] = {}

    def missing(self, rows: Rows) -> Rows:
        """Those of the rows whose statistics are not known."""
        keys = [self.store.files[row].digest for row in rows]
        stored = self.features.places if self.features else {}
        new = [row for row, key in zip(rows, keys, strict=True) if key not in self.computed and key not in stored]
        return np.array(new, dtype=int)

    def observe(self, rows: Rows, decoded: list[Tensor]) -> None:
        """Compute those that are missing."""
        images = dict(zip(rows.tolist(), decoded, strict=True))
        wanted = self.missing(rows).tolist()
        # Not in threads: each would start OpenMP threads of its own, which slow down all that follows.
        for row in wanted:
            self.computed[self.store.files[row].digest] = simple_statistics(self.whole(row, images[row]))

    def whole(self, row: int, decoded: Tensor) -> Tensor:
        """An image in all its pixels: very large ones were decoded at a fraction."""
        file = self.store.files[row]
        if reduction(file.size, self.store.image_size) == 1:
            return decoded
        try:
            return as_tensor(decode(self.store.read(row), None))
        except OSError as error:
            raise Unreadable({row: str(error)}, [file.path]) from error

    def of_all(self) -> np.ndarray:
        """(n, 12) of all images; NaN for those that were dropped. Raises OSError, see `batches.DroppedRows`."""
        rows = np.arange(len(self.store.files))
        for piece in chunks(self.missing(rows), 64):
            self.dropping.load(piece, lambda left: self.observe(left, self.store.load(left, keep=False)))
        rows = np.setdiff1d(rows, self.missing(rows))
        keys = [self.store.files[row].digest for row in rows]
        new = [key for key in dict.fromkeys(keys) if key in self.computed]
        if self.cache and self.features and new and self.cache.make_room(len(new) * self.features.row_bytes):
            with self.cache.alone([self.features]):
                left = [new[place] for place in self.features.missing(new)]
                if left:
                    self.features.add(left, torch.stack([self.computed[key] for key in left]))
                self.features.flush()
        stored = [key for key in dict.fromkeys(keys) if key not in self.computed]
        known = dict(self.computed)
        if self.features and stored:
            known |= dict(zip(stored, self.features.stack(stored), strict=True))
        found = np.full((len(self.store.files), len(NAMES)), np.nan)
        found[rows] = torch.stack([known[key] for key in keys]).double().numpy()
        return found
