"""Download of one file over HTTP, with resume and verification.

The content is written to a hidden partial file, verified by size and digest, and renamed. The next
attempt resumes a partial file with a Range request. The download of huggingface_hub would start
again after an interruption and does not verify digests.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import BinaryIO

import httpx2

from finesight.errors import UserError
from finesight.hub.http_client import (
    HttpClient,
    RetryableError,
    get_etag,
    is_offline,
    parse_int,
    strip_query,
)
from finesight.storage import make_folder, translate_os_errors, write_file

CHUNK_BYTES = 2**20
"""Number of bytes per read when the digest of a file is computed."""

LOCK_POLL_S = 0.2
"""Interval in seconds at which the lock of another process is checked."""

ProgressCallback = Callable[[int], None]
"""Callback that receives the number of new bytes; negative if bytes are discarded."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a server, with the properties that the listing contains.

    Attributes:
        path: Path relative to the target folder.
        size: Size in bytes; None if unknown.
        sha256: SHA-256 digest in hexadecimal; None if unknown.
        git_sha1: SHA-1 digest of the git blob, which includes the git header; None if unknown.
        limit: Maximum number of bytes to download if the size is unknown.
        is_mutable: Whether the content at the URL may change; see `remove_if_stale`.
    """

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    limit: int | None = None
    is_mutable: bool = False


class DownloadCancelled(Exception):
    """Raised to stop a download that is no longer needed.

    Another download failed, or the user cancelled.
    """


def download_file(
    file: RemoteFile,
    target: Path,
    http_client: HttpClient,
    on_progress: ProgressCallback,
    stop_event: Event,
) -> None:
    """Download and verify a file, unless the target exists.

    A partial file of an earlier attempt is resumed. If several processes request the same file, one
    downloads it and the others wait.

    Args:
        file: File to download.
        target: Path of the downloaded file.
        http_client: HTTP client of the site.
        on_progress: Called with the number of new bytes.
        stop_event: Event that cancels the download.

    Raises:
        UserError: The file is not available, fails verification, or `target` is not writable.
        DownloadCancelled: `stop_event` is set.
    """
    make_folder(target.parent)
    partial = target.with_name(f".{target.name}.partial")
    with translate_os_errors(target), _lock_partial_file(partial, target, stop_event) as stream:
        if stream is None:
            on_progress(target.stat().st_size)
            return
        num_existing = stream.seek(0, os.SEEK_END)
        on_progress(num_existing)
        etag_path = _get_etag_path(target)
        _receive_file(file, stream, etag_path, http_client, on_progress, stop_event)
        mismatch = _find_mismatch(file, stream)
        if mismatch and num_existing:
            # The partial file may be of another version: restart once.
            _truncate(stream, on_progress)
            _receive_file(file, stream, etag_path, http_client, on_progress, stop_event)
            mismatch = _find_mismatch(file, stream)
        if mismatch:
            partial.unlink()
            raise _build_mismatch_error(file, mismatch)
        os.fsync(stream.fileno())
        partial.rename(target)
        if not file.is_mutable:
            etag_path.unlink(missing_ok=True)


def remove_if_stale(file: RemoteFile, target: Path, http_client: HttpClient) -> None:
    """Remove the local copy of a mutable file if it is outdated.

    The copy is kept only if the server confirms that the file is unchanged, or in offline mode.

    Raises:
        UserError: The server does not respond.
    """
    if is_offline() or not target.exists():
        return
    etag_path = _get_etag_path(target)
    etag = _read_etag(etag_path)
    # Another process may have replaced it meanwhile.
    if not (etag and http_client.is_unchanged(file.url, etag)) and _read_etag(etag_path) == etag:
        target.unlink(missing_ok=True)


def _get_etag_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.etag")


def _read_etag(etag_path: Path) -> str:
    return etag_path.read_text(encoding="utf-8") if etag_path.exists() else ""


@contextlib.contextmanager
def _lock_partial_file(partial: Path, target: Path, stop_event: Event) -> Iterator[BinaryIO | None]:
    """Open and lock the partial file of a download.

    Other processes, such as other ranks, wait until the first one has finished.

    Yields:
        The open partial file, or None if the target exists.
    """
    while not target.exists():
        with partial.open("ab+") as stream:
            while _is_locked_elsewhere(stream):
                if stop_event.wait(LOCK_POLL_S):
                    raise DownloadCancelled
            if _is_same_file(partial, stream):
                yield stream
                return
    yield None


def _is_locked_elsewhere(stream: BinaryIO) -> bool:
    """Try to lock a file, and return whether another process holds the lock."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network file systems have no locks
        return False
    return False


def _is_same_file(path: Path, stream: BinaryIO) -> bool:
    """Return whether a path still refers to an open file.

    Another process may have renamed or removed the file.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _receive_file(
    file: RemoteFile,
    stream: BinaryIO,
    etag_path: Path,
    http_client: HttpClient,
    on_progress: ProgressCallback,
    stop_event: Event,
) -> None:
    """Append to a partial file until it is complete, with retries.

    Raises:
        UserError: All attempts fail.
    """
    num_attempts = max_received = 0
    while True:
        num_received = stream.seek(0, os.SEEK_END)
        if file.size is not None and num_received == file.size:
            return
        if file.size is not None and num_received > file.size:
            _truncate(stream, on_progress)
            num_received = 0
        try:
            if _receive_range(
                file, stream, num_received, etag_path, http_client, on_progress, stop_event
            ):
                return
            failure = RetryableError("the response ended early")
        except RetryableError as error:
            failure = error
        # A file shorter than listed is restarted, never extended past its end.
        num_attempts = (
            0 if stream.seek(0, os.SEEK_END) > max(num_received, max_received) else num_attempts + 1
        )
        max_received = max(max_received, stream.tell())
        delay_s = failure.retry_delay(num_attempts)
        if delay_s is None:
            raise _build_incomplete_error(file, stream.tell(), failure)
        if stop_event.wait(delay_s):
            raise DownloadCancelled


def _receive_range(
    file: RemoteFile,
    stream: BinaryIO,
    num_received: int,
    etag_path: Path,
    http_client: HttpClient,
    on_progress: ProgressCallback,
    stop_event: Event,
) -> bool:
    """Request the remaining bytes of a file and append them to the partial file.

    Returns:
        True if the file is complete. If the server does not support the range, the partial file is
        truncated.
    """
    headers = {"Range": f"bytes={num_received}-"} if num_received else {}
    if num_received and _has_no_digest(file) and _read_etag(etag_path):
        # Without a digest, only the server can tell whether the file is unchanged.
        headers["If-Range"] = _read_etag(etag_path)
    with http_client.stream_get(file.url, headers) as response:
        if response.status_code == 416 or (
            response.status_code == 206 and _get_range_start(response) != num_received
        ):
            _truncate(stream, on_progress)
            return False
        if response.status_code == 200 and num_received:
            _truncate(stream, on_progress)
        if _has_no_digest(file):
            write_file(etag_path, get_etag(response).encode())
        total_bytes = _get_total_bytes(response)
        if file.size is None and total_bytes is None and _has_no_digest(file):
            _check_length_known(file, response)
        _check_size(file, total_bytes)
        try:
            for chunk in response.iter_raw():
                if stop_event.is_set():
                    raise DownloadCancelled
                stream.write(chunk)
                stream.flush()
                on_progress(len(chunk))
                _check_size(file, stream.tell())
        except httpx2.TransportError as error:
            raise RetryableError(f"{type(error).__name__}: {error}") from error
    return stream.tell() == total_bytes or (file.size is None and total_bytes is None)


def _has_no_digest(file: RemoteFile) -> bool:
    return file.sha256 is None and file.git_sha1 is None


def _get_range_start(response: httpx2.Response) -> int:
    """Return the first byte of the Content-Range header; -1 if it is missing."""
    first = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
    number = parse_int(first)
    return -1 if number is None else number


def _get_total_bytes(response: httpx2.Response) -> int | None:
    """Return the complete size of a file from the headers of a response.

    A partial response contains it in Content-Range. Returns None if the size is unknown.
    """
    range_total = response.headers.get("content-range", "").rpartition("/")[2]
    length = (
        range_total if response.status_code == 206 else response.headers.get("content-length", "")
    )
    return parse_int(length)


def _check_length_known(file: RemoteFile, response: httpx2.Response) -> None:
    """Raise UserError if a truncated response could not be detected."""
    if "chunked" not in response.headers.get("transfer-encoding", "").lower():
        raise UserError(
            f"the server does not send the size of {file.path}",
            where=strip_query(file.url),
            expected="a size, a digest, or a chunked response: otherwise truncation is not"
            " detected",
            remedy="download it with another program, check that it is complete, and use its path",
        )


def _truncate(stream: BinaryIO, on_progress: ProgressCallback) -> None:
    on_progress(-stream.seek(0, os.SEEK_END))
    stream.truncate(0)


def _check_size(file: RemoteFile, size: int | None) -> None:
    max_bytes = file.size if file.size is not None else file.limit
    if size is not None and max_bytes is not None and size > max_bytes:
        raise UserError(
            f"at least {size} bytes",
            where=file.url,
            expected=f"at most {max_bytes} bytes"
            if file.size is None
            else f"{max_bytes} bytes, as listed",
            remedy="if this is intended, download it with another program and use its path",
        )


def _find_mismatch(file: RemoteFile, stream: BinaryIO) -> str:
    """Compare the size and digests of a downloaded file with its listing.

    Returns:
        Description of the first difference; empty if there is none.
    """
    size = stream.seek(0, os.SEEK_END)
    if file.size is not None and size != file.size:
        return f"received {size} bytes, expected {file.size}"
    for name, expected in (("SHA-256", file.sha256), ("git SHA-1", file.git_sha1)):
        if expected is not None:
            digest = hashlib.sha256() if name == "SHA-256" else hashlib.sha1(usedforsecurity=False)
            if name == "git SHA-1":
                digest.update(b"blob %d\0" % size)
            stream.seek(0)
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
            if digest.hexdigest() != expected.lower():
                return f"its {name} is {digest.hexdigest()}, expected {expected.lower()}"
    return ""


def _build_mismatch_error(file: RemoteFile, mismatch: str) -> UserError:
    return UserError(
        f"{file.path} differs from the listing: {mismatch}; the file was discarded",
        where=file.url,
        expected="the bytes of the hub's listing",
        remedy="try again; if it fails again, a mirror or a proxy changes files: use another one"
        " (HF_ENDPOINT, MODELSCOPE_ENDPOINT)",
    )


def _build_incomplete_error(
    file: RemoteFile, num_received: int, failure: RetryableError
) -> UserError:
    total_note = f" of {file.size}" if file.size is not None else ""
    return UserError(
        f"{file.path}: received {num_received}{total_note} bytes, then {failure.what}",
        where=file.url,
        expected="a response from the server",
        remedy="check the connection and start again to resume the download",
    )


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Raise UserError if a disk has less free space than required.

    The folder may not exist yet.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    stats = os.statvfs(existing)
    free = stats.f_bavail * stats.f_frsize
    if num_bytes > free:
        raise UserError(
            f"{num_bytes} bytes are required, {free} are free",
            where=str(folder),
            expected=os.strerror(errno.ENOSPC).lower() + " is expected",
            remedy="free some space, or choose another disk (HF_HOME, --to)",
        )
