"""File listings of and uploads to ModelScope or a compatible hub (MODELSCOPE_ENDPOINT).

The package modelscope_hub sends the requests. Files are downloaded by `Downloader`, and uploaded to
storage by this module: modelscope_hub would send the token to any storage host that the hub names,
and would split an upload into several commits.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import httpx2

from finesight import __version__
from finesight.errors import UserError
from finesight.files.hub_address import HubAccess, HubAddress, Refusal
from finesight.files.storage import sha256_file, temporary_folder
from finesight.hub.download import (
    HTTP_TIMEOUT,
    MAX_ERROR_BYTES,
    RETRY_STATUSES,
    HttpSite,
    RemoteFile,
    get_retry_delay,
)

if TYPE_CHECKING:
    from modelscope_hub import HubApi, Visibility

DEFAULT_REVISION = "master"

MIN_LFS_BYTES = 2**20
"""File size above which a file is uploaded with Git LFS, whatever its name."""

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model")
"""Suffixes of files that are uploaded with Git LFS at any size."""


def get_access() -> HubAccess:
    """Return the endpoint of the hub and the names of its settings."""
    configured = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or ""
    url = configured.strip() or "https://www.modelscope.cn"
    endpoint = (url if "://" in url else f"https://{url}").rstrip("/")
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    names = "MODELSCOPE_ENDPOINT", "MODELSCOPE_API_TOKEN", "my/myaccesstoken"
    return HubAccess(endpoint, *names, token)


def build_site(address: HubAddress) -> HttpSite:
    """Build the `HttpSite` of a repository, with the token of the user."""
    token = _read_token()
    headers = {}
    if token:
        # Older services of the hub read the cookie, newer ones the header.
        headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    return HttpSite(
        lambda response, message: _build_refusal_error(address, response.status_code, message),
        headers,
    )


def list_files(address: HubAddress) -> tuple[str, list[RemoteFile]]:
    """Return a digest of the file listing, which serves as a commit, and the files.

    The hub does not return the commit of a branch. The digest covers the names, sizes and SHA-256
    digests of all files.
    """
    revision = address.revision or DEFAULT_REVISION
    with _open_api(address) as api:
        entries = api.list_repo_files(address.repo_id, address.repo_type, revision=revision)
    url = f"{get_access().endpoint}/api/v1/{address.repo_type}s/{address.repo_id}/repo"
    files = [
        RemoteFile(
            entry.path,
            f"{url}?{urlencode({'Revision': revision, 'FilePath': entry.path})}",
            entry.size or None,  # 0 means an empty file or an unknown size
            sha256=entry.sha256 or None,
        )
        for entry in entries
        if entry.type != "tree"
    ]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{file.path}\0{file.size}\0{file.sha256}\n".encode())
    return digest.hexdigest()[:40], files


def check_publish(address: HubAddress, *, public: bool) -> None:
    """Raise UserError without a token, or if the repository exists with another visibility."""
    with _open_api(address, writes=True) as api:
        _has_repository(api, address, public)


def publish_files(
    address: HubAddress, files: Mapping[str, Path], *, public: bool, commit_message: str
) -> str:
    """Publish files in a model repository on ModelScope in one commit."""
    digests = {}
    for name, path in files.items():
        if path.stat().st_size > MIN_LFS_BYTES or name.endswith(LFS_SUFFIXES):
            digests[path] = sha256_file(path)
    with _open_api(address, writes=True) as api:
        if not _has_repository(api, address, public):
            api.create_repo(address.repo_id, "model", visibility=_get_visibility(public))
        objects = [{"oid": oid, "size": path.stat().st_size} for path, oid in digests.items()]
        upload_urls = {}
        if objects:
            upload_urls = api.legacy.validate_blobs(address.repo_id, "model", objects)
        for path, sha256 in digests.items():
            url = upload_urls.get(sha256)
            if url is not None:  # the hub does not have this object
                _upload_object(address, url, path)
        actions = []
        for name, path in files.items():
            actions.append(_build_commit_action(name, path, digests.get(path)))
        api.legacy.create_commit(address.repo_id, "model", actions, commit_message)
    return get_access().get_page(address)


def is_same_domain(url: str, hub_url: str) -> bool:
    """Return whether a URL belongs to the domain of the hub.

    The token is sent only to this domain.
    """
    target = urlsplit(url)
    hub_parts = urlsplit(hub_url)
    host = target.hostname or ""
    domain = (hub_parts.hostname or "").removeprefix("www.")
    is_subdomain = not domain.replace(".", "").isdigit() and host.endswith(f".{domain}")
    return target.scheme == hub_parts.scheme and (target.netloc == hub_parts.netloc or is_subdomain)


def _read_token() -> str:
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(
            f"{len(token)} characters, some of which are invalid in a token",
            where="MODELSCOPE_API_TOKEN",
            expected="a token such as ms-... with ASCII letters, digits and punctuation",
            remedy=f"unset the variable, or {get_access().token_hint}",
        )
    return token


@contextlib.contextmanager
def _open_api(address: HubAddress, *, writes: bool = False) -> Iterator[HubApi]:
    """Yield a client of the hub, and convert its exceptions to UserError."""
    try:
        from modelscope_hub import HubApi, HubConfig
        from modelscope_hub.errors import APIError, HubError
    except ImportError as error:
        raise UserError(
            "modelscope_hub is required, but not installed",
            where=str(address),
            remedy="pip install 'finesight[modelscope]'",
        ) from error
    access = get_access()
    token = _read_token()
    if writes:
        access.require_token(address, token)
    # An empty folder, because the package reads tokens of other programs and stores an identifier.
    with temporary_folder("hub") as folder:
        try:
            logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
            yield HubApi(HubConfig(access.endpoint, folder, folder, token))
        except APIError as error:
            build_error = access.build_write_error if writes else _build_refusal_error
            raise build_error(address, error.status_code or 0, error.message) from error
        except (HubError, OSError, ValueError) as error:
            raise access.build_connection_error(address, error) from error


def _has_repository(api: HubApi, address: HubAddress, public: bool) -> bool:
    """Return whether the repository exists. Another visibility raises UserError."""
    from modelscope_hub.errors import NotExistError

    try:
        info = api.legacy.get_repo_info(address.repo_id, "model")
    except NotExistError:
        return False
    is_private = info.get("Visibility") == int(_get_visibility(False))
    get_access().require_visibility(address, is_private, public)
    return True


def _get_visibility(public: bool) -> Visibility:
    from modelscope_hub import Visibility

    return Visibility.PUBLIC if public else Visibility.PRIVATE


def _upload_object(address: HubAddress, url: str, path: Path) -> None:
    """Upload a file to storage with one PUT request, which is retried."""
    headers = {"User-Agent": f"finesight/{__version__}"}
    headers["Content-Length"] = str(path.stat().st_size)
    if is_same_domain(url, get_access().endpoint):
        headers |= build_site(address).headers
    for num_failures in itertools.count(1):
        try:
            with path.open("rb") as file:
                status, message = _put(url, headers, file)
        except httpx2.TransportError as error:
            status = 0
            message = f"{type(error).__name__}: {error}"
        if 200 <= status < 300:
            return
        delay_s = get_retry_delay(num_failures)
        if status not in (0, *RETRY_STATUSES) or delay_s is None:
            raise get_access().build_write_error(address, status, message)
        time.sleep(delay_s)


def _put(url: str, headers: Mapping[str, str], file: IO[bytes]) -> tuple[int, str]:
    """Send a PUT request, and return its status and the start of its response."""
    with httpx2.stream("PUT", url, headers=headers, content=file, timeout=HTTP_TIMEOUT) as response:
        body = next(response.iter_raw(), b"")[:MAX_ERROR_BYTES]
    return response.status_code, body.decode("utf-8", "replace")


def _build_commit_action(name: str, path: Path, sha256: str | None) -> dict[str, Any]:
    base = {"action": "create", "path": name, "size": path.stat().st_size}
    if sha256 is not None:
        return base | {"type": "lfs", "sha256": sha256, "content": "", "encoding": ""}
    content = base64.b64encode(path.read_bytes()).decode()
    return base | {"type": "normal", "sha256": "", "content": content, "encoding": "base64"}


def _build_refusal_error(address: HubAddress, status: int, message: str) -> UserError:
    reasons: dict[int, Refusal] = {401: "gated", 403: "gated", 404: "missing"}
    return get_access().build_refusal_error(address, reasons.get(status, "other"), status, message)
