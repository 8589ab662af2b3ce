"""Publication of models on the Hugging Face Hub or ModelScope.

Uploads to Hugging Face use huggingface_hub, those to ModelScope `modelscope_upload`.
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
from finesight.hub import modelscope_upload
from finesight.hub.address import HubAddress
from finesight.hub.http_client import is_offline


@dataclass(frozen=True, slots=True)
class FileUpload:
    """A local file and its name in the hub repository."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size


def publish_model(
    address: HubAddress, files: Sequence[FileUpload], *, public: bool, message: str
) -> str:
    """Upload files to a model repository in one commit.

    A missing repository is created. Files that exist in the repository under other names are kept.

    Args:
        address: Address of the repository, without a revision.
        files: Files to upload.
        public: Whether the repository is public.
        message: Message of the commit.

    Returns:
        URL of the repository page.

    Raises:
        UserError: There is no token, the repository has another visibility, the hub rejects the
            request, or HF_HUB_OFFLINE is set.
    """
    if address.repo_type != "model" or address.revision or address.data_part:
        raise UserError(
            f"{address} is not a model, or has a revision",
            where="OUT",
            expected="hf:OWNER/NAME or modelscope:OWNER/NAME, without a revision",
            remedy="remove the other parts",
        )
    if is_offline():
        raise UserError(
            f"{address} requires a request, but HF_HUB_OFFLINE is set",
            where="offline mode",
            expected="a connection to the hub",
            remedy="unset HF_HUB_OFFLINE",
        )
    assert files, f"no files for {address}"
    if address.hub == "modelscope":
        named_paths = [(file.name, file.path) for file in files]
        return modelscope_upload.publish_files(
            address, named_paths, public=public, commit_message=message
        )
    try:
        return _publish_to_huggingface(address, files, public=public, message=message)
    except HfHubHTTPError as error:
        raise _build_refusal_error(address, error) from error
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"uploading to {address} failed: {type(error).__name__}: {str(error).strip()[:200]}",
            where=constants.ENDPOINT,
            expected="a connection to the hub",
            remedy="check the connection and HF_ENDPOINT, and start again: without the final"
            " commit, the repository is unchanged",
        ) from error


def _publish_to_huggingface(
    address: HubAddress, files: Sequence[FileUpload], *, public: bool, message: str
) -> str:
    token, repo_url = get_token(), f"{constants.ENDPOINT}/{address.repo_id}"
    if not token:
        raise UserError(
            f"no token for {address}",
            where="HF_TOKEN",
            expected="a token with write access",
            remedy=f"create one at {constants.ENDPOINT}/settings/tokens, then: export"
            " HF_TOKEN=hf_...",
        )
    # Its progress bars would overwrite console output and fill logs.
    disable_progress_bars()
    api = HfApi(token=token, library_name="finesight", library_version=__version__)
    try:
        is_private = bool(api.repo_info(address.repo_id, repo_type="model").private)
    except RepositoryNotFoundError:
        api.create_repo(address.repo_id, repo_type="model", private=not public)
    else:
        if is_private == public:
            raise modelscope_upload.build_visibility_error(address, repo_url, public)
    operations = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=os.fspath(file.path))
        for file in files
    ]
    api.create_commit(address.repo_id, operations, commit_message=message, repo_type="model")
    return repo_url


def _build_refusal_error(address: HubAddress, error: HfHubHTTPError) -> UserError:
    status = error.response.status_code
    message = error.response.headers.get("x-error-message", "") or error.server_message or ""
    is_permission_error = status in (401, 403)
    return UserError(
        f"the hub rejects writing to {address} with status {status} {message[:200]}".rstrip(),
        where=constants.ENDPOINT,
        expected=f"a token with write access to {address.repo_id.partition('/')[0]}"
        if is_permission_error
        else "a successful response",
        remedy=f"create a token with write access at {constants.ENDPOINT}/settings/tokens"
        if is_permission_error
        else "start again later: without the final commit, the repository is unchanged",
    )
