"""Samples become the files of a foreign format in a new folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from finesight.data.formats import format_named
from finesight.data.formats.format import Format, Writing
from finesight.data.headers import DamagedPicture, open_header, orientation, picture_size
from finesight.data.jsonl import Located
from finesight.data.pictures import named
from finesight.data.sample import BoxPart, ImagePart, Sample, files_of
from finesight.storage import explained, write_folder


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote. `lost` counts what the format has no place for, by what it is."""

    format: str
    samples: int
    files: tuple[Path, ...]
    pictures: int
    lost: dict[str, int]
    notes: tuple[str, ...]


def export(samples: Sequence[Located], out: Path, to: str, *, copy_pictures: bool) -> Exported:
    """Write `samples` into `out` as the format named `to`, which `finesight data import` reads.

    Pictures stay where they are and are named by their path from `out`, or are copied into
    `out`/pictures. Raises UserError, and leaves no `out`, when it exists, the format is unknown,
    a picture is missing or the format cannot hold a sample.
    """
    form = format_named(to, "--to")
    assert form.write is not None, f"no writer of {to}"
    with write_folder(out) as staging:
        places = _places(samples)
        names = named(dict.fromkeys(places.values()), staging, out, copy=copy_pictures)
        sizes: dict[Path, tuple[int, int]] = {}

        def size(path: Path) -> tuple[int, int]:
            if path not in sizes:
                sizes[path] = picture_size(path)
            return sizes[path]

        writing = Writing({path: names[place] for path, place in places.items()}, size)
        files = _write(form.write(samples, writing), staging)
        notes = (*_turned(samples, form), *writing.notes)
    return Exported(
        format=form.name,
        samples=len(samples),
        files=tuple(out / file for file in files),
        pictures=len(names),
        lost={what: count for what, count in sorted(writing.lost.items()) if count},
        notes=notes,
    )


def _places(samples: Sequence[Located]) -> dict[Path, Path]:
    """Every picture and frame by what the samples call it: where it lies, once resolved."""
    places: dict[Path, Path] = {}
    for located in samples:
        for name in (name for part in located.sample.parts() for name in files_of(part)):
            path = located.path(name)
            if path in places:
                continue
            if not path.is_file():
                raise DamagedPicture(
                    "no such picture",
                    where=f"the sample {located.sample.id!r}, {path}",
                    expected="an existing file",
                    remedy="`finesight data check` lists all of them",
                )
            # The folder resolved, as `..` steps out of where a link leads to.
            places[path] = path.parent.resolve() / path.name
    return places


def _write(pieces: Iterator[tuple[str, bytes]], staging: Path) -> list[str]:
    """The files that came, in order. Pieces of one file come in a row, or it is opened again."""
    current, stream = "", None
    names: dict[str, None] = {}
    with explained(staging):
        try:
            for name, content in pieces:
                assert ".." not in Path(name).parts, f"{name} is outside of the output folder"
                if name != current or stream is None:
                    stream = _turn_to(stream, staging / name)
                    current = name
                stream.write(content)
                names[name] = None
        finally:
            if stream is not None:
                stream.close()
    return list(names)


def _turn_to(stream: BinaryIO | None, path: Path) -> BinaryIO:
    if stream is not None:
        stream.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def _turned(samples: Sequence[Located], form: Format) -> Iterator[str]:
    """A note where boxes lie in pictures that other programs show unturned."""
    if form.name == "samples":
        return
    boxed = {path for located in samples for path in _boxed(located)}
    turned = sum(map(_is_turned, boxed))
    if turned:
        yield (
            f"{turned} pictures with boxes carry an EXIF turn. Boxes are written as they lie after"
            " it; programs that do not turn pictures (ms-swift, LLaMA-Factory) misplace them: save"
            " these pictures turned first"
        )


def _is_turned(path: Path) -> bool:
    picture_size(path)  # refuses a picture whose EXIF data cannot be read
    with open_header(path) as image:
        return orientation(image) != 1


def _boxed(located: Located) -> Iterator[Path]:
    """The pictures of a sample that it has boxes in."""
    sample: Sample = located.sample
    pictures = [part.image for part in sample.parts() if isinstance(part, ImagePart)]
    for part in sample.parts():
        if isinstance(part, BoxPart):
            yield located.path(pictures[part.image])
