"""The run folder: what is in it, and who may write there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from finesight.bounded_files import parse_json, read_bytes, read_lines
from finesight.child_processes import FileLock
from finesight.config import MOST, Recipe
from finesight.errors import UserError
from finesight.evaluate import own
from finesight.manifest import MANIFEST, Manifest
from finesight.recipe import dump_recipe
from finesight.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    DROPPED,
    IMAGES,
    METRICS,
    MODEL,
    PREDICTIONS,
    RECIPE,
    REPORT,
    RESULT,
)
from finesight.storage import (
    append_line,
    cut_file,
    explained,
    flush_file,
    make_folder,
    sweep,
    write_file,
)

_LINE_EXPECTED = "a line of metrics as `finesight train` wrote it"
_LINE_REMEDY = "restore the file from a copy, or cut it off before the damaged line"


class Run:
    """A run folder. Paths are those that `finesight predict` and `eval` look for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / CHECKPOINTS
        self.predictions = folder / PREDICTIONS
        self.adapter = folder / ADAPTER
        self.model = folder / MODEL
        self.metrics = folder / METRICS
        self.report = folder / REPORT
        self.images = folder / IMAGES

    @property
    def begun(self) -> bool:
        """Whether a run has begun here."""
        return (self.folder / MANIFEST).exists()

    def check_free(self, resume: bool) -> None:
        """Raises UserError when something else than this run, resumed, lives in the folder."""
        with explained(self.folder):
            begun = self.begun
        if begun and not resume:
            raise UserError(
                f"{self.folder.name} holds another run",
                where=str(self.folder),
                expected="a new folder, or a run that is resumed",
                remedy=f"add --resume (from Python resume=True) to go on with it, or choose another"
                f" one: output={self.folder}-2",
            )
        if self.folder.is_symlink() and not self.folder.exists():
            raise UserError(
                f"{self.folder.name} is a link to nothing",
                where=str(self.folder),
                expected="a folder, or nothing yet",
                remedy="remove the link, or choose another output",
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(
                f"{self.folder.name} is a file",
                where=str(self.folder),
                expected="a folder, or nothing yet",
                remedy="choose another output",
            )
        others = [] if begun or not self.folder.is_dir() else list(self.folder.iterdir())
        visible = sorted(path.name for path in others if not path.name.startswith("."))
        if visible:
            raise UserError(
                f"holds {', '.join(visible[:5])}, and no run",
                where=str(self.folder),
                expected="an empty folder, or none yet",
                remedy="choose another output",
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block no other process may write here. Raises UserError when one does."""
        make_folder(self.folder)
        with explained(self.folder):
            lock = FileLock(self.folder)
        with lock:
            try:
                lock.acquire(wait=False)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is training in {self.folder.name}",
                    where=str(self.folder),
                    expected="one process to a run",
                    remedy="wait for it, stop it, or choose another output",
                ) from error
            except OSError:
                # Some network file systems cannot lock: then it is up to the user.
                pass
            yield

    def begin(self, recipe: Recipe, manifest: Manifest) -> None:
        """Write manifest and recipe; with the manifest, the first file, the folder counts as a
        run: whatever else is in a folder without one belongs to somebody else."""
        sweep(self.folder)
        try:
            text = manifest.model_dump_json(indent=1)
        except PydanticSerializationError as error:
            raise UserError(
                "a path of the recipe has a name that is not UTF-8, which no manifest can hold",
                where=str(self.folder),
                expected="model, data and output in folders whose names are UTF-8",
                remedy="rename the folder; `finesight data import` gives images such names",
            ) from error
        write_file(self.folder / MANIFEST, f"{text}\n".encode())
        write_file(self.folder / RECIPE, dump_recipe(recipe).encode())

    def keep_metric(self, recipe: Recipe) -> None:
        """Put a copy of the recipe's own metric, if it has one, beside it."""
        place = own.split(recipe.eval.metric) if recipe.eval else None
        if place is not None and place[0].is_file():
            write_file(self.folder / own.COPY, place[0].read_bytes())

    def note(self, figures: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`: JSON, but for NaN where a step had no finite figure."""
        append_line(self.metrics, json.dumps(figures))

    def flush(self) -> None:
        """Let all that was noted survive a power failure."""
        flush_file(self.metrics)

    def write(self, name: str, content: object) -> None:
        """Put `content` into the folder as a JSON file."""
        write_file(self.folder / name, (json.dumps(content, indent=1) + "\n").encode())

    def note_dropped(self, dropped: Iterable[tuple[str, str]]) -> None:
        """List the samples that are left out from the start, (id, reason), in `dropped.jsonl`."""
        lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in dropped]
        write_file(self.folder / DROPPED, "".join(lines).encode())

    def finished(self, result: object) -> None:
        """Write the result: the run is complete, and what was noted stays."""
        self.flush()
        self.write(RESULT, result)

    def result(self) -> bytes | None:
        """Read what `finished` wrote; None for a run that has not come so far."""
        path = self.folder / RESULT
        if not path.exists():
            return None
        return read_bytes(
            path,
            expected="the file as `finesight train` wrote it",
            remedy="delete it: --resume then writes it again",
        )

    def forget_after(self, step: int, measured: int) -> None:
        """Cut off the lines of steps after `step` and of measurements after step `measured`, which
        will come again, and a last line that a crash has torn."""
        if self.metrics.exists():
            kept = 0
            for size, figures in _lines(self.metrics):
                if figures["step"] > (measured if "held_out_loss" in figures else step):
                    break
                kept += size
            cut_file(self.metrics, kept)

    def history(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return list(self.lines())

    def lines(self) -> Iterator[dict[str, Any]]:
        """Those of `history`, one at a time: a long run has more than there is room for."""
        if self.metrics.exists():
            yield from (figures for _, figures in _lines(self.metrics))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield whole lines, each with its bytes, up to the first torn one.

    Raises:
        UserError: The file is not a regular file, or a value of a line has a wrong type.
    """
    lines = read_lines(path, expected=_LINE_EXPECTED, remedy=_LINE_REMEDY)
    for number, line in enumerate(lines, start=1):
        try:
            figures = parse_json(line)
        except ValueError:
            return
        if not isinstance(figures, dict) or not line.endswith(b"\n"):
            return
        _check_types(figures, f"{path}:{number}")
        yield len(line), figures


class _MetricsLine(BaseModel):
    """Values of a metrics line that a resumed run reads, with their types."""

    model_config = ConfigDict(strict=True)

    step: Annotated[int, Field(ge=0, le=MOST)]
    loss: float | None = None
    held_out_loss: float | None = None
    scores: dict[str, float] = {}
    headline: str | None = None
    intervals: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)] | None] = {}
    details: dict[str, Any] = {}
    dropped: list[Any] = []
    void: list[str] = []

    @model_validator(mode="after")
    def _headline_is_a_score(self) -> _MetricsLine:
        if self.headline is not None and self.headline not in self.scores:
            raise ValueError(f"the headline {self.headline!r:.80} is no score")
        return self


def _check_types(figures: dict[str, Any], where: str) -> None:
    try:
        _MetricsLine.model_validate(figures)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the line"
        raise UserError(
            f"{key}: {first['msg']}, got {first['input']!r:.60}",
            where=where,
            expected=_LINE_EXPECTED,
            remedy=_LINE_REMEDY,
        ) from error
