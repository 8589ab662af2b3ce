"""File listings of, uploads to and cached files of the Hugging Face Hub or a mirror (HF_ENDPOINT).

The package huggingface_hub sends all requests except downloads, which `Downloader` resumes and
verifies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_token,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from finesight import __version__
from finesight.errors import UserError
from finesight.files.hub_address import HubAccess, HubAddress, Refusal
from finesight.hub.download import HttpSite, RemoteFile

_DEFAULT_REVISION = "main"
_COMMIT_PATTERN = re.compile(r"[0-9a-f]{7,64}")
_INVALID_RESPONSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError)
"""Exceptions of huggingface_hub if a server other than a hub responds."""


def get_access() -> HubAccess:
    """Return the endpoint of the hub and the names of its settings."""
    endpoint = constants.ENDPOINT.rstrip("/")
    return HubAccess(endpoint, "HF_ENDPOINT", "HF_TOKEN", "settings/tokens", get_token() or "")


def list_files(address: HubAddress) -> tuple[str, list[RemoteFile]]:
    """Return the current commit of a repository and its files."""
    api = HfApi(library_name="finesight", library_version=__version__)
    revision = address.revision or _DEFAULT_REVISION
    try:
        commit = (
            api.repo_info(address.repo_id, repo_type=address.repo_type, revision=revision).sha or ""
        )
        if not _COMMIT_PATTERN.fullmatch(commit):  # used as a folder name
            raise ValueError(f"invalid commit {commit[:80]!r}")
        tree = api.list_repo_tree(
            address.repo_id, recursive=True, revision=commit, repo_type=address.repo_type
        )
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return commit, [_to_remote_file(address, commit, entry) for entry in files]
    except HfHubHTTPError as error:
        raise _build_refusal_error(address, error.response, error) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, *_INVALID_RESPONSE_ERRORS) as error:
        raise get_access().build_connection_error(address, error) from error


def build_site(address: HubAddress) -> HttpSite:
    """Build the `HttpSite` of a repository, with the token of the user."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return HttpSite(lambda response, message: _build_refusal_error(address, response), headers)


def find_cached_snapshot(address: HubAddress, patterns: Sequence[str]) -> Path | None:
    """Find the cached snapshot of a repository in the cache of huggingface_hub.

    No request is sent.

    Returns:
        The snapshot folder, or None if the repository is not cached.
    """
    try:
        return Path(
            snapshot_download(
                address.repo_id,
                repo_type=address.repo_type,
                revision=address.revision or _DEFAULT_REVISION,
                allow_patterns=list(patterns),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def check_publish(address: HubAddress, *, public: bool) -> None:
    """Raise UserError without a token, or if the repository exists with another visibility."""
    with _open_api(address) as api:
        _has_repository(api, address, public)


def publish_files(
    address: HubAddress, files: Mapping[str, Path], *, public: bool, commit_message: str
) -> str:
    """Publish files in a model repository on the Hugging Face Hub in one commit.

    Arguments, result and errors are those of `finesight.hub.modelscope.publish_files`.
    """
    with _open_api(address) as api:
        if not _has_repository(api, address, public):
            api.create_repo(address.repo_id, repo_type="model", private=not public)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=os.fspath(path))
            for name, path in files.items()
        ]
        api.create_commit(
            address.repo_id, operations, commit_message=commit_message, repo_type="model"
        )
    return get_access().get_page(address)


def _has_repository(api: HfApi, address: HubAddress, public: bool) -> bool:
    """Return whether the repository exists. Another visibility raises UserError."""
    try:
        is_private = bool(api.repo_info(address.repo_id, repo_type="model").private)
    except RepositoryNotFoundError:
        return False
    get_access().require_visibility(address, is_private, public)
    return True


@contextmanager
def _open_api(address: HubAddress) -> Iterator[HfApi]:
    """Yield a client with the token of the user, and convert its exceptions to UserError."""
    access = get_access()
    token = get_token()
    access.require_token(address, token)
    # Its progress bars would overwrite console output and fill logs.
    disable_progress_bars()
    try:
        yield HfApi(token=token, library_name="finesight", library_version=__version__)
    except HfHubHTTPError as error:
        message = error.response.headers.get("x-error-message", "") or error.server_message or ""
        raise access.build_write_error(address, error.response.status_code, message) from error
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise access.build_connection_error(address, error) from error


def _to_remote_file(address: HubAddress, commit: str, entry: RepoFile) -> RemoteFile:
    url = hf_hub_url(address.repo_id, entry.path, repo_type=address.repo_type, revision=commit)
    # Files stored in git are listed with their SHA-1, files in LFS with their SHA-256.
    if entry.lfs:
        return RemoteFile(entry.path, url, entry.lfs.size, sha256=entry.lfs.sha256)
    return RemoteFile(entry.path, url, entry.size, git_sha1=entry.blob_id)


def _build_refusal_error(
    address: HubAddress, response: httpx2.Response, error: HfHubHTTPError | None = None
) -> UserError:
    """Build the UserError for a rejected request.

    The hub sends the reason in a response header; huggingface_hub raises an exception for it.
    """
    code = response.headers.get("x-error-code", "")
    status = response.status_code
    message = response.headers.get("x-error-message", "")
    reason: Refusal = "other"
    if code == "GatedRepo" or isinstance(error, GatedRepoError):
        reason = "gated"
    elif message == "Invalid credentials in Authorization header":
        reason = "token"
    elif code in ("RepoNotFound", "RevisionNotFound") or status in (401, 403, 404):
        reason = "missing"
    return get_access().build_refusal_error(address, reason, status, message)
