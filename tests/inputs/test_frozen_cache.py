"""`frozen_cache`: several processes fill one cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from inputs import frozen_cache
from storage import feature_cache, locks


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
