"""How a whole image becomes an evaluation view: as open_clip's own transform does it, for every resize mode."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from backbones import names
from inputs.decoding import as_tensor
from inputs.views import RESIZE_MODES, Views
from sources.describe import wide_images
from storage.image_files import ImageFile

SIZE, MEAN, STD = 32, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def smooth_image(width: int, height: int) -> Image.Image:
    """An image without detail that kernels could disagree about."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], axis=-1)).astype(np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(64, 40), (41, 77), (50, 50), (20, 24)])
def test_the_evaluation_view_is_that_of_open_clip(mode, interpolation, size):
    image = smooth_image(*size)
    theirs = image_transform(SIZE, False, MEAN, STD, resize_mode=mode, interpolation=interpolation)(image)
    cpu = torch.device("cpu")
    views = Views(image_size=SIZE, mean=MEAN, std=STD, device=cpu, resize_mode=mode, interpolation=interpolation)
    ours = views([as_tensor(np.array(image))], ["digest"], None)[0]
    # Pillow and torch round each pixel by itself: two grey levels of 255.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 / 255 / min(STD))


@pytest.mark.parametrize("said", [{"resize_mode": "stretch"}, {"interpolation": "nearest"}])
def test_an_unknown_mode_is_refused(said):
    with pytest.raises(ValueError, match="must be of shortest, longest, squash, and of bicubic, bilinear"):
        Views(image_size=SIZE, mean=MEAN, std=STD, device=torch.device("cpu"), **said)


def test_a_folder_and_a_tag_say_their_mode(tmp_path):
    model_cfg = names.resolve("ViT-B-32", "none").config["model_cfg"]
    said = {"mean": MEAN, "std": STD, "resize_mode": "squash", "interpolation": "bilinear"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": said}))
    assert names.resolve(f"local-dir:{tmp_path}", "none").config["preprocess_cfg"] == said
    assert names.resolve("ViT-B-16-SigLIP", "webli").config["preprocess_cfg"]["resize_mode"] == "squash"
    assert set(names.resolve("ViT-B-32", "openai").config["preprocess_cfg"]) == {"mean", "std"}


def test_what_the_middle_square_leaves_out_is_told(tmp_path):
    files = [ImageFile(tmp_path / str(size), "", size) for size in ((100, 100), (200, 100), (90, 100))]
    said = wide_images(files)
    assert said == "the middle square leaves out up to 50% of an image, 25% or more of 1 image(s)"
    assert wide_images(files[:1]) == "none"
