"""Reading in other processes: same items, errors as they are, deaths explained."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tracemalloc
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from finesight.errors import UserError
from finesight.train.workers import RESTARTS, guarded, read_ahead


class Numbers(Dataset[int | UserError]):
    """Item k is k, but for the one that does something else."""

    def __init__(self, odd: int = -1, signal_number: int = 0) -> None:
        self.odd, self.signal_number, self.home = odd, signal_number, os.getpid()

    def __getitem__(self, number: int) -> int | UserError:
        if number == self.odd and self.signal_number:
            assert os.getpid() != self.home, "not in a worker"
            os.kill(os.getpid(), self.signal_number)
        elif number == self.odd:
            return guarded(self.fail)
        return number

    def fail(self) -> int:
        raise UserError("it broke", where="here", expected="better", remedy="mend it")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_come_in_order(workers: int) -> None:
    assert list(read_ahead(Numbers(), range(3, 20, 2), workers, pin=False)) == [*range(3, 20, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_as_it_was_raised(workers: int) -> None:
    items = read_ahead(Numbers(odd=3), range(6), workers, pin=False)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError) as caught:
        next(items)
    error = caught.value
    assert (error.what, error.where, error.remedy) == ("it broke", "here", "mend it")


class Groups(Dataset[int | UserError]):
    def __getitem__(self, number: int) -> int:
        return os.getpgid(0)


def test_workers_are_out_of_reach_of_signals_to_the_group() -> None:
    groups = set(read_ahead(Groups(), range(6), 2, pin=False))
    assert len(groups) == 2
    assert os.getpgid(0) not in groups


def test_no_process_stays_behind_an_error() -> None:
    items = read_ahead(Numbers(odd=3), range(60), 2, pin=False)
    with pytest.raises(UserError) as caught:
        list(items)
    assert caught.tb is not None
    assert multiprocessing.active_children() == []


def test_no_process_stays_when_reading_is_broken_off() -> None:
    items = read_ahead(Numbers(), range(60), 2, pin=False)
    next(items)
    assert len(multiprocessing.active_children()) == 2
    del items
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_explained() -> None:
    items = read_ahead(Numbers(2, signal.SIGKILL), range(50), 1, pin=False)
    with pytest.raises(UserError, match=r"data died[\s\S]*train\.workers lower") as caught:
        list(items)
    assert f"{RESTARTS + 1} times for one item" in caught.value.what


class Tensors(Dataset[torch.Tensor | UserError]):
    """What it sends has to be fetched from the worker, if it is still there."""

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.full((9,), number)


@pytest.mark.parametrize("data", [Numbers(), Tensors()], ids=["numbers", "tensors"])
def test_a_death_shows_at_the_next_item_and_never_in_between(
    data: Dataset[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And is no loss: the worker is started again, with the item that was due."""
    before = signal.getsignal(signal.SIGCHLD)
    items = read_ahead(data, range(50), 1, pin=False)
    for _ in range(5):
        next(items)
    assert signal.getsignal(signal.SIGCHLD) is before
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert caplog.messages == []
    assert [int(torch.as_tensor(item).max()) for item in items] == [*range(5, 50)]
    (said,) = caplog.messages
    assert said.startswith("a process that reads data died, and is started again")
    assert signal.getsignal(signal.SIGCHLD) is before
    assert multiprocessing.active_children() == []


class Broken(Dataset[int | UserError]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, number: int) -> int:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("it broke"), FileNotFoundError("it broke")])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_ours_in_a_worker_is_no_death(error: Exception, workers: int) -> None:
    with pytest.raises(type(error), match="it broke"):
        list(read_ahead(Broken(error), range(3), workers, pin=False))


def test_reading_leaves_the_random_numbers_of_training_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(read_ahead(Numbers(), range(3), 0, pin=False))
    assert torch.equal(torch.rand(3), expected)


def test_ten_million_items_to_come_take_no_memory() -> None:
    tracemalloc.start()
    try:
        items = read_ahead(Numbers(), range(10_000_000), 0, pin=False)
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
