"""File listings of ModelScope or a compatible hub (MODELSCOPE_ENDPOINT).

This module sends its two kinds of requests itself. The package modelscope reads its token from a
pickle, verifies no digests if a listing has none, requires a compiled cryptography package, and has
no offline mode.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import httpx2

from finesight.errors import UserError
from finesight.hub.address import HubAddress
from finesight.hub.http_client import HttpClient, HttpSite, strip_query
from finesight.hub.transfer import RemoteFile

DEFAULT_REVISION = "master"
PAGE_SIZE = 200
"""Number of entries per page of a dataset listing; the last page is shorter."""

MAX_MODEL_ENTRIES = 3000
"""Number of entries at which the hub truncates the listing of a model without an error."""

MAX_PAGES = 5000
MAX_PAGE_ATTEMPTS = 3
"""Maximum attempts for each page of a dataset listing after the first.

The hub sometimes rejects such a request by mistake.
"""


def get_endpoint() -> str:
    """Return the base URL of the hub, without a trailing slash."""
    configured = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or ""
    url = configured.strip() or "https://www.modelscope.cn"
    return (url if "://" in url else f"https://{url}").rstrip("/")


def list_files(address: HubAddress) -> tuple[str, list[RemoteFile]]:
    """Return a digest of the file listing, which serves as a commit, and the files.

    The hub does not return the commit of a branch. The digest covers the names, sizes and SHA-256
    digests of all files.

    Raises:
        UserError: The repository is unknown or private, or the hub does not respond.
    """
    with HttpClient(build_site(address)) as http_client:
        entries = [
            entry for entry in _iter_entries(address, http_client) if entry.get("Type") != "tree"
        ]
    files = [_to_remote_file(address, entry) for entry in entries]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{file.path}\0{file.size}\0{file.sha256}\n".encode())
    return digest.hexdigest()[:40], files


def build_site(address: HubAddress) -> HttpSite:
    """Build the `HttpSite` of a repository, with the token of the user.

    Raises:
        UserError: The token contains invalid characters.
    """
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(
            f"{len(token)} characters, some of which are invalid in a token",
            where="MODELSCOPE_API_TOKEN",
            expected="a token such as ms-... with ASCII letters, digits and punctuation",
            remedy=f"copy it again from {get_endpoint()}/my/myaccesstoken, or unset the variable",
        )
    # Older services of the hub read the cookie, newer ones the header.
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    return HttpSite(
        lambda *answer: _build_refusal_error(address, *answer), headers if token else {}
    )


def _iter_entries(address: HubAddress, http_client: HttpClient) -> Iterator[Mapping[str, Any]]:
    url = f"{_api_url(address)}/repo/{'tree' if address.repo_type == 'dataset' else 'files'}"
    params = {"Revision": address.revision or DEFAULT_REVISION, "Recursive": "True"}
    if address.repo_type == "model":
        entries = _fetch_page(address, http_client, url, params)
        if len(entries) >= MAX_MODEL_ENTRIES:
            raise UserError(
                f"{address} has at least {MAX_MODEL_ENTRIES} files, the maximum of the"
                " hub's listing",
                where=url,
                expected="a model with fewer files",
                remedy="download it with another program and use the folder",
            )
        yield from entries
        return
    for page_number in range(1, MAX_PAGES + 1):
        page_params = {**params, "PageNumber": str(page_number), "PageSize": str(PAGE_SIZE)}
        entries = _fetch_page(
            address,
            http_client,
            url,
            page_params,
            attempts=MAX_PAGE_ATTEMPTS if page_number > 1 else 1,
        )
        yield from entries
        if len(entries) < PAGE_SIZE:
            return


def _fetch_page(
    address: HubAddress,
    http_client: HttpClient,
    url: str,
    params: Mapping[str, str],
    attempts: int = 1,
) -> list[Mapping[str, Any]]:
    try:
        payload = http_client.get_json(url, params)
    except UserError:
        if attempts == 1:
            raise
        return _fetch_page(address, http_client, url, params, attempts - 1)
    data = payload.get("Data") if isinstance(payload, dict) else None
    listed = data.get("Files") if isinstance(data, dict) else None
    files = listed if isinstance(listed, list) else None
    entries: list[Mapping[str, Any]] = (
        [entry for entry in files if isinstance(entry, dict)] if files else []
    )
    if isinstance(payload, dict) and payload.get("Success") is not False and entries == files:
        return entries
    message = payload.get("Message") if isinstance(payload, dict) else payload
    raise UserError(
        f"{address} cannot be listed: {str(message)[:200]}",
        where=url,
        expected="the files of a repository",
        remedy="check the name and the revision (the main branch is called master)",
    )


def _to_remote_file(address: HubAddress, entry: Mapping[str, Any]) -> RemoteFile:
    path, size, sha256 = entry.get("Path"), entry.get("Size"), entry.get("Sha256")
    if not isinstance(path, str) or not isinstance(size, int):
        raise UserError(
            f"{address}: invalid file entry {str(dict(entry))[:200]}",
            where=_api_url(address),
            expected="files with Path and Size",
            remedy="check MODELSCOPE_ENDPOINT",
        )
    query = urlencode({"Revision": address.revision or DEFAULT_REVISION, "FilePath": path})
    return RemoteFile(
        path,
        f"{_api_url(address)}/repo?{query}",
        size or None,  # 0 means an empty file or an unknown size
        sha256=sha256 if isinstance(sha256, str) and sha256 else None,
    )


def _api_url(address: HubAddress) -> str:
    return f"{get_endpoint()}/api/v1/{address.repo_type}s/{address.repo_id}"


def _build_refusal_error(address: HubAddress, response: httpx2.Response, message: str) -> UserError:
    repo_url = f"{get_endpoint()}/{address.repo_type}s/{address.repo_id}"
    status = response.status_code
    if status in (401, 403):
        return UserError(
            f"{address} is private or gated, or requires accepting a license (status {status})",
            where=repo_url,
            expected="a token (MODELSCOPE_API_TOKEN) with read access",
            remedy=f"log in and request access at {repo_url}, create a token at"
            f" {get_endpoint()}/my/myaccesstoken, then: export MODELSCOPE_API_TOKEN=ms-...",
        )
    if status == 404:
        return UserError(
            f"{address} or its revision does not exist, or it is private (status 404)",
            where=repo_url,
            expected="a public repository, or a token (MODELSCOPE_API_TOKEN) with read access",
            remedy="check the name (the main branch is called master), and whether it is a model"
            " or a dataset",
        )
    return UserError(
        f"the hub rejects the request for {address} with status {status}: {message[:200]!r}",
        where=strip_query(str(response.request.url)),
        expected="the file",
        remedy="try again later, or download it with another program and use the folder",
    )
