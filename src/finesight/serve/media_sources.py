"""Sources of request images and videos: uploaded files, and URLs on allowed web hosts."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import secrets
import shutil
import socket
import ssl
import threading
import time
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import httpx2

from finesight import __version__
from finesight.errors import UserError
from finesight.files.bounded_files import open_regular_file, parse_json
from finesight.files.hub_address import is_offline
from finesight.hub.bounded_request import ResponseLimitError, read_content
from finesight.hub.download import is_allowed_url, is_public_address, join_url, parse_int
from finesight.ingest.formats.label_studio import get_local_path
from finesight.samples.image_file import IMAGE_FORMATS as DECODABLE_FORMATS
from finesight.serve.api_schema import ApiError, ServerLimits

FILE_PURPOSE = "vision"
CHUNK_BYTES = 2**20
MAX_REDIRECTS = 5
MAX_TOKEN_BYTES = 64 << 10
CONTENT_TYPE_PREFIXES = (
    "image/",
    "video/",
    "application/pdf",
    "application/octet-stream",
    "binary/octet-stream",
)

DATA_PATH = "/data/"
"""Path of the images on a Label Studio server: uploads and local files."""

MAX_DECODINGS = 4
_UNSAFE_CHARACTERS = re.compile("[\x00-\x1f\x7f\ufffd]|%u[0-9a-fA-F]{4}")

DEFAULT_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Image formats that are always accepted. Other decoders are slow or rarely fuzzed."""

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
ResolveFn = Callable[[str, int], Awaitable[Sequence[str]]]
FetchFn = Callable[[str, BinaryIO], Awaitable[None]]


def read_formats(more: Sequence[str]) -> tuple[str, ...]:
    """Return the default image formats and additional ones (`--image-format`)."""
    names = tuple(name.upper().replace(" ", "") for name in more)
    for name in set(names) - set(DECODABLE_FORMATS):
        others = sorted(set(DECODABLE_FORMATS) - set(DEFAULT_IMAGE_FORMATS))
        raise UserError(
            f"unknown image format {name!r:.40}",
            where="--image-format",
            expected=" or ".join(others),
            remedy="Correct the name or omit it.",
        )
    return tuple(dict.fromkeys((*DEFAULT_IMAGE_FORMATS, *names)))


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """File that a client has uploaded. Its `filename` is never used as a path."""

    id: str
    owner: str
    filename: str
    num_bytes: int
    created_at: int
    path: Path

    def as_json(self) -> dict[str, Any]:
        """Return the file object of the OpenAI API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": FILE_PURPOSE,
            "status": "processed",
        }


class FileStore:
    """Stores uploaded files by ID. An API key has access to its own files only."""

    def __init__(self, folder: Path, limits: ServerLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._uploads: dict[str, UploadedFile] = {}
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700)

    def add(self, owner: str, filename: str, source: BinaryIO) -> UploadedFile:
        """Store a file of a client. Raise ApiError if the file or the store exceeds a limit."""
        file_id = f"file-{secrets.token_hex(16)}"
        path = self._folder / file_id
        try:
            with open(path, "xb") as file:
                shutil.copyfileobj(source, file)
                num_bytes = file.tell()
            if num_bytes > (limit := self._limits.max_image_bytes):
                raise ApiError(413, f"file is too large: expected at most {limit} bytes", "file")
            upload = UploadedFile(file_id, owner, filename[:255], num_bytes, int(time.time()), path)
            with self._lock:
                num_files = len(self._uploads)
                total_bytes = sum(other.num_bytes for other in self._uploads.values())
                max_files = self._limits.max_files
                max_bytes = self._limits.max_total_file_bytes
                if num_files >= max_files or total_bytes + num_bytes > max_bytes:
                    raise ApiError(
                        413,
                        f"file storage is full: {num_files} files, {total_bytes} bytes. Expected at"
                        f" most {max_files} files with {max_bytes} bytes. Delete files.",
                        "file",
                    )
                self._uploads[file_id] = upload
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return upload

    def list_files(self, owner: str) -> list[UploadedFile]:
        """Return the files of an owner, newest first."""
        with self._lock:
            owned = [upload for upload in self._uploads.values() if upload.owner == owner]
        return owned[::-1]

    def get(self, owner: str, file_id: str) -> UploadedFile:
        """Return an uploaded file. Raise ApiError if it is missing or has another owner."""
        with self._lock:
            upload = self._uploads.get(file_id)
        if upload is None or upload.owner != owner:
            raise ApiError(404, f"no file {file_id[:64]!r}", "file_id")
        return upload

    def link(self, owner: str, file_id: str, target: Path) -> None:
        """Create a hard link to an upload, which remains valid after its deletion."""
        upload = self.get(owner, file_id)
        try:
            os.link(upload.path, target)
        except FileNotFoundError as error:
            raise ApiError(404, f"file {file_id[:64]!r} was deleted", "file_id") from error

    def delete(self, owner: str, file_id: str) -> None:
        """Delete an uploaded file. Raise ApiError if it is missing or has another owner."""
        upload = self.get(owner, file_id)
        with self._lock:
            self._uploads.pop(file_id, None)
        upload.path.unlink(missing_ok=True)


async def resolve_host(host: str, port: int) -> list[str]:
    """Resolve a host name to IP addresses with the resolver of the system."""
    addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in addresses]


class MediaFetcher:
    """Fetches files over HTTPS from allowed hosts, with limits on size and time.

    It prevents server-side request forgery (SSRF): a host name is resolved once per request, all of
    its addresses must be public, and the connection uses a checked address, so that DNS rebinding
    has no effect. The time limit of a fetch includes redirects.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        limits: ServerLimits,
        *,
        resolve: ResolveFn = resolve_host,
        is_allowed_address: Callable[[IpAddress], bool] = is_public_address,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._timeout_s = limits.fetch_timeout_s
        self._max_bytes = limits.max_image_bytes
        self._resolve = resolve
        self._is_allowed_address = is_allowed_address
        self._ssl_context = ssl.create_default_context() if hosts else None

    async def fetch(self, url: str, file: BinaryIO) -> None:
        """Fetch an image or video and write it to a file.

        Raises:
            UserError: The scheme, host or address of the URL or of a redirect is not allowed, or
                the response is too large, too slow or of another type.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._follow_redirects(url, file)
        except TimeoutError as error:
            raise _fetch_error(f"timeout after {self._timeout_s:g} seconds") from error
        except (httpx2.TransportError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise _fetch_error(type(error).__name__) from error

    async def _follow_redirects(self, url: str, file: BinaryIO) -> None:
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            host, port = self._check_url(url, target)
            address = await self._resolve_address(host, port)
            redirect_url = await self._request(target, host, address, file)
            if redirect_url is None:
                return
            target = join_url(target, redirect_url)
        raise _fetch_error(f"more than {MAX_REDIRECTS} redirects")

    def _check_url(self, original_url: str, target_url: str) -> tuple[str, int]:
        try:
            is_allowed = is_allowed_url(original_url, target_url, self._hosts)
        except ValueError:  # invalid port, address or name
            is_allowed = False
        parts = urlsplit(target_url) if is_allowed else urlsplit("")
        if is_offline() or not is_allowed or parts.hostname is None:
            what = "URL or its redirect is not allowed"
            if is_allowed:
                what = "URLs are disabled because HF_HUB_OFFLINE is set"
            expected = (
                "a data URL, or https:// and a host that the server allows (--allow-media-host)"
            )
            raise _url_error(what, expected)
        return parts.hostname, parts.port or 443

    async def _resolve_address(self, host: str, port: int) -> str:
        """Resolve a host name to one IP address after checking all of its addresses."""
        addresses = await self._resolve(host, port)
        # An address may contain a local zone: fe80::1%eth0.
        if not addresses or not all(
            self._is_allowed_address(ipaddress.ip_address(a)) for a in addresses
        ):
            raise _url_error(
                "host of the URL has no public address", "a host with public addresses only"
            )
        return addresses[0]

    async def _request(self, url: str, host: str, address: str, file: BinaryIO) -> str | None:
        """Send a request and write the response to the file, or return the redirect target."""
        assert self._ssl_context is not None, f"{host} is allowed without allowed hosts"
        connect_url = httpx2.URL(url).copy_with(host=address)
        headers = {
            "Host": urlsplit(url).netloc,
            "User-Agent": f"finesight/{__version__}",
            "Accept-Encoding": "identity",
        }
        # trust_env=False: a proxy would resolve the name again.
        async with (
            httpx2.AsyncClient(verify=self._ssl_context, trust_env=False) as client,
            client.stream(
                "GET", connect_url, headers=headers, extensions={"sni_hostname": host}
            ) as response,
        ):
            if response.has_redirect_location:
                return str(response.headers["location"])
            content_type = response.headers.get("content-type", "").lower()
            if response.status_code != 200 or not content_type.startswith(CONTENT_TYPE_PREFIXES):
                raise _fetch_error(
                    f"status {response.status_code}, content type {content_type[:40]!r}"
                )
            content_length = parse_int(response.headers.get("content-length", ""))
            num_bytes = content_length or 0
            async for chunk in response.aiter_raw():
                num_bytes = max(num_bytes, file.tell() + len(chunk))
                if num_bytes > self._max_bytes:
                    break
                file.write(chunk)
        if num_bytes > self._max_bytes:
            raise _fetch_error(f"at least {num_bytes} bytes; expected at most {self._max_bytes}")
        return None


class LabelStudioImages:
    """Loads the images of Label Studio tasks: from a folder, or from the server of the user.

    Only the given folder and server are accessed. Redirects are not followed, so that the token is
    sent to this server only.

    Args:
        folder: Root of local files and of the uploads of the server, None to load none.
        url: Address of the Label Studio server, None to send no request.
        token: Legacy or personal access token for this server.
    """

    def __init__(
        self, folder: Path | None, url: str | None, token: str | None, limits: ServerLimits
    ) -> None:
        parts = urlsplit(url or "")
        if url and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query):
            raise UserError(
                f"{url!r:.200} is not the address of a server",
                where="--label-studio-url",
                expected="http:// or https:// and a host, such as http://localhost:8080",
                remedy="correct the address",
            )
        self._folder = Path(os.path.realpath(folder)) if folder else None
        self._url = (url or "").rstrip("/")
        self._token = token
        self._limits = limits

    async def fetch(self, reference: str, file: BinaryIO, *, web: MediaFetcher) -> None:
        """Write an image of a task to a file; `web` fetches other web URLs.

        Raises:
            ApiError: The image is missing or too large, or its source is not configured.
            UserError: `web` does not allow the URL.
        """
        is_own = bool(self._url) and reference.startswith(f"{self._url}/")
        path = reference
        if is_own:
            path = reference.removeprefix(self._url)
        if "://" in path:
            await web.fetch(reference, file)
            return
        if await asyncio.to_thread(self._copy_file, path, file):
            return
        if not self._url or not _is_data_path(path):
            raise ApiError(
                400,
                f"no image {path[:200]!r}; expected a file below --label-studio-files, or a path"
                f" below {DATA_PATH} of the server at --label-studio-url",
                "tasks",
            )
        await self._request(path, file)

    def _copy_file(self, path: str, target: BinaryIO) -> bool:
        """Copy a file below the folder, or return False if there is none."""
        name = get_local_path(path) or path
        if self._folder is None or name.startswith("/"):
            return False
        try:
            file = Path(os.path.realpath(self._folder / name))
            if not file.is_relative_to(self._folder):
                return False
            with open_regular_file(file) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    self._write(chunk, path, target)
        except (OSError, ValueError, UserError):
            return False
        return True

    def _write(self, chunk: bytes, path: str, target: BinaryIO) -> None:
        if target.tell() + len(chunk) > self._limits.max_image_bytes:
            raise ApiError(413, f"image {path[:200]!r} is too large", "tasks")
        target.write(chunk)

    async def _request(self, path: str, file: BinaryIO) -> None:
        try:
            async with (
                asyncio.timeout(self._limits.fetch_timeout_s),
                httpx2.AsyncClient(trust_env=False) as client,
            ):
                headers = await self._authorize(client) | {"Accept-Encoding": "identity"}
                async with client.stream("GET", self._url + path, headers=headers) as response:
                    if response.status_code != 200:
                        raise OSError(f"status {response.status_code}")
                    async for chunk in response.aiter_raw():
                        self._write(chunk, path, file)
        except (
            httpx2.RequestError,
            httpx2.InvalidURL,
            OSError,
            LookupError,
            ResponseLimitError,
            TypeError,
            ValueError,
        ) as error:
            reason = str(error) if isinstance(error, OSError) and error.errno is None else ""
            raise ApiError(
                400,
                f"image {path[:200]!r} could not be loaded from the Label Studio server:"
                f" {reason or type(error).__name__}",
                "tasks",
            ) from error

    async def _authorize(self, client: httpx2.AsyncClient) -> dict[str, str]:
        """Return the header for the token. A personal token is exchanged for an access token."""
        if self._token is None:
            return {}
        if self._token.count(".") != 2:
            return {"Authorization": f"Token {self._token}"}
        url = f"{self._url}/api/token/refresh"
        headers = {"Accept-Encoding": "identity"}
        body = {"refresh": self._token}
        async with client.stream("POST", url, json=body, headers=headers) as response:
            if response.status_code != 200:
                raise OSError(f"status {response.status_code} of the token")
            content = await read_content(response, MAX_TOKEN_BYTES)
        return {"Authorization": f"Bearer {parse_json(content)['access']}"}


def _is_data_path(path: str) -> bool:
    """Return whether a path stays below `DATA_PATH`, however often a server decodes it."""
    decoded = path
    for _ in range(MAX_DECODINGS):
        decoded = unicodedata.normalize("NFKC", unquote(decoded))
    parts = re.split(r"[/\\?&=;#]", decoded)
    is_plain = decoded == unquote(decoded) and not _UNSAFE_CHARACTERS.search(decoded)
    return is_plain and path.startswith(DATA_PATH) and ".." not in parts


def _fetch_error(what: str) -> UserError:
    return _url_error(f"file could not be fetched: {what}", "an image or video at the URL")


def _url_error(what: str, expected: str) -> UserError:
    remedy = "Send the file as a data URL, or upload an image to /v1/files."
    return UserError(what, where="url", expected=expected, remedy=remedy)
