"""`--fix`: a new folder with the samples that are sound, or can be mended for certain."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from finesight.check.box_faults import clipped, in_order
from finesight.check.findings import Finding, Fix, Place, where_of
from finesight.check.pictures import Album
from finesight.check.samples import paths_of
from finesight.check.texts import without_marks
from finesight.data.jsonl import as_record, write_samples
from finesight.data.opening import Drafts
from finesight.data.pictures import ImageNames
from finesight.data.sample import BoxPart, ImagePart, Part, Sample
from finesight.data.shards import PATTERN, is_pattern
from finesight.errors import UserError, escaped_json
from finesight.storage import write_file

LISTS = LEFT_OUT, CHANGES = "left_out.jsonl", "changes.jsonl"

_Key = tuple[str, int, int]
"""A source, a row of it, and a sample of that row."""


@dataclass(frozen=True, slots=True)
class Mended:
    """What `--fix` wrote: files with their numbers of samples, and how many samples were changed
    and left out."""

    files: tuple[tuple[Path, int], ...]
    changed: int
    left_out: int

    def as_lines(self) -> list[str]:
        """For people."""
        files = [f"{path}: {samples} samples" for path, samples in self.files]
        folder = self.files[0][0].parent
        done = f"{self.changed} samples changed, {self.left_out} left out"
        return [*files, f"{done}: {folder / CHANGES}, {folder / LEFT_OUT}"]

    def as_json(self) -> dict[str, Any]:
        """As JSON data."""
        files = [{"file": str(path), "samples": samples} for path, samples in self.files]
        return {"files": files, "changed": self.changed, "left_out": self.left_out}


class Mending:
    """Decides, finding by finding, what becomes of each sample, and writes it in the end.

    A sample with an error that cannot be mended for certain is left out: training and measuring
    would not take it, or should not. Warnings and notes change nothing, except that the second of
    two equal samples goes.
    """

    def __init__(self) -> None:
        self._left_out: dict[_Key, dict[str, str]] = {}
        self._mends: dict[_Key, set[Fix]] = {}
        self._changes: list[dict[str, Any]] = []
        self._wrong_convention: list[Finding] = []

    def note(self, place: Place, finding: Finding) -> None:
        """Take a finding about a sample into account."""
        key = (place.source, place.row, place.number)
        if finding.fix == "dropped" or (finding.severity == "error" and finding.fix is None):
            said = {"where": finding.where, "sample": finding.sample}
            self._left_out.setdefault(key, {**said, "code": finding.code, "what": finding.what})
        elif finding.fix is not None:
            self._mends.setdefault(key, set()).add(finding.fix)

    def note_source(self, finding: Finding) -> None:
        """Take a finding about a whole source into account."""
        if finding.severity == "error":
            self._wrong_convention.append(finding)

    def write(self, staging: Path, out: Path, album: Album, drafts: Sequence[Drafts]) -> Mended:
        """Read the sources once more and write, into `staging` which is to become `out`, a file of
        samples for each, left_out.jsonl and changes.jsonl.

        Raises UserError when a source's boxes mean something else than they are read as, as good
        samples would be left out, and when nothing is left of a source.
        """
        for finding in self._wrong_convention:
            raise UserError(
                f"{finding.what}; nothing was written",
                where=finding.where,
                expected="boxes that are read as they are meant, before single ones are mended",
                remedy=finding.remedy,
            )
        files = []
        used: set[Path] = set()
        names = ImageNames(staging, out, copy=False)
        for draft, name in zip(drafts, _file_names(drafts), strict=True):
            samples = []
            for sample in self._kept(draft, album):
                paths = list(paths_of(sample))
                used.update(map(Path, paths), (staging / names.name(path) for path in paths))
                samples.append(sample.with_files(names.name))
                names.copy(paths)
            if not samples:
                raise UserError(
                    f"none of {len(draft)} rows is left; nothing was written",
                    where=str(draft.source.path),
                    expected="some samples that have no errors and are not said elsewhere",
                    remedy="see what was found, and mend the source itself or leave it out",
                )
            write_samples(staging / name, samples)
            files.append((out / name, len(samples)))
        _remove_unused(staging, used)
        left_out = list(self._left_out.values())
        write_file(staging / LEFT_OUT, _lines(left_out))
        write_file(staging / CHANGES, _lines(self._changes))
        return Mended(tuple(files), len(self._changes), len(left_out))

    def _kept(self, draft: Drafts, album: Album) -> Iterator[Sample]:
        """The samples that stay, mended."""
        source = str(draft.source.path)
        for row, drafted in enumerate(draft):
            for number, sample in enumerate(drafted.samples):
                key = (source, row, number)
                if key in self._left_out:
                    continue
                fixes = self._mends.get(key, set())
                mended = _mended(sample, fixes, album)
                if mended != sample:
                    self._changes.append(
                        _change(where_of(source, drafted.place), sample, mended, fixes)
                    )
                yield mended


def _mended(sample: Sample, fixes: set[Fix], album: Album) -> Sample:
    if "marks taken out" in fixes:
        sample = without_marks(sample)
    if not fixes & {"clipped", "put in order"}:
        return sample
    pictures = [part.image for part in sample.parts() if isinstance(part, ImagePart)]

    def mended(part: Part) -> Part:
        if not isinstance(part, BoxPart):
            return part
        size = album[pictures[part.image]].size
        x1, y1, x2, y2 = part.xyxy
        box = in_order(part.xyxy, size) if x2 < x1 or y2 < y1 else clipped(part.xyxy, size)
        return part if box is None else part.model_copy(update={"xyxy": box})

    messages = tuple(
        message.model_copy(update={"content": tuple(map(mended, message.content))})
        for message in sample.messages
    )
    return sample.model_copy(update={"messages": messages})


def _change(where: str, before: Sample, after: Sample, fixes: set[Fix]) -> dict[str, Any]:
    """What was changed, message by message."""
    pairs = zip(as_record(before)["messages"], as_record(after)["messages"], strict=True)
    return {
        "where": where,
        "sample": before.id,
        "fixes": sorted(fixes),
        "messages": [
            {"message": number, "before": old["content"], "after": new["content"]}
            for number, (old, new) in enumerate(pairs)
            if old != new
        ],
    }


def _file_names(drafts: Sequence[Drafts]) -> list[str]:
    """A name for each source's file, its own where it is free."""
    names: list[str] = []
    for draft in drafts:
        stem = _stem(draft.source.path)
        spellings = chain([f"{stem}.jsonl"], (f"{stem}-{n}.jsonl" for n in count(2)))
        names.append(next(name for name in spellings if name not in (*names, *LISTS)))
    return names


def _stem(source: Path) -> str:
    """The source's own; of a pattern what is no sign of one, or else its folder's name."""
    if not is_pattern(source):
        return source.resolve().stem
    plain = "".join(sign for sign in source.stem if sign not in PATTERN).strip("-_.")
    return plain or source.absolute().parent.name or "samples"


def _remove_unused(staging: Path, used: set[Path]) -> None:
    """Delete pictures that were saved out of tables for samples that are left out."""
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path.suffix != ".jsonl" and path not in used:
            path.unlink()


def _lines(records: Sequence[dict[str, Any]]) -> bytes:
    lines = (f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
    return "".join(map(escaped_json, lines)).encode()
