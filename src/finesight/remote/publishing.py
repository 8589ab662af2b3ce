"""Files to a repository of a hub: what will go is known first, and nothing is made public unasked.

Hugging Face's hub is spoken to through huggingface_hub, ModelScope's through `modelscope_upload`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from finesight import __version__
from finesight.errors import UserError
from finesight.remote import modelscope_upload
from finesight.remote.address import Address
from finesight.remote.web import offline


@dataclass(frozen=True, slots=True)
class Upload:
    """A file and what it will be called in the repository."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size


def publish(address: Address, files: Sequence[Upload], *, public: bool, message: str) -> str:
    """Put the files into the repository in one commit; returns the address of its page.

    A repository that there is not is made, private unless `public`. Files of an earlier version
    that are not among these stay. Raises UserError without a token, for a repository that is public
    unasked or private in spite of being asked, for a refusal by the hub, and while offline.
    """
    if address.kind != "model" or address.revision or address.part:
        raise UserError(
            f"{address} is not the name of a model alone",
            where="OUT",
            expected="hf:OWNER/NAME or modelscope:OWNER/NAME, without a revision",
            remedy="leave the rest out",
        )
    if offline():
        raise UserError(
            f"{address} would have to be asked, and HF_HUB_OFFLINE is set",
            where="offline mode",
            expected="a connection to the hub",
            remedy="unset HF_HUB_OFFLINE",
        )
    assert files, f"no files for {address}"
    if address.hub == "modelscope":
        pairs = [(file.name, file.path) for file in files]
        return modelscope_upload.publish(address, pairs, public=public, message=message)
    try:
        return _to_huggingface(address, files, public=public, message=message)
    except HfHubHTTPError as error:
        raise _refusal(address, error) from error
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{address} cannot be written: {type(error).__name__}: {str(error).strip()[:200]}",
            where=constants.ENDPOINT,
            expected="a connection to the hub",
            remedy="check the connection and HF_ENDPOINT, and start again: the commit is the last"
            " step, without it nothing has changed",
        ) from error


def _to_huggingface(
    address: Address, files: Sequence[Upload], *, public: bool, message: str
) -> str:
    token, page = get_token(), f"{constants.ENDPOINT}/{address.name}"
    if not token:
        raise UserError(
            f"no token for {address}",
            where="HF_TOKEN",
            expected="a token that may write",
            remedy=f"make one at {constants.ENDPOINT}/settings/tokens, then: export"
            " HF_TOKEN=hf_...",
        )
    # Its bars would be drawn over what is said here, and into logs.
    disable_progress_bars()
    api = HfApi(token=token, library_name="finesight", library_version=__version__)
    try:
        is_private = bool(api.repo_info(address.name, repo_type="model").private)
    except RepositoryNotFoundError:
        api.create_repo(address.name, repo_type="model", private=not public)
    else:
        if is_private == public:
            raise modelscope_upload.visibility_refused(address, page, public)
    operations = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=os.fspath(file.path))
        for file in files
    ]
    api.create_commit(address.name, operations, commit_message=message, repo_type="model")
    return page


def _refusal(address: Address, error: HfHubHTTPError) -> UserError:
    status = error.response.status_code
    said = error.response.headers.get("x-error-message", "") or error.server_message or ""
    rights = status in (401, 403)
    return UserError(
        f"the hub refuses to write {address} with status {status} {said[:200]}".rstrip(),
        where=constants.ENDPOINT,
        expected=f"a token that may write to {address.name.partition('/')[0]}"
        if rights
        else "an answer that it is done",
        remedy=f"make a token with the right to write at {constants.ENDPOINT}/settings/tokens"
        if rights
        else "start again later: the commit is the last step, without it nothing has changed",
    )
