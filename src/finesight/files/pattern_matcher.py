"""Match untrusted regular expressions in a worker process with a limit of time.

Python's `re` backtracks: a pattern such as `(a+)+b` takes exponential time, and no thread can
interrupt it. The package `regex` has a time limit, but another syntax, and other characters match
its `\\w`. Recipes and the files of PEFT mean those of `re`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from finesight.errors import Remedy, UserError
from finesight.files.worker_pool import JobOutput, WorkerLimitError, WorkerPool

MAX_PATTERN_CPU_S = 5.0
"""CPU seconds of a matcher: for all patterns of an adapter, or for one response of a reward."""

MAX_MEMORY_BYTES = 256 << 20

MatchGroups = list[str | None]


class FirstMatch(NamedTuple):
    """Index of the first pattern that matches a text, and the groups of the match."""

    pattern_index: int
    groups: MatchGroups


class PatternMatcher(contextlib.AbstractContextManager["PatternMatcher"]):
    """Matches patterns as `re` does. The first match starts the worker process.

    Args:
        where: Location of the patterns, for errors.
        remedy: Remedy for a pattern that is invalid or exceeds a limit.

    Attributes:
        budget_s: CPU seconds that the next matches may take together.
    """

    def __init__(self, where: str, remedy: Remedy) -> None:
        self._where, self._remedy = where, remedy
        self._pool = WorkerPool(_prepare, num_idle=1, memory_bytes=MAX_MEMORY_BYTES)
        self.budget_s = MAX_PATTERN_CPU_S

    def __exit__(self, *problem: object) -> None:
        self._pool.close()

    def match(
        self,
        pattern: str,
        texts: Sequence[str] = (),
        *,
        is_full: bool = False,
        flags: re.RegexFlag = re.NOFLAG,
    ) -> list[MatchGroups | None]:
        """Return the groups of the match at the start of each text; None without a match.

        Arguments and errors are those of `match_first`.
        """
        found = self.match_first([pattern], texts, is_full=is_full, flags=flags)
        return [None if one is None else one.groups for one in found]

    def match_first(
        self,
        patterns: Sequence[str],
        texts: Sequence[str] = (),
        *,
        is_full: bool = False,
        flags: re.RegexFlag = re.NOFLAG,
    ) -> list[FirstMatch | None]:
        """Return the first match of a pattern at the start of each text; None without a match.

        Args:
            texts: Texts to match. Without any, only the patterns are checked.
            is_full: Whether a pattern must match a text completely.

        Raises:
            UserError: A pattern is invalid, or the matches exceed the limits.
        """
        if not patterns:
            return [None] * len(texts)
        subject = f"the pattern {patterns[0]:.200}"
        if len(patterns) > 1:
            subject = f"one of {len(patterns)} patterns, from {patterns[0]:.200},"
        expected = "regular expressions without nested repetition, such as (a+)+"
        if self.budget_s <= 0:
            raise self._build_error(f"{subject} took more than the time that is left", expected)
        # All patterns are one job: a clock of CPU time may be too coarse for short ones.
        args = [*patterns], [*texts], is_full, flags
        try:
            with self._pool.borrow_worker() as worker:
                # A time limit of 0 would be none.
                limit_s = max(round(self.budget_s, 1), 0.1)
                reply = worker.call(_match, *args, max_cpu_s=limit_s)
        except WorkerLimitError as error:
            raise self._build_error(f"{subject} {error.what}", expected) from error
        except UserError as error:
            raise self._build_error(error.what, "a regular expression of Python") from error
        self.budget_s -= reply.cpu_seconds
        return [None if one is None else FirstMatch(*one) for one in reply.value]

    def _build_error(self, what: str, expected: str) -> UserError:
        return UserError(what, where=self._where, expected=expected, remedy=self._remedy)


def _prepare() -> None:
    """Import this module in the template process."""


def _match(
    state: None, patterns: list[str], texts: list[str], is_full: bool, flags: re.RegexFlag
) -> JobOutput:
    """Match texts in a worker process."""
    found: list[FirstMatch | None] = [None] * len(texts)
    for index, pattern in enumerate(patterns):
        try:
            compiled = re.compile(pattern, flags)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{pattern:.200} is not a regular expression: {error}") from error
        find = compiled.fullmatch if is_full else compiled.match
        for number, text in enumerate(texts):
            if found[number] is None and (match := find(text)) is not None:
                found[number] = FirstMatch(index, [*match.groups()])
    return JobOutput(found)
