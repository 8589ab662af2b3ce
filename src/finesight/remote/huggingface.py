"""Hugging Face's hub, or a mirror of it (HF_ENDPOINT): what a repository holds at which commit.

huggingface_hub asks and understands the hub, knows the token and the address. The files themselves
come through `transfer`, which see.
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
from finesight.remote.address import Address
from finesight.remote.transfer import RemoteFile
from finesight.remote.web import Site, without_query

_NEWEST = "main"
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_NO_HUB = (ValueError, LookupError, TypeError, AttributeError)
"""What huggingface_hub makes of an answer that is not a hub's."""


def listing(address: Address) -> tuple[str, list[RemoteFile]]:
    """The commit that the address means now, and every file of it.

    Raises UserError for a repository that is unknown, gated or private, and without a connection.
    """
    api = HfApi(library_name="finesight", library_version=__version__)
    revision = address.revision or _NEWEST
    try:
        commit = api.repo_info(address.name, repo_type=address.kind, revision=revision).sha or ""
        if not _COMMIT.fullmatch(commit):  # it becomes the name of a folder
            raise ValueError(f"a commit that is none, {commit[:80]!r}")
        tree = api.list_repo_tree(
            address.name, recursive=True, revision=commit, repo_type=address.kind
        )
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return commit, [_file(address, commit, entry) for entry in files]
    except HfHubHTTPError as error:
        raise _refusal(address, error.response, error) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, *_NO_HUB) as error:
        raise UserError(
            f"{address} cannot be had: {type(error).__name__}: {str(error).strip()[:200]}",
            where=constants.ENDPOINT,
            expected="a connection to the hub, and a name that it allows",
            remedy="check the connection and HF_ENDPOINT, or download it elsewhere and give its"
            " folder; with HF_HUB_OFFLINE=1 what was downloaded before is used",
        ) from error


def site(address: Address) -> Site:
    """Who answers requests for files of the repository: the token goes to the hub alone."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return Site(lambda response, said: _refusal(address, response), headers)


def elsewhere(address: Address, commit: str, paths: list[str]) -> Path | None:
    """The folder in huggingface_hub's own cache that holds all these files of the commit, as
    another program downloaded them; None without one."""
    folder = None
    for path in paths:
        found = try_to_load_from_cache(address.name, path, revision=commit, repo_type=address.kind)
        if not isinstance(found, str):
            return None
        folder = Path(found).parents[len(Path(path).parts) - 1]
    return folder


def newest_elsewhere(address: Address, wanted: Sequence[str]) -> Path | None:
    """The folder of huggingface_hub's own cache that holds the files of the address which fit
    `wanted`, without any request; None without one."""
    try:
        return Path(
            snapshot_download(
                address.name,
                repo_type=address.kind,
                revision=address.revision or _NEWEST,
                allow_patterns=list(wanted),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def _file(address: Address, commit: str, entry: RepoFile) -> RemoteFile:
    # Files that git holds itself are listed with its SHA-1, those in LFS with their SHA-256.
    return RemoteFile(
        entry.path,
        hf_hub_url(address.name, entry.path, repo_type=address.kind, revision=commit),
        entry.lfs.size if entry.lfs else entry.size,
        sha256=entry.lfs.sha256 if entry.lfs else None,
        git_sha1=None if entry.lfs else entry.blob_id,
    )


def _refusal(
    address: Address, response: httpx2.Response, error: HfHubHTTPError | None = None
) -> UserError:
    """Why the hub refuses, and what helps: its code is in a header, or known by huggingface_hub."""
    code = response.headers.get("x-error-code", "")
    page = f"{constants.ENDPOINT}/{'datasets/' * (address.kind == 'dataset')}{address.name}"
    if code == "GatedRepo" or isinstance(error, GatedRepoError):
        return UserError(
            f"{address} is gated: its owner asks everybody to accept a licence first",
            where=page,
            expected="a token (HF_TOKEN) of an account that has accepted it",
            remedy=f"log in and accept the licence at {page}, make a token at"
            f" {constants.ENDPOINT}/settings/tokens, then: export HF_TOKEN=hf_...",
        )
    if response.headers.get("x-error-message") == "Invalid credentials in Authorization header":
        return UserError(
            f"the hub does not know the token that it was shown for {address}",
            where=constants.ENDPOINT,
            expected="a token that is valid, or none for a public repository",
            remedy="unset HF_TOKEN, or make another token at"
            f" {constants.ENDPOINT}/settings/tokens, then: export HF_TOKEN=hf_...",
        )
    if code == "RevisionNotFound" or isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{address} has no revision {address.revision or _NEWEST!r}",
            where=page,
            expected="a branch, a tag or a commit",
            remedy=f"see {page}/tree/{_NEWEST}, or leave @{address.revision} out",
        )
    unknown = code == "RepoNotFound" or isinstance(error, RepositoryNotFoundError)
    if unknown or response.status_code in (401, 403, 404):
        return UserError(
            f"the hub has no {address}, or it is private (status {response.status_code})",
            where=page,
            expected="a public repository, or a token (HF_TOKEN) that may read it",
            remedy="check the name; a data set is not a model and the other way round; for a"
            " private one: export HF_TOKEN=hf_...",
        )
    return UserError(
        f"the hub refuses {address} with status {response.status_code}"
        f" {response.headers.get('x-error-message', '')[:200]}".rstrip(),
        where=without_query(str(response.request.url)),
        expected="the file",
        remedy="try again later, or download it elsewhere and give its folder",
    )
