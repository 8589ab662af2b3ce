"""Convert the errors of rows that cannot be parsed to issues of a data check."""

from __future__ import annotations

from finesight.check.check_issues import CheckIssue, SampleLocation
from finesight.data.formats.dataset_format import PlaceholderCountError, UnexpectedPlaceholderError
from finesight.data.image_header import CorruptImageError
from finesight.data.sample import EmptyAnswerError, InvalidTurnsError
from finesight.errors import UserError

_CODE_BY_ERROR: tuple[tuple[type[UserError], str], ...] = (
    (EmptyAnswerError, "empty-answer"),
    (InvalidTurnsError, "invalid-role-order"),
    (PlaceholderCountError, "placeholder-count-mismatch"),
    (UnexpectedPlaceholderError, "placeholder-in-text"),
    (CorruptImageError, "image-missing"),
)
"""Issue code by error type; the first match applies, and other errors are `invalid-row`.

In a data check, CorruptImageError is raised only for missing files.
"""


def issue_from_error(error: UserError, location: SampleLocation) -> CheckIssue:
    """Convert the error of a dataset row to an issue at its location."""
    code = next(
        (code for error_type, code in _CODE_BY_ERROR if isinstance(error, error_type)),
        "invalid-row",
    )
    what = f"{error.where}: {error.what}" if error.where else error.what
    remedy = "; ".join(filter(None, [error.expected, error.remedy]))
    return location.create_issue(code, what, remedy)
