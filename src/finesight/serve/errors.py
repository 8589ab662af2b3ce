"""What goes wrong with a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finesight.errors import UserError

TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""The `type` of an error by its status."""


@dataclass(slots=True, eq=False)
class Refused(Exception):
    """A request is not answered; `param` is the part of it that is wrong, `wait` the seconds after
    which it may be asked again."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    wait: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's interface has it."""
        kind = TYPES.get(self.status, "server_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def extra_headers(self) -> dict[str, str]:
        """With Retry-After, where another attempt may do better."""
        wait = {} if self.wait is None else {"Retry-After": str(self.wait)}
        return {**self.headers, **wait}


class ClientGone(Exception):
    """The client has disconnected: nobody reads an answer."""


def refused(error: UserError, param: str | None = None, hidden: str = "") -> Refused:
    """What the user's own error says, as status 400; `hidden`, a folder of this machine, is cut out
    of it."""
    where = f"{error.where}: " if error.where and not error.where.startswith("/") else ""
    expected = f"; expected {error.expected}" if error.expected else ""
    text = f"{where}{error.what}{expected}"
    return Refused(400, text.replace(hidden, "") if hidden else text, param)


def broken() -> Refused:
    """Our own fault: what it was stands in the log, never in an answer."""
    return Refused(500, "the server failed; its log says where")
