"""Upload of files to ModelScope, with the HTTP requests of the official client.

`POST /api/v1/models` creates a repository. Large files are uploaded with the Git LFS batch API and
one PUT request each. One commit then adds all files, with small ones embedded as base64.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from finesight import __version__
from finesight.digests import sha256_file
from finesight.errors import UserError
from finesight.hub.address import HubAddress
from finesight.hub.http_client import (
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    RETRY_STATUSES,
    RetryableError,
    strip_query,
)
from finesight.hub.modelscope import DEFAULT_REVISION, build_site, get_endpoint

PRIVATE, PUBLIC = 1, 5
"""Values of the field `Visibility` of a ModelScope repository."""

MIN_LFS_BYTES = 2**20
"""File size above which a file is uploaded with Git LFS, whatever its name."""

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model")
"""Suffixes of files that are uploaded with Git LFS at any size."""

CHUNK_BYTES = 2**20

NamedFiles = Sequence[tuple[str, Path]]


def publish_files(
    address: HubAddress, files: NamedFiles, *, public: bool, commit_message: str
) -> str:
    """Publish files in a model repository on ModelScope.

    Args:
        address: Address of the repository, which is created if it does not exist.
        files: Pairs of a name in the repository and a local path.
        public: Whether the repository is public.
        commit_message: Message of the commit.

    Returns:
        URL of the repository page.

    Raises:
        UserError: There is no token, the repository has another visibility, or the hub rejects a
            request.
    """
    headers = dict(build_site(address).headers)
    repo_url = f"{get_endpoint()}/models/{address.repo_id}"
    if not headers:
        raise UserError(
            f"no token for {address}",
            where="MODELSCOPE_API_TOKEN",
            expected="a token of an account with write access",
            remedy=f"create one at {get_endpoint()}/my/myaccesstoken, then: export"
            " MODELSCOPE_API_TOKEN=ms-...",
        )
    timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    user_agent = {"User-Agent": f"finesight/{__version__}"}
    with httpx2.Client(follow_redirects=False, timeout=timeout, headers=user_agent) as http_client:
        modelscope_client = _ModelScopeClient(address, http_client, headers)
        modelscope_client.ensure_repository(public, repo_url)
        modelscope_client.create_commit(files, commit_message)
    return repo_url


def build_visibility_error(address: HubAddress, repo_url: str, public: bool) -> UserError:
    """Build the UserError for a repository that exists with another visibility."""
    current = "private" if public else "public"
    return UserError(
        f"the repository {address} exists and is {current}",
        where=repo_url,
        expected=f"a {'public' if public else 'private'} repository, or a new name",
        remedy="remove --public" if public else "add --public to publish in a public repository",
    )


class _ModelScopeClient:
    def __init__(
        self, address: HubAddress, http_client: httpx2.Client, headers: Mapping[str, str]
    ) -> None:
        self._address, self._http_client, self._headers = address, http_client, headers
        self._api_url = f"{get_endpoint()}/api/v1"

    def ensure_repository(self, public: bool, repo_url: str) -> None:
        """Create the repository if it does not exist.

        Raises:
            UserError: The repository exists with another visibility.
        """
        url = f"{self._api_url}/models/{self._address.repo_id}"
        existing = self._send_json("GET", url, allow_missing=True)
        if existing is None:
            owner, _, name = self._address.repo_id.partition("/")
            visibility = PUBLIC if public else PRIVATE
            body = {"Path": owner, "Name": name, "Visibility": visibility}
            self._send_json("POST", f"{self._api_url}/models", body)
            return
        data = existing.get("Data")
        current_visibility = data.get("Visibility") if isinstance(data, dict) else None
        if current_visibility != (PUBLIC if public else PRIVATE):
            raise build_visibility_error(self._address, repo_url, public)

    def create_commit(self, files: NamedFiles, commit_message: str) -> None:
        """Upload large files to Git LFS, then add all files in one commit."""
        digests_by_path = {
            path: sha256_file(path)
            for name, path in files
            if path.stat().st_size > MIN_LFS_BYTES or name.endswith(LFS_SUFFIXES)
        }
        repo_api_url = f"{self._api_url}/repos/models/{self._address.repo_id}"
        objects = [
            {"oid": sha256, "size": path.stat().st_size} for path, sha256 in digests_by_path.items()
        ]
        if objects:
            url = f"{repo_api_url}/info/lfs/objects/batch"
            payload = self._send_json("POST", url, {"operation": "upload", "objects": objects})
            upload_urls = _parse_upload_urls(payload or {})
            for path, sha256 in digests_by_path.items():
                # None for objects that the hub already has.
                if upload_urls.get(sha256) is not None:
                    self._upload_object(str(upload_urls[sha256]), path)
        actions = [
            _build_commit_action(name, path, digests_by_path.get(path)) for name, path in files
        ]
        body = {"commit_message": commit_message, "actions": actions}
        self._send_json("POST", f"{repo_api_url}/commit/{DEFAULT_REVISION}", body)

    def _upload_object(self, url: str, path: Path) -> None:
        headers = {"Content-Length": str(path.stat().st_size)}
        if is_same_domain(url, get_endpoint()):
            headers |= self._headers
        self._request("PUT", url, headers, path)

    def _send_json(
        self, method: str, url: str, body: object = None, *, allow_missing: bool = False
    ) -> dict[str, Any] | None:
        content = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        response = self._request(method, url, headers, content, allow_missing)
        if response is None:
            return None
        try:
            content_json = response.json()
        except ValueError:
            content_json = None
        payload = content_json if isinstance(content_json, dict) else {}
        if (
            not payload
            or payload.get("Success") is False
            or payload.get("Code") not in (200, "200", None)
        ):
            raise self._build_error(
                url, response.status_code, str(payload.get("Message", "no JSON"))
            )
        return payload

    def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes | Path | None,
        allow_missing: bool = False,
    ) -> httpx2.Response | None:
        """Send a request, with retries unless it creates a repository or a commit.

        Returns:
            The response, or None for status 404 if `allow_missing`.
        """
        is_single_attempt = method == "POST" and not url.endswith("/batch")
        for num_failures in itertools.count(1):
            try:
                body = _iter_chunks(content) if isinstance(content, Path) else content
                response = self._http_client.request(method, url, headers=headers, content=body)
                status, message = response.status_code, response.text[:200]
            except httpx2.TransportError as error:
                status, message = 0, f"{type(error).__name__}: {error}"
            if status not in (0, *RETRY_STATUSES):
                break
            delay_s = (
                None if is_single_attempt else RetryableError(message).retry_delay(num_failures)
            )
            if delay_s is None:
                raise self._build_error(url, status, message)
            time.sleep(delay_s)
        if allow_missing and status == 404:
            return None
        if status >= 300:
            raise self._build_error(url, status, message)
        return response

    def _build_error(self, url: str, status: int, message: str) -> UserError:
        return UserError(
            f"the hub rejects writing to {self._address} (status {status}): {message[:200]}",
            where=strip_query(url),
            expected="a token (MODELSCOPE_API_TOKEN) with write access",
            remedy="check name and token, and start again: without the final commit, the"
            " repository is unchanged",
        )


def _parse_upload_urls(payload: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the upload URL of each Git LFS object by its SHA-256 digest.

    The URL is None for objects that the hub already has.
    """
    data = payload.get("Data", payload)
    objects = data.get("objects") if isinstance(data, dict) else None
    upload_urls: dict[str, str | None] = {}
    for item in objects if isinstance(objects, list) else []:
        upload = (item.get("actions") or {}).get("upload") or {}
        upload_urls[str(item.get("oid"))] = upload.get("href")
    return upload_urls


def _build_commit_action(name: str, path: Path, sha256: str | None) -> dict[str, Any]:
    size = path.stat().st_size
    base = {"action": "create", "path": name, "size": size}
    if sha256 is not None:
        return base | {"type": "lfs", "sha256": sha256, "content": "", "encoding": ""}
    content = base64.b64encode(path.read_bytes()).decode()
    return base | {"type": "normal", "sha256": "", "content": content, "encoding": "base64"}


def _iter_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def is_same_domain(url: str, hub_url: str) -> bool:
    """Return whether a URL belongs to the domain of the hub.

    The token is sent only to this domain.
    """
    target, hub_parts = urlsplit(url), urlsplit(hub_url)
    host, domain = target.hostname or "", (hub_parts.hostname or "").removeprefix("www.")
    is_subdomain = not domain.replace(".", "").isdigit() and host.endswith(f".{domain}")
    return target.scheme == hub_parts.scheme and (target.netloc == hub_parts.netloc or is_subdomain)
