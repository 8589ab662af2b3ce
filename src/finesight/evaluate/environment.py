"""Environments of reinforcement tuning: tools that a model calls during an episode.

Each episode is a process without API keys, with limits of memory and of time per call. It is
forked from a process that has loaded the class.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
    WorkerLimitError,
    WorkerLostError,
    WorkerPool,
)
from finesight.samples.sample import check_tool

MAX_REPLY_BYTES = 64 << 20
"""Maximum size of a reply of an episode: its pixels and its value."""

MAX_VALUE_BYTES = 4 << 20
"""Maximum size of the value of a reply: its texts with escaped characters."""

FILES_PER_EPISODE = 3
"""Open files of this process for each running episode."""

MAX_OPEN_FILES = 16_384
"""Limit of open files to which that of this process is raised if it is lower."""

LOWER_FILE_LIMITS = (10_240, 4_096, 1_024)
"""Limits of open files that are tried after `MAX_OPEN_FILES`."""

RESERVED_FILES = 256
"""Open files of this process that episodes leave for data, checkpoints and connections."""

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


class Environment(AbstractContextManager["Environment"]):
    """Tools of a class of the user or of a component. Close it to end its processes.

    Args:
        name: `FILE.py:CLASS`, or the name of a component.
        run_dir: Run whose copy replaces a missing file; None without copies.
        seconds: Maximum time of a call, waiting included.
        turn_seconds: Maximum time of all calls of a turn together.

    Attributes:
        tools: Definitions of the tools, as in the OpenAI API.
        has_reward: Whether the class has the method `get_reward`.
        where: The name, with the copy of the run if its file is missing.

    Raises:
        UserError: The file or the component does not exist, or its class is no environment.
    """

    def __init__(
        self,
        name: str,
        run_dir: Path | None,
        seconds: float,
        turn_seconds: float = math.inf,
    ) -> None:
        require_environment(name)
        if run_dir is not None:
            name = resolve_metric_path(name, run_dir, copy_name=ENVIRONMENT_COPY)
        self.where = name
        location = parse_metric_path(name)
        if location is not None:
            file, class_name = location
            require_metric_file(file)
            name = f"{file}:{class_name}"
        self._seconds = seconds
        self._turn_seconds = turn_seconds
        file_limit = raise_file_limit()
        num_reserved = min(RESERVED_FILES, file_limit // 2)
        self._max_sessions = (file_limit - num_reserved) // FILES_PER_EPISODE
        self._sessions: set[EnvironmentSession] = set()
        self._pool = WorkerPool(
            environment_worker.load_environment,
            name,
            num_idle=0,
            memory_bytes=MAX_MEMORY_BYTES,
            has_own_groups=True,
            max_reply_bytes=MAX_REPLY_BYTES,
            max_value_bytes=MAX_VALUE_BYTES,
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
                where=self.where,
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
        if len(self._sessions) >= self._max_sessions:
            raise EpisodeError(
                f"{len(self._sessions)} episodes run, and no more fit the limit of open files"
                " (ulimit -n)",
                where=self.where,
            )
        try:
            worker = self._pool.fork()
        except (OSError, UserError, WorkerJobError) as error:
            raise EpisodeError(f"no process of an episode: {error}", where=self.where) from error
        session = EnvironmentSession(
            worker,
            self.where,
            self.tools,
            seconds=self._seconds,
            turn_seconds=self._turn_seconds,
        )
        session.start_turn()
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

    Args:
        seconds: Maximum number of seconds of a call.
        turn_seconds: Maximum number of seconds of all calls of a turn.

    Attributes:
        on_close: Called with the session when it is closed.
        turn_end: Time on the clock of `time.monotonic` at which the calls of the turn end.
    """

    on_close: Callable[[EnvironmentSession], object] | None = None
    turn_end: float = math.inf
    _turn_seconds: float = math.inf  # of sessions without a process, which subclasses provide

    def __init__(
        self,
        worker: Worker,
        where: str,
        tools: Sequence[dict[str, Any]],
        *,
        seconds: float,
        turn_seconds: float,
    ) -> None:
        self._worker = worker
        self._where = where
        self._seconds = seconds
        self._turn_seconds = turn_seconds
        self._tool_names = [tool["function"]["name"] for tool in tools]

    def start_turn(self) -> None:
        """Start the time of a turn, which its calls share."""
        self.turn_end = time.monotonic() + self._turn_seconds

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
            if len(reply.value) > environment_worker.MAX_RESULT_CHARS:
                raise EpisodeError(
                    f"a reply with an invalid result: {len(reply.value)} characters",
                    where=self._where,
                )
            return describe_mistake(_replace_surrogates(reply.value))
        return ToolResult(read_blocks(reply, self._where))

    def get_reward(self) -> float | None:
        """Return the reward of the episode; None if the environment gives none.

        Raises:
            EpisodeError: The environment fails, or exceeds a limit.
        """
        value = self.run(environment_worker.get_reward).value
        if value is None:
            return None
        reward = math.nan
        if isinstance(value, int | float):
            with suppress(OverflowError):  # of an integer
                reward = float(value)
        if not math.isfinite(reward):
            raise EpisodeError(f"a reply with an invalid reward: {value!r:.60}", where=self._where)
        return reward

    def run(self, job: Callable[..., JobOutput], *args: object) -> JobOutput:
        """Run a job of `environment_worker` in the process of the episode.

        Raises:
            EpisodeError: The job fails, or exceeds a limit.
        """
        if self._worker.is_killed:
            raise EpisodeError("an earlier call ended at a limit", where=self._where)
        left = self.turn_end - time.monotonic()
        try:
            return self._worker.call_within(min(self._seconds, max(0.0, left)), job, *args)
        except WorkerLimitError as error:
            what = error.what
            if left < self._seconds and time.monotonic() >= self.turn_end:
                what = f"the calls of a turn took more than {self._turn_seconds:g} s together"
            raise EpisodeError(what, where=self._where) from error
        except UserError as error:
            raise EpisodeError(error.what, where=error.where or self._where) from error
        except (WorkerJobError, WorkerLostError) as error:
            raise EpisodeError(f"{type(error).__name__}: {error}", where=self._where) from error


def read_blocks(reply: JobOutput, where: str) -> list[ResultBlock]:
    """Return the texts and images of a reply, whose process may have damaged it.

    Raises:
        EpisodeError: The reply exceeds the limits of results, or has other values.
    """
    texts = reply.value
    is_valid = isinstance(texts, list) and len(texts) <= environment_worker.MAX_RESULT_BLOCKS
    num_chars = 0
    num_images = 0
    for text in texts if is_valid else ():
        if text is None:
            num_images += 1
        elif isinstance(text, str):
            num_chars += len(text)
        else:
            is_valid = False
    num_pixels = 0
    for array in reply.arrays:
        is_image = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
        is_valid = is_valid and is_image and array.size > 0
        num_pixels += array.size // 3
    is_valid = is_valid and num_images == len(reply.arrays) <= environment_worker.MAX_RESULT_IMAGES
    is_valid = is_valid and num_pixels <= environment_worker.MAX_RESULT_PIXELS
    if not is_valid or num_chars > environment_worker.MAX_RESULT_CHARS:
        raise EpisodeError(
            f"a reply with an invalid result: {num_chars} characters, {len(reply.arrays)} images",
            where=where,
        )
    images = map(Image.fromarray, reply.arrays)
    blocks: list[ResultBlock] = []
    for text in texts:
        blocks.append(next(images) if text is None else _replace_surrogates(text))
    return blocks


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which have no tokens."""
    return text.encode("utf-8", "replace").decode()


def raise_file_limit() -> int:
    """Raise the limit of open files of this process as far as it may, and return it."""
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES
    if hard_limit != resource.RLIM_INFINITY:
        wanted = min(wanted, hard_limit)
    if soft_limit == resource.RLIM_INFINITY or soft_limit >= wanted:
        return soft_limit if soft_limit != resource.RLIM_INFINITY else wanted
    for limit in (wanted, *LOWER_FILE_LIMITS):
        if soft_limit < limit <= wanted:
            with suppress(OSError, ValueError):  # a lower limit of the kernel, as on macOS
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard_limit))
                return limit
    return soft_limit
