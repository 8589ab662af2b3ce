"""Features of pictures on disk, where later runs find them again.

They lie in the folder for assets of huggingface_hub's cache, which HF_HOME moves: a folder for each
tower and what computes with it, and there a safetensors file for each chunk of pictures. A file
gets its name when it is whole, its SHA-256 is compared when it is read, and what was not used for
longest goes first where room is needed. Nothing is flushed: what a power failure damages is
computed again.

Shapes: M places of the pictures of a chunk, K features of each, D width.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finesight.bounded_files import parse_json
from finesight.child_processes import FileLock
from finesight.data.lines import Unreadable
from finesight.errors import UserError
from finesight.hub import LARGEST_HEADER
from finesight.storage import explained, make_folder

MOST_BYTES = 64 << 30
"""Of all features on disk together."""

MOST_OF_FREE = 0.5
"""Share of what is free on the disk that features may take."""

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TENSOR, _DIGEST = "features", "sha256"


def features_folder() -> Path:
    """Where features lie, of all models."""
    # Imported here: it is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "features"


class Stored(NamedTuple):
    """A chunk's file, and the byte at which its features start."""

    path: Path
    start: int


class FeatureFiles:
    """The features of one tower, in its folder below `home`. To be closed: until then no other run
    removes any."""

    def __init__(self, home: Path, tower: str, *, guards: bool = True) -> None:
        """`guards` is for one of several processes that use the same. Raises UserError where no
        folder can be made."""
        self.home, self.folder = home, home / tower
        make_folder(self.folder)
        with explained(home):
            self._lock = FileLock(home)
        self._guards = guards
        if guards:
            with suppress(OSError):
                self._lock.acquire(shared=True)

    def close(self) -> None:
        """Let other runs remove what this one has used."""
        self._lock.close()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept of this tower."""
        return not any(self.folder.iterdir())

    def path(self, name: str) -> Path:
        """The file of the chunk `name`."""
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether there is a file of this chunk, whole or not."""
        return self.path(name).exists()

    def make_room(self, wanted: Iterable[str], missing: int) -> int:
        """Bytes that features may still take. The files that were not used for longest are removed
        until these are `missing`, but none of the chunks `wanted`, and none while another run uses
        any."""
        alone = self._guards and self._is_alone()
        files = self._files()
        used = sum(size for _, size, _ in files)
        free = shutil.disk_usage(self.home).free

        def room() -> int:
            return max(0, min(MOST_BYTES - used, int(MOST_OF_FREE * free)))

        if alone:
            kept = {self.path(name) for name in wanted}
            for path in self.home.glob("*/.*.making"):
                path.unlink(missing_ok=True)
            for _, size, path in sorted(files):
                if missing <= room():
                    break
                if path not in kept:
                    path.unlink(missing_ok=True)
                    used, free = used - size, free + size
        if self._guards:
            with suppress(OSError):
                self._lock.acquire(shared=True)
        return room()

    def _is_alone(self) -> bool:
        """Take the lock for this process alone; False where others use it or there are none."""
        try:
            self._lock.acquire(wait=False)
        except OSError:
            return False
        return True

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each was last used, its size, and where it is."""
        stats = []
        for path in self.home.glob("*/*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            stats.append((stat.st_mtime, stat.st_size, path))
        return stats

    def write(self, name: str, features_MKD: Tensor) -> Stored:
        """Keep a chunk's features, contiguous on the CPU; where they lie. Raises UserError where
        the disk takes no more."""
        path = self.path(name)
        # Of its own, where several processes and threads write the same.
        making = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}.making")
        try:
            with explained(path):
                notes = {_DIGEST: hashlib.sha256(_bytes_of(features_MKD)).hexdigest()}
                save_file({_TENSOR: features_MKD}, making, notes)
                start = making.stat().st_size - len(_bytes_of(features_MKD))
                os.replace(making, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot be written: {error}",
                where=str(path),
                expected="a folder that takes what is written, and stays while a run needs it",
                remedy="set train.cache=memory, or HF_HOME to a folder on another disk",
            ) from error
        finally:
            with suppress(OSError):
                making.unlink()
        return Stored(path, start)

    def read(self, name: str, features_MKD: Tensor) -> Stored | None:
        """Fill contiguous `features_MKD` on the CPU with what is kept of a chunk; where it lies.
        None where nothing is kept of it, or what is kept is damaged: then it is removed."""
        path = self.path(name)
        try:
            with path.open("rb", buffering=0) as file:
                start = _read_whole(file.fileno(), features_MKD)
        except FileNotFoundError:
            return None
        except (ValueError, OSError):
            with suppress(OSError):
                path.unlink()
            return None
        # Others' files may be read and not touched.
        with suppress(OSError):
            os.utime(path)
        return Stored(path, start)


def _read_whole(file: int, features_MKD: Tensor) -> int:
    """Raises ValueError for a file that is not what `write` made of such a tensor."""
    length = int.from_bytes(_read_at(file, 8, 0), "little")
    if length > LARGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header: Any = parse_json(_read_at(file, length, 8))
    room = _bytes_of(features_MKD)
    form = {
        "dtype": _TYPES[features_MKD.dtype],
        "shape": list(features_MKD.shape),
        "data_offsets": [0, len(room)],
    }
    if not isinstance(header, dict) or header.get(_TENSOR) != form:
        raise ValueError("another tensor")
    notes = header.get("__metadata__")
    read_into(file, room, 8 + length)
    found = hashlib.sha256(room).hexdigest()
    if not isinstance(notes, dict) or notes.get(_DIGEST) != found:
        raise ValueError("other bytes")
    return 8 + length


def _read_at(file: int, length: int, start: int) -> bytes:
    found = os.pread(file, length, start)
    if len(found) < length:
        raise ValueError("cut off")
    return found


def read_into(file: int, room: memoryview, start: int) -> None:
    """Fill `room` with the bytes of an open file from `start` on. Raises ValueError where the file
    ends before."""
    at = 0
    while at < len(room):
        count = os.preadv(file, [room[at:]], start + at)
        if not count:
            raise ValueError("cut off")
        at += count


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    assert tensor.is_contiguous(), "a tensor with gaps"
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_rows(stored: Stored, at: int, features_MKD: Tensor) -> None:
    """Fill contiguous `features_MKD` on the CPU with a chunk's features from its place `at` on.

    Raises Unreadable where the file is no longer what it was.
    """
    room = _bytes_of(features_MKD)
    row = len(room) // max(1, len(features_MKD))
    try:
        file = os.open(stored.path, os.O_RDONLY)
        try:
            read_into(file, room, stored.start + at * row)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        said = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else error
        raise Unreadable(
            f"features of pictures cannot be read again: {said}",
            where=str(stored.path),
            expected="the file that was there when the run looked at its pictures",
            remedy="start again with --resume: what is missing is looked at again",
        ) from error
