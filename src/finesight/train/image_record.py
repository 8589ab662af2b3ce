"""Fingerprints of the training images, which detect images that changed before a resume.

A fingerprint covers the size of each image file and its first and last `EDGE_BYTES` bytes, which
cost little in addition to reading the header. Modification times are recorded but do not count as
changes, because copying a dataset changes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from finesight.data.corpus import Corpus
from finesight.data.image_header import CorruptImageError, resolve_content, split_container_path
from finesight.data.sample import LocatedSample, list_media_paths
from finesight.errors import UserError
from finesight.storage import write_file

EDGE_BYTES = 8 * 1024
"""Number of bytes read at the start and at the end of an image file."""

MAX_LISTED_IMAGES = 5
"""Maximum number of changed images listed in a message."""

_COLUMN_NAMES = ("samples", "contents", "times")
_CHECKSUM_KEY = "sha256"


class ImageState(NamedTuple):
    """Fingerprints of all images of a sample.

    Attributes:
        content: Hash of the sizes, first and last bytes of the files.
        time: Hash of the modification times.
    """

    content: int
    time: int


def read_image_state(sample: LocatedSample) -> ImageState:
    """Compute the fingerprints of the images of a sample.

    Raises:
        CorruptImageError: An image cannot be read.
    """
    contents, times = (hashlib.blake2b(digest_size=8) for _ in range(2))
    # The fingerprint of the data covers the images in rows of a Parquet file.
    folder = sample.folder
    covered = folder.suffix.lower() == ".parquet" and folder.is_file()
    for path in () if covered else list_sample_images(sample):
        try:
            size, ends, time = _read_edges(path)
        except OSError as error:
            raise CorruptImageError(
                f"cannot be read: {error.strerror or error}",
                where=str(path),
                expected="a readable image during the complete run",
                remedy="restore the image, or correct its permissions",
            ) from error
        contents.update(size.to_bytes(8) + ends)
        times.update(time.to_bytes(8, signed=True))
    return ImageState(*(int.from_bytes(h.digest(), signed=True) for h in (contents, times)))


def list_sample_images(sample: LocatedSample) -> list[Path]:
    """Return the paths of the images and video frames of a sample, in order."""
    return [
        sample.resolve_path(name)
        for part in sample.sample.iter_parts()
        for name in list_media_paths(part)
    ]


def _read_edges(path: Path) -> tuple[int, bytes, int]:
    """Return size, first and last bytes, and modification time of an image file."""
    inside = resolve_content(path)
    if not isinstance(inside, Path):
        content = inside.getvalue()
        archive = Path(split_container_path(str(path))[0])
        return (
            len(content),
            content[:EDGE_BYTES] + content[EDGE_BYTES:][-EDGE_BYTES:],
            archive.stat().st_mtime_ns,
        )
    file = os.open(inside, os.O_RDONLY)
    try:
        state = os.fstat(file)
        ends = os.pread(file, EDGE_BYTES, 0)
        if state.st_size > EDGE_BYTES:
            ends += os.pread(file, EDGE_BYTES, max(EDGE_BYTES, state.st_size - EDGE_BYTES))
    finally:
        os.close(file)
    return state.st_size, ends, state.st_mtime_ns


@dataclass(frozen=True, slots=True, eq=False)
class ImageStates:
    """Image fingerprints of several samples, in the order of their corpus indices."""

    samples_N: NDArray[np.int64]
    contents_N: NDArray[np.int64]
    times_N: NDArray[np.int64]

    @classmethod
    def from_states(cls, samples: Sequence[int], states: Iterable[ImageState]) -> ImageStates:
        """Combine the fingerprints of single samples; `samples` are their corpus indices."""
        contents, times = zip(*states, strict=True) if samples else ((), ())
        return cls(*(np.array(column, dtype=np.int64) for column in (samples, contents, times)))

    @classmethod
    def empty(cls) -> ImageStates:
        """Return an instance without samples."""
        return cls.from_states((), ())

    @property
    def digest(self) -> str:
        """SHA-256 of the image contents of all samples, without modification times."""
        digest = hashlib.sha256(self.samples_N.tobytes())
        digest.update(self.contents_N.tobytes())
        return digest.hexdigest()

    def find_changed(self, recorded: ImageStates) -> list[int]:
        """Return the corpus indices of samples whose image contents differ from `recorded`."""
        at, recorded_at = self._match_samples(recorded)
        other_N = self.contents_N[at] != recorded.contents_N[recorded_at]
        samples: list[int] = self.samples_N[at][other_N].tolist()
        return samples

    def count_touched(self, recorded: ImageStates) -> int:
        """Count the samples whose image modification times differ from `recorded`."""
        at, recorded_at = self._match_samples(recorded)
        return int(np.count_nonzero(self.times_N[at] != recorded.times_N[recorded_at]))

    def _match_samples(self, other: ImageStates) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        _, own, others = np.intersect1d(
            self.samples_N, other.samples_N, assume_unique=True, return_indices=True
        )
        return own, others


def save_image_record(path: Path, record: Mapping[str, ImageStates]) -> None:
    """Write the image fingerprints of each split to a file, atomically."""
    tensors = {
        f"{split}.{name}": column
        for split, states in record.items()
        for name, column in zip(
            _COLUMN_NAMES, (states.samples_N, states.contents_N, states.times_N), strict=True
        )
    }
    write_file(path, save(tensors, {_CHECKSUM_KEY: _checksum(tensors)}))


def load_image_record(path: Path) -> dict[str, ImageStates]:
    """Read the image fingerprints of each split that `save_image_record` wrote.

    Raises:
        UserError: The file is corrupt.
    """
    try:
        reader: Any = safe_open(path, framework="numpy")  # its methods are untyped
        with reader as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            checksum = (file.metadata() or {}).get(_CHECKSUM_KEY)
        splits = sorted({name.rpartition(".")[0] for name in tensors})
        record = {
            split: ImageStates(*(tensors[f"{split}.{name}"] for name in _COLUMN_NAMES))
            for split in splits
        }
        error_text = "" if checksum == _checksum(tensors) else "the checksum does not match"
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        error_text = str(error)
    if error_text:
        raise UserError(
            f"the fingerprints of the images cannot be read: {error_text}",
            where=str(path),
            expected="the file as the run wrote it",
            remedy=f"delete {path} to resume without comparing images",
        )
    return record


def _checksum(tensors: Mapping[str, NDArray[np.int64]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {len(tensors[name])}\n".encode() + tensors[name].tobytes())
    return digest.hexdigest()


def collect_reported_errors(lines: Iterable[Mapping[str, Any]]) -> str:
    """Collect the image errors in the lines of `metrics.jsonl`, as one text.

    The user may have repaired the images that this text mentions, so `check_images` accepts changes
    of them.
    """
    messages = []
    for line in lines:
        messages += [*map(json.dumps, line.get("skipped_samples", ())), line.get("reason", "")]
    return "\n".join(messages)


def check_images(
    split: str,
    corpus: Corpus,
    current: ImageStates,
    recorded: ImageStates,
    path: Path,
    reported_errors: str,
    log: Callable[[str], None],
) -> None:
    """Compare the images of a split with their fingerprints at the start of the run.

    Changed modification times and repaired images are logged.

    Args:
        split: Name of the split, `train` or `eval`.
        corpus: Samples of the split.
        current: Current fingerprints.
        recorded: Fingerprints at the start of the run.
        path: File of the recorded fingerprints, for messages.
        reported_errors: Result of `collect_reported_errors`.
        log: Function that logs a message.

    Raises:
        UserError: Images have changed that the run had not reported as corrupt.
    """
    changed: list[str] = []
    num_repaired = 0
    for index in current.find_changed(recorded):
        sample = corpus[index]
        first, *others = map(str, list_sample_images(sample))
        names = json.dumps(sample.sample.id), first, *others
        if any(name in reported_errors for name in names):
            num_repaired += 1
        else:
            changed.append(
                f"{first} (or one of {len(others)} others of its sample)" if others else first
            )
    if num_repaired:
        log(f"data.{split}: corrupt images of {num_repaired} samples were replaced")
    if changed:
        named = ", ".join(changed[:MAX_LISTED_IMAGES])
        num_more = len(changed) - MAX_LISTED_IMAGES
        more = f" and {num_more} more" if num_more > 0 else ""
        raise UserError(
            f"data.{split}: the images of {len(changed)} samples have changed since the start of"
            f" the run: {named}{more}",
            where=str(path),
            expected="the images of the start of the run",
            remedy=f"restore them, or delete {path} to resume with the current images",
        )
    if touched := current.count_touched(recorded):
        log(
            f"data.{split}: the images of {touched} samples have another modification time than"
            f" at the start of the run; their sizes and their first and last"
            f" {EDGE_BYTES // 1024} KiB are equal, so they count as unchanged"
        )
