"""Search for the files that match a pattern, within a bound on the number of files found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from glob import iglob
from pathlib import Path

from finesight.errors import UserError
from finesight.files.bounded_files import MAX_DEPTH

GLOB_CHARACTERS = frozenset("*?[")

MAX_SEARCHED_FILES = 200_000
"""Maximum number of files and folders that a search finds, with those on its way."""


class SearchBudget:
    """Number of files that one or several searches may still find."""

    def __init__(self) -> None:
        self._files_left = MAX_SEARCHED_FILES

    def count_file(self, pattern: str) -> None:
        """Count a file that a pattern has found. Raises UserError for one too many."""
        self._files_left -= 1
        if self._files_left < 0:
            raise UserError(
                "too many files to search",
                where=pattern,
                expected=f"at most {MAX_SEARCHED_FILES:,}",
                remedy="name its folders",
            )


def is_glob(path: Path) -> bool:
    """Return whether a path is a glob pattern rather than an existing file."""
    return bool(GLOB_CHARACTERS & {*str(path)}) and not path.exists()


def iter_matches(pattern: str, budget: SearchBudget | None = None) -> Iterator[str]:
    """Yield the paths that match a pattern, similar to `glob.iglob` with `recursive`.

    The order is the same on all machines, but not sorted. Differences from `glob.iglob`:

    - A folder to which several paths lead is read once, with the same one of these paths on all
      machines.
    - `a/**` does not yield `a/` itself.
    - A slash at the end of the pattern has no effect: it also matches files.

    Args:
        budget: Budget of several patterns together. None: this pattern has one of its own.

    Raises:
        UserError: More files than the budget are found.
    """
    budget = budget or SearchBudget()
    parts = [part for part in pattern.split("/") if part] or ["."]
    root = "/" if pattern.startswith("/") else ""
    if len(parts) > MAX_DEPTH:
        return

    # Links and ".." multiply the paths to a folder, so each folder is read once per part of the
    # pattern. "**" at the end reads its folder twice: as "**" and as "*".
    seen: set[tuple[str, str, int]] = set()
    waiting = [(root, parts)]
    while waiting:
        folder, (part, *rest) = waiting.pop()
        state = (os.path.realpath(folder), part, len(rest))
        if state in seen:
            continue
        seen.add(state)

        is_deep = part == "**"
        if is_deep:
            # "**" matches no folder, too.
            waiting.append((folder, rest or ["*"]))
        names = iglob("*" if is_deep else part, root_dir=folder or None)
        # Folders are read in sorted order, because the last one added is the next one read.
        for name in sorted(names, reverse=True):
            path = os.path.join(folder, name)
            budget.count_file(pattern)
            if is_deep:
                if os.path.isdir(path):
                    waiting.append((path, [part, *rest]))
            elif not rest:
                yield path
            elif os.path.isdir(path):
                waiting.append((path, rest))


def has_match(pattern: str, budget: SearchBudget) -> bool:
    """Return whether a path exists or, as a pattern, matches one. Raises like `iter_matches`."""
    if os.path.exists(pattern):
        return True
    return pattern != "" and next(iter_matches(pattern, budget), None) is not None
