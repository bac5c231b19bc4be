"""The drawn set with features: scenes and questions in official form, and regions described by their pixels alone.

Shapes: K regions of an image, F numbers that describe one.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from backbones import towers
from backbones.loading import Backbone, load_backbone
from inputs.decoding import as_tensor, decode
from regions.features import GqaObjects
from storage.atomic import sync, temporary_name, write_errors
from storage.json_files import write_json
from storage.locks import locked
from training.devices import Runtime
from vqa.drawn import DrawnImage, draw, remove_left, say_that_it_waits

CLIP = ("lite", "assets")
STAGES = 4  # of its seven; later ones see things that are no coloured shapes
NUM_IMAGES = 960
CROP = 48  # pixels per side that a region is seen at
MARGIN = 0.1  # of a box's sides that are seen around it
CROPS_AT_ONCE = 64
FEATURES = {"GQA": "objects", "VQA": "trainval.hdf5"}  # form -> where they lie in the folder
VERSION = 3  # of what is drawn and computed; another one is drawn anew


def find_demo_set(cache: Path, form: str, runtime: Runtime) -> tuple[Path, Path]:
    """The folder of the drawn set, "GQA" or "VQA", and what --features names in it; made if it is not there yet.

    Raises:
        OSError: it cannot be written.
    """
    folder = cache / f"drawn-{form.lower()}-{VERSION}"
    if not folder.is_dir():
        with locked(cache, wait=say_that_it_waits) as is_locked:
            if is_locked:
                remove_left(folder)
            if not folder.is_dir():
                make_demo_set(folder, form, runtime)
    return folder, folder / FEATURES[form]


def make_demo_set(folder: Path, form: str, runtime: Runtime) -> None:
    """Draw the set and compute its features; the folder appears when it is whole. Raises OSError."""
    runtime.say(f"drawing   scenes and questions in {folder}, once")
    temporary = temporary_name(folder)
    whole = temporary / folder.name  # in a folder of its own, for what `draw` puts beside it
    write = write_gqa_objects if form == "GQA" else write_stacked
    try:
        images = draw(whole, form, num_images=NUM_IMAGES)
        features = box_features(load_backbone(*CLIP), runtime, images)
        with write_errors(folder):
            write(whole / FEATURES[form], images, features)
            for path in (*whole.rglob("*"), whole):  # see `drawn.put`
                sync(path)
            try:
                whole.rename(folder)
            except OSError:  # another process was quicker, where folders cannot be locked
                if not folder.is_dir():
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def box_features(backbone: Backbone, runtime: Runtime, images: Sequence[DrawnImage]) -> list[NDArray[np.float32]]:
    """(K, F) for each image: what `describe` gives, of mean 0 and standard deviation 1 over the training fold."""
    features = describe(backbone, runtime, images)
    are_trained = torch.tensor([image.fold == "train" for image in images for _ in image.boxes])
    std, mean = torch.std_mean(features[are_trained], dim=0)
    counts = [len(image.boxes) for image in images]
    return [part.numpy() for part in ((features - mean) / (std + 1e-6)).split(counts)]


@torch.inference_mode()
def describe(backbone: Backbone, runtime: Runtime, images: Sequence[DrawnImage]) -> Tensor:
    """(boxes of all images, F): mean and deviation of what a CLIP's first stages make of the pixels in each box."""
    visual = backbone.clip.visual.to(runtime.device).eval()
    mean, std = (torch.tensor(backbone.config["preprocess_cfg"][name])[:, None, None] for name in ("mean", "std"))
    crops = torch.stack([crop for image in images for crop in crops_of(image)])
    found = []
    for part in crops.split(CROPS_AT_ONCE):
        x = ((part.float() / 255 - mean) / std).to(runtime.device)
        found.append(towers.run_observed(visual, x, 0, STAGES)[1].float().cpu())
    return torch.cat(found)


def crops_of(image: DrawnImage) -> list[Tensor]:
    """(3, CROP, CROP) uint8 of each box and a little around it."""
    pixels, found = as_tensor(decode(image.path, None)), []
    for x1, y1, x2, y2 in image.boxes:
        across, down = MARGIN * (x2 - x1), MARGIN * (y2 - y1)
        left, top = max(0, int(x1 - across)), max(0, int(y1 - down))
        right, bottom = min(image.width, int(np.ceil(x2 + across))), min(image.height, int(np.ceil(y2 + down)))
        found.append(F.resize(pixels[:, top:bottom, left:right], [CROP, CROP], antialias=True))
    return found


def write_gqa_objects(folder: Path, images: Sequence[DrawnImage], features: Sequence[NDArray[np.float32]]) -> None:
    """Features in the form of GQA's object files, with room for no more objects than there are."""
    folder.mkdir()
    most, width = max(map(len, features)), features[0].shape[1]
    info: dict[str, Any] = {}
    with h5py.File(folder / "gqa_objects_0.h5", "w") as file:
        all_features = file.create_dataset("features", (len(images), most, width), dtype="f4")
        all_boxes = file.create_dataset("bboxes", (len(images), most, 4), dtype="f4")
        for place, (image, own) in enumerate(zip(images, features, strict=True)):
            all_features[place, : len(own)], all_boxes[place, : len(own)] = own, np.array(image.boxes)
            size = {"width": image.width, "height": image.height}
            info[image.id] = {"file": 0, "idx": place, "objectsNum": len(own), **size}
    write_json(folder / GqaObjects.INFO, info)


def write_stacked(path: Path, images: Sequence[DrawnImage], features: Sequence[NDArray[np.float32]]) -> None:
    """Features in the form of BAN's files: those of all images one after another, and which image comes when."""
    boxes = np.concatenate([np.array(image.boxes, dtype=np.float32) for image in images])
    sizes = np.concatenate([np.tile([image.width, image.height] * 2, (len(image.boxes), 1)) for image in images])
    corners = boxes / sizes
    ends = np.cumsum([len(own) for own in features])
    with h5py.File(path, "w") as file:
        file["image_features"] = np.concatenate(features)
        file["image_bb"] = boxes
        file["spatial_features"] = np.hstack([corners, corners[:, 2:] - corners[:, :2]]).astype(np.float32)
        file["pos_boxes"] = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    index = {int(image.id): place for place, image in enumerate(images)}
    path.with_name("imgid2idx.pkl").write_bytes(pickle.dumps(index))
