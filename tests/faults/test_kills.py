"""Runs killed at random points, and power loss; resumed runs must be bit-identical."""

import io
import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from crash_disk import CrashingDisk, PowerLossDisk
from rich.console import Console
from tiny_task import TinyTask, assert_same_run, write_recipe

from finesight.evaluate.episode import Episode, EpisodeRunner
from finesight.files import storage
from finesight.infer.request import GenerationRequest
from finesight.settings.recipe import load_recipe
from finesight.train import rollout
from finesight.train.rollout import build_requests
from finesight.train.training_run import train

SETTINGS = {"save_every": 1, "epochs": 4}
REWARD = "def early(case):\n    return sum(letter < 'n' for letter in case.answer)\n"
GRPO = {
    "objective": "grpo",
    "steps": 4,
    "epochs": None,
    "save_every": 1,
    "grpo": {"num_generations": 4, "max_completion_length": 8, "num_iterations": 2},
}


def start_or_resume(
    task: TinyTask, name: str, disk: storage.FileSystem | None = None, **settings: Any
) -> int:
    """Start a child that begins or resumes the run."""
    child = os.fork()
    if child == 0:
        try:
            recipe = task.recipe | {"output_dir": str(task.folder / name)}
            if settings:
                (task.folder / "rewards.py").write_text(REWARD)
                recipe["rewards"] = [f"{task.folder / 'rewards.py'}:early"]
            settings = settings or SETTINGS
            path = write_recipe(task.folder / f"{os.getpid()}.yaml", recipe, **settings)
            with patch.object(storage, "file_system", disk or storage.FileSystem()):
                train(load_recipe(path), resume=True, console=Console(file=io.StringIO()))
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ending(child: int) -> str:
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


class UninterruptedRun(NamedTuple):
    task: TinyTask
    run: Path
    seconds: float


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> UninterruptedRun:
    torch.set_num_threads(1)
    task = TinyTask(tmp_path_factory.mktemp("kills") / "task")
    start = time.perf_counter()
    assert ending(start_or_resume(task, "whole")) == "exit 0"
    return UninterruptedRun(task, task.folder / "whole", time.perf_counter() - start)


@pytest.mark.parametrize("settings", [{}, GRPO], ids=["sft", "grpo"])
def test_killed_run_resumes_bit_exactly(uninterrupted, every_point, settings):
    """Kill a run repeatedly; final weights, optimizer state and metrics are bit-identical.

    Kills of GRPO also occur during a rollout and a reward in its own process.
    """
    task, expected, seconds = uninterrupted
    if settings:
        expected, start = task.folder / "expected", time.perf_counter()
        assert ending(start_or_resume(task, "expected", **settings)) == "exit 0"
        seconds = time.perf_counter() - start
    wanted = 50 if every_point else 4
    kills, ends, rng = 0, 0, random.Random(0)
    prefix = "rollouts" if settings else "run"
    while kills < wanted:
        child = start_or_resume(task, f"{prefix}{ends}", **settings)
        time.sleep(rng.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        how = ending(child)
        assert how in ("killed", "exit 0")
        kills += how == "killed"
        if how == "exit 0":
            assert_equal_runs(task.folder / f"{prefix}{ends}", expected)
            ends += 1
    assert ending(start_or_resume(task, f"{prefix}{ends}", **settings)) == "exit 0"
    assert_equal_runs(task.folder / f"{prefix}{ends}", expected)


ENVIRONMENT = """
import os, signal
from pathlib import Path

class Deadly:
    def reset(self, id):
        self.id = id
        self.num_calls = 0

    def _die(self, moment):
        folder = Path({folder!r})
        armed = folder / moment
        if armed.exists():
            armed.unlink()
            os.kill(int((folder / "pid").read_text()), signal.SIGKILL)

    def look(self, text: str) -> str:
        '\''Look.

        Args:
            text: Any text.
        '\''
        self._die("tool")
        self.num_calls += 1
        return text * len(self.id)

    def get_reward(self):
        self._die("reward")
        return self.num_calls
"""


def run_with_tools(task: TinyTask, name: str) -> int:
    """Start a child that begins or resumes a run in which each first answer calls a tool."""
    child = os.fork()
    if child:
        return child
    try:
        (task.folder / "pid").write_text(str(os.getpid()))
        (task.folder / "deadly.py").write_text(ENVIRONMENT.format(folder=str(task.folder)))
        (task.folder / "rewards.py").write_text(REWARD)
        rewards = ["environment", f"{task.folder / 'rewards.py'}:early"]
        recipe = task.recipe | {"output_dir": str(task.folder / name), "rewards": rewards}
        grpo = {
            "num_generations": 4,
            "max_completion_length": 60,
            "environment": f"{task.folder / 'deadly.py'}:Deadly",
        }
        path = write_recipe(task.folder / f"{os.getpid()}.yaml", recipe, **GRPO | {"grpo": grpo})
        call = '{"name": "look", "arguments": {"text": "ab"}}'

        def find_calls(self: EpisodeRunner, episode: Episode, answer: str) -> list[str]:
            return [call] if episode.num_turns == 1 else []

        def shorten(*args: Any) -> list[GenerationRequest]:
            # The random model ends no answer, so that its first one would use all tokens.
            return [replace(one, max_new_tokens=8) for one in build_requests(*args)]

        def append(self: EpisodeRunner, episode: Episode, request: Any, results: Any) -> Any:
            return append_results(self, episode, replace(request, max_new_tokens=60), results)

        append_results = EpisodeRunner.append_results
        with (
            patch.object(EpisodeRunner, "find_calls", find_calls),
            patch.object(EpisodeRunner, "append_results", append),
            patch.object(rollout, "build_requests", shorten),
        ):
            train(load_recipe(path), resume=True, console=Console(file=io.StringIO()))
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("moment", ["tool", "reward"])
def test_run_killed_in_an_environment_resumes_bit_exactly(tmp_path, moment):
    """The kill is during a call of a tool, or of get_reward, in the process of an episode."""
    torch.set_num_threads(1)
    task = TinyTask(tmp_path / "task")
    assert ending(run_with_tools(task, "whole")) == "exit 0"
    whole = task.folder / "whole"
    assert json.loads((whole / "responses.jsonl").read_text().splitlines()[0])["episode"]["turns"]
    num_kills = 0
    for number in range(3):
        child = run_with_tools(task, "run")
        deadline = time.monotonic() + 120
        while not (task.folder / "run" / "checkpoints" / f"step-{number + 1}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        (task.folder / moment).touch()
        num_kills += ending(child) == "killed"
        (task.folder / moment).unlink(missing_ok=True)
    assert num_kills
    assert ending(run_with_tools(task, "run")) == "exit 0"
    assert_equal_runs(task.folder / "run", whole)


def test_crash_at_operation_resumes_bit_exactly(uninterrupted, every_point):
    """Breaks: the process, or the power, at an operation of a run. Survive: all bits, and every
    step and measurement of the metrics. Takes long: each operation is a run."""
    task, expected, _ = uninterrupted
    # Processes die at some operations in tests/invariants/test_resume.py, too.
    for crash in ("power", "process") if every_point else ("power",):
        deaths = 0
        for last in range(1, 1000, 7 if every_point else 131):
            home = task.folder / f"{crash}{last}"
            home.mkdir()
            disk = PowerLossDisk(last, home) if crash == "power" else CrashingDisk(last)
            how = ending(start_or_resume(task, f"{home.name}/run", disk))
            if how == "exit 0":
                break
            assert how == "killed"
            deaths += 1
            assert ending(start_or_resume(task, f"{home.name}/run")) == "exit 0"
            assert_same_run(home / "run", expected)
            assert read_evaluations(home / "run") == read_evaluations(expected)
        assert how == "exit 0"
        assert deaths > 1


def assert_equal_runs(run: Path, expected: Path) -> None:
    """Assert equal weights, optimizer states, responses, and metrics apart from time and memory."""
    assert_same_run(run, expected)
    assert read_steps(run) == read_steps(expected)
    if (responses := expected / "responses.jsonl").exists():
        assert (run / "responses.jsonl").read_bytes() == responses.read_bytes()


def read_steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    varying = re.compile(r".*_s|mfu|peak_memory_gb|features")
    return [
        {name: value for name, value in line.items() if not varying.fullmatch(name)}
        for line in lines
        if "loss" in line
    ]


def read_evaluations(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
