"""Rows that cannot be read at all, as findings: each by what stood in the way."""

from __future__ import annotations

from finesight.check.findings import Finding, Place
from finesight.data.formats.format import MarksDiffer, StrayMark
from finesight.data.headers import DamagedPicture
from finesight.data.rules import BadTurns, EmptyAnswer
from finesight.errors import UserError

_CODES: tuple[tuple[type[UserError], str], ...] = (
    (EmptyAnswer, "empty-answer"),
    (BadTurns, "roles-out-of-order"),
    (MarksDiffer, "marks-differ"),
    (StrayMark, "placeholder-typed"),
    (DamagedPicture, "picture-missing"),
)
"""Which fault a kind of refusal is, the first that fits; all others are rows that are unreadable.
Of pictures, a lenient reading refuses only those that are no file at all."""


def problem_finding(problem: UserError, place: Place) -> Finding:
    """The refusal of a row as a finding."""
    code = next((code for kind, code in _CODES if isinstance(problem, kind)), "row-unreadable")
    what = f"{problem.where}: {problem.what}" if problem.where else problem.what
    remedy = "; ".join(filter(None, [problem.expected, problem.remedy]))
    return place.finding(code, what, remedy)
