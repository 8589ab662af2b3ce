"""Environments of reinforcement tuning: tools that a model calls during an episode.

Each episode is a process without API keys, with limits of memory and of time per call. It is
forked from a process that has loaded the class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finesight.environment_components import require_environment
from finesight.errors import UserError
from finesight.evaluate import environment_worker
from finesight.evaluate.custom_metric import (
    ENVIRONMENT_COPY,
    parse_metric_path,
    require_metric_file,
    resolve_metric_path,
)
from finesight.evaluate.reward_workers import MAX_MEMORY_BYTES
from finesight.evaluate.score_function import LOAD_SECONDS
from finesight.files.worker_pool import (
    JobOutput,
    Worker,
    WorkerJobError,
    WorkerLostError,
    WorkerPool,
)
from finesight.samples.sample import check_tool

ResultBlock = str | Image.Image
"""A text or an RGB image in the result of a tool."""


class EpisodeError(UserError):
    """Raised when the environment of an episode fails. Other episodes are not affected."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """Result of a tool call.

    Attributes:
        is_mistake: Whether the model made a mistake, which the only block describes.
    """

    blocks: Sequence[ResultBlock]
    is_mistake: bool = False


def describe_mistake(problem: str) -> ToolResult:
    """Return the result of an invalid call, which tells the model the problem."""
    return ToolResult([f"Error: {problem}"], is_mistake=True)


class Environment(contextlib.AbstractContextManager["Environment"]):
    """Tools of a class of the user or of a component. Close it to end its processes.

    Args:
        name: `FILE.py:CLASS`, or the name of a component.
        run_dir: Run whose copy replaces a missing file; None without copies.
        seconds: Maximum time of a call, waiting included.

    Attributes:
        tools: Definitions of the tools, as in the OpenAI API.
        has_reward: Whether the class has the method `get_reward`.

    Raises:
        UserError: The file or the component does not exist, or its class is no environment.
    """

    def __init__(self, name: str, run_dir: Path | None, seconds: float) -> None:
        require_environment(name)
        if run_dir is not None:
            name = resolve_metric_path(name, run_dir, copy_name=ENVIRONMENT_COPY)
        self._where = name
        location = parse_metric_path(name)
        if location is not None:
            file, class_name = location
            require_metric_file(file)
            name = f"{file}:{class_name}"
        self._seconds = seconds
        self._sessions: set[EnvironmentSession] = set()
        self._pool = WorkerPool(
            environment_worker.load_environment,
            name,
            num_idle=0,
            memory_bytes=MAX_MEMORY_BYTES,
            has_own_groups=True,
        )
        try:
            with self._pool.fork() as worker:
                described = worker.call_within(LOAD_SECONDS, environment_worker.describe).value
            self.tools = tuple(map(check_tool, described["tools"]))
            self.has_reward = bool(described["has_reward"])
        except (OSError, WorkerJobError) as error:
            self._pool.close()
            raise UserError(
                f"the process that loads it ended ({error})",
                where=self._where,
                expected="a class that loads within two minutes, without threads",
                remedy="start programs and threads in reset",
            ) from error
        except UserError:
            self._pool.close()
            raise

    def __exit__(self, *problem: object) -> None:
        self.end_episodes()
        self._pool.close()

    def end_episodes(self) -> None:
        """Kill the processes of all episodes. Their calls in other threads fail."""
        for session in list(self._sessions):
            session.close()

    def start_episode(self, row: Mapping[str, Any], images: Sequence[Path]) -> EnvironmentSession:
        """Start the process of an episode, and reset its environment.

        Args:
            row: Values of the sample, as keyword arguments of `reset`; `seed` only if it is one.
            images: Image files of the question, loaded for the argument `images`.

        Raises:
            EpisodeError: The process cannot start, or `reset` fails.
        """
        try:
            worker = self._pool.fork()
        except (OSError, UserError, WorkerJobError) as error:
            raise EpisodeError(f"no process of an episode: {error}", where=self._where) from error
        session = EnvironmentSession(worker, self._where, self._seconds, self.tools)
        session.on_close = self._sessions.discard
        self._sessions.add(session)
        try:
            session.run(environment_worker.reset, row, images)
        except EpisodeError:
            session.close()
            raise
        return session


class EnvironmentSession:
    """Environment of one episode, in a process of its own. Close it to end the process.

    Attributes:
        on_close: Called with the session when it is closed.
    """

    on_close: Callable[[EnvironmentSession], object] | None = None

    def __init__(
        self, worker: Worker, where: str, seconds: float, tools: Sequence[dict[str, Any]]
    ) -> None:
        self._worker = worker
        self._where = where
        self._seconds = seconds
        self._tool_names = [tool["function"]["name"] for tool in tools]

    def close(self) -> None:
        """End the process of the episode, and the programs that it has started."""
        self._worker.close()
        if self.on_close is not None:
            self.on_close(self)

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Call a tool; wrong names and arguments are mistakes of the model.

        Raises:
            EpisodeError: The tool fails, or exceeds a limit.
        """
        if name not in self._tool_names:
            return describe_mistake(
                f"no tool {name!r}; the tools are {', '.join(self._tool_names)}"
            )
        reply = self.run(environment_worker.call_tool, name, arguments)
        if isinstance(reply.value, str):
            return describe_mistake(reply.value)
        images = [Image.fromarray(array) for array in reply.arrays]
        blocks: list[ResultBlock] = []
        for text in reply.value:
            blocks.append(images.pop(0) if text is None else text)
        return ToolResult(blocks)

    def get_reward(self) -> float | None:
        """Return the reward of the episode; None if the environment gives none.

        Raises:
            EpisodeError: The environment fails, or exceeds a limit.
        """
        value = self.run(environment_worker.get_reward).value
        if value is None:
            return None
        return float(value)

    def run(self, job: Callable[..., JobOutput], *args: object) -> JobOutput:
        """Run a job of `environment_worker` in the process of the episode.

        Raises:
            EpisodeError: The job fails, or exceeds a limit.
        """
        try:
            return self._worker.call_within(self._seconds, job, *args)
        except UserError as error:
            raise EpisodeError(error.what, where=error.where or self._where) from error
        except (WorkerJobError, WorkerLostError) as error:
            raise EpisodeError(f"{type(error).__name__}: {error}", where=self._where) from error
