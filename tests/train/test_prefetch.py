"""Reading in other processes: same items, errors as they are, deaths explained."""

import gc
import multiprocessing
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from finesight.errors import UserError
from finesight.train.prefetch import MAX_RESTARTS, prefetch_items


class Items:
    """Item k is k, except one item that kills its process or raises an error."""

    def __init__(self, special: int = -1, effect: int | Exception = 0) -> None:
        self.special, self.effect, self.home = special, effect, os.getpid()

    def __call__(self, number: int) -> int:
        if number == self.special:
            if isinstance(self.effect, Exception):
                raise self.effect
            assert os.getpid() != self.home, "not in a worker"
            os.kill(os.getpid(), self.effect)
        return number


class ProcessGroupItems:
    def __call__(self, number: int) -> int:
        return os.getpgid(0)


@pytest.fixture
def list_workers() -> Callable[[], list[BaseProcess]]:
    """Lists the processes that the test started; other tests may have left theirs."""
    gc.collect()
    before = set(multiprocessing.active_children())
    return lambda: [one for one in multiprocessing.active_children() if one not in before]


def read(items: Callable[[int], Any], indices: range, workers: int) -> Iterator[Any]:
    return prefetch_items(items, indices, workers, pin_memory=False)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_are_ordered(workers):
    """Reading does not use the random numbers of torch."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert list(read(Items(), range(3, 20, 2), workers)) == [*range(3, 20, 2)]
    assert torch.equal(torch.rand(3), expected) or workers


@pytest.mark.parametrize(
    "error",
    [
        UserError("it broke", where="here", expected="better", remedy="fix it"),
        RuntimeError("it broke"),
        FileNotFoundError("it broke"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_reraised_without_crash(error, workers, list_workers):
    items = read(Items(3, error), range(60), workers)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error), match="it broke") as caught:
        next(items)
    if isinstance(caught.value, UserError):
        assert (caught.value.where, caught.value.remedy) == ("here", "fix it")
        assert list_workers() == []


def test_workers_ignore_group_signals():
    groups = set(read(ProcessGroupItems(), range(6), 2))
    assert len(groups) == 2
    assert os.getpgid(0) not in groups


def test_no_process_remains_after_early_stop(list_workers):
    items = read(Items(), range(60), 2)
    next(items)
    assert len(list_workers()) == 2
    del items
    assert list_workers() == []


def test_repeatedly_killed_worker_is_explained():
    with pytest.raises(UserError, match=r"worker died[\s\S]*lower train\.num_workers") as caught:
        list(read(Items(2, signal.SIGKILL), range(50), 1))
    assert f"{MAX_RESTARTS + 1} times at the same item" in caught.value.what


def test_ten_million_items_use_little_memory():
    tracemalloc.start()
    try:
        items = read(Items(), range(10_000_000), 0)
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
