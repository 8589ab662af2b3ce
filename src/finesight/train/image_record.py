"""Fingerprints of the images that a run learns from, compared when the run is resumed.

A fingerprint covers the size of each image file and its first and last `BLOCK` bytes, which cost
little beside the header that is read anyway. Modification times are recorded too, but decide
nothing: copying a data set changes them.
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

from finesight.data.headers import DamagedPicture
from finesight.data.inside import container, content
from finesight.data.jsonl import Located
from finesight.data.sample import files_of
from finesight.data.sources import Corpus
from finesight.errors import UserError
from finesight.storage import write_file

BLOCK = 8 * 1024
"""Bytes at the start and at the end of an image file that are read."""

NAMED = 5
"""Changed images that a message names."""

_TENSORS = ("samples", "contents", "times")
_CHECKSUM = "sha256"


class ImageState(NamedTuple):
    """Fingerprints of all images of a sample: of what the files hold, and of when they were
    modified."""

    content: int
    time: int


def image_state(located: Located) -> ImageState:
    """Read the fingerprints of a sample's images. Raises DamagedPicture for an unreadable one."""
    contents, times = (hashlib.blake2b(digest_size=8) for _ in range(2))
    # The fingerprint of the data covers the images in rows of a Parquet file.
    folder = located.folder
    covered = folder.suffix.lower() == ".parquet" and folder.is_file()
    for path in () if covered else image_paths(located):
        try:
            size, ends, time = _ends(path)
        except OSError as error:
            raise DamagedPicture(
                f"cannot be read: {error.strerror or error}",
                where=str(path),
                expected="an image that stays where it is",
                remedy="put the image back, or correct its permissions",
            ) from error
        contents.update(size.to_bytes(8) + ends)
        times.update(time.to_bytes(8, signed=True))
    return ImageState(*(int.from_bytes(h.digest(), signed=True) for h in (contents, times)))


def image_paths(located: Located) -> list[Path]:
    """List the images and video frames of a sample in order."""
    return [located.path(name) for part in located.sample.parts() for name in files_of(part)]


def _ends(path: Path) -> tuple[int, bytes, int]:
    """Read the size, the first and last bytes, and the modification time of an image file."""
    inside = content(path)
    if not isinstance(inside, Path):
        found = inside.getvalue()
        archive = Path(container(str(path))[0])
        return len(found), found[:BLOCK] + found[BLOCK:][-BLOCK:], archive.stat().st_mtime_ns
    file = os.open(inside, os.O_RDONLY)
    try:
        state = os.fstat(file)
        ends = os.pread(file, BLOCK, 0)
        if state.st_size > BLOCK:
            ends += os.pread(file, BLOCK, max(BLOCK, state.st_size - BLOCK))
    finally:
        os.close(file)
    return state.st_size, ends, state.st_mtime_ns


@dataclass(frozen=True, slots=True, eq=False)
class ImageStates:
    """Fingerprints of the images of some samples of a corpus, in the order of their indices."""

    samples_N: NDArray[np.int64]
    contents_N: NDArray[np.int64]
    times_N: NDArray[np.int64]

    @classmethod
    def of(cls, samples: Sequence[int], states: Iterable[ImageState]) -> ImageStates:
        """Collect the fingerprints of the samples with these indices."""
        contents, times = zip(*states, strict=True) if samples else ((), ())
        return cls(*(np.array(column, dtype=np.int64) for column in (samples, contents, times)))

    @classmethod
    def none(cls) -> ImageStates:
        """Return the fingerprints of no samples."""
        return cls.of((), ())

    @property
    def digest(self) -> str:
        """A SHA-256 over the contents of all images, without modification times."""
        whole = hashlib.sha256(self.samples_N.tobytes())
        whole.update(self.contents_N.tobytes())
        return whole.hexdigest()

    def changed_since(self, recorded: ImageStates) -> list[int]:
        """List the samples of both whose images have another content now."""
        at, recorded_at = self._common(recorded)
        other_N = self.contents_N[at] != recorded.contents_N[recorded_at]
        samples: list[int] = self.samples_N[at][other_N].tolist()
        return samples

    def touched_since(self, recorded: ImageStates) -> int:
        """Count the samples of both whose images have other modification times now."""
        at, recorded_at = self._common(recorded)
        return int(np.count_nonzero(self.times_N[at] != recorded.times_N[recorded_at]))

    def _common(self, other: ImageStates) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        _, own, others = np.intersect1d(
            self.samples_N, other.samples_N, assume_unique=True, return_indices=True
        )
        return own, others


def save_image_record(path: Path, record: Mapping[str, ImageStates]) -> None:
    """Write the fingerprints of each split, atomically."""
    tensors = {
        f"{split}.{name}": column
        for split, states in record.items()
        for name, column in zip(_TENSORS, _columns(states), strict=True)
    }
    write_file(path, save(tensors, {_CHECKSUM: _checksum(tensors)}))


def load_image_record(path: Path) -> dict[str, ImageStates]:
    """Read what `save_image_record` wrote. Raises UserError for a damaged file."""
    try:
        with _opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            checksum = (file.metadata() or {}).get(_CHECKSUM)
        splits = sorted({name.rpartition(".")[0] for name in tensors})
        record = {
            split: ImageStates(*(tensors[f"{split}.{name}"] for name in _TENSORS))
            for split in splits
        }
        problem = "" if checksum == _checksum(tensors) else "the checksum does not match"
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"the fingerprints of the images cannot be read: {problem}",
            where=str(path),
            expected="the file that the run wrote when it began",
            remedy=f"delete {path} to resume without comparing images",
        )
    return record


def _opened(path: Path) -> Any:
    # Its methods are untyped.
    return safe_open(path, framework="numpy")


def _columns(states: ImageStates) -> tuple[NDArray[np.int64], ...]:
    return states.samples_N, states.contents_N, states.times_N


def _checksum(tensors: Mapping[str, NDArray[np.int64]]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name} {len(tensors[name])}\n".encode() + tensors[name].tobytes())
    return whole.hexdigest()


def reported_damage(lines: Iterable[Mapping[str, Any]]) -> str:
    """Collect what the lines of `metrics.jsonl` say of damaged images: they may be repaired."""
    said = []
    for line in lines:
        said += [*map(json.dumps, line.get("dropped", ())), line.get("why", "")]
    return "\n".join(said)


def check_images(
    split: str,
    corpus: Corpus,
    found: ImageStates,
    recorded: ImageStates,
    path: Path,
    damage: str,
    say: Callable[[str], None],
) -> None:
    """Compare the images of a split with those that the run began with, recorded in `path`.

    Raises UserError naming images of another size or content, unless the run has reported their
    damage. Other modification times alone come from copying the data set, and are told by `say`.
    """
    changed: list[int] = []
    repaired: list[int] = []
    for sample in found.changed_since(recorded):
        (repaired if _is_damaged(corpus[sample], damage) else changed).append(sample)
    if repaired:
        say(f"data.{split}: damaged images of {len(repaired)} samples have been replaced")
    if changed:
        named = ", ".join(_named(corpus[sample]) for sample in changed[:NAMED])
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        raise UserError(
            f"data.{split}: the images of {len(changed)} samples have changed since the run began:"
            f" {named}{more}",
            where=str(path),
            expected="the images that the run began with",
            remedy=f"restore them, or delete {path} to resume with the images as they are now",
        )
    if touched := found.touched_since(recorded):
        say(
            f"data.{split}: the images of {touched} samples have another modification time than"
            f" when the run began; their sizes and their first and last {BLOCK // 1024} KiB are the"
            " same, so they count as unchanged"
        )


def _is_damaged(located: Located, damage: str) -> bool:
    names = [json.dumps(located.sample.id), *map(str, image_paths(located))]
    return any(name in damage for name in names)


def _named(located: Located) -> str:
    first, *others = image_paths(located)
    return f"{first} (or one of {len(others)} others of its sample)" if others else str(first)
