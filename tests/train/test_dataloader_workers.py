"""Reading in other processes: same items, errors as they are, deaths explained."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finesight.errors import UserError
from finesight.train.dataloader import MAX_RESTARTS, prefetch_items


class NumberItems:
    """Item k is k, but for the one that does something else."""

    def __init__(self, odd: int = -1, signal_number: int = 0) -> None:
        self.odd, self.signal_number, self.home = odd, signal_number, os.getpid()

    def __call__(self, number: int) -> int:
        if number == self.odd and self.signal_number:
            assert os.getpid() != self.home, "not in a worker"
            os.kill(os.getpid(), self.signal_number)
        elif number == self.odd:
            raise UserError("it broke", where="here", expected="better", remedy="fix it")
        return number


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_are_ordered(workers: int) -> None:
    assert list(prefetch_items(NumberItems(), range(3, 20, 2), workers, pin_memory=False)) == [
        *range(3, 20, 2)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_errors_are_reraised(workers: int) -> None:
    items = prefetch_items(NumberItems(odd=3), range(6), workers, pin_memory=False)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError) as caught:
        next(items)
    error = caught.value
    assert (error.what, error.where, error.remedy) == ("it broke", "here", "fix it")


class ProcessGroupItems:
    def __call__(self, number: int) -> int:
        return os.getpgid(0)


def test_workers_ignore_group_signals() -> None:
    groups = set(prefetch_items(ProcessGroupItems(), range(6), 2, pin_memory=False))
    assert len(groups) == 2
    assert os.getpgid(0) not in groups


def test_no_process_remains_after_error() -> None:
    items = prefetch_items(NumberItems(odd=3), range(60), 2, pin_memory=False)
    with pytest.raises(UserError) as caught:
        list(items)
    assert caught.tb is not None
    assert multiprocessing.active_children() == []


def test_no_process_remains_after_early_stop() -> None:
    items = prefetch_items(NumberItems(), range(60), 2, pin_memory=False)
    next(items)
    assert len(multiprocessing.active_children()) == 2
    del items
    assert multiprocessing.active_children() == []


def test_killed_worker_is_explained() -> None:
    items = prefetch_items(NumberItems(2, signal.SIGKILL), range(50), 1, pin_memory=False)
    with pytest.raises(UserError, match=r"worker died[\s\S]*lower train\.num_workers") as caught:
        list(items)
    assert f"{MAX_RESTARTS + 1} times at the same item" in caught.value.what


class TensorItems:
    """What it sends has to be fetched from the worker, if it is still there."""

    def __call__(self, number: int) -> torch.Tensor:
        return torch.full((9,), number)


@pytest.mark.parametrize("data", [NumberItems(), TensorItems()], ids=["numbers", "tensors"])
def test_killed_worker_is_restarted_at_next_item(
    data: Callable[[int], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And is no loss: the worker is started again, with the item that was due."""
    before = signal.getsignal(signal.SIGCHLD)
    items = prefetch_items(data, range(50), 1, pin_memory=False)
    for _ in range(5):
        next(items)
    assert signal.getsignal(signal.SIGCHLD) is before
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert caplog.messages == []
    assert [int(torch.as_tensor(item).max()) for item in items] == [*range(5, 50)]
    (output,) = caplog.messages
    assert output.startswith("a data loader worker died and is restarted")
    assert signal.getsignal(signal.SIGCHLD) is before
    assert multiprocessing.active_children() == []


class FailingItems:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, number: int) -> int:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("it broke"), FileNotFoundError("it broke")])
@pytest.mark.parametrize("workers", [0, 1])
def test_worker_exception_is_not_a_crash(error: Exception, workers: int) -> None:
    with pytest.raises(type(error), match="it broke"):
        list(prefetch_items(FailingItems(error), range(3), workers, pin_memory=False))


def test_reading_does_not_change_torch_rng() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(prefetch_items(NumberItems(), range(3), 0, pin_memory=False))
    assert torch.equal(torch.rand(3), expected)


def test_ten_million_items_use_little_memory() -> None:
    tracemalloc.start()
    try:
        items = prefetch_items(NumberItems(), range(10_000_000), 0, pin_memory=False)
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
