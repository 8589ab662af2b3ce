"""Distributed training: equality with single-process training, and failures of ranks."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
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
from multi_process_run import rewind_to_checkpoint, run_in_ranks, run_to_completion, start_run
from safetensors.torch import load_file
from tiny_task import TinyTask, edit_samples, read_losses, write_recipe
from torch import Tensor

from finesight.cli.app import run_command
from finesight.errors import TrainingInterrupted
from finesight.train.checkpoint import OPTIMIZER_FILE, WEIGHTS_FILE
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget, max_unsplit_packs
from finesight.train.parallel import distributed
from finesight.train.parallel.distributed import (
    SINGLE_PROCESS,
    PeerFailedError,
    ProcessGroup,
    RankDesyncError,
    RankMonitor,
    RankTimeoutError,
)
from finesight.train.sampler import DistributedSampler
from finesight.train.step_batch import StepBatch
from finesight.train.trainer import Trainer, sync_step


def read_trained_state(folder: Path) -> dict[str, Tensor]:
    """Weights, and means of gradients and of their squares, after the last step."""
    last = folder / "checkpoints" / "step-6"
    return load_file(last / WEIGHTS_FILE) | load_file(last / OPTIMIZER_FILE)


def assert_equal_losses(folder: Path, other: Path, rel: float = 1e-6) -> None:
    assert dict(read_losses(folder)) == pytest.approx(dict(read_losses(other)), rel=rel)


def assert_close(folder: Path, other: Path) -> None:
    """Compare by root mean square: AdamW takes full steps for gradients of rounding errors."""
    assert_equal_losses(folder, other)
    ours, theirs = read_trained_state(folder), read_trained_state(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).square().mean().sqrt() <= 1e-6, name


def make_ranks(count: int) -> list[ProcessGroup]:
    store = dist.HashStore()
    return [
        ProcessGroup(rank, count, monitor=RankMonitor(store, rank, count)) for rank in range(count)
    ]


def run_ranks(*errors: Exception | None) -> list[BaseException | None]:
    def run_rank(ranks: ProcessGroup) -> BaseException | None:
        try:
            with ranks.sync_errors():
                if (error := errors[ranks.rank]) is not None:
                    raise error
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(errors)) as pool:
        return list(pool.map(run_rank, make_ranks(len(errors))))


def test_out_of_memory_reduces_budget_on_all_ranks():
    """The budgets are combined; the run ends if one sample is too large for a rank."""

    def full(*budget: float) -> GpuOutOfMemoryError:
        keys = "pack_tokens", "activation_checkpointing"
        below = MemoryBudget(**dict(zip(keys, budget, strict=True))) if budget else None
        error = GpuOutOfMemoryError("full")
        error.next_budget = below
        return error

    raised = run_ranks(full(64, 0.5), None, full(512, 1))
    assert {type(error) for error in raised} == {GpuOutOfMemoryError}
    assert {error.next_budget for error in raised} == {full(64, 1).next_budget}
    assert "rank 0, 2" in str(raised[1])
    for failure in (full(), ValueError("mine")):
        first, second = run_ranks(failure, full(64, 0.5))
        assert first is failure
        assert isinstance(second, PeerFailedError)
        assert "rank 0 of 2" in str(second)
    assert run_ranks(None, None) == [None, None]


def test_failure_is_reported_in_next_collective():
    """All ranks then exchange their state."""
    ranks = make_ranks(3)

    def fail_after(group: ProcessGroup, collective: Callable[[], object]) -> list[list[int]]:
        with pytest.raises(PeerFailedError, match="rank 1 of 3 failed"):
            collective()
        return group.sync_failure([group.rank, 15])

    def check_errors() -> None:
        with ranks[0].sync_errors():
            pass

    with ThreadPoolExecutor(3) as pool:
        futures = (
            pool.submit(ranks[1].sync_failure, [1, 0]),
            pool.submit(fail_after, ranks[0], check_errors),
            pool.submit(fail_after, ranks[2], partial(ranks[2].broadcast_str, "")),
        )
        assert all(one.result() == [[0, 15], [1, 0], [2, 15]] for one in futures)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ValueError("no"), "start again with --resume"),
        (GpuOutOfMemoryError("full", where="", expected="", remedy=""), "lower train.pack_tokens"),
    ],
)
def test_error_among_waiting_ranks_ends_the_run(error, remedy):
    message = "rank 0 of 1 failed in the middle of a step"
    with pytest.raises(RankDesyncError, match=message) as raised, SINGLE_PROCESS.raise_desync():
        raise error
    assert remedy in str(raised.value)
    assert raised.value.__cause__ is error


def test_ranks_at_different_steps_are_detected():
    """The error contains both step numbers, or both collectives."""
    first, second = make_ranks(2)
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


def test_rank_zero_waits_until_all_ranks_leave(monkeypatch):
    """Rank 0 hosts the store, which the other ranks read in their last collective."""
    store = dist.HashStore()
    monitors = [RankMonitor(store, rank, 3) for rank in range(3)]
    with ThreadPoolExecutor() as threads:
        rank_zero = threads.submit(monitors[0].leave)
        monitors[2].leave()
        assert not rank_zero.done()
        monitors[1].leave()
        rank_zero.result()
    # It does not wait for lost ranks.
    monkeypatch.setattr(distributed, "EXIT_TIMEOUT", timedelta(seconds=0.01))
    RankMonitor(dist.HashStore(), 0, 2).leave()


def test_ranks_that_report_after_the_timeout_are_not_named():
    """Rank 2 hangs; rank 1 exchanged tensors with it, and reports when this times out."""
    store = dist.HashStore()

    def check(keys: list[str]) -> bool:
        """Let rank 1 report after rank 0 has found that two ranks are missing."""
        has_arrived = store.check(keys)
        if keys == ["finesight/1/2"]:
            store.set("finesight/1/1", "failed")
        return has_arrived

    slow_store: Any = mock.Mock(wraps=store, **{"check.side_effect": check})
    with pytest.raises(RankTimeoutError, match="rank 2 of 3 did not respond"):
        RankMonitor(slow_store, 0, 3).all_gather("", timedelta(seconds=0.01))


def test_killed_main_process_is_named():
    ended = dist.DistNetworkError("Connection reset by peer")
    store: Any = mock.Mock(**{"set.side_effect": ended, "check.side_effect": ended})
    with pytest.raises(RankTimeoutError, match="rank 0 of 2 did not respond"):
        RankMonitor(store, 1, 2).all_gather("", timedelta(seconds=1))


TIMEOUT = RankTimeoutError("rank 1 did not respond", where="", expected="", remedy="")
INTERRUPTED = TrainingInterrupted("checkpoint of step 3 written")


def test_stop_signal_with_a_missing_rank():
    """A sharded run saves no checkpoint without the missing rank, and does not claim one."""
    for parallel, error, is_within_step, saves, raised in (
        ("ddp", TIMEOUT, False, True, TrainingInterrupted),
        ("ddp", TIMEOUT, True, False, None),
        ("fsdp", TIMEOUT, False, False, None),
        ("fsdp", INTERRUPTED, False, False, RankTimeoutError),
    ):
        trainer = mock.MagicMock(is_main=True, is_within_step=is_within_step)
        trainer.state.engine.parallel.is_sharded = parallel == "fsdp"
        trainer.stop.signal = signal.SIGTERM
        trainer.build_interruption.return_value = INTERRUPTED
        trainer.process_group.sync_failure.side_effect = TIMEOUT
        with pytest.raises(raised) if raised else nullcontext():
            Trainer.handle_failure(trainer, error)
        assert trainer.save_checkpoint.called == saves


def test_training_is_equal_for_any_world_size(tmp_path):
    """Each run resumes with another world size. Takes long: six runs of up to four processes."""
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
    sizes = [line["world_size"] for line in task.read_metrics(two) if "world_size" in line]
    assert sizes == [2, 1]


def test_evaluation_is_distributed(tmp_path):
    """Some ranks have no sample, one sample is corrupt. Takes long: three runs, four processes."""
    task = TinyTask(tmp_path / "task")
    task.recipe["track"] = ["tensorboard"]
    task.truncate_images("eval1")
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


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw_8bit"},
        {"optimizer": "muon"},
        {"objective": "kto"},
        {"objective": "distill"},
    ],
)
def test_other_settings_match_single_process(tmp_path, settings):
    task = TinyTask(tmp_path / "task")
    if settings.get("objective") == "distill":
        teacher = run_to_completion(task, 1, "teacher")
        settings |= {"distill": {"teacher": str(teacher), "max_completion_length": 4}}
    for split in ("train", "eval") if settings.get("objective") == "kto" else ():
        with edit_samples(task.folder / f"{split}.jsonl") as samples:
            for number, sample in enumerate(samples):
                sample["label"] = number % 3 > 0
    alone, two = (run_to_completion(task, n, f"run{n}", **settings) for n in (1, 2))
    assert_equal_losses(two, alone, rel=1e-4)


def test_failing_rank_ends_all_ranks(tmp_path):
    """The repaired run resumes. Takes long: torchrun starts processes that import torch."""
    task = TinyTask(tmp_path / "task")
    whole = run_to_completion(task, 2, "whole", epochs=1)
    fail = "data.on_invalid_sample=fail"
    # Nothing else falls due at that step.
    settings = {"epochs": 1, "save_every": 100}
    for number, is_launched in ((3, True), (4, False)):
        broken = task.folder / f"train{number}.png"
        content = broken.read_bytes()
        task.truncate_images(broken.stem)
        name = f"run{number}"
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
    assert_equal_losses(run_to_completion(task, 2, "run4", "--resume", fail, **settings), whole)


@pytest.mark.parametrize("pack_tokens", [100, 10])
def test_corrupt_image_is_skipped_on_all_ranks(tmp_path, pack_tokens):
    """Check context parallelism with cached features, too."""
    task = TinyTask(tmp_path / "task")
    task.truncate_images("train3")
    skip = "data.on_invalid_sample=skip"
    alone, two = (
        run_to_completion(task, count, f"run{count}", skip, pack_tokens=pack_tokens)
        for count in (1, 2)
    )
    skipped, others = (
        [line["skipped_samples"] for line in task.read_metrics(folder) if "skipped_samples" in line]
        for folder in (alone, two)
    )
    assert skipped == others
    assert_close(two, alone)


def find_rank(folder: Path, rank: int) -> int:
    """Return the process id of a rank that torchrun has started for the run in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environment = (entry / "environ").read_text().split("\0")
            except OSError:
                continue
            if {f"RUN_OF_TEST={folder}", f"RANK={rank}"} <= {*environment}:
                found.append(int(entry.name))
    (number,) = found
    return number


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
@pytest.mark.parametrize(("count", "rank"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_stop_signal_on_one_rank_stops_all(tmp_path, count, rank):
    """Each rank stops with a checkpoint of the last step: two under torchrun, four without it."""
    task = TinyTask(tmp_path / "task")
    folder, deadline = task.folder / "run", time.monotonic() + 120

    def wait_for_step(is_running: Callable[[], bool]) -> None:
        while not read_losses(folder):
            assert is_running()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    if count == 2:
        process = start_run(task, count, "run", epochs=200)
        wait_for_step(lambda: process.poll() is None)
        os.kill(find_rank(folder, rank), signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    else:
        with run_in_ranks(task, count, "run", epochs=200) as ranks:
            wait_for_step(lambda: all(one.is_alive() for one in ranks))
            os.kill(ranks[rank].pid, signal.SIGTERM)
        assert [one.exitcode for one in ranks] == [75] * count
        output = (task.folder / "run.rank0.txt").read_text()
    assert "stopped by SIGTERM" in output
    # The launcher prints a traceback of its own.
    assert "/finesight/" not in output
    last = max(step for step, _ in read_losses(folder))
    assert (folder / "checkpoints" / f"step-{last}").is_dir()


def test_context_shards_cover_every_sample():
    class FixedSampler:
        def __len__(self) -> int:
            return 50

        def batch_indices(self, step: int) -> Sequence[int]:
            return random.Random(step).sample(range(1000), 13)

    def cost(index: int) -> float:
        return float(1 + index % 97)

    def tokens(index: int) -> int:
        return 41 if index % 7 == 0 else 40

    for count in (1, 2, 3, 4, 20):
        size = 40 // max_unsplit_packs(count)
        shares = [
            DistributedSampler(FixedSampler(), ProcessGroup(rank, count), cost, tokens, size)
            for rank in range(count)
        ]
        assert {len(share) for share in shares} == {50}
        for step in range(50):
            own = [list(share.batch_indices(step)) for share in shares]
            indices = FixedSampler().batch_indices(step)
            members = [index for index in indices if tokens(index) <= 40]
            split = [index for index in indices if tokens(index) > 40]
            assert all(share.split_indices(step) == split for share in shares)
            assert sorted(chain.from_iterable(own)) == sorted(members)
            assert all(sorted(one, key=members.index) == one for one in own)
            loads = [sum(map(cost, one)) for one in own]
            assert max(loads) <= sum(loads) / count + 97


@pytest.mark.parametrize(
    ("name", "value", "output"),
    [
        ("RANK", None, "RANK is not set"),
        ("MASTER_ADDR", None, "MASTER_ADDR is not set"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is two, and WORLD_SIZE is not a number"),
        ("LOCAL_RANK", "", "LOCAL_RANK is not a number"),
    ],
)
def test_incomplete_launch_environment_is_rejected(tmp_path, capsys, name, value, output):
    task = TinyTask(tmp_path / "task")
    recipe = write_recipe(tmp_path / "r.yaml", task.recipe | {"output_dir": str(tmp_path / "run")})
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment.pop(name)
    with mock.patch.dict(os.environ, environment | ({} if value is None else {name: value})):
        assert run_command(["train", str(recipe)]) == 2
    # The screen breaks lines.
    assert output in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
