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
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from finesight import __version__
from finesight.errors import UserError
from finesight.hub.address import HubAddress
from finesight.hub.download import HttpSite, RemoteFile, strip_query
from finesight.hub.modelscope import build_visibility_error

_DEFAULT_REVISION = "main"
_COMMIT_PATTERN = re.compile(r"[0-9a-f]{7,64}")
_INVALID_RESPONSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError)
"""Exceptions of huggingface_hub if a server other than a hub responds."""


def get_endpoint() -> str:
    """Return the base URL of the hub, without a trailing slash."""
    return constants.ENDPOINT.rstrip("/")


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
        raise UserError(
            f"{address} is not available: {type(error).__name__}: {str(error).strip()[:200]}",
            where=constants.ENDPOINT,
            expected="a connection to the hub, and a valid name",
            remedy="check the connection and HF_ENDPOINT, or download it on another machine and"
            " use the folder; with HF_HUB_OFFLINE=1, downloaded files are used",
        ) from error


def build_site(address: HubAddress) -> HttpSite:
    """Build the `HttpSite` of a repository, with the token of the user."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return HttpSite(lambda response, message: _build_refusal_error(address, response), headers)


def find_cached_files(address: HubAddress, commit: str, paths: list[str]) -> Path | None:
    """Find files of a commit in the cache of huggingface_hub.

    Another program, such as transformers, may have downloaded them.

    Returns:
        The snapshot folder that contains all files, or None if any is missing.
    """
    folder = None
    for path in paths:
        cached_path = try_to_load_from_cache(
            address.repo_id, path, revision=commit, repo_type=address.repo_type
        )
        if not isinstance(cached_path, str):
            return None
        folder = Path(cached_path).parents[len(Path(path).parts) - 1]
    return folder


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
    return f"{constants.ENDPOINT}/{address.repo_id}"


def _has_repository(api: HfApi, address: HubAddress, public: bool) -> bool:
    """Return whether the repository exists. Another visibility raises UserError."""
    try:
        is_private = bool(api.repo_info(address.repo_id, repo_type="model").private)
    except RepositoryNotFoundError:
        return False
    if is_private == public:
        repo_url = f"{constants.ENDPOINT}/{address.repo_id}"
        raise build_visibility_error(address, repo_url, public)
    return True


@contextmanager
def _open_api(address: HubAddress) -> Iterator[HfApi]:
    """Yield a client with the token of the user, and convert its exceptions to UserError."""
    token = get_token()
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
    try:
        yield HfApi(token=token, library_name="finesight", library_version=__version__)
    except HfHubHTTPError as error:
        raise _build_write_error(address, error) from error
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"uploading to {address} failed: {type(error).__name__}: {str(error).strip()[:200]}",
            where=constants.ENDPOINT,
            expected="a connection to the hub",
            remedy="check the connection and HF_ENDPOINT, and start again: without the final"
            " commit, the repository is unchanged",
        ) from error


def _to_remote_file(address: HubAddress, commit: str, entry: RepoFile) -> RemoteFile:
    # Files stored in git are listed with their SHA-1, files in LFS with their SHA-256.
    return RemoteFile(
        entry.path,
        hf_hub_url(address.repo_id, entry.path, repo_type=address.repo_type, revision=commit),
        entry.lfs.size if entry.lfs else entry.size,
        sha256=entry.lfs.sha256 if entry.lfs else None,
        git_sha1=None if entry.lfs else entry.blob_id,
    )


def _build_refusal_error(
    address: HubAddress, response: httpx2.Response, error: HfHubHTTPError | None = None
) -> UserError:
    """Build the UserError for a rejected request.

    The hub sends the reason in a response header; huggingface_hub raises an exception for it.
    """
    code = response.headers.get("x-error-code", "")
    repo_url = (
        f"{constants.ENDPOINT}/{'datasets/' * (address.repo_type == 'dataset')}{address.repo_id}"
    )
    if code == "GatedRepo" or isinstance(error, GatedRepoError):
        return UserError(
            f"{address} is gated: its owner requires each user to accept a license",
            where=repo_url,
            expected="a token (HF_TOKEN) of an account that accepted the license",
            remedy=f"log in and accept the license at {repo_url}, create a token at"
            f" {constants.ENDPOINT}/settings/tokens, then: export HF_TOKEN=hf_...",
        )
    if response.headers.get("x-error-message") == "Invalid credentials in Authorization header":
        return UserError(
            f"the hub rejects the token for {address}",
            where=constants.ENDPOINT,
            expected="a valid token, or none for a public repository",
            remedy="unset HF_TOKEN, or create another token at"
            f" {constants.ENDPOINT}/settings/tokens, then: export HF_TOKEN=hf_...",
        )
    if code == "RevisionNotFound" or isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{address} has no revision {address.revision or _DEFAULT_REVISION!r}",
            where=repo_url,
            expected="a branch, a tag or a commit",
            remedy=f"see {repo_url}/tree/{_DEFAULT_REVISION}, or remove @{address.revision}",
        )
    is_unknown = code == "RepoNotFound" or isinstance(error, RepositoryNotFoundError)
    if is_unknown or response.status_code in (401, 403, 404):
        return UserError(
            f"{address} does not exist or is private (status {response.status_code})",
            where=repo_url,
            expected="a public repository, or a token (HF_TOKEN) with read access",
            remedy="check the name, and whether it is a model or a dataset; for a private one:"
            " export HF_TOKEN=hf_...",
        )
    return UserError(
        f"the hub rejects the request for {address} with status {response.status_code}"
        f" {response.headers.get('x-error-message', '')[:200]}".rstrip(),
        where=strip_query(str(response.request.url)),
        expected="the file",
        remedy="try again later, or download it with another program and use the folder",
    )


def _build_write_error(address: HubAddress, error: HfHubHTTPError) -> UserError:
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
