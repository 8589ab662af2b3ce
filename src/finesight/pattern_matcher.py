"""Match untrusted regular expressions in a worker process with a limit of time.

Python's `re` backtracks: a pattern such as `(a+)+b` takes exponential time, and no thread can
interrupt it. The package `regex` has a time limit, but another syntax, and other characters match
its `\\w`. Recipes and the files of PEFT mean those of `re`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

from finesight.errors import Remedy, UserError
from finesight.worker_pool import JobOutput, WorkerLimitError, WorkerPool

MAX_PATTERN_CPU_S = 5.0
"""CPU seconds of a matcher: for all patterns of an adapter, or for one response of a reward."""

MAX_MEMORY_BYTES = 256 << 20

MatchGroups = list[str | None]


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

        Args:
            texts: Texts to match. Without any, only the pattern is checked.
            is_full: Whether the pattern must match each text completely.

        Raises:
            UserError: The pattern is invalid, or the match exceeds the limits.
        """
        try:
            with self._pool.borrow_worker() as worker:
                # A time limit of 0 would be none.
                limit_s = max(self.budget_s, 0.01)
                reply = worker.call(_match, pattern, [*texts], is_full, flags, max_cpu_s=limit_s)
        except WorkerLimitError as error:
            expected = "a regular expression without nested repetition, such as (a+)+"
            raise self._build_error(f"the pattern {pattern:.200} {error.what}", expected) from error
        except UserError as error:
            raise self._build_error(error.what, "a regular expression of Python") from error
        self.budget_s -= reply.cpu_seconds
        return list(reply.value)

    def _build_error(self, what: str, expected: str) -> UserError:
        return UserError(what, where=self._where, expected=expected, remedy=self._remedy)


def _prepare() -> None:
    """Import this module in the template process."""


def _match(
    state: None, pattern: str, texts: list[str], is_full: bool, flags: re.RegexFlag
) -> JobOutput:
    """Match texts in a worker process."""
    try:
        compiled = re.compile(pattern, flags)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{pattern:.200} is not a regular expression: {error}") from error
    find = compiled.fullmatch if is_full else compiled.match
    groups: list[MatchGroups | None] = []
    for text in texts:
        found = find(text)
        groups.append(None if found is None else [*found.groups()])
    return JobOutput(groups)
