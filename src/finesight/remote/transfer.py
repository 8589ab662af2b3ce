"""One file over HTTP: what is there already is kept, and the whole is verified before it counts.

A file comes into a hidden neighbour, and gets its name when its size and its digest are right. What
stays after a cut line or a killed process is continued by the next attempt with a Range request.
huggingface_hub starts such a file anew, and compares no digest.
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
from finesight.remote.web import TryAgain, Web, mark_of, offline, whole_number, without_query
from finesight.storage import explained, make_folder, write_file

PIECE = 2**20
"""Bytes that are read at once to compute a digest."""

LOOK_SECONDS = 0.2
"""How often a process looks whether another one has finished a file."""

Advance = Callable[[int], None]
"""To be called with each number of bytes that are there; negative where they were of no use."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a server, and what is known of it beforehand.

    `size` is in bytes. `sha256` and `git_sha1` are in hexadecimal; git's is over the file with
    git's header before it. Without a size at most `limit` bytes are taken. What is `changing` may
    be another file tomorrow: see `renew`.
    """

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    limit: int | None = None
    changing: bool = False


class Stopped(Exception):
    """Another file failed, or the user stopped: this one is not needed any more."""


def bring(file: RemoteFile, target: Path, web: Web, advance: Advance, stop: Event) -> None:
    """Put the file at `target`, whole and verified; one that is there is taken as it is.

    Raises UserError when it cannot be had, is not what it should be, or `target` cannot be written.
    """
    make_folder(target.parent)
    partial = target.with_name(f".{target.name}.partial")
    with explained(target), _held(partial, target, stop) as stream:
        if stream is None:
            advance(target.stat().st_size)
            return
        kept = stream.seek(0, os.SEEK_END)
        advance(kept)
        mark = _mark_at(target)
        _receive(file, stream, mark, web, advance, stop)
        problem = _mismatch(file, stream)
        if problem and kept:
            # The beginning may be of another file that had this name: from the first byte, once.
            _empty(stream, advance)
            _receive(file, stream, mark, web, advance, stop)
            problem = _mismatch(file, stream)
        if problem:
            partial.unlink()
            raise _unlike(file, problem)
        os.fsync(stream.fileno())
        partial.rename(target)
        if not file.changing:
            mark.unlink(missing_ok=True)


def renew(file: RemoteFile, target: Path, web: Web) -> None:
    """Remove a changing file of an earlier fetch unless the server says that it is the same one.

    Offline it stays. Raises UserError where the server does not answer.
    """
    if offline() or not target.exists():
        return
    mark = _mark_at(target)
    said = _read(mark)
    # Another process may have renewed it meanwhile.
    if not (said and web.unchanged(file.url, said)) and _read(mark) == said:
        target.unlink(missing_ok=True)


def _mark_at(target: Path) -> Path:
    return target.with_name(f".{target.name}.etag")


def _read(mark: Path) -> str:
    return mark.read_text(encoding="utf-8") if mark.exists() else ""


@contextlib.contextmanager
def _held(partial: Path, target: Path, stop: Event) -> Iterator[BinaryIO | None]:
    """The partial file, to be written by this process alone; None when `target` is there.

    Several processes of one training ask for the same files at once: the others wait here.
    """
    while not target.exists():
        with partial.open("ab+") as stream:
            while _is_taken(stream):
                if stop.wait(LOOK_SECONDS):
                    raise Stopped
            if _is_still(partial, stream):
                yield stream
                return
    yield None


def _is_taken(stream: BinaryIO) -> bool:
    """Whether another process holds the file; else this one does from now on."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network file systems know no locks
        return False
    return False


def _is_still(path: Path, stream: BinaryIO) -> bool:
    """Whether the open file is the one of that name, not renamed by another process meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _receive(
    file: RemoteFile, stream: BinaryIO, mark: Path, web: Web, advance: Advance, stop: Event
) -> None:
    """Append to the stream until the file is whole. Raises UserError when the line stays cut."""
    attempts = most = 0
    while True:
        have = stream.seek(0, os.SEEK_END)
        if file.size is not None and have == file.size:
            return
        if file.size is not None and have > file.size:
            _empty(stream, advance)
            have = 0
        try:
            if _continue(file, stream, have, mark, web, advance, stop):
                return
            failure = TryAgain("the answer ended early")
        except TryAgain as error:
            failure = error
        # A file that is shorter now than listed begins anew, and never gets beyond its end.
        attempts = 0 if stream.seek(0, os.SEEK_END) > max(have, most) else attempts + 1
        most = max(most, stream.tell())
        seconds = failure.pause(attempts)
        if seconds is None:
            raise _cut(file, stream.tell(), failure)
        if stop.wait(seconds):
            raise Stopped


def _continue(
    file: RemoteFile,
    stream: BinaryIO,
    have: int,
    mark: Path,
    web: Web,
    advance: Advance,
    stop: Event,
) -> bool:
    """One request from byte `have` on; whether the file is whole as far as the server says."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and _is_unknown(file) and _read(mark):
        # Without a digest only the server can tell whether the file is still the one begun.
        headers["If-Range"] = _read(mark)
    with web.answer(file.url, headers) as response:
        if response.status_code == 416 or (
            response.status_code == 206 and _first_byte(response) != have
        ):
            _empty(stream, advance)
            return False
        if response.status_code == 200 and have:
            _empty(stream, advance)
        if _is_unknown(file):
            write_file(mark, mark_of(response).encode())
        total = _announced(response)
        if file.size is None and total is None and _is_unknown(file):
            _refuse_endless(file, response)
        _refuse_size(file, total)
        try:
            for piece in response.iter_raw():
                if stop.is_set():
                    raise Stopped
                stream.write(piece)
                stream.flush()
                advance(len(piece))
                _refuse_size(file, stream.tell())
        except httpx2.TransportError as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from error
    return stream.tell() == total or (file.size is None and total is None)


def _is_unknown(file: RemoteFile) -> bool:
    return file.sha256 is None and file.git_sha1 is None


def _first_byte(response: httpx2.Response) -> int:
    """Where the answered range begins, `bytes 100-199/200`; -1 where it is not said."""
    first = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
    number = whole_number(first)
    return -1 if number is None else number


def _announced(response: httpx2.Response) -> int | None:
    """The bytes of the whole file as an answer, whole or ranged, says them."""
    after = response.headers.get("content-range", "").rpartition("/")[2]
    length = after if response.status_code == 206 else response.headers.get("content-length", "")
    return whole_number(length)


def _refuse_endless(file: RemoteFile, response: httpx2.Response) -> None:
    """Refuse a file of which nobody could tell whether the end is missing."""
    if "chunked" not in response.headers.get("transfer-encoding", "").lower():
        raise UserError(
            f"the server does not say how long {file.path} is",
            where=without_query(file.url),
            expected="a length, a digest, or an answer in chunks: else a cut file looks whole",
            remedy="download it yourself, see that it is whole, and give its path",
        )


def _empty(stream: BinaryIO, advance: Advance) -> None:
    advance(-stream.seek(0, os.SEEK_END))
    stream.truncate(0)


def _refuse_size(file: RemoteFile, size: int | None) -> None:
    most = file.size if file.size is not None else file.limit
    if size is not None and most is not None and size > most:
        raise UserError(
            f"{size} bytes or more",
            where=file.url,
            expected=f"at most {most} bytes" if file.size is None else f"{most} bytes, as listed",
            remedy="if that is what you want, download it yourself and give its path",
        )


def _mismatch(file: RemoteFile, stream: BinaryIO) -> str:
    """What of the received bytes is not as it was announced, with both values; else nothing."""
    size = stream.seek(0, os.SEEK_END)
    if file.size is not None and size != file.size:
        return f"{size} bytes were received in place of {file.size}"
    for name, expected in (("SHA-256", file.sha256), ("git SHA-1", file.git_sha1)):
        if expected is not None:
            total = hashlib.sha256() if name == "SHA-256" else hashlib.sha1(usedforsecurity=False)
            if name == "git SHA-1":
                total.update(b"blob %d\0" % size)
            stream.seek(0)
            while piece := stream.read(PIECE):
                total.update(piece)
            if total.hexdigest() != expected.lower():
                return f"its {name} is {total.hexdigest()}, not {expected.lower()}"
    return ""


def _unlike(file: RemoteFile, problem: str) -> UserError:
    return UserError(
        f"{file.path} is not the file that was listed: {problem}; nothing was kept",
        where=file.url,
        expected="the bytes that the hub lists",
        remedy="try again; if it stays so, a mirror or a proxy changes files: use another one"
        " (HF_ENDPOINT, MODELSCOPE_ENDPOINT)",
    )


def _cut(file: RemoteFile, have: int, failure: TryAgain) -> UserError:
    of = f" of {file.size}" if file.size is not None else ""
    return UserError(
        f"{file.path}: {have}{of} bytes were received, then {failure.what}",
        where=file.url,
        expected="an answer by the server",
        remedy="check the connection and start again: it goes on where it stopped",
    )


def refuse_full(folder: Path, needed: int) -> None:
    """Raise UserError where fewer than `needed` bytes are free on the disk of `folder`."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    state = os.statvfs(existing)
    free = state.f_bavail * state.f_frsize
    if needed > free:
        raise UserError(
            f"{needed} bytes are needed and {free} are free",
            where=str(folder),
            expected=os.strerror(errno.ENOSPC).lower() + " is what would happen",
            remedy="free some space, or choose another disk (HF_HOME, --to)",
        )
