"""The embedded lite CLIP: small, complete, and it knows what real pictures show."""

from __future__ import annotations

import open_clip
import torch
from sklearn.datasets import load_sample_images

from backbones import loading, names, towers
from inputs.views import Views

TEXTS = ("a palace", "a flower", "a dog", "a car", "food on a plate")


def test_the_asset_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in names.EMBEDDED["lite"].iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert {"open_clip_config.json", "open_clip_model.safetensors", "README.md", "LICENSE", *tokenizer} == set(files)
    assert sum(files.values()) <= 10e6


def test_it_finds_the_text_that_fits_a_photograph():
    backbone = loading.load_backbone("lite", "assets")
    assert backbone.image_size == 288
    views = Views(image_size=288, device=torch.device("cpu"), **backbone.config["preprocess_cfg"])
    pictures = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    tokens = backbone.tokenizer(list(TEXTS))
    with torch.inference_mode():
        pixels = views(pictures, ["china", "flower"], None)
        image = towers.run_image(backbone.clip.visual.eval(), pixels, 0, 8)
        text = towers.run_text(backbone.clip.text, tokens, tokens, 0, 3)
    cosines = image @ text.T
    assert cosines.argmax(dim=1).tolist() == [0, 1]
    others = cosines[:, 2:].max(dim=1).values
    assert (cosines.max(dim=1).values > others + 0.2).all()


def test_open_clip_itself_loads_it_and_embeds_the_same():
    place = f"local-dir:{names.EMBEDDED['lite']}"
    theirs = open_clip.create_model(place).eval()
    ours = loading.load_backbone("lite", "assets").clip.eval()
    pixels = torch.rand(2, 3, 288, 288, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(theirs.encode_image(pixels), ours.encode_image(pixels), atol=1e-4, rtol=1e-4)


def test_a_text_ends_with_the_highest_number_where_it_is_read():
    backbone = loading.load_backbone("lite", "assets")
    tokens = backbone.tokenizer(["a red circle", "unheardofness " * 100])
    assert tokens.shape == (2, 64)
    highest = backbone.config["model_cfg"]["text_cfg"]["vocab_size"] - 1
    assert (tokens.max(dim=1).values == highest).all() and (tokens == highest).sum(dim=1).tolist() == [1, 1]
    assert towers.trims_exactly(backbone.clip.text)
