"""Write a fixed copy of checked data files, without invalid samples (`check --fix`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from finesight.errors import UserError, escape_surrogates
from finesight.files.path_patterns import GLOB_CHARACTERS, is_glob
from finesight.files.storage import write_file
from finesight.ingest.check.check_issues import (
    CHANGES_FILE,
    LOG_FILES,
    SKIPPED_SAMPLES_FILE,
    CheckIssue,
    FixAction,
    SampleLocation,
    format_location,
)
from finesight.ingest.check.check_result import FixResult
from finesight.ingest.check.image_catalog import ImageCatalog
from finesight.ingest.check.sample_issues import (
    correct_order,
    iter_media_paths,
    remove_placeholders,
)
from finesight.ingest.image_resolver import ImageNames
from finesight.ingest.import_source import UnvalidatedSource
from finesight.samples.boxes import clip_box
from finesight.samples.image_file import get_file
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    Sample,
    sample_to_dict,
    write_samples,
)

_SampleKey = tuple[str, int, int]
"""Data file, row index and index within the row, which identify a sample."""


class DatasetFixer:
    """Keep, fix or skip each sample based on its issues, and write the result.

    Samples with an error that has no unambiguous fix are skipped. Duplicates and training samples
    with leaked validation images are skipped as well. Other notes cause a change only if they have
    a fix, and warnings cause none.
    """

    def __init__(self) -> None:
        self._skipped: dict[_SampleKey, dict[str, str]] = {}
        self._fixes: dict[_SampleKey, set[FixAction]] = {}
        self._changes: list[dict[str, Any]] = []
        self._convention_issues: list[CheckIssue] = []

    def add_issue(self, location: SampleLocation, issue: CheckIssue) -> None:
        """Record an issue of a sample, which may lead to a fix or skip."""
        key = (location.source, location.row_index, location.sample_index)
        if issue.fix == "skipped" or (issue.severity == "error" and issue.fix is None):
            entry = {"location": issue.where, "sample_id": issue.sample_id}
            self._skipped.setdefault(key, {**entry, "code": issue.code, "what": issue.what})
        elif issue.fix is not None:
            self._fixes.setdefault(key, set()).add(issue.fix)

    def add_source_issue(self, issue: CheckIssue) -> None:
        """Record an issue of a full data file; `write` fails for an error."""
        if issue.severity == "error":
            self._convention_issues.append(issue)

    @property
    def can_write(self) -> bool:
        """True if the box conventions of all data files are correct, as `write` requires."""
        return not self._convention_issues

    def write(
        self, staging: Path, out: Path, catalog: ImageCatalog, sources: Sequence[UnvalidatedSource]
    ) -> FixResult:
        """Read the data files again and write the samples that are kept, with fixes applied.

        Args:
            catalog: Images of the check, which provide the sizes for clipping boxes.

        Raises:
            UserError: The box convention of a file differs from the declared one, or a file has no
                valid sample.
        """
        for issue in self._convention_issues:
            raise UserError(
                f"{issue.what}; no files were written",
                where=issue.where,
                expected="a correct box convention before individual boxes are fixed",
                remedy=issue.remedy,
            )
        files = []
        used_images: set[Path] = set()
        image_names = ImageNames(staging, out, copy=False)
        for source, name in zip(sources, _assign_file_names(sources), strict=True):
            samples = []
            for sample in self._iter_fixed_samples(source, catalog):
                paths = list(iter_media_paths(sample))
                copies = (staging / image_names.name(path) for path in paths)
                used_images.update(map(get_file, chain(map(Path, paths), copies)))
                samples.append(sample.map_paths(image_names.name))
                image_names.copy(paths)
            if not samples:
                raise UserError(
                    f"none of {len(source)} rows is valid; no files were written",
                    where=str(source.source.path),
                    expected="at least one sample without errors that is not a duplicate",
                    remedy="fix the reported issues in the source, or remove the source",
                )
            write_samples(staging / name, samples)
            files.append((out / name, len(samples)))
        _remove_unused_images(staging, used_images)
        skipped = list(self._skipped.values())
        write_file(staging / SKIPPED_SAMPLES_FILE, _encode_jsonl(skipped))
        write_file(staging / CHANGES_FILE, _encode_jsonl(self._changes))
        return FixResult(tuple(files), len(self._changes), len(skipped))

    def _iter_fixed_samples(
        self, source: UnvalidatedSource, catalog: ImageCatalog
    ) -> Iterator[Sample]:
        """Yield the samples of a data file that are kept, with fixes applied."""
        source_name = str(source.source.path)
        for row_index, row in enumerate(source):
            for sample_index, sample in enumerate(row.samples):
                key = (source_name, row_index, sample_index)
                if key in self._skipped:
                    continue
                fixes = self._fixes.get(key, set())
                fixed_sample = _fix_sample(sample, fixes, catalog)
                if fixed_sample != sample:
                    where = format_location(source_name, row.location)
                    self._changes.append(_describe_change(where, sample, fixed_sample, fixes))
                yield fixed_sample


def _fix_sample(sample: Sample, fixes: set[FixAction], catalog: ImageCatalog) -> Sample:
    if "placeholders removed" in fixes:
        sample = remove_placeholders(sample)
    if not fixes & {"clipped", "reordered"}:
        return sample
    image_paths = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]

    def fix_part(part: ContentPart) -> ContentPart:
        if not isinstance(part, BoxPart):
            return part
        size = catalog[image_paths[part.image]].size
        box = clip_box(part.xyxy, size, is_point=part.is_point) or correct_order(part.xyxy, size)
        return part if box is None else part.model_copy(update={"xyxy": box})

    return sample.with_parts(fix_part)


def _describe_change(
    where: str, before: Sample, after: Sample, fixes: set[FixAction]
) -> dict[str, Any]:
    """Describe a changed sample as JSON data: messages, then the rejected answer if it has one."""
    contents = [
        [*(message["content"] for message in one["messages"]), one.get("rejected")]
        for one in map(sample_to_dict, (before, after))
    ]
    messages = [
        {"message": index, "before": one, "after": other}
        for index, (one, other) in enumerate(zip(*contents, strict=True))
        if one != other
    ]
    return {"location": where, "sample_id": before.id, "fixes": sorted(fixes), "messages": messages}


def _assign_file_names(sources: Sequence[UnvalidatedSource]) -> list[str]:
    """Return a unique output file name per data file, numbered if necessary."""
    names: list[str] = []
    for source in sources:
        stem = _source_stem(source.source.path)
        candidates = chain([f"{stem}.jsonl"], (f"{stem}-{n}.jsonl" for n in count(2)))
        names.append(next(name for name in candidates if name not in (*names, *LOG_FILES)))
    return names


def _source_stem(source: Path) -> str:
    """Return the stem of the output file for a data file.

    For a glob pattern, this is the literal part of its stem or, without one, the name of its
    folder.
    """
    if not is_glob(source):
        return source.resolve().stem
    cleaned = "".join(char for char in source.stem if char not in GLOB_CHARACTERS).strip("-_.")
    return cleaned or source.absolute().parent.name or "samples"


def _remove_unused_images(staging: Path, used_images: set[Path]) -> None:
    """Delete saved images that no written sample references."""
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path.suffix != ".jsonl" and path not in used_images:
            path.unlink()


def _encode_jsonl(records: Sequence[dict[str, Any]]) -> bytes:
    lines = (f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
    return "".join(map(escape_surrogates, lines)).encode()
