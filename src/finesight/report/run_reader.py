"""Reader for run directories that may be incomplete or damaged.

Only the manifest is required. Missing values are None or empty, and the names of unreadable files
are recorded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from finesight.errors import UserError, suggest_similar_path
from finesight.files import bounded_files
from finesight.files.bounded_files import (
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    load_yaml,
    parse_json,
    read_text,
)
from finesight.files.storage import DIGESTS_FILE
from finesight.metric_components import METRICS, get_metric
from finesight.objective_components import DEFAULT_OBJECTIVE
from finesight.optimizer_components import DEFAULT_OPTIMIZER
from finesight.settings.manifest import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    GUARD_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    PARAM_AUDIT_FILE,
    PREDICTIONS_FOLDER,
    RECIPE_FILE,
    RESULT_FILE,
    SKIPPED_SAMPLES_FILE,
    find_newest_checkpoint,
    require_run_plugins,
)

JsonObject = dict[str, Any]
"""JSON object of a run: a record of a step, an evaluation or a prediction."""

FIELD_TYPES: dict[str, type] = {
    **dict.fromkeys(["step", "steps", "total_steps", "skipped_steps", "weights_step"], float),
    **dict.fromkeys(["num_samples", "num_loss_samples", "num_tokens"], float),
    **dict.fromkeys(["epoch", "loss", "validation_loss", "grad_norm", "peak_memory_gb"], float),
    **dict.fromkeys(["num_supervised_tokens", "rewards/accuracies", "rewards/margins"], float),
    **dict.fromkeys(["step_s", "eval_s", "setup_s", "vision_cache_s", "data_wait_s"], float),
    **dict.fromkeys(["samples_per_s", "mfu", "pack_tokens", "activation_checkpointing"], float),
    **dict.fromkeys(["num_tensors", "num_params", "num_changed", "num_with_grad"], float),
    "relative_change": float,
    **dict.fromkeys(["lr", "scores", "intervals", "details", "versions", "data"], dict),
    **dict.fromkeys(["size_histograms", "before", "after", "notes", "full", "loss_metrics"], dict),
    **dict.fromkeys(["skipped_samples", "nonfinite_samples", "loss_spike_samples"], list),
    "metric_differences": list,
    **dict.fromkeys(["primary_metric", "started_at", "ended_at", "status", "reason"], str),
    **dict.fromkeys(["sample_set", "score_set"], str),
}
"""Expected types of values by key; `float` accepts any number.

Values of another type are treated as missing.
"""

MAX_PAGE_FILE_BYTES = 8 << 20
MAX_PAGE_RECIPE_BYTES = 1 << 20
"""Maximum size of a JSON file, and of the recipe, of a run on a page with many runs."""

# Lines of a run may be damaged: larger numbers are treated as missing.
MAX_ABS_VALUE = 1e15
MAX_MFU = 1.0


@dataclass(frozen=True)
class RunRecord:
    """Content of a run directory.

    Attributes:
        steps: Lines of `metrics.jsonl` for training steps.
        evaluations: Lines of `metrics.jsonl` for evaluations: figures of the common subset of the
            run, and with the key `full`, of all samples.
        starts: Lines of `metrics.jsonl` for the start of each training process.
        vision_cache_builds: Lines of `metrics.jsonl` for builds of the vision cache.
        param_changes: Rows of the parameter audit. None if missing.
        result: Result of a finished run. None for an unfinished run.
        weight_digests: SHA-256 digests of the trained weights by file.
        checkpoint_identity: Fingerprints of data and base model in the newest checkpoint.
        end_event: Line of `metrics.jsonl` for the interruption or failure of the last training
            process. None if there was none.
        guard: Result of the regression guard; empty without one.
        max_bytes: Maximum number of bytes of each JSON Lines file, as given to `read_run`.
    """

    folder: Path
    recipe: JsonObject
    recipe_text: str
    manifest: JsonObject
    steps: list[JsonObject]
    evaluations: list[JsonObject]
    starts: list[JsonObject]
    vision_cache_builds: list[JsonObject]
    skipped_samples: list[JsonObject]
    param_changes: list[JsonObject] | None
    result: JsonObject | None
    weight_digests: dict[str, str]
    checkpoint_identity: JsonObject
    end_event: JsonObject | None = None
    unreadable_files: list[str] = field(default_factory=list)
    guard: JsonObject = field(default_factory=dict)
    max_bytes: int | None = None

    @property
    def primary_metric(self) -> str | None:
        """Primary metric of the last evaluation that has one."""
        for line in reversed(self.evaluations):
            if line.get("primary_metric"):
                return str(line["primary_metric"])
        return None

    @property
    def predictions_files(self) -> list[Path]:
        """Prediction files in chronological order.

        The order is: before training, during training by step, after training.
        """
        folder = self.folder / PREDICTIONS_FOLDER
        paths = {path.stem: path for path in folder.glob("*.jsonl") if path.is_file()}
        interim_names = [name for name in paths if name.removeprefix("step-").isdecimal()]
        interim_names.sort(key=lambda name: (int(name.removeprefix("step-")), name))
        return [paths[name] for name in ("before", *interim_names, "after") if name in paths]


def read_run(
    folder: Path,
    where: str = "report",
    *,
    with_plugins: bool = True,
    max_bytes: int | None = None,
) -> RunRecord:
    """Read the content of a run directory.

    Args:
        max_bytes: Maximum number of bytes of each JSON Lines file, of which the middle is left out.
            Other files are limited as well, since a page has to answer in time. None: no limit.

    Raises:
        UserError: `folder` is not a run directory, or lacks a plug-in.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise UserError(
            f"{folder} is not a run directory",
            where=where,
            expected=f"a folder with {MANIFEST_FILE} from training",
            remedy=suggest_similar_path(folder, "give the output_dir of a run"),
        )
    reader = _RunFolderReader(folder, max_bytes)
    lines = list(map(_drop_invalid_values, reader.read_lines(METRICS_FILE)))
    lines = [line for line in lines if line.get("step") is not None]
    reader.record_irregular_files(PREDICTIONS_FOLDER)
    param_changes = None
    audit = reader.read_json(PARAM_AUDIT_FILE)
    if isinstance(audit, list):
        param_changes = [_drop_invalid_values(as_object(row)) for row in audit]
    text = reader.read_text(RECIPE_FILE) or ""
    result = _drop_invalid_values(as_object(reader.read_json(RESULT_FILE)))
    _clean_section(result, "before")
    _clean_section(result, "after")
    steps = _select_steps(lines)
    for line in lines:
        _clean_section(line, "full")
    recipe = reader.parse_recipe(text)
    metric = str(as_object(recipe.get("eval")).get("metric"))
    if with_plugins:
        train = as_object(recipe.get("train"))
        objective = str(train.get("objective") or DEFAULT_OBJECTIVE)
        optimizer = str(train.get("optimizer") or DEFAULT_OPTIMIZER)
        require_run_plugins(folder, objective, optimizer)
        METRICS.get(metric)  # Pages show scores by the texts and directions of their metric.
    else:
        get_metric(metric)
    return RunRecord(
        folder=folder,
        recipe=recipe,
        recipe_text=text,
        manifest=as_object(reader.read_json(MANIFEST_FILE)),
        steps=steps,
        evaluations=[line for line in lines if "validation_loss" in line],
        starts=[line for line in lines if line.get("started_at")],
        vision_cache_builds=[line for line in lines if "vision_cache_s" in line],
        skipped_samples=list(reader.read_lines(SKIPPED_SAMPLES_FILE)),
        param_changes=param_changes,
        result=result or None,
        weight_digests=reader.read_weight_digests(),
        checkpoint_identity=reader.read_checkpoint_identity(),
        end_event=_find_end_event(lines),
        unreadable_files=reader.unreadable_files,
        guard=as_object(reader.read_json(GUARD_FILE)),
        max_bytes=max_bytes,
    )


def _clean_section(line: JsonObject, name: str) -> None:
    """Drop the invalid values of a JSON object inside a line."""
    if line.get(name) is not None:
        line[name] = _drop_invalid_values(line[name])


def _select_steps(lines: Sequence[JsonObject]) -> list[JsonObject]:
    """Return the lines of training steps, without an MFU that is too high."""
    steps = [line for line in lines if "loss" in line and line.get("step_s") is not None]
    for line in steps:
        # A step above the measured peak shows that the peak is too low for all steps.
        if line.get("mfu") is None and line.get("num_packs") != 0:
            return [step | {"mfu": None} for step in steps]
    return steps


def _find_end_event(lines: Sequence[JsonObject]) -> JsonObject | None:
    """Return the end of the last training process, or None if none was recorded."""
    for line in reversed(lines):
        if line.get("ended_at"):
            return line
        if line.get("started_at"):
            return None
    return None


def get_sample_set(line: JsonObject, count: str = "num_loss_samples") -> tuple[object, object]:
    """Return the digest and the number of validation samples of an evaluation.

    Runs of earlier versions have no digest.

    Args:
        count: Number of samples: `num_loss_samples`, or `num_samples` for scores.
    """
    digest = line.get("sample_set")
    if count == "num_samples":
        digest = line.get("score_set") or digest
    return digest, line.get(count, line.get("num_samples"))


def list_comparable_evaluations(
    lines: Iterable[JsonObject], count: str = "num_loss_samples"
) -> list[JsonObject]:
    """Return the evaluations of the most frequent set of samples.

    Args:
        count: Number of samples to compare: `num_loss_samples`, or `num_samples` for scores.
    """
    groups: defaultdict[object, list[JsonObject]] = defaultdict(list)
    for line in lines:
        if is_finite(line.get("validation_loss")):
            groups[get_sample_set(line, count)].append(line)
    return max(groups.values(), key=len, default=[])


def pair_evaluations(before: JsonObject, after: JsonObject) -> list[JsonObject]:
    """Return two evaluations of the same samples: if possible, of all.

    Scores or losses of other samples are removed from the first one, with a note.
    """
    if not before or not after:
        return [{}, as_object(after.get("full")) or after]
    full_before = as_object(before.get("full")) or before
    full_after = as_object(after.get("full")) or after
    if rank_equal_sets(full_before, full_after) >= rank_equal_sets(before, after):
        before = full_before
        after = full_after
    removed: JsonObject = {}
    if not has_equal_sets(before, after, "num_samples"):
        removed |= {"scores": {}, "intervals": {}}
        removed["notes"] = dict.fromkeys(as_object(before.get("scores")), OTHER_SAMPLES)
    if not has_equal_sets(before, after, "num_loss_samples"):
        notes = removed.get("notes", before.get("notes"))
        removed["validation_loss"] = None
        removed["notes"] = as_object(notes) | {"validation_loss": OTHER_SAMPLES}
    return [before | removed, after]


OTHER_SAMPLES = "not compared, because the evaluation before training has other samples"


def has_equal_sets(before: JsonObject, after: JsonObject, count: str) -> bool:
    """Return whether two evaluations have the same samples.

    Args:
        count: Number of samples: `num_loss_samples`, or `num_samples` for scores.
    """
    return get_sample_set(before, count) == get_sample_set(after, count)


def rank_equal_sets(before: JsonObject, after: JsonObject) -> int:
    """Rank two evaluations by their equal samples.

    Those of scores count 2, those of losses 1. The rank is 0 without equal samples.
    """
    equal_scores = has_equal_sets(before, after, "num_samples")
    equal_losses = has_equal_sets(before, after, "num_loss_samples")
    return 2 * equal_scores + equal_losses


def list_image_folders(run_records: Iterable[RunRecord]) -> list[Path]:
    """Return the folders to which relative image paths may refer.

    These are the current folder and the working directories in which the runs were started.
    """
    folders = [Path()]
    for run_record in run_records:
        for line in run_record.starts:
            folder = line.get("working_dir")
            if isinstance(folder, str):
                folders.append(Path(folder))
    return folders


def read_json_lines(
    path: Path, damaged_lines: list[int] | None = None, max_bytes: int | None = None
) -> Iterator[JsonObject]:
    """Yield the objects of a JSON Lines file, without invalid lines.

    Args:
        damaged_lines: List to which the numbers of invalid lines are added, from 1. A truncated
            last line is omitted, since a process may be writing it.
        max_bytes: Maximum number of bytes, of a larger file those at both ends. None: all lines.
    """
    lines = bounded_files.read_lines(path, expected="JSON Lines")
    if max_bytes is not None:
        lines = bounded_files.read_edge_lines(path, max_bytes, expected="JSON Lines")
    for line_number, line in enumerate(lines, 1):
        try:
            content = parse_json(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            yield content
        elif damaged_lines is not None and (line.endswith(b"\n") or len(line) == MAX_LINE_BYTES):
            damaged_lines.append(line_number)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number that fits in a float."""
    if not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # integers may have thousands of digits
        return False


def as_object(content: object) -> JsonObject:
    """Return a JSON object, or an empty one for another value."""
    if not isinstance(content, dict):
        return {}
    return content


def _drop_invalid_values(line: JsonObject) -> JsonObject:
    """Replace the values of a line that have an unexpected type by None."""
    valid: JsonObject = {}
    for key, value in line.items():
        valid[key] = value if _is_valid(key, value) else None
    return valid


def _is_valid(key: str, value: object) -> bool:
    """Return whether a value has the expected type, and a number a valid size."""
    expected_type = FIELD_TYPES.get(key)
    if expected_type is None:
        return True
    if expected_type is not float:
        return isinstance(value, expected_type)
    maximum = MAX_MFU if key == "mfu" else MAX_ABS_VALUE
    return isinstance(value, int | float) and abs(value) <= maximum


class _RunFolderReader:
    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self.unreadable_files: list[str] = []

    def read_text(self, name: str) -> str | None:
        path = self._folder / name
        if not path.exists():
            return None
        limit = MAX_FILE_BYTES
        if self._max_bytes is not None:
            limit = MAX_PAGE_FILE_BYTES
            if name == RECIPE_FILE:
                limit = MAX_PAGE_RECIPE_BYTES
        try:
            return read_text(path, expected="a file of a run directory", max_bytes=limit)
        except UserError:
            self.unreadable_files.append(name)
        return None

    def read_json(self, name: str) -> object:
        text = self.read_text(name)
        if text is None:
            return None
        try:
            return parse_json(text)
        except ValueError:
            self.unreadable_files.append(name)
            return None

    def parse_recipe(self, text: str) -> JsonObject:
        try:
            return as_object(load_yaml(text))
        except yaml.YAMLError:
            self.unreadable_files.append(RECIPE_FILE)
            return {}

    def read_lines(self, name: str) -> Iterator[JsonObject]:
        path = self._folder / name
        if not path.exists():
            return
        damaged_lines: list[int] = []
        try:
            is_large = self._max_bytes is not None and path.stat().st_size > self._max_bytes
            yield from read_json_lines(path, damaged_lines, self._max_bytes)
        except (UserError, OSError):
            self.unreadable_files.append(name)
            return
        if is_large:
            # The numbers of the lines are unknown.
            self.unreadable_files.append(f"the middle of {name}")
        elif len(damaged_lines) == 1:
            self.unreadable_files.append(f"line {damaged_lines[0]:,} of {name}")
        elif damaged_lines:
            count = len(damaged_lines)
            self.unreadable_files.append(
                f"{count:,} lines from line {damaged_lines[0]:,} of {name}"
            )

    def record_irregular_files(self, name: str) -> None:
        """Mark JSON Lines files of a folder as unreadable unless they are regular files."""
        for path in sorted((self._folder / name).glob("*.jsonl")):
            if not path.is_file():
                self.unreadable_files.append(f"{name}/{path.name}")

    def read_weight_digests(self) -> dict[str, str]:
        """Return the SHA-256 digests of the trained weights by path in the run directory."""
        digests = {}
        for part in (ADAPTER_FOLDER, MODEL_FOLDER):
            content = as_object(self.read_json(f"{part}/{DIGESTS_FILE}"))
            for name, value in content.items():
                if name.endswith(".safetensors"):
                    digests[f"{part}/{name}"] = str(value)
        return digests

    def read_checkpoint_identity(self) -> JsonObject:
        """Return the fingerprints of data and base model in the newest checkpoint."""
        newest = find_newest_checkpoint(self._folder)
        if newest is None:
            return {}
        state_file = f"{CHECKPOINTS_FOLDER}/{newest.name}/state.json"
        return as_object(as_object(self.read_json(state_file)).get("identity"))
