"""Disk tier of the vision cache: feature files, shared by runs.

The files are in the assets folder of the huggingface_hub cache (`HF_HOME`), with a folder for each
vision encoder and one safetensors file per chunk of images. A file is renamed to its final name
after it is complete, and its SHA-256 is verified on reading. Least recently used files are evicted.
Files are not flushed to disk: the features in a file that a power failure corrupts are computed
again.

Shapes: M image tokens of a chunk, K features per token, D width.
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
from finesight.data.line_index import UnreadableFileError
from finesight.errors import UserError
from finesight.model_folder import MAX_HEADER_BYTES
from finesight.storage import FileLock, make_folder, translate_os_errors

MAX_STORE_BYTES = 64 << 30
"""Maximum size of the feature files of all vision encoders, in bytes."""

MAX_FREE_FRACTION = 0.5
"""Maximum fraction of the free disk space for new feature files."""

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TENSOR_KEY, _SHA256_KEY = "features", "sha256"


def vision_store_root() -> Path:
    """Return the root folder of the feature files of all vision encoders."""
    # Imported here, because huggingface_hub is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "vision_cache"


class StoredChunk(NamedTuple):
    """Feature file of a chunk of images, and the byte offset of its features."""

    path: Path
    data_offset: int


class VisionFileStore:
    """Folder of the feature files of one vision encoder.

    Other runs cannot evict files until the store is closed.
    """

    def __init__(self, root: Path, encoder_hash: str, *, use_lock: bool = True) -> None:
        """Create the folder of the vision encoder, and acquire the shared lock.

        Args:
            root: Root folder of all vision encoders.
            encoder_hash: Fingerprint of the encoder and its settings, used as folder name.
            use_lock: Whether to hold the lock; one rank per machine does.

        Raises:
            UserError: The folder cannot be created.
        """
        self.root, self.folder = root, root / encoder_hash
        make_folder(self.folder)
        with translate_os_errors(root):
            self._lock_fd = FileLock(root)
        self._use_lock = use_lock
        if use_lock:
            with suppress(OSError):
                self._lock_fd.acquire(shared=True)

    def close(self) -> None:
        """Release the lock, so that other runs may evict files."""
        self._lock_fd.close()

    @property
    def is_empty(self) -> bool:
        """True if there are no feature files of this vision encoder."""
        return not any(self.folder.iterdir())

    def chunk_path(self, name: str) -> Path:
        """Return the path of the feature file of a chunk."""
        return self.folder / f"{name}.safetensors"

    def has_chunk(self, name: str) -> bool:
        """Return whether the feature file of a chunk exists, without verifying it."""
        return self.chunk_path(name).exists()

    def evict(self, required_chunks: Iterable[str], missing_bytes: int) -> int:
        """Remove least recently used feature files until new files fit.

        No file is removed while another run uses the store.

        Args:
            required_chunks: Names of chunks that must not be removed.
            missing_bytes: Size of the new files.

        Returns:
            Number of bytes available for new files.
        """
        is_exclusive = self._use_lock and self._is_alone()
        files = self._list_files()
        used = sum(size for _, size, _ in files)
        free = shutil.disk_usage(self.root).free

        def available_bytes() -> int:
            return max(0, min(MAX_STORE_BYTES - used, int(MAX_FREE_FRACTION * free)))

        if is_exclusive:
            protected_paths = {self.chunk_path(name) for name in required_chunks}
            for path in self.root.glob("*/.*.tmp"):
                path.unlink(missing_ok=True)
            for _, size, path in sorted(files):
                if missing_bytes <= available_bytes():
                    break
                if path not in protected_paths:
                    path.unlink(missing_ok=True)
                    used, free = used - size, free + size
        if self._use_lock:
            with suppress(OSError):
                self._lock_fd.acquire(shared=True)
        return available_bytes()

    def _is_alone(self) -> bool:
        """Acquire the exclusive lock; return False if another run uses the store.

        The result is also False on a file system without locks.
        """
        try:
            self._lock_fd.acquire(wait=False)
        except OSError:
            return False
        return True

    def _list_files(self) -> list[tuple[float, int, Path]]:
        """Return the time of last use, the size and the path of all feature files."""
        stats = []
        for path in self.root.glob("*/*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            stats.append((stat.st_mtime, stat.st_size, path))
        return stats

    def write(self, name: str, features_MKD: Tensor) -> StoredChunk:
        """Write the features of a chunk to a file, atomically.

        Args:
            name: Name of the chunk.
            features_MKD: Contiguous CPU tensor.

        Raises:
            UserError: The disk is not writable.
        """
        path = self.chunk_path(name)
        # A unique name per process and thread.
        temp_path = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with translate_os_errors(path):
                metadata = {_SHA256_KEY: hashlib.sha256(_as_bytes(features_MKD)).hexdigest()}
                save_file({_TENSOR_KEY: features_MKD}, temp_path, metadata)
                data_offset = temp_path.stat().st_size - len(_as_bytes(features_MKD))
                os.replace(temp_path, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot be written: {error}",
                where=str(path),
                expected="a writable folder during the complete run",
                remedy="set train.vision_cache=memory, or move HF_HOME to another disk",
            ) from error
        finally:
            with suppress(OSError):
                temp_path.unlink()
        return StoredChunk(path, data_offset)

    def read(self, name: str, features_MKD: Tensor) -> StoredChunk | None:
        """Read and verify the features of a chunk.

        Args:
            name: Name of the chunk.
            features_MKD: Contiguous CPU tensor that receives the features.

        Returns:
            The file; None if it is missing or corrupt. A corrupt file is removed.
        """
        path = self.chunk_path(name)
        try:
            with path.open("rb", buffering=0) as file:
                data_offset = _read_verified(file.fileno(), features_MKD)
        except FileNotFoundError:
            return None
        except (ValueError, OSError):
            with suppress(OSError):
                path.unlink()
            return None
        # Files of other users may be read-only.
        with suppress(OSError):
            os.utime(path)
        return StoredChunk(path, data_offset)


def _read_verified(fd: int, features_MKD: Tensor) -> int:
    """Read the features in an open file and verify their SHA-256; return their byte offset.

    Raises:
        ValueError: The file does not contain features of this shape and dtype, or is corrupt.
    """
    length = int.from_bytes(_read_at(fd, 8, 0), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header: Any = parse_json(_read_at(fd, length, 8))
    buffer = _as_bytes(features_MKD)
    expected_spec = {
        "dtype": _DTYPE_NAMES[features_MKD.dtype],
        "shape": list(features_MKD.shape),
        "data_offsets": [0, len(buffer)],
    }
    if not isinstance(header, dict) or header.get(_TENSOR_KEY) != expected_spec:
        raise ValueError("another tensor")
    metadata = header.get("__metadata__")
    read_into(fd, buffer, 8 + length)
    digest = hashlib.sha256(buffer).hexdigest()
    if not isinstance(metadata, dict) or metadata.get(_SHA256_KEY) != digest:
        raise ValueError("other bytes")
    return 8 + length


def _read_at(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) < length:
        raise ValueError("cut off")
    return data


def read_into(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer with the bytes of an open file, starting at an offset.

    Raises:
        ValueError: The file is too short.
    """
    position = 0
    while position < len(buffer):
        num_bytes = os.preadv(fd, [buffer[position:]], offset + position)
        if not num_bytes:
            raise ValueError("cut off")
        position += num_bytes


def _as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy."""
    assert tensor.is_contiguous(), "a tensor that is not contiguous"
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_rows(stored_chunk: StoredChunk, start_row: int, features_MKD: Tensor) -> None:
    """Read the features of consecutive image tokens of a chunk, without verifying them.

    Args:
        stored_chunk: Feature file.
        start_row: Index of the first image token in the chunk.
        features_MKD: Contiguous CPU tensor that receives the features.

    Raises:
        UnreadableFileError: The file is missing, truncated or unreadable.
    """
    buffer = _as_bytes(features_MKD)
    row_bytes = len(buffer) // max(1, len(features_MKD))
    try:
        fd = os.open(stored_chunk.path, os.O_RDONLY)
        try:
            read_into(fd, buffer, stored_chunk.data_offset + start_row * row_bytes)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else error
        raise UnreadableFileError(
            f"cached image features cannot be read: {reason}",
            where=str(stored_chunk.path),
            expected="the file as it was at the start of training",
            remedy="start again with --resume to encode missing images again",
        ) from error
