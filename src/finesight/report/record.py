"""A run folder as it is found: whole, still growing, interrupted, or written by an older version.

Nothing here is taken for granted but the manifest: what is missing is None or empty, and what
cannot be read is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from finesight import bounded_files
from finesight import run_folder as names
from finesight.bounded_files import LARGEST_LINE, parse_json, read_text
from finesight.digests import DIGESTS
from finesight.errors import UserError
from finesight.manifest import MANIFEST
from finesight.yaml_text import parsed

Line = dict[str, Any]
"""A JSON object: of one step, of one measurement, of one answer."""

KINDS: dict[str, type] = {
    **dict.fromkeys(["step", "steps", "samples", "tokens", "supervised", "skipped"], float),
    **dict.fromkeys(["epoch", "loss", "held_out_loss", "grad_norm", "memory_gb"], float),
    **dict.fromkeys(["seconds", "prepared_s", "seen_s", "samples_per_s", "utilisation"], float),
    **dict.fromkeys(["waited_s", "pack_tokens"], float),
    **dict.fromkeys(["tensors", "numbers", "changed", "reached", "relative"], float),
    **dict.fromkeys(["lr", "scores", "intervals", "details", "versions", "data", "spread"], dict),
    **dict.fromkeys(["before", "after", "notes"], dict),
    **dict.fromkeys(["dropped", "differences", "void", "jumped"], list),
    "weights_of": float,
    "recompute": float,
    **dict.fromkeys(["headline", "started", "ended", "how", "why"], str),
}
"""What the values of keys are, float for any number: those that are something else are taken for
missing."""

MOST = 1e15
"""A greater number is none that a run counts or measures."""


@dataclass(frozen=True)
class Record:
    """What a run folder says.

    `steps`, `measured`, `starts` and `looks` are the lines of `metrics.jsonl` that speak of a step,
    of a measurement, of a process that began or went on, and of looking at all pictures before its
    steps. `weights` are digests by file, `identity` the fingerprints that the newest checkpoint
    keeps. `end` is what the process that wrote last said when it ended before the run did, if it
    could. `unreadable` names files that are damaged.
    """

    folder: Path
    recipe: Line
    recipe_text: str
    manifest: Line
    steps: list[Line]
    measured: list[Line]
    starts: list[Line]
    looks: list[Line]
    dropped: list[Line]
    moved: list[Line] | None
    result: Line | None
    weights: dict[str, str]
    identity: Line
    end: Line | None = None
    unreadable: list[str] = field(default_factory=list)

    @property
    def answers(self) -> list[Path]:
        """Files of answers, in the order in which they were made: of the first measurement, then
        of those on the way, then of the last."""
        folder = self.folder / names.PREDICTIONS
        paths = {path.stem: path for path in folder.glob("*.jsonl") if path.is_file()}
        numbers = {name: name.removeprefix("step-") for name in paths}
        between = sorted((int(n), name) for name, n in numbers.items() if n.isdecimal())
        order = ["before", *(name for _, name in between), "after"]
        return [paths[name] for name in order if name in paths]


def read_record(folder: Path, where: str = "finesight report") -> Record:
    """The run in `folder`. Raises UserError when there is none, said to be of `where`."""
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} is not the folder of a run",
            where=where,
            expected=f"a folder with {MANIFEST}, as `finesight train` writes it",
            remedy="give the run's output folder",
        )
    reader = _Reader(folder)
    lines = [_sound(line) for line in reader.lines(names.METRICS)]
    lines = [line for line in lines if line.get("step") is not None]
    borders = [line for line in lines if line.get("started") or line.get("ended")]
    reader.note_misplaced(names.PREDICTIONS)
    moved = reader.json(names.MOVED)
    text = reader.text(names.RECIPE) or ""
    return Record(
        folder=folder,
        recipe=reader.yaml(text),
        recipe_text=text,
        manifest=_object(reader.json(MANIFEST)),
        steps=[line for line in lines if "loss" in line and line.get("seconds") is not None],
        measured=[line for line in lines if "held_out_loss" in line],
        starts=[line for line in lines if line.get("started")],
        looks=[line for line in lines if "seen_s" in line],
        dropped=list(reader.lines(names.DROPPED)),
        moved=[_sound(_object(row)) for row in moved] if isinstance(moved, list) else None,
        result=_result(_object(reader.json(names.RESULT))) or None,
        weights=reader.weights(),
        identity=reader.identity(),
        end=borders[-1] if borders and borders[-1].get("ended") else None,
        unreadable=reader.unreadable,
    )


def read_lines(path: Path, damaged: list[int] | None = None) -> Iterator[Line]:
    """Objects of a JSON Lines file. Lines that are none are left out and, but for a last one that
    is torn, as that of a run that goes on or crashed may be, their numbers added to `damaged`."""
    for number, line in enumerate(bounded_files.read_lines(path, expected="JSON Lines"), 1):
        try:
            content = parse_json(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            yield content
        elif damaged is not None and (line.endswith(b"\n") or len(line) == LARGEST_LINE):
            damaged.append(number)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return True for a finite number that a float can hold."""
    if not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # whole numbers may have thousands of digits
        return False


def _object(content: object) -> Line:
    return content if isinstance(content, dict) else {}


def _result(content: Line) -> Line:
    result = _sound(content)
    for name in ("before", "after"):
        if result.get(name) is not None:
            result[name] = _sound(result[name])
    return result


def _sound(line: Line) -> Line:
    """The line without values of another kind than their keys say."""
    return {
        key: value if key not in KINDS or _is(value, KINDS[key]) else None
        for key, value in line.items()
    }


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and abs(value) < MOST
    return isinstance(value, kind)


class _Reader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.unreadable: list[str] = []

    def text(self, name: str) -> str | None:
        path = self._folder / name
        if not path.exists():
            return None
        try:
            return read_text(path, expected="a file of a run")
        except UserError:
            self.unreadable.append(name)
            return None

    def json(self, name: str) -> object:
        text = self.text(name)
        if text is None:
            return None
        try:
            return parse_json(text)
        except ValueError:
            self.unreadable.append(name)
            return None

    def yaml(self, text: str) -> Line:
        try:
            return _object(parsed(text))
        except yaml.YAMLError:
            self.unreadable.append(names.RECIPE)
            return {}

    def lines(self, name: str) -> Iterator[Line]:
        path = self._folder / name
        if not path.exists():
            return
        damaged: list[int] = []
        try:
            yield from read_lines(path, damaged)
        except UserError:
            self.unreadable.append(name)
        if damaged:
            lines = "line" if len(damaged) == 1 else f"{len(damaged):,} lines from line"
            self.unreadable.append(f"{lines} {damaged[0]:,} of {name}")

    def note_misplaced(self, name: str) -> None:
        """Report JSON Lines files of a folder that are not regular files."""
        found = sorted((self._folder / name).glob("*.jsonl"))
        self.unreadable += [f"{name}/{path.name}" for path in found if not path.is_file()]

    def weights(self) -> dict[str, str]:
        """SHA-256 of the trained weights, by their path in the run's folder."""
        found: dict[str, str] = {}
        for part in (names.ADAPTER, names.MODEL):
            digests = _object(self.json(f"{part}/{DIGESTS}"))
            found |= {
                f"{part}/{name}": str(value)
                for name, value in digests.items()
                if name.endswith(".safetensors")
            }
        return found

    def identity(self) -> Line:
        """What the newest checkpoint says of data and base."""
        checkpoints = self._folder / names.CHECKPOINTS
        numbers = [path.name.removeprefix("step-") for path in checkpoints.glob("step-*")]
        steps = sorted(int(number) for number in numbers if number.isdecimal())
        if not steps:
            return {}
        state = _object(self.json(f"{names.CHECKPOINTS}/step-{steps[-1]}/state.json"))
        return _object(state.get("identity"))
