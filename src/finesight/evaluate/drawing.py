"""Formulas drawn by ziamath, in processes of their own, to see whether two look the same.

Formulas come from models, so drawing one may fail, take for ever or ask for all memory. Each is
drawn in a child process with bounds on time and memory; what cannot be drawn there has no drawing.
This file is also the child's program: it reads formulas from its input, a JSON string a line, and
answers each with the digest of its drawing, or with null.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from types import FrameType

LONGEST = 4000
"""Characters of a formula; a longer one is not drawn. Published data sets end at about 1,000."""

SECONDS = 2
"""Processor time for one formula; real ones take a fiftieth of a second."""

PATIENCE = 60
"""Seconds to wait for an answer of the child, which a crowded machine may delay."""

MEMORY = 2 * 10**9
CHILDREN = 4

_known: dict[str, str | None] = {}
"""Digests of what this process has asked for: the truths of a data set are drawn once."""

_MOST_KNOWN = 200_000


def available() -> bool:
    """Whether ziamath is installed (`pip install "finesight[latex]"`)."""
    return util.find_spec("ziamath") is not None


def drawings(formulas: Iterable[str]) -> dict[str, str | None]:
    """The digest of each formula's drawing: equal ones look the same. None if it has none."""
    wanted = set(formulas)
    if len(_known) > _MOST_KNOWN:
        _known.clear()
    missing = sorted(wanted - _known.keys())
    count = min(CHILDREN, os.cpu_count() or 1, len(missing))
    if count:
        shares = [missing[first::count] for first in range(count)]
        with ThreadPoolExecutor(count) as pool:
            for share, digests in zip(shares, pool.map(_drawn, shares), strict=True):
                _known.update(zip(share, digests, strict=True))
    return {formula: _known[formula] for formula in wanted}


def _drawn(formulas: list[str]) -> list[str | None]:
    """Digests in order; a child that dies or falls silent is replaced."""
    digests: list[str | None] = []
    while len(digests) < len(formulas):
        with _child() as child:
            for formula in formulas[len(digests) :]:
                answer = _asked(child, formula) if len(formula) <= LONGEST else "null"
                digests.append(json.loads(answer) if answer else None)
                if not answer:
                    break
            child.kill()
    return digests


def _child() -> subprocess.Popen[str]:
    # By its path and without the folder it lies in: it imports nothing of finesight.
    command = [sys.executable, "-P", __file__]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        # Ctrl-C is for the parent, which may go on; without it the child's input ends.
        start_new_session=True,
    )


def _asked(child: subprocess.Popen[str], formula: str) -> str:
    """The child's line about a formula; empty if it died or fell silent."""
    assert child.stdin is not None, "a child without input"
    assert child.stdout is not None, "a child without output"
    try:
        child.stdin.write(json.dumps(formula) + "\n")
        child.stdin.flush()
    except OSError:
        # It is dead. Closing would try once more to write, and raise where nobody expects it.
        with contextlib.suppress(OSError):
            child.stdin.close()
        return ""
    ready, _, _ = select.select([child.stdout], [], [], PATIENCE)
    return child.stdout.readline() if ready else ""


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def _draw(formula: str) -> str | None:
    import ziamath

    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        svg = ziamath.Latex(formula).svg()
        return hashlib.sha256(svg.encode()).hexdigest()[:32]
    # Whatever a foreign parser makes of a model's words.
    except Exception:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer() -> None:
    """What the child does."""
    import resource

    # Not every system lets a process bound itself.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _out_of_time)
    for line in sys.stdin:
        print(json.dumps(_draw(json.loads(line))), flush=True)


if __name__ == "__main__":
    _answer()
