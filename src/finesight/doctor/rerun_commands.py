"""Build shell commands that resume a run or repeat it with other settings."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import ValidationError

from finesight.config import DataSettings, Recipe, TrainFileSettings
from finesight.doctor.diagnosis import format_command
from finesight.report.run_reader import RunRecord
from finesight.report.summary import get_last_start
from finesight.run_files import RECIPE_FILE

MAX_SAFE_LEARNING_RATE = 1e-3
"""Maximum learning rate that diagnoses suggest. It is safe for small adapters."""


def resume_command(run_record: RunRecord, *overrides: str) -> str:
    """Return the shell command that resumes a run from its newest checkpoint."""
    return format_command(
        "finesight", "train", str(run_record.folder / RECIPE_FILE), *overrides, "--resume"
    )


def rerun_command(run_record: RunRecord, *overrides: str) -> str:
    """Return the shell command that repeats a run in a new folder.

    Args:
        run_record: Content of the run directory.
        *overrides: Recipe overrides, such as `train.steps=100`.
    """
    recipe_path = str(run_record.folder / RECIPE_FILE)
    return format_command(
        "finesight",
        "train",
        recipe_path,
        *overrides,
        f"output_dir={next_free_folder(run_record.folder)}",
    )


def next_free_folder(folder: Path) -> Path:
    """Return the first unused folder name with a number, such as `run-2` for `run`."""
    suffix = 2
    while (candidate := folder.with_name(f"{folder.name}-{suffix}")).exists():
        suffix += 1
    return candidate


def load_run_recipe(run_record: RunRecord) -> Recipe:
    """Load the recipe of a run. Default settings are used if it cannot be read."""
    try:
        return Recipe.model_validate(run_record.recipe)
    except ValidationError:
        unknown = DataSettings(train=(TrainFileSettings(path=Path("unknown")),))
        return Recipe(model="unknown", data=unknown, output_dir=run_record.folder)


def get_learning_rates(run_record: RunRecord) -> dict[str, float]:
    """Return the learning rates of a run by part of the model, `default` first."""
    rates_by_part = load_run_recipe(run_record).train.learning_rate.model_dump()
    return {part: value for part, value in rates_by_part.items() if value is not None}


def scale_learning_rates(run_record: RunRecord, factor: float) -> list[str]:
    """Return the overrides that multiply every learning rate of a run by a factor."""
    scaled = {
        part: f"{round_to_digit(value * factor):g}"
        for part, value in get_learning_rates(run_record).items()
    }
    return [f"train.learning_rate.{part}={value}" for part, value in scaled.items()]


def lower_learning_rates(run_record: RunRecord) -> list[str]:
    """Return the overrides that divide every learning rate of a run by ten or more.

    The results are at most `MAX_SAFE_LEARNING_RATE`.
    """
    return scale_learning_rates(
        run_record, min(0.1, MAX_SAFE_LEARNING_RATE / max(get_learning_rates(run_record).values()))
    )


def round_to_digit(learning_rate: float) -> float:
    """Round a learning rate to one significant digit."""
    power = math.floor(math.log10(learning_rate))
    return float(round(learning_rate / 10.0**power) * 10.0**power)


def scale_duration(run_record: RunRecord, factor: float) -> list[str]:
    """Return the overrides that multiply the number of steps or epochs by a factor."""
    train = load_run_recipe(run_record).train
    if train.steps is not None:
        return [f"train.steps={max(1, math.ceil(train.steps * factor))}"]
    return [f"train.epochs={round_up_hundredth((train.epochs or 1) * factor):g}"]


def round_up_hundredth(value: float) -> float:
    """Round a number of epochs up to two decimals."""
    return math.ceil(100 * value - 1e-9) / 100


def get_num_workers(run_record: RunRecord) -> int | None:
    """Return the data loader workers of the last training process, or None if unknown."""
    value = get_last_start(run_record).get("num_workers")
    return value if isinstance(value, int) else None
