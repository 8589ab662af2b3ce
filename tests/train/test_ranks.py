"""Several processes that learn together: what one process learns, whoever stops or goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from launched import run, start, unfinished
from safetensors.torch import load_file
from small_run import Task, losses, write_recipe
from torch import Tensor

from finesight.encode.slice import Alone
from finesight.train.budget import Budget, FullMemory, packs_alone
from finesight.train.checkpoint import MOMENTS, VALUES
from finesight.train.ranks import Errand, Ranks, Roll, ShareFailed
from finesight.train.shares import Share, shared
from finesight.train.survey import Glance


def learned(folder: Path) -> dict[str, Tensor]:
    """Weights, and means of gradients and of their squares, after the last step."""
    last = folder / "checkpoints" / "step-6"
    return load_file(last / VALUES) | load_file(last / MOMENTS)


def assert_alike(folder: Path, other: Path) -> None:
    """By the root mean square over each tensor: AdamW steps as far for a gradient that is rounding
    alone as for any other, so that single numbers may differ by part of a step."""
    assert dict(losses(folder)) == pytest.approx(dict(losses(other)), rel=1e-6)
    ours, theirs = learned(folder), learned(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).square().mean().sqrt() <= 1e-6, name


def meeting(works: Sequence[Callable[[], None]]) -> list[BaseException | None]:
    """What is raised where each of several processes, here threads, goes through a block."""
    store = dist.HashStore()

    def go(number: int) -> BaseException | None:
        ranks = Ranks(number, len(works), roll=Roll(store, number, len(works)))
        try:
            with ranks.confirmed():
                works[number]()
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(go, range(len(works))))


def fails(error: Exception) -> None:
    raise error


def full(below: Budget | None) -> Callable[[], None]:
    return partial(fails, FullMemory("full", below=below))


def nothing() -> None:
    pass


def test_where_memory_is_full_all_take_less() -> None:
    """The least that any of them needs; an end for all where one sample is too much for one."""
    less = [Budget(pack_tokens=tokens, recompute=share) for tokens, share in ((64, 0.5), (512, 1))]
    both = Budget(pack_tokens=64, recompute=1)
    raised = meeting([full(less[0]), nothing, full(less[1])])
    assert [error.below for error in raised if isinstance(error, FullMemory)] == [both] * 3
    assert "process 0, 2" in str(raised[1])
    first, second = meeting([full(None), full(less[0])])
    assert isinstance(first, FullMemory)
    assert first.below is None
    assert isinstance(second, ShareFailed)
    assert "process 0 of 2" in str(second)
    first, second = meeting([partial(fails, ValueError("mine")), full(less[0])])
    assert isinstance(first, ValueError)
    assert isinstance(second, ShareFailed)
    assert meeting([nothing, nothing]) == [None, None]


def test_meetings_of_two_kinds_are_told_apart() -> None:
    """One that waits for the first to speak hears nothing while that is in a block; the first one
    hears who did not come to its block."""
    store = dist.HashStore()
    first, second = (Ranks(n, 2, roll=Roll(store, n, 2)) for n in range(2))
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(second.called, Errand.WAIT)
        with pytest.raises(ShareFailed, match="process 1 of 2"), first.confirmed():
            pass
        assert waits.result().errand is Errand.WAIT
        waits = pool.submit(second.called, Errand.WAIT)
        assert first.called(Errand.OVER).errand is Errand.OVER
        assert waits.result().errand is Errand.OVER
        for signal_number in (0, 15):
            fails = pool.submit(second.called, Errand.FAILED, signal=signal_number)
            with pytest.raises(ShareFailed, match="process 1 of 2"):
                first.called(Errand.SAVE)
            assert fails.result().errand is Errand.SAVE


def test_as_many_processes_as_you_like(tmp_path: Path) -> None:
    """The last step has two samples: of four processes two have nothing to learn. Each run is gone
    on with by another number of them."""
    task = Task(tmp_path / "task")
    alone, two, four = (run(task, count, f"run{count}") for count in (1, 2, 4))
    assert_alike(two, alone)
    assert_alike(four, alone)
    for folder, count in ((two, 1), (alone, 2), (four, 2)):
        before = losses(folder)
        run(task, count, unfinished(folder).name, "--resume")
        assert [step for step, _ in losses(folder)] == [step for step, _ in before]
        assert dict(losses(folder)) == pytest.approx(dict(before), rel=1e-6)
    assert_alike(two, alone)
    assert_alike(four, alone)
    started = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["processes"] for line in started if "processes" in line] == [2, 1]


def test_answers_are_shared_out(tmp_path: Path) -> None:
    """Three held-out samples, one of them damaged: of four processes some have none to answer, and
    what is measured and written is what one process does. The first process alone tracks."""
    task = Task(tmp_path / "task")
    task.recipe["track"] = ["tensorboard"]
    broken = task.folder / "eval1.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    task.recipe["eval"] = {"metric": "ocr", "max_new_tokens": 8}
    folders = [run(task, count, f"run{count}", epochs=1) for count in (1, 2, 4)]
    assert [len(list((one / "track" / "tensorboard").iterdir())) for one in folders] == [1, 1, 1]
    for name in ("before", "after"):
        alone, *others = [(run_ / "predictions" / f"{name}.jsonl").read_text() for run_ in folders]
        assert alone.count("\n") == 2
        assert others == [alone, alone]
    first, *others = [json.loads((one / "result.json").read_text())["after"] for one in folders]
    for other in others:
        assert other["scores"] == first["scores"]
        assert other["intervals"] == first["intervals"]
        assert other["held_out_loss"] == pytest.approx(first["held_out_loss"], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "muon"])
def test_other_optimisers(tmp_path: Path, optimizer: str) -> None:
    task = Task(tmp_path / "task")
    folders = [run(task, count, f"run{count}", optimizer=optimizer) for count in (1, 2)]
    one, two = (dict(losses(folder)) for folder in folders)
    assert two == pytest.approx(one, rel=1e-4)


def test_one_that_cannot_go_on_ends_all(tmp_path: Path) -> None:
    """A picture that only one process reads is damaged, and the recipe refuses such: the run ends,
    whoever it was, and says which; with the picture whole again it comes to its own end."""
    task = Task(tmp_path / "task")
    whole = run(task, 2, "whole", epochs=1)
    for number in (3, 4):
        broken = task.folder / f"train{number}.png"
        content = broken.read_bytes()
        broken.write_bytes(content[:60])
        # Nothing else falls due at that step.
        process = start(task, 2, f"run{number}", "data.unusable=refuse", epochs=1, save_every=100)
        said, _ = process.communicate(timeout=300)
        assert process.returncode
        assert f"train{number}.png" in said
        assert not (task.folder / f"run{number}" / "result.json").exists()
        broken.write_bytes(content)
    words = "--resume", "data.unusable=refuse"
    # The first process does not know what another one has read.
    (task.folder / "run4" / "images.safetensors").unlink()
    resumed = run(task, 2, "run4", *words, epochs=1, save_every=100)
    assert dict(losses(resumed)) == pytest.approx(dict(losses(whole)), rel=1e-6)


@pytest.mark.parametrize("pack_tokens", [100, 10])
def test_a_broken_picture_is_missed_by_all(tmp_path: Path, pack_tokens: int) -> None:
    """Also where all processes learn each sample together, from features that each has."""
    task = Task(tmp_path / "task")
    broken = task.folder / "train3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    settings = {"pack_tokens": pack_tokens}
    folders = [run(task, n, f"run{n}", "data.unusable=drop", **settings) for n in (1, 2)]
    dropped = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        dropped.append([line["dropped"] for line in lines if "dropped" in line])
    assert dropped[0] == dropped[1]
    assert_alike(folders[1], folders[0])


def processes(folder: Path, rank: int) -> Iterator[int]:
    """Those that learn in this folder as this one of several."""
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
def test_one_that_is_asked_to_stop_stops_all(tmp_path: Path, rank: int) -> None:
    task = Task(tmp_path / "task")
    process = start(task, 2, "run", epochs=200)
    folder = task.folder / "run"
    deadline = time.monotonic() + 120
    while not losses(folder):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (number,) = processes(folder, rank)
    os.kill(number, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "stopped by SIGTERM" in said
    # The launcher tells of the exit code in a traceback of its own.
    assert "/finesight/" not in said
    last = max(step for step, _ in losses(folder))
    assert (folder / "checkpoints" / f"step-{last}").is_dir()


def test_a_share_of_every_sample() -> None:
    class Whole:
        def __len__(self) -> int:
            return 50

        def of(self, step: int) -> list[int]:
            return random.Random(step).sample(range(1000), 13)

    def cost(index: int) -> float:
        return float(1 + index % 97)

    def tokens(index: int) -> int:
        return 41 if index % 7 == 0 else 40

    for count in (1, 2, 3, 4, 20):
        ranks = [Ranks(number, count) for number in range(count)]
        size = 40 // packs_alone(count)
        shares = [Share(Whole(), one, cost, tokens, 50).within(size) for one in ranks]
        assert {len(share) for share in shares} == {50}
        for step in range(50):
            own = [list(share.of(step)) for share in shares]
            members = [index for index in Whole().of(step) if tokens(index) <= 40]
            split = [index for index in Whole().of(step) if tokens(index) > 40]
            assert all(share.split(step) == split for share in shares)
            assert sorted(chain.from_iterable(own)) == sorted(members)
            assert all(sorted(one, key=members.index) == one for one in own)
            loads = [sum(map(cost, one)) for one in own]
            assert max(loads) <= sum(loads) / count + 97


def test_shares_go_by_needed_tokens() -> None:
    """What a sample costs, and whether it is split."""

    class Whole:
        def __len__(self) -> int:
            return 1

        def of(self, step: int) -> list[int]:
            return [0, 1, 2]

    class Seen(dict[int, Glance]):
        beginning = 5

    class Counting:
        def __init__(self) -> None:
            self.asked: list[tuple[int, ...]] = []

        def of(self, load: Alone) -> float:
            self.asked.append(load.lengths)
            return 1.0

    most, counting = 50 * packs_alone(2), Counting()
    needed = {0: most, 1: most + 1, 2: 10}
    glances = {n: Glance(str(n), k + 2, k, 3, (), (), frozenset()) for n, k in needed.items()}
    share: Any = shared(Whole(), Ranks(0, 2), Seen(glances), counting, 50)  # type: ignore[arg-type]
    assert list(share.split(0)) == [1]
    assert len(share.of(0)) == 1
    assert counting.asked == [(most - 5,), (5,)]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", None, "RANK is not set"),
        ("MASTER_ADDR", None, "MASTER_ADDR is not set"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is two, and WORLD_SIZE is no number"),
        ("LOCAL_RANK", "", "LOCAL_RANK is no number"),
    ],
)
def test_half_a_launch_is_refused(tmp_path: Path, name: str, value: str | None, said: str) -> None:
    task = Task(tmp_path / "task")
    recipe = write_recipe(tmp_path / "r.yaml", task.recipe | {"output": str(tmp_path / "run")})
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    told = {n: v for n, v in (told | {name: value}).items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-m", "finesight", "train", str(recipe)],
        env={n: v for n, v in os.environ.items() if n != name} | told,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    # The screen breaks lines.
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()
