"""Endpoint and token of a hub, and the errors of requests that it rejects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finesight.errors import UserError
from finesight.hub.address import HubAddress

Refusal = Literal["gated", "missing", "token", "other"]
"""Reason of a rejected request."""


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Base URL of a hub, its environment variables, and its page that creates tokens."""

    endpoint: str
    endpoint_variable: str
    token_variable: str
    token_page: str

    def get_page(self, address: HubAddress) -> str:
        """Return the URL of the page of a repository."""
        is_plain = address.hub == "hf" and address.repo_type == "model"
        folder = "" if is_plain else f"{address.repo_type}s/"
        return f"{self.endpoint}/{folder}{address.repo_id}"

    @property
    def token_hint(self) -> str:
        """Instruction to create a token and to set its variable."""
        page = f"{self.endpoint}/{self.token_page}"
        return f"create a token at {page}, then: export {self.token_variable}=TOKEN"

    def require_token(self, address: HubAddress, token: str | None) -> None:
        """Raise UserError without a token."""
        if not token:
            raise UserError(
                f"no token for {address}",
                where=self.token_variable,
                expected="a token of an account with write access",
                remedy=self.token_hint,
            )

    def require_visibility(self, address: HubAddress, is_private: bool, public: bool) -> None:
        """Raise UserError if an existing repository has another visibility than expected."""
        if is_private == public:
            raise UserError(
                f"the repository {address} exists and is {'private' if public else 'public'}",
                where=self.get_page(address),
                expected=f"a {'public' if public else 'private'} repository, or a new name",
                remedy="remove --public"
                if public
                else "give another name, or run `finesight export` with --public",
            )

    def build_refusal_error(
        self, address: HubAddress, reason: Refusal, status: int, message: str
    ) -> UserError:
        """Build the UserError for a rejected request to read a repository."""
        page, read_token = self.get_page(address), f"a token ({self.token_variable}) to read it"
        what, expected, remedy = {
            "gated": (
                "is gated or private: its owner requires each user to accept a license",
                f"{read_token}, of an account that accepted the license",
                f"log in and request access at {page}, {self.token_hint}",
            ),
            "token": (
                "is not available: the hub rejects the token",
                "a valid token, or none for a public repository",
                f"unset {self.token_variable}, or {self.token_hint}",
            ),
            "missing": (
                "does not exist or is private, or has no such revision",
                f"the name of a public repository and of its revision, or {read_token}",
                f"check the name at {page}, and whether it is a model or a dataset; for a private"
                f" one, {self.token_hint}",
            ),
            "other": (
                f"is not available: the hub rejects the request: {message[:200]!r}",
                "the file",
                "try again later, or download it with another program and use the folder",
            ),
        }[reason]
        return UserError(
            f"{address} {what} (status {status})", where=page, expected=expected, remedy=remedy
        )

    def build_write_error(self, address: HubAddress, status: int, message: str) -> UserError:
        """Build the UserError for a rejected request to write to a repository."""
        return UserError(
            f"the hub rejects writing to {address} with status {status}: {message[:200]}",
            where=self.endpoint,
            expected=f"a token ({self.token_variable}) with write access",
            remedy=f"check the name, {self.token_hint}, and start again: without the final commit,"
            " the repository is unchanged",
        )

    def build_connection_error(self, address: HubAddress, error: Exception) -> UserError:
        """Build the UserError for a request without a valid response."""
        return UserError(
            f"{address} is not available: {type(error).__name__}: {str(error).strip()[:200]}",
            where=self.endpoint,
            expected="a connection to the hub, and a valid name",
            remedy=f"check the connection and {self.endpoint_variable}, and start again, or"
            " download it on another machine and use the folder; with HF_HUB_OFFLINE=1, downloaded"
            " files are used",
        )
