"""`transfer`: work that is done ahead in another thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from inputs import transfer


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_running_ahead_gives_the_same_results_in_order(depth):
    assert list(transfer.run_ahead(lambda item: item * item, range(20), depth)) == [n * n for n in range(20)]
    assert list(transfer.run_ahead(str, [], depth)) == []


@pytest.mark.parametrize("depth", [0, 3])
def test_an_exception_comes_in_the_place_of_its_result(depth):
    def invert(item: int) -> float:
        return 1 / (item - 5)

    results, found = transfer.run_ahead(invert, range(10), depth), []
    with pytest.raises(ZeroDivisionError):
        found.extend(results)  # keeps what came before
    assert found == [1 / (item - 5) for item in range(5)]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_are_taken_up_to_the_depth_ahead_and_no_further(depth):
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(12):
            taken += 1
            yield item

    ahead = []
    for received, item in enumerate(transfer.run_ahead(lambda item: item, items(), depth)):
        assert item == received
        ahead.append(taken - received - 1)
    assert ahead == [min(depth, 12 - received - 1) for received in range(12)]


def test_what_is_ahead_is_computed_in_another_thread_while_a_result_is_in_use():
    done = [threading.Event() for _ in range(4)]
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        done[item].set()
        return item

    results = transfer.run_ahead(work, range(4), 2)
    assert next(results) == 0
    assert done[1].wait(30) and done[2].wait(30)  # without being asked for
    assert not done[3].is_set()
    assert list(results) == [1, 2, 3]
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize("depth", [0, 3])
def test_who_wants_no_more_results_leaves_no_thread_behind(depth):
    before = threading.active_count()
    results = transfer.run_ahead(lambda item: item, range(100), depth)
    assert next(results) == 0
    results.close()
    assert threading.active_count() <= before  # one of another test may have ended since
