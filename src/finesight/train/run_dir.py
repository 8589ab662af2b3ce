"""Run directory: paths of its files, atomic writes and the lock."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from finesight.errors import Step, UserError, format_count
from finesight.evaluate import custom_metric
from finesight.files.bounded_files import parse_json, read_lines
from finesight.files.storage import (
    FileLock,
    append_line,
    flush_file,
    is_written_folder,
    make_folder,
    remove_partial_files,
    translate_os_errors,
    truncate_file,
    write_file,
)
from finesight.settings.config import Recipe
from finesight.settings.manifest import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    IMAGES_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    PREDICTIONS_FOLDER,
    RECIPE_FILE,
    REPORT_FILE,
    RESPONSES_FILE,
    RESULT_FILE,
    SAMPLES_FOLDER,
    SKIPPED_SAMPLES_FILE,
    Manifest,
    find_next_run_dir,
    find_run_dir,
)
from finesight.settings.recipe import dump_recipe
from finesight.settings.setting_types import MAX_COUNT

Split = Literal["train", "eval"]

_ABSENT_PATH = "a path that does not exist"

_lent: ContextVar[str] = ContextVar("lent", default="")
"""Directory that the caller has locked for the next call of `RunDir.lock`."""


class RunDir:
    """Directory of a training run; other commands read the same paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint_dir = path / CHECKPOINTS_FOLDER
        self.predictions_dir = path / PREDICTIONS_FOLDER
        self.adapter_dir = path / ADAPTER_FOLDER
        self.model_dir = path / MODEL_FOLDER
        self.metrics_path = path / METRICS_FILE
        self.responses_path = path / RESPONSES_FILE
        self.report_path = path / REPORT_FILE
        self.images_path = path / IMAGES_FILE
        self.skipped_path = path / SKIPPED_SAMPLES_FILE
        self.samples_dir = path / SAMPLES_FOLDER
        self._recorded_skips: set[tuple[str, str]] = set()

    @property
    def is_started(self) -> bool:
        """True if the directory contains a run."""
        with translate_os_errors(self.path):
            return (self.path / MANIFEST_FILE).exists()

    @property
    def is_finished(self) -> bool:
        """True if the run is complete."""
        return (self.path / RESULT_FILE).exists()

    @property
    def next_path(self) -> Path:
        """First free path of a further run: `run-2`, `run-3` and so on after `run`."""
        return find_next_run_dir(self.path)

    def check_available(self, resume: bool) -> None:
        """Verify that the directory is empty or absent, or contains the run to resume.

        Raises:
            UserError: The directory contains other files or another run.
        """
        is_started = self.is_started
        visible = [] if is_started else self._list_visible_files()
        remedy = "set another output_dir"
        problem: tuple[str, str] | None
        if is_started and not resume:
            problem = "contains a finished run", "a new folder"
            remedy = f"set another folder: output_dir={self.next_path}"
            if not self.is_finished:
                problem = "contains another run", "a new folder, or a run that is resumed"
                remedy = f"add --resume (in Python, resume=True) to continue it, or {remedy}"
        elif self.path.is_symlink() and not self.path.exists():
            problem = "is a broken link", f"a folder, or {_ABSENT_PATH}"
            remedy = f"remove the link, or {remedy}"
        elif self.path.exists() and not self.path.is_dir():
            problem = "is a file", f"a folder, or {_ABSENT_PATH}"
        elif visible:
            found = ", ".join(visible[:5])
            problem = f"contains {found}, but no run", f"an empty folder, or {_ABSENT_PATH}"
        else:
            problem = _find_write_problem(self.path)
        if problem is not None:
            what, expected = problem
            raise UserError(what, where=str(self.path), expected=expected, remedy=remedy)

    def _list_visible_files(self) -> list[str]:
        """Return the sorted names of the files in the directory.

        Hidden files, and the samples of a Python program, precede a run.
        """
        if not self.path.is_dir():
            return []
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(".")}
        if is_written_folder(self.samples_dir):
            names.discard(SAMPLES_FOLDER)
        return sorted(names)

    def suggest_restart(self, recipe: Recipe, checkpoint: Path, changes: Mapping[str, Any]) -> Step:
        """Return the steps that resume without changes of settings, or start with them."""
        purpose = "to start from the checkpoint with the new ones"
        source = checkpoint
        if recipe.tune.has_mode("full"):
            purpose = "after the run has finished, to train its final weights with the new ones"
            source = self.path
        further = self.suggest_further_run(recipe, source, purpose, changes)
        arguments = {"recipe": str(self.path), "resume": True}
        return Step("train", arguments, "to keep the settings of the run", further)

    def suggest_further_run(
        self, recipe: Recipe, source: Path, purpose: str, changes: Mapping[str, Any] | None = None
    ) -> Step:
        """Return the step of a new run that starts from the weights of this one.

        Args:
            source: The run, or one of its LoRA checkpoints.
            changes: Changed settings by name.
        """
        model = find_run_dir(Path(os.path.expanduser(recipe.model)))
        files = model / MANIFEST_FILE, model / "adapter_config.json"
        has_adapter = recipe.adapter is None and any(map(os.path.isfile, files))
        is_model = recipe.tune.has_mode("full") or has_adapter
        changes = dict(changes or {})
        if "train.objective" in changes:
            changes["train.objective"] = recipe.train.objective
        if "train.objective" in changes or "train.optimizer" in changes:
            # Settings of other objectives and optimizers are not compared.
            sections = {f"train.{name}" for name in recipe.train.sections}
            changes = {k: v for k, v in changes.items() if v is not None or k not in sections}
        overrides = [f"{name}={_format_setting(value)}" for name, value in changes.items()]
        if is_model:
            overrides.append(f"model={source}")
            if recipe.adapter is not None:
                overrides.append("adapter=null")
        else:
            overrides.append(f"adapter={source}")
        overrides.append(f"output_dir={self.next_path}")
        arguments = {"recipe": str(self.path / RECIPE_FILE), "overrides": overrides}
        return Step("train", arguments, purpose)

    @contextmanager
    def lock(self, *, is_lent: bool = False) -> Iterator[None]:
        """Hold the write lock of the directory within the context.

        Args:
            is_lent: Whether the next call in the context, which trains, takes over the lock.

        Raises:
            UserError: Another process, or another training of this one, holds the lock.
        """
        make_folder(self.path)
        path = os.path.realpath(self.path)
        with ExitStack() as stack:
            if _lent.get() != path:
                stack.enter_context(self._acquire_lock())
            # A callback of the training may start another one, which does not take over the lock.
            token = _lent.set(path if is_lent else "")
            try:
                yield
            finally:
                _lent.reset(token)

    @contextmanager
    def _acquire_lock(self) -> Iterator[None]:
        with translate_os_errors(self.path):
            lock = FileLock(self.path)
        with lock:
            try:
                lock.acquire(wait=False)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is training in {self.path.name}",
                    where=str(self.path),
                    expected="one training process per run",
                    remedy="wait for it, stop it, or set another output_dir",
                ) from error
            except OSError:
                # Some network file systems do not support locks; the user is responsible there.
                pass
            yield

    def initialize(self, recipe: Recipe, manifest: Manifest) -> None:
        """Write the manifest and the recipe of a new run.

        The manifest is written first; a directory without a manifest is not a run.

        Raises:
            UserError: A path in the recipe is not valid UTF-8.
        """
        remove_partial_files(self.path)
        try:
            text = manifest.model_dump_json(indent=1)
        except PydanticSerializationError as error:
            raise UserError(
                "a path of the recipe is not valid UTF-8, which the manifest requires",
                where=str(self.path),
                expected="UTF-8 paths of model, data and output_dir",
                remedy="rename the folder; an import renames images",
            ) from error
        write_file(self.path / MANIFEST_FILE, f"{text}\n".encode())
        write_file(self.path / RECIPE_FILE, dump_recipe(recipe).encode())

    def copy_functions(self, recipe: Recipe) -> None:
        """Copy the Python files of a custom metric and of rewards, if any, to the run."""
        for _, name, copy_name in custom_metric.list_functions(recipe):
            source = custom_metric.parse_metric_path(name)
            if source is not None and source[0].is_file():
                write_file(self.path / copy_name, source[0].read_bytes())

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`; non-finite values are written as NaN or Infinity."""
        append_line(self.metrics_path, json.dumps(metrics))

    def flush(self) -> None:
        """Flush the appended lines of all files to disk (fsync)."""
        for path in (self.metrics_path, self.responses_path, self.skipped_path):
            flush_file(path)

    def write(self, name: str, content: object) -> None:
        """Write an object to a JSON file of the run, atomically."""
        write_file(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def write_skipped_samples(self, skipped: Iterable[tuple[str, str]], step: int = 0) -> None:
        """Write the samples skipped before the first step to `skipped_samples.jsonl`.

        The samples that were skipped in the steps before a resume are kept.

        Args:
            skipped: ID and reason of each sample.
            step: Step of the checkpoint of a resumed run.
        """
        rows = [SkippedRow(id=name, reason=reason) for name, reason in skipped]
        first = {(row.id, row.reason) for row in rows}
        for row in self.read_skipped_samples():
            if row.step is not None and row.step <= step and (row.id, row.reason) not in first:
                rows.append(row)
        self._recorded_skips = set()
        lines = []
        for row in rows:
            self._recorded_skips.add((row.id, row.reason))
            lines.append(row.model_dump_json(exclude_defaults=True) + "\n")
        write_file(self.skipped_path, "".join(lines).encode())

    def read_skipped_samples(self) -> list[SkippedRow]:
        """Read `skipped_samples.jsonl`, without damaged lines."""
        rows = list[SkippedRow]()
        if self.skipped_path.is_file():
            for line in read_lines(self.skipped_path, expected="skipped samples"):
                with suppress(ValidationError):
                    rows.append(SkippedRow.model_validate_json(line))
        return rows

    def append_skipped_samples(
        self,
        skipped: Iterable[tuple[str, str]],
        step: int,
        split: Split = "train",
    ) -> None:
        """Append samples that were skipped later to `skipped_samples.jsonl`, each only once."""
        for name, reason in skipped:
            if (name, reason) not in self._recorded_skips:
                self._recorded_skips.add((name, reason))
                row = SkippedRow(id=name, reason=reason, step=step, split=split)
                append_line(self.skipped_path, row.model_dump_json(exclude_defaults=True))

    def truncate_metrics(self, step: int, last_eval_step: int) -> None:
        """Remove the lines of metrics and responses that a resumed run writes again.

        An incomplete last line is removed as well.

        Args:
            step: Step of the checkpoint.
            last_eval_step: Step of the last evaluation before the checkpoint.
        """
        for path in filter(Path.exists, (self.metrics_path, self.responses_path)):
            num_bytes = 0
            for size, metrics in _read_lines(path):
                last_step = step
                if "validation_loss" in metrics:
                    last_step = last_eval_step
                if metrics["step"] > last_step:
                    break
                num_bytes += size
            truncate_file(path, num_bytes)

    def iter_metrics(self) -> Iterator[dict[str, Any]]:
        """Iterate over the lines of `metrics.jsonl`, without loading the complete file."""
        if self.metrics_path.exists():
            for _, metrics in _read_lines(self.metrics_path):
                yield metrics


def _find_write_problem(path: Path) -> tuple[str, str] | None:
    """Return why a folder cannot be written, and what is expected; None if it can."""
    nearest = path.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"cannot be created: {nearest} is a file", "a path in a folder"
    if not os.access(nearest, os.W_OK):
        what = f"cannot be written: no permission for {nearest}"
        return what, "a path in a folder that you may write to"
    return None


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Iterate over the complete lines of `metrics.jsonl`, each with its size in bytes.

    The iteration ends at the first incomplete line.

    Raises:
        UserError: The path is not a regular file, or a value of a line has the wrong type.
    """
    expected = "a line of metrics as training wrote it"
    remedy = "restore the file from a copy, or truncate it before the corrupt line"
    lines = read_lines(path, expected=expected, remedy=remedy)
    for line_number, line in enumerate(lines, start=1):
        try:
            metrics = parse_json(line)
            if not isinstance(metrics, dict) or not line.endswith(b"\n"):
                return
            _MetricsLine.model_validate(metrics)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"])) or "the line"
            raise UserError(
                f"{key}: {first['msg']}, got {first['input']!r:.60}",
                where=f"{path}:{line_number}",
                expected=expected,
                remedy=remedy,
            ) from error
        except ValueError:
            return
        yield len(line), metrics


def describe_changed_data(run: str) -> str:
    """Describe a change of the validation data since a run started; empty without a change."""
    # Training does not need these modules.
    from finesight.report.run_reader import read_run
    from finesight.report.summary import get_data_stats
    from finesight.samples.corpus import load_corpus
    from finesight.settings.recipe import load_recipe

    folder = find_run_dir(Path(run))
    for name in (MANIFEST_FILE, RECIPE_FILE):
        # A model or adapter may have the manifest of a run, but not its records.
        if not (folder / name).is_file():
            return ""
    recorded = get_data_stats(read_run(folder, "eval"), "eval")
    corpus = load_corpus(load_recipe(folder / RECIPE_FILE).data.eval)
    if recorded.get("fingerprint") in (None, corpus.fingerprint):
        return ""
    counts = f"{format_count(recorded.get('num_samples', 0), 'sample')}, now {len(corpus)}"
    return f"the validation data changed since the run ({counts}): its report has other scores"


class SkippedRow(BaseModel):
    """Row of `skipped_samples.jsonl`; `step` is None for a sample skipped at the start."""

    id: str
    reason: str
    step: int | None = None
    split: Split = "train"


class _MetricsLine(BaseModel):
    """Schema of the values in `metrics.jsonl` that a resumed run reads."""

    model_config = ConfigDict(strict=True)

    step: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    loss: float | None = None
    validation_loss: float | None = None
    scores: dict[str, float] = {}
    primary_metric: str | None = None
    intervals: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)] | None] = {}
    details: dict[str, Any] = {}
    sample_set: str | None = None
    score_set: str | None = None
    full: _MetricsLine | None = None
    skipped_samples: list[Any] = []
    nonfinite_samples: list[str] = []

    @model_validator(mode="after")
    def _check_primary_metric(self) -> _MetricsLine:
        if self.primary_metric is not None and self.primary_metric not in self.scores:
            raise ValueError(f"the primary metric {self.primary_metric!r:.80} is not a score")
        return self


def _format_setting(value: Any) -> str:
    """Format the value of a setting in its short form, such as one learning rate of all parts."""
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
        if value.keys() == {"default"}:
            value = value["default"]
    return json.dumps(value)
