"""`frozen_cache`: what is cached stands for pixels, and several processes fill one cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_feeds import feed_of, store_of, views_of
from small_models import IMAGE_LAYERS, build_clip, build_model, stir

from backbones import towers
from backbones.freezing import freeze_backbone
from inputs import frozen_cache, image_store
from inputs.batches import DroppedRows
from inputs.image_sources import PixelSource
from storage import feature_cache, locks
from training import devices


@pytest.fixture(scope="module")
def store(demo_set) -> image_store.ImageStore:
    return store_of(demo_set)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"crops": 2, "test_crops": 3}], ids=["resized", "crops"])
@pytest.mark.parametrize("with_statistics", [False, True], ids=["activations alone", "statistics"])
@pytest.mark.parametrize(
    ("freezing", "stage"), [({"everything": True}, IMAGE_LAYERS + 1), ({"num_layers": 2}, 2)], ids=["all", "two blocks"]
)
def test_cached_stages_score_as_pixels_do(store, tmp_path, freezing, stage, with_statistics, options):
    clip = build_clip()
    width = towers.num_statistics(clip.visual) if with_statistics else 0
    model = build_model(clip, stage_width=width).eval()
    freeze_backbone(clip, **freezing)
    stir(model.heads)
    caching = frozen_cache.Caching(
        feature_cache.FeatureCache(tmp_path, 1e9),
        devices.start_runtime("cpu", "off"),
        "float32",
        {},
        batch_size=4,
        reserve=0,
        keep_decoded=False,
        fingerprint=frozen_cache.fingerprint,
        dropping=DroppedRows(),
    )
    pixels = PixelSource(store, views_of(**options))
    source = frozen_cache.cache_images(
        caching,
        clip.visual,
        pixels,
        rows_of={None: np.arange(10), 0: np.arange(5)},
        evaluation="evaluation",
        augmentation=options,
        observe=lambda rows, images: None,
        with_statistics=with_statistics,
    )
    feed = feed_of(pixels)
    order = [(None, np.array([7, 0, 3])), (0, np.array([4, 1])), (None, np.array([9]))]
    expected = [model(**batch.inputs)["q"] for batch in feed.batches(order)]
    feed.source = source
    for batch, scores in zip(feed.batches(order), expected, strict=True):
        assert batch.inputs["image_stage"] == stage and ("statistics" in batch.inputs) == with_statistics
        torch.testing.assert_close(model(**batch.inputs)["q"], scores, atol=1e-5, rtol=0)
    assert torch.cat(expected).std() > 1e-3


class Ranks:
    """Stands for the runtime of one of two processes, which are threads here."""

    world = 2

    def __init__(self, rank: int, meeting: threading.Barrier, values: dict[int, Any]) -> None:
        self.rank, self.meeting, self.values = rank, meeting, values
        self.is_main = rank == 0

    def barrier(self) -> None:
        self.meeting.wait(60)

    def of_all(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier()
        found = [self.values[rank] for rank in range(self.world)]
        self.barrier()
        return found

    def of_main(self, compute: Callable[[], Any]) -> Any:
        return self.of_all(compute() if self.is_main else None)[0]


def is_free(folder: Path) -> bool:
    """Whether another run could take the lock of a recipe."""
    try:
        with locks.locked(folder, wait=None):
            return True
    except BlockingIOError:
        return False


@pytest.mark.parametrize("main_misses", [True, False])
def test_no_other_run_can_take_a_recipe_before_the_last_process_has_written(tmp_path, main_misses):
    """Also where processes see folders of their own, and the first misses nothing in its own."""
    meeting, values = threading.Barrier(2), {}
    left: dict[int, list[int]] = {0: [0] if main_misses else [], 1: [0, 1]}  # what is missing
    free: list[bool] = []

    def run(rank: int) -> None:
        cache = feature_cache.FeatureCache(tmp_path, 1e9)
        rows = cache.open({"what": "rows"}, (1,), torch.float32)

        def compute(numbers: np.ndarray) -> None:
            if len(numbers):
                if rank == 1:
                    threads[0].join(0.3)  # time enough to leave
                    free.append(is_free(rows.folder))
                left[rank] = [number for number in left[rank] if number not in numbers]

        setting = SimpleNamespace(cache=cache, runtime=Ranks(rank, meeting, values))
        frozen_cache.Caching.fill(
            setting, [rows], lambda: len(left[rank]), lambda: np.array(left[rank], dtype=int), compute
        )

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert left == {0: [], 1: []} and free == [False, False]
    assert list(tmp_path.iterdir()) == []  # nothing was put into it
