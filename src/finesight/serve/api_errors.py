"""Errors of the inference server, in the format that OpenAI clients expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finesight.errors import UserError

ERROR_TYPES: Mapping[int, str] = {
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
"""Values of the field `type` in an error body, by HTTP status."""


@dataclass(slots=True, eq=False)
class ApiError(Exception):
    """Raised to respond to a request with an error.

    Attributes:
        status: HTTP status.
        message: Message for the client.
        param: Path of the invalid field in the request body.
        code: Machine-readable code, such as `model_not_found`.
        retry_after_s: Seconds until the client may retry.
        headers: Additional HTTP headers.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """Error body in the format of the OpenAI API."""
        error_type = ERROR_TYPES.get(self.status, "server_error")
        fields = {"message": self.message, "type": error_type}
        return {"error": {**fields, "param": self.param, "code": self.code}}

    @property
    def response_headers(self) -> dict[str, str]:
        """HTTP headers of the error response, with `Retry-After` if a retry is useful."""
        if self.retry_after_s is None:
            return self.headers
        return {**self.headers, "Retry-After": str(self.retry_after_s)}


class ClientDisconnectedError(Exception):
    """Raised when the client disconnects before its response is complete."""


def from_user_error(error: UserError, param: str | None = None, hidden_path: str = "") -> ApiError:
    """Convert a `UserError` about a request to an error response with status 400.

    Args:
        error: Error of the request.
        param: Path of the invalid field in the request body.
        hidden_path: Local folder that is removed from the message.
    """
    where = f"{error.where}: " if error.where and not error.where.startswith("/") else ""
    expected = f"; expected {error.expected}" if error.expected else ""
    text = f"{where}{error.what}{expected}"
    return ApiError(400, text.replace(hidden_path, "") if hidden_path else text, param)


def internal_error() -> ApiError:
    """Return the response for an internal error. Only the server log has its details."""
    return ApiError(500, "internal server error; see the server log")
