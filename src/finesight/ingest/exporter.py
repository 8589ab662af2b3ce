"""Export samples to another dataset format in a new folder.

The folder is created only if the export succeeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path

from finesight.files.storage import translate_os_errors, write_folder
from finesight.ingest.formats import get_writable_format
from finesight.ingest.formats.dataset_format import DatasetFormat, ExportContext
from finesight.ingest.image_resolver import IMAGES_FOLDER, ImageNames
from finesight.samples.image_file import (
    CorruptImageError,
    get_file,
    is_page,
    open_image_header,
    read_exif_orientation,
    read_image_size,
    save_page,
    split_page,
)
from finesight.samples.sample import BoxPart, ImagePart, LocatedSample, list_media_paths


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """Result of an export.

    Attributes:
        lost_counts: Counts of sample content that the format cannot represent, by description.
    """

    format: str
    num_samples: int
    files: tuple[Path, ...]
    num_images: int
    lost_counts: dict[str, int]
    notes: tuple[str, ...]


def export_dataset(
    samples: Sequence[LocatedSample], out: Path, format_name: str, *, copy_images: bool
) -> ExportSummary:
    """Export samples to a folder in a format that an import can read.

    Images are referenced by their path relative to `out`, or copied to the folder `out`/images.
    Only samples refer to pages of documents. Other formats have them as PNG, in OUT/images.
    """
    data_format = get_writable_format(format_name, "--to")
    assert data_format.write_files is not None, f"{format_name} is not writable"
    with write_folder(out) as staging:
        resolved_paths = _resolve_image_paths(samples)
        if not data_format.keeps_pages:
            resolved_paths |= _render_pages(resolved_paths, staging / IMAGES_FOLDER)
        image_paths = dict.fromkeys(resolved_paths.values())
        taken = {path.name for path in image_paths if path.is_relative_to(staging)}
        output_names = ImageNames(staging, out, taken, copy=copy_images)
        image_names = {path: output_names.name(str(path)) for path in image_paths}
        output_names.copy(map(str, image_paths))
        names = {path: image_names[resolved] for path, resolved in resolved_paths.items()}
        writing = ExportContext(names, cache(read_image_size))
        files = _write_files(data_format.write_files(samples, writing), staging)
        notes = (*_note_exif_orientations(samples, data_format), *writing.notes)
    lost_counts: dict[str, int] = {}
    for what, count in sorted(writing.lost_counts.items()):
        if count:
            lost_counts[what] = count
    return ExportSummary(
        format=data_format.name,
        num_samples=len(samples),
        files=tuple(map(out.joinpath, files)),
        num_images=len(image_names),
        lost_counts=lost_counts,
        notes=notes,
    )


def _resolve_image_paths(samples: Sequence[LocatedSample]) -> dict[Path, Path]:
    """Map each image and video frame path to its path without symbolic links."""
    resolved_paths: dict[Path, Path] = {}
    for located_sample in samples:
        parts = located_sample.sample.iter_parts()
        for name in itertools.chain.from_iterable(map(list_media_paths, parts)):
            path = located_sample.resolve_path(name)
            if path in resolved_paths:
                continue
            if not get_file(path).is_file():
                raise CorruptImageError(
                    "no such image",
                    where=f"the sample {located_sample.sample.id!r}, {path}",
                    expected="an existing file",
                    remedy="check the samples for a list of all of them",
                )
            # Resolve the folder first: `..` is relative to the target of a link.
            resolved_paths[path] = path.parent.resolve() / path.name
    return resolved_paths


def _render_pages(resolved_paths: Mapping[Path, Path], folder: Path) -> dict[Path, Path]:
    """Save the pages of documents as PNG, and return their new paths by image path."""
    pages = dict.fromkeys(resolved_paths.values())
    targets: dict[Path, Path] = {}
    for number, page in enumerate(pages, 1):
        if is_page(page):
            document, _ = split_page(page.name)
            targets[page] = folder / f"{Path(document).stem}-{number}.png"
    if targets:
        folder.mkdir()
    for page, target in targets.items():
        save_page(page, target)
    return {path: targets[page] for path, page in resolved_paths.items() if page in targets}


def _write_files(chunks: Iterator[tuple[str, bytes]], staging: Path) -> list[str]:
    """Write chunks of (file name, content) and return the file names in order."""
    names: dict[str, None] = {}
    with translate_os_errors(staging):
        for name, group in itertools.groupby(chunks, key=itemgetter(0)):
            assert ".." not in Path(name).parts, f"{name} is outside the output folder"
            names[name] = None
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.writelines(map(itemgetter(1), group))
    return list(names)


def _note_exif_orientations(
    samples: Sequence[LocatedSample], data_format: DatasetFormat
) -> Iterator[str]:
    """Yield a note if samples have boxes in images with an EXIF orientation.

    Programs that ignore the orientation show these boxes at the wrong position.
    """
    if data_format.is_native:
        return
    paths: set[Path] = set()
    for located_sample in samples:
        parts = list(located_sample.sample.iter_parts())
        images = [part.image for part in parts if isinstance(part, ImagePart)]
        boxed = {images[part.image] for part in parts if isinstance(part, BoxPart)}
        paths.update(map(located_sample.resolve_path, boxed))
    num_rotated = 0
    for path in paths:
        read_image_size(path)  # rejects an image with invalid EXIF data
        with open_image_header(path) as image:
            num_rotated += read_exif_orientation(image) != 1
    if num_rotated:
        yield (
            f"{num_rotated} images with boxes have an EXIF orientation. Boxes are written in"
            " coordinates after rotation; programs that ignore it (ms-swift, LLaMA-Factory)"
            " misplace them: rotate the stored images first"
        )
