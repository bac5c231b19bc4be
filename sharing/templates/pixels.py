"""What the model of this folder is shown of an image file: its pixels, as uint8 and to the bit as in training."""

import math

import numpy as np
from PIL import Image, ImageOps


def decode(path, formats, size):
    """(H, W, 3) uint8, upright, on white; an image far larger than `size` at a half, a quarter or an eighth of it."""
    Image.init()
    with Image.open(path, formats=[name for name in formats if name in Image.OPEN]) as image:
        factor = max(f for f in (1, 2, 4, 8) if f == 1 or (size and min(image.size) >= 3 * f * size))
        reduced = sorted(math.ceil(side / factor) for side in image.size)
        image.draft(None, (image.width // factor, image.height // factor))
        assert image.mode[0] not in "IF" or image.format == "PNG", "more than 8 bits are read of PNG alone; save it so"
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    return np.asarray(image if sorted(image.size) == reduced else image.reduce(factor))


def resize(pixels, sides, kind):
    """(H, W, 3) -> (*sides, 3) as torchvision does with uint8 and antialias: 16-bit weights, widths before heights."""
    for axis, new in ((1, sides[1]), (0, sides[0])):
        pixels, scale = np.moveaxis(pixels, axis, 0), pixels.shape[axis] / new
        x = np.abs(np.arange(len(pixels)) + 0.5 - scale * (np.arange(new)[:, None] + 0.5)) / max(scale, 1)
        cubic = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5 * (x < 2))
        weights = cubic if kind == "bicubic" else np.maximum(1 - x, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        one = max(2**bits for bits in range(23) if int(0.5 + weights.max() * 2**bits) < 2**15)
        found = np.tensordot(np.trunc(weights * one + np.copysign(0.5, weights)), pixels, axes=1)  # whole numbers
        pixels = np.moveaxis(((found + one // 2) // one).clip(0, 255).astype(np.uint8), 0, axis)
    return pixels


def take_views(pixels, size, mode, interpolation, whole, crops):
    """(V, S, S, 3) uint8: the whole image, if it is looked at, then crops of native size on a grid of (few, many)."""
    (height, width), found = pixels.shape[:2], []
    shortest = [int(size * side / min(height, width)) for side in (height, width)]
    if whole:
        longest = [max(1, round(size * side / max(height, width))) for side in (height, width)]
        sides = {"squash": [size, size], "shortest": shortest, "longest": longest}[mode]
        image = resize(pixels, sides, interpolation)
        image = np.pad(image, [(max(0, size - side) // 2, max(0, size - side + 1) // 2) for side in (*sides, size)])
        top, left = (round(max(0, side - size) / 2) for side in sides)
        found.append(image[top : top + size, left : left + size])
    if crops:
        pixels = resize(pixels, shortest, "bicubic") if min(height, width) < size else pixels
        ends = zip((side - size for side in pixels.shape), sorted(crops, reverse=height > width), strict=False)
        tops, lefts = (np.rint(np.linspace(0, end, n) if n > 1 else [end / 2]).astype(int) for end, n in ends)
        found += [pixels[top : top + size, left : left + size] for top in tops for left in lefts]
    return np.stack(found)
