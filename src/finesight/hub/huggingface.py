"""File listings and cached files of the Hugging Face Hub or a mirror (HF_ENDPOINT).

The package huggingface_hub sends the listing requests and provides the token and the URLs of files.
The module `transfer` downloads the files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import httpx2
from huggingface_hub import (
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

from finesight import __version__
from finesight.errors import UserError
from finesight.hub.address import HubAddress
from finesight.hub.http_client import HttpSite, strip_query
from finesight.hub.transfer import RemoteFile

_DEFAULT_REVISION = "main"
_COMMIT_PATTERN = re.compile(r"[0-9a-f]{7,64}")
_INVALID_RESPONSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError)
"""Exceptions of huggingface_hub if a server other than a hub responds."""


def list_files(address: HubAddress) -> tuple[str, list[RemoteFile]]:
    """Return the current commit of a repository and its files.

    Raises:
        UserError: The repository is unknown, gated or private, or the hub does not respond.
    """
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

    Args:
        address: Address of the repository.
        patterns: Glob patterns of the required files.

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
