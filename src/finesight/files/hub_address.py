"""Addresses of repositories on the Hugging Face Hub and ModelScope, and access to these hubs.

The syntax is `hf:OWNER/NAME@REVISION` or `modelscope:OWNER/NAME@REVISION`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from finesight.errors import UnavailableError, UserError

HubName = Literal["hf", "modelscope"]
RepoType = Literal["model", "dataset"]

_TRUE_VALUES = frozenset({"1", "ON", "YES", "TRUE"})

_REPO_ID_PATTERN = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_ADDRESS_PATTERN = re.compile(
    # Without a hub prefix, models/my/tiny is a mistyped path, not a repository.
    r"(?:(?P<hub>hf|modelscope):(?P<kind>datasets/|models/)?)?"
    rf"(?P<name>{_REPO_ID_PATTERN})"
    r"(?:@(?P<revision>[\w][\w./-]*))?"
    r"(?::(?P<part>[\w][\w./ -]*))?"
)


@dataclass(frozen=True, slots=True)
class HubAddress:
    """Address of a model or dataset repository on a hub.

    Attributes:
        revision: Branch, tag or commit; None for the default branch.
        data_part: Split, `SUBSET/SPLIT` or file of a data set; None for the complete data set.
    """

    hub: HubName
    repo_type: RepoType
    repo_id: str
    revision: str | None = None
    data_part: str | None = None

    def __str__(self) -> str:
        folder = "datasets/" if self.repo_type == "dataset" else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}:{folder}{self.repo_id}{revision}"


def is_offline() -> bool:
    """Return whether the environment variable HF_HUB_OFFLINE disables all requests."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE_VALUES


def is_hub_address(source: str) -> bool:
    """Return whether a string starts with `hf:` or `modelscope:`.

    The rest of the string is not validated.
    """
    return source.startswith(("hf:", "modelscope:"))


def parse_model_address(text: str) -> HubAddress | None:
    """Parse the hub address of a model.

    Accepted forms are `OWNER/NAME`, `hf:OWNER/NAME` and `modelscope:OWNER/NAME`, each optionally
    with `@REVISION`.

    Returns:
        The address, or None if the text is not the address of a model, such as a local path.
    """
    address = _parse(text)
    if address is None or address.repo_type == "dataset" or address.data_part is not None:
        return None
    return address


def parse_dataset_address(text: str) -> HubAddress:
    """Parse the hub address of a data set.

    Accepted forms are `hf:OWNER/NAME` and `modelscope:OWNER/NAME`, optionally followed by
    `@REVISION` and `:PART`.
    """
    address = _parse(text, "dataset")
    if address is None or address.repo_type == "model" or not is_hub_address(text):
        raise UserError(
            f"{text!r} is not the address of a dataset",
            where="SOURCE",
            expected="hf:OWNER/NAME or modelscope:OWNER/NAME, optionally with @REVISION and :SPLIT",
            remedy="for example hf:jrzhang/TextVQA_GT_bbox:train",
        )
    return address


def parse_address(text: str) -> HubAddress:
    """Parse the hub address of a model or data set.

    The address of a data set has the prefix `datasets/`, as in `hf:datasets/OWNER/NAME`.
    """
    address = _parse(text)
    if address is None or (address.repo_type == "model" and address.data_part is not None):
        raise UserError(
            f"{text!r} is not the address of a repository",
            where="SOURCE",
            expected="[hf:|modelscope:]OWNER/NAME for a model, hf:datasets/OWNER/NAME or"
            " modelscope:datasets/OWNER/NAME for a dataset, optionally with @REVISION",
            remedy="for example hf:Qwen/Qwen2-VL-2B-Instruct or"
            " hf:datasets/jrzhang/TextVQA_GT_bbox",
        )
    return address


def _parse(text: str, default_type: RepoType = "model") -> HubAddress | None:
    match = _ADDRESS_PATTERN.fullmatch(text)
    if match is None or ".." in text:
        return None
    repo_types: dict[str | None, RepoType] = {
        None: default_type,
        "datasets/": "dataset",
        "models/": "model",
    }
    hub: HubName = "modelscope" if match["hub"] == "modelscope" else "hf"
    return HubAddress(
        hub, repo_types[match["kind"]], match["name"], match["revision"], match["part"]
    )


Refusal = Literal["gated", "missing", "token", "other"]
"""Reason of a rejected request."""


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Base URL of a hub, its environment variables, and its page that creates tokens.

    Attributes:
        token: Token of the user, which errors never repeat; empty without one.
    """

    endpoint: str
    endpoint_variable: str
    token_variable: str
    token_page: str
    token: str = ""

    def get_page(self, address: HubAddress) -> str:
        """Return the URL of the page of a repository."""
        is_plain = address.hub == "hf" and address.repo_type == "model"
        folder = "" if is_plain else f"{address.repo_type}s/"
        return f"{self.endpoint}/{folder}{address.repo_id}"

    def _shorten(self, message: str) -> str:
        """Return the start of a message of a server, which may repeat the token."""
        if self.token:
            message = message.replace(self.token, "***")
        return message[:200]

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
        if is_private != public:
            return
        if public:
            found = "private"
            expected = "public"
            remedy = "remove --public"
        else:
            found = "public"
            expected = "private"
            remedy = "give another name, or add --public"
        raise UserError(
            f"the repository {address} exists and is {found}",
            where=self.get_page(address),
            expected=f"a {expected} repository, or a new name",
            remedy=remedy,
        )

    def build_refusal_error(
        self, address: HubAddress, reason: Refusal, status: int, message: str
    ) -> UserError:
        """Build the UserError for a rejected request to read a repository."""
        page = self.get_page(address)
        read_token = f"a token ({self.token_variable}) to read it"
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
                f"is not available: the hub rejects the request: {self._shorten(message)!r}",
                "the file",
                "try again later, or download it with another program and use the folder",
            ),
        }[reason]
        error_type: type[UserError] = UnavailableError
        if reason == "missing":
            error_type = UserError
        return error_type(
            f"{address} {what} (status {status})", where=page, expected=expected, remedy=remedy
        )

    def build_write_error(self, address: HubAddress, status: int, message: str) -> UserError:
        """Build the UserError for a rejected request to write to a repository."""
        return UserError(
            f"the hub rejects writing to {address} with status {status}: {self._shorten(message)}",
            where=self.endpoint,
            expected=f"a token ({self.token_variable}) with write access",
            remedy=f"check the name, {self.token_hint}, and start again: without the final commit,"
            " the repository is unchanged",
        )

    def build_connection_error(self, address: HubAddress, error: Exception) -> UserError:
        """Build the UserError for a request without a valid response."""
        reason = self._shorten(str(error).strip())
        return UnavailableError(
            f"{address} is not available: {type(error).__name__}: {reason}",
            where=self.endpoint,
            expected="a connection to the hub, and a valid name",
            remedy=f"check the connection and {self.endpoint_variable}, and start again, or"
            " download it on another machine and use the folder; with HF_HUB_OFFLINE=1, downloaded"
            " files are used",
        )
