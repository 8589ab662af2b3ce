"""A measure of one's own: a Python function in a file, named by a recipe as `metric.py:function`.

The function takes a `Case` (answer, boxes, truths, targets) and gives one number, or several by
name, the more the better. The set's figures are their means; the first name, or the one that the
file calls HEADLINE, stands for all. The file is run as it is: it is a program, not data.
"""

from __future__ import annotations

import math
import numbers
import os
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finesight.errors import UserError
from finesight.evaluate.answered import Case, Score, Scored, Scores, means
from finesight.evaluate.bootstrap import UNBOUNDED

COPY = "metric.py"
"""What a run's folder calls its copy of the file."""

EXPECTED = "a function of one case that gives a finite number, or a dict of them by name"


def split(metric: str) -> tuple[Path, str] | None:
    """File and function of `path/to/metric.py:function`; None for the name of a task."""
    file, colon, function = metric.rpartition(":")
    return (Path(os.path.expanduser(file)), function) if colon else None


def found(metric: str, run: Path, *, copy_first: bool = False) -> str:
    """The same metric, by the copy in a run's folder where the file itself is not there or, with
    `copy_first`, wherever there is a copy."""
    place = split(metric)
    if place is None or not (run / COPY).is_file():
        return metric
    if os.path.isfile(place[0]) and not copy_first:
        return metric
    return f"{run / COPY}:{place[1]}"


def load(file: Path, function: str) -> Score:
    """A way to score by a function in a file. Raises UserError, now or when scoring, naming the
    line for whatever goes wrong in it."""
    content = _run(file)
    chosen = content.get(function)
    if not callable(chosen):
        there = sorted(n for n, v in content.items() if callable(v) and not n.startswith("_"))
        raise UserError(
            f"no function {function!r}",
            where=str(file),
            expected=EXPECTED,
            remedy=f"name one of {', '.join(there)}" if there else f"define {function}(case)",
        )
    headline = content.get("HEADLINE")
    return lambda cases: _scored(chosen, file, function, headline, cases)


def require_file(file: Path) -> None:
    """Raise UserError unless the file is there; it is not executed."""
    if not os.path.isfile(file):
        raise UserError(
            "no such file",
            where=str(file),
            expected="a Python file with the function of your metric",
            remedy="correct eval.metric; it is relative to the folder the command runs in",
        )


def _run(file: Path) -> dict[str, Any]:
    require_file(file)
    try:
        return runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
        raise _failed(error, file, "while the file was run") from error


def _scored(
    function: Callable[[Case], Any],
    file: Path,
    name: str,
    headline: str | None,
    cases: Sequence[Case],
) -> Scored:
    each: list[Scores] = []
    for case in cases:
        try:
            value = function(case)
        except (Exception, SystemExit) as error:
            doing = f"for sample {case.id!r}, answer {case.answer[:80]!r}"
            raise _failed(error, file, doing) from error
        each.append(_as_scores(value, file, name, case))
        if each[-1].keys() != each[0].keys():
            raise _refused(f"the figures {', '.join(each[-1])} after {', '.join(each[0])}", file)
    if headline is not None and headline not in each[0]:
        raise _refused(f"HEADLINE is {headline!r}, the figures are {', '.join(each[0])}", file)
    first = headline or next(iter(each[0]))
    ordered = [{first: scores[first]} | scores for scores in each]
    return Scored(ordered, means(ordered, bounds=UNBOUNDED))


def _as_scores(value: object, file: Path, function: str, case: Case) -> Scores:
    named = value if isinstance(value, dict) else {function: value}
    scores: Scores = {}
    for name, number in named.items():
        if not isinstance(number, numbers.Real) or not math.isfinite(number):
            raise _refused(f"{name} is {number!r} for sample {case.id!r}", file)
        scores[str(name)] = float(number)
    if not scores:
        raise _refused(f"no figure for sample {case.id!r}", file)
    return scores


def _refused(what: str, file: Path) -> UserError:
    remedy = "correct the function: the same names for every case, and finite numbers"
    return UserError(what, where=str(file), expected=EXPECTED, remedy=remedy)


def _failed(error: BaseException, file: Path, doing: str) -> UserError:
    """What went wrong in the user's file, and on which line of it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    line = lines[-1] if lines else None
    if isinstance(error, SyntaxError) and error.filename == str(file):
        line = error.lineno
    return UserError(
        f"{type(error).__name__}: {error} ({doing})",
        where=f"{file}:{line}" if line else str(file),
        expected=EXPECTED,
        remedy="correct the file; `python -m pdb` shows more",
    )
