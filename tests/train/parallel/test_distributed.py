"""Distributed training: equality with single-process training, and failures of ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from case_files import load_cases
from multi_process_run import rewind_to_checkpoint, run_in_ranks, run_to_completion, start_run
from safetensors.torch import load_file
from tiny_task import TinyTask, read_losses, write_recipe
from torch import Tensor

from finesight.cli.app import run_command
from finesight.encode.packing import SampleShape
from finesight.errors import TrainingInterrupted
from finesight.train.checkpoint import OPTIMIZER_FILE, WEIGHTS_FILE
from finesight.train.dataloader import StepBatch
from finesight.train.dataset_stats import SampleStats
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget, max_unsplit_packs
from finesight.train.parallel import distributed
from finesight.train.parallel.distributed import (
    PeerFailedError,
    ProcessGroup,
    RankDesyncError,
    RankMonitor,
    RankTimeoutError,
)
from finesight.train.sampler import DistributedSampler
from finesight.train.setup import build_rank_sampler
from finesight.train.trainer import Trainer, sync_step

CASES = load_cases("distributed")


def read_trained_state(folder: Path) -> dict[str, Tensor]:
    """Weights, and means of gradients and of their squares, after the last step."""
    last = folder / "checkpoints" / "step-6"
    return load_file(last / WEIGHTS_FILE) | load_file(last / OPTIMIZER_FILE)


def assert_close(folder: Path, other: Path) -> None:
    """Compare tensors by their root mean square error.

    AdamW takes full steps for gradients that consist of rounding errors, so single elements may
    differ.
    """
    assert dict(read_losses(folder)) == pytest.approx(dict(read_losses(other)), rel=1e-6)
    ours, theirs = read_trained_state(folder), read_trained_state(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).square().mean().sqrt() <= 1e-6, name


def run_ranks(works: Sequence[Callable[[], None]]) -> list[BaseException | None]:
    """Return the exceptions of several ranks, here threads, in a collective context."""
    store = dist.HashStore()

    def go(number: int) -> BaseException | None:
        ranks = ProcessGroup(number, len(works), monitor=RankMonitor(store, number, len(works)))
        try:
            with ranks.sync_errors():
                works[number]()
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(go, range(len(works))))


def fails(error: Exception) -> None:
    raise error


def full(below: MemoryBudget | None) -> Callable[[], None]:
    return partial(fails, GpuOutOfMemoryError("full", next_budget=below))


def no_op() -> None:
    pass


def test_out_of_memory_reduces_budget_on_all_ranks() -> None:
    """The least that any of them needs; an end for all where one sample is too much for one."""
    less = [
        MemoryBudget(pack_tokens=tokens, activation_checkpointing=share)
        for tokens, share in ((64, 0.5), (512, 1))
    ]
    both = MemoryBudget(pack_tokens=64, activation_checkpointing=1)
    raised = run_ranks([full(less[0]), no_op, full(less[1])])
    assert [error.next_budget for error in raised if isinstance(error, GpuOutOfMemoryError)] == [
        both
    ] * 3
    assert "rank 0, 2" in str(raised[1])
    first, second = run_ranks([full(None), full(less[0])])
    assert isinstance(first, GpuOutOfMemoryError)
    assert first.next_budget is None
    assert isinstance(second, PeerFailedError)
    assert "rank 0 of 2" in str(second)
    first, second = run_ranks([partial(fails, ValueError("mine")), full(less[0])])
    assert isinstance(first, ValueError)
    assert isinstance(second, PeerFailedError)
    assert run_ranks([no_op, no_op]) == [None, None]


def test_failure_is_reported_in_next_collective() -> None:
    """All ranks then exchange their state."""
    store = dist.HashStore()
    ranks = [ProcessGroup(n, 3, monitor=RankMonitor(store, n, 3)) for n in range(3)]

    def fail_after(group: ProcessGroup, collective: Callable[[], object]) -> list[list[int]]:
        with pytest.raises(PeerFailedError, match="rank 1 of 3 failed"):
            collective()
        return group.sync_failure([group.rank, 15])

    def check_errors() -> None:
        with ranks[0].sync_errors():
            pass

    with ThreadPoolExecutor(3) as pool:
        failed = pool.submit(ranks[1].sync_failure, [1, 0])
        others = [
            pool.submit(fail_after, ranks[0], check_errors),
            pool.submit(fail_after, ranks[2], partial(ranks[2].broadcast_str, "")),
        ]
        for result in (failed, *others):
            assert result.result() == [[0, 15], [1, 0], [2, 15]]


def test_ranks_at_different_steps_are_detected() -> None:
    """The error contains both step numbers, or both collectives."""
    store = dist.HashStore()
    first, second = (ProcessGroup(n, 2, monitor=RankMonitor(store, n, 2)) for n in range(2))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(sync_step, second, StepBatch(4, (), (), ()))
        with pytest.raises(RankDesyncError, match=r"rank 0 at 3 \(step\), rank 1 at 4 \(step\)"):
            sync_step(first, StepBatch(3, (), (), ()))
        assert isinstance(other.exception(), RankDesyncError)
        other = pool.submit(second.broadcast_str, "")
        with (
            pytest.raises(RankDesyncError, match=r"rank 0 .* \(status\), rank 1 .* \(data\)"),
            first.sync_errors(),
        ):
            pass
        assert isinstance(other.exception(), RankDesyncError)


def test_rank_zero_waits_until_all_ranks_leave() -> None:
    """Rank 0 hosts the store, which the other ranks read in their last collective."""
    store = dist.HashStore()
    monitors = [RankMonitor(store, rank, 3) for rank in range(3)]
    with ThreadPoolExecutor() as threads:
        rank_zero = threads.submit(monitors[0].leave)
        monitors[2].leave()
        assert not rank_zero.done()
        monitors[1].leave()
        rank_zero.result()


class EndedStore:
    """Store of a main process that was killed."""

    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    def check(self, keys: Sequence[str]) -> bool:
        raise dist.DistNetworkError("Connection reset by peer")


def test_killed_main_process_is_named() -> None:
    with pytest.raises(RankTimeoutError, match="rank 0 of 2 did not respond"):
        RankMonitor(EndedStore(), 1, 2).all_gather("", timedelta(seconds=1))


@pytest.mark.parametrize(
    ("parallel", "saves", "raised"),
    [("ddp", True, TrainingInterrupted), ("fsdp", False, None)],
)
def test_stop_signal_with_a_missing_rank(
    parallel: str, saves: bool, raised: type[Exception] | None
) -> None:
    """A sharded run saves no checkpoint without the missing rank, and does not claim one."""
    trainer = mock.MagicMock(is_main=True)
    trainer.state.parallel.is_sharded = parallel == "fsdp"
    trainer.stop.signal = signal.SIGTERM
    trainer.build_interruption.return_value = TrainingInterrupted("checkpoint of step 3 written")
    timeout = RankTimeoutError("rank 1 did not respond", where="", expected="", remedy="")
    trainer.process_group.sync_failure.side_effect = timeout
    with pytest.raises(raised) if raised else nullcontext():
        Trainer.handle_failure(trainer, timeout)
    assert trainer.save_checkpoint.called == saves


def test_interrupted_sharded_run_names_the_missing_rank() -> None:
    trainer = mock.MagicMock(is_main=True)
    trainer.state.parallel.is_sharded = True
    timeout = RankTimeoutError("rank 1 did not respond", where="", expected="", remedy="")
    trainer.process_group.sync_failure.side_effect = timeout
    with pytest.raises(RankTimeoutError):
        Trainer.handle_failure(trainer, TrainingInterrupted("checkpoint of step 3 written"))
    assert not trainer.save_checkpoint.called


def test_rank_zero_does_not_wait_for_lost_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "EXIT_TIMEOUT", timedelta(seconds=0.01))
    RankMonitor(dist.HashStore(), 0, 2).leave()


def test_training_is_equal_for_any_world_size(tmp_path: Path) -> None:
    """The last step has two samples for four ranks; each run resumes with another world size.

    Takes long: six runs of up to four processes.
    """
    task = TinyTask(tmp_path / "task")
    alone, two, four = (run_to_completion(task, count, f"run{count}") for count in (1, 2, 4))
    assert_close(two, alone)
    assert_close(four, alone)
    for folder, count in ((two, 1), (alone, 2), (four, 2)):
        before = read_losses(folder)
        run_to_completion(task, count, rewind_to_checkpoint(folder).name, "--resume")
        assert [step for step, _ in read_losses(folder)] == [step for step, _ in before]
        assert dict(read_losses(folder)) == pytest.approx(dict(before), rel=1e-6)
    assert_close(two, alone)
    assert_close(four, alone)
    started = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["world_size"] for line in started if "world_size" in line] == [2, 1]


def test_evaluation_is_distributed(tmp_path: Path) -> None:
    """Evaluate three validation samples, one of them corrupt, on four ranks, and compare with one.

    Some ranks have no sample. Only the main process uses the tracker. Takes long: three runs of up
    to four processes.
    """
    task = TinyTask(tmp_path / "task")
    task.recipe["track"] = ["tensorboard"]
    broken = task.folder / "eval1.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    task.recipe["eval"] = {"metric": "ocr", "max_new_tokens": 8}
    folders = [run_to_completion(task, count, f"run{count}", epochs=1) for count in (1, 2, 4)]
    assert [len(list((one / "track" / "tensorboard").iterdir())) for one in folders] == [1, 1, 1]
    for name in ("before", "after"):
        alone, *others = [(run_ / "predictions" / f"{name}.jsonl").read_text() for run_ in folders]
        assert alone.count("\n") == 2
        assert others == [alone, alone]
    first, *others = [json.loads((one / "result.json").read_text())["after"] for one in folders]
    for other in others:
        assert other["scores"] == first["scores"]
        assert other["intervals"] == first["intervals"]
        assert other["validation_loss"] == pytest.approx(first["validation_loss"], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon"])
def test_other_optimizers_match_single_process(tmp_path: Path, optimizer: str) -> None:
    task = TinyTask(tmp_path / "task")
    folders = [
        run_to_completion(task, count, f"run{count}", optimizer=optimizer) for count in (1, 2)
    ]
    one, two = (dict(read_losses(folder)) for folder in folders)
    assert two == pytest.approx(one, rel=1e-4)


def test_failing_rank_ends_all_ranks(tmp_path: Path) -> None:
    """A corrupt image on one rank ends the run on all ranks; the repaired run resumes.

    Takes long: torchrun starts one of the runs, in processes that import torch.
    """
    task = TinyTask(tmp_path / "task")
    full_value = run_to_completion(task, 2, "whole", epochs=1)
    fail = "data.on_invalid_sample=fail"
    for number, is_launched in ((3, True), (4, False)):
        broken = task.folder / f"train{number}.png"
        content = broken.read_bytes()
        broken.write_bytes(content[:60])
        name = f"run{number}"
        # Nothing else falls due at that step.
        settings = {"epochs": 1, "save_every": 100}
        if is_launched:
            process = start_run(task, 2, name, fail, **settings)
            output, _ = process.communicate(timeout=300)
            assert process.returncode
        else:
            with run_in_ranks(task, 2, name, fail, **settings) as ranks:
                pass
            assert all(rank.exitcode for rank in ranks), "a rank hangs, or has no error"
            files = [task.folder / f"{name}.rank{rank}.txt" for rank in range(2)]
            output = "".join(file.read_text() for file in files)
        assert f"train{number}.png" in output
        assert not (task.folder / name / "result.json").exists()
        broken.write_bytes(content)
    # The main process does not know which images another rank has read.
    (task.folder / "run4" / "images.safetensors").unlink()
    resumed = run_to_completion(task, 2, "run4", "--resume", fail, **settings)
    assert dict(read_losses(resumed)) == pytest.approx(dict(read_losses(full_value)), rel=1e-6)


@pytest.mark.parametrize("pack_tokens", [100, 10])
def test_corrupt_image_is_skipped_on_all_ranks(tmp_path: Path, pack_tokens: int) -> None:
    """Check context parallelism with cached features, too."""
    task = TinyTask(tmp_path / "task")
    broken = task.folder / "train3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    settings = {"pack_tokens": pack_tokens}
    folders = [
        run_to_completion(task, n, f"run{n}", "data.on_invalid_sample=skip", **settings)
        for n in (1, 2)
    ]
    skipped = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        skipped.append([line["skipped_samples"] for line in lines if "skipped_samples" in line])
    assert skipped[0] == skipped[1]
    assert_close(folders[1], folders[0])


def make_ranks(folder: Path, rank: int) -> Iterator[int]:
    """Yield the process ids of a rank that trains in this folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                surroundings = (entry / "environ").read_text().split("\0")
            except OSError:
                continue
            if {f"RUN_OF_TEST={folder}", f"RANK={rank}"} <= {*surroundings}:
                yield int(entry.name)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_stop_signal_on_one_rank_stops_all_ranks_of_torchrun(tmp_path: Path, rank: int) -> None:
    task = TinyTask(tmp_path / "task")
    process = start_run(task, 2, "run", epochs=200)
    folder = task.folder / "run"
    deadline = time.monotonic() + 120
    while not read_losses(folder):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (number,) = make_ranks(folder, rank)
    os.kill(number, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    # The launcher tells of the exit code in a traceback of its own.
    assert_stopped(folder, output)


@pytest.mark.parametrize("rank", [0, 3])
def test_stop_signal_on_one_rank_stops_all_ranks(tmp_path: Path, rank: int) -> None:
    """No launcher ends the other ranks: each of them stops by itself."""
    task = TinyTask(tmp_path / "task")
    folder = task.folder / "run"
    with run_in_ranks(task, 4, "run", epochs=200) as ranks:
        deadline = time.monotonic() + 120
        while not read_losses(folder):
            assert all(process.is_alive() for process in ranks)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(ranks[rank].pid, signal.SIGTERM)
    assert [process.exitcode for process in ranks] == [75] * 4
    assert_stopped(folder, (task.folder / "run.rank0.txt").read_text())


def assert_stopped(folder: Path, output: str) -> None:
    """Assert that the run has written a checkpoint of its last step, and no traceback."""
    assert "stopped by SIGTERM" in output
    assert "/finesight/" not in output
    last = max(step for step, _ in read_losses(folder))
    assert (folder / "checkpoints" / f"step-{last}").is_dir()


def test_context_shards_cover_every_sample() -> None:
    class FixedSampler:
        def __len__(self) -> int:
            return 50

        def batch_indices(self, step: int) -> list[int]:
            return random.Random(step).sample(range(1000), 13)

    def cost(index: int) -> float:
        return float(1 + index % 97)

    def tokens(index: int) -> int:
        return 41 if index % 7 == 0 else 40

    for count in (1, 2, 3, 4, 20):
        ranks = [ProcessGroup(number, count) for number in range(count)]
        size = 40 // max_unsplit_packs(count)
        shares = [
            DistributedSampler(FixedSampler(), one, cost, tokens, 50).with_pack_tokens(size)
            for one in ranks
        ]
        assert {len(share) for share in shares} == {50}
        for step in range(50):
            own = [list(share.batch_indices(step)) for share in shares]
            members = [index for index in FixedSampler().batch_indices(step) if tokens(index) <= 40]
            split = [index for index in FixedSampler().batch_indices(step) if tokens(index) > 40]
            assert all(share.split_indices(step) == split for share in shares)
            assert sorted(chain.from_iterable(own)) == sorted(members)
            assert all(sorted(one, key=members.index) == one for one in own)
            loads = [sum(map(cost, one)) for one in own]
            assert max(loads) <= sum(loads) / count + 97


def test_batch_split_is_balanced_by_tokens() -> None:
    """What a sample costs, and whether it is split."""

    class SingleBatchSampler:
        def __len__(self) -> int:
            return 1

        def batch_indices(self, step: int) -> list[int]:
            return [0, 1, 2]

    class Seen(dict[int, SampleStats]):
        prefix_length = 5

    class Counting:
        def __init__(self) -> None:
            self.requested: list[tuple[int, ...]] = []

        def count(self, load: SampleShape) -> float:
            self.requested.append(load.lengths)
            return 1.0

    most, counting = 50 * max_unsplit_packs(2), Counting()
    needed = {0: most, 1: most + 1, 2: 10}
    glances = {n: SampleStats(str(n), k + 2, k, 3, (), (), frozenset()) for n, k in needed.items()}
    share: Any = build_rank_sampler(
        SingleBatchSampler(),
        ProcessGroup(0, 2),
        Seen(glances),
        counting,
        50,
        can_split_samples=True,
    )  # type: ignore[arg-type]
    assert list(share.split_indices(0)) == [1]
    assert len(share.batch_indices(0)) == 1
    assert counting.requested == [(most - 5,), (5,)]


@pytest.mark.parametrize(
    ("name", "value", "output"), CASES["test_incomplete_launch_environment_is_rejected"]
)
def test_incomplete_launch_environment_is_rejected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str | None,
    output: str,
) -> None:
    task = TinyTask(tmp_path / "task")
    recipe = write_recipe(tmp_path / "r.yaml", task.recipe | {"output_dir": str(tmp_path / "run")})
    result = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    result |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    monkeypatch.delenv(name, raising=False)
    for variable, text in (result | {name: value}).items():
        if text is not None:
            monkeypatch.setenv(variable, text)
    assert run_command(["train", str(recipe)]) == 2
    # The screen breaks lines.
    assert output in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
