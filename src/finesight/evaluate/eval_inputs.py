"""Loading of evaluation data and settings, from arguments and the recipe of a run."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finesight.config import EvalSettings
from finesight.data.corpus import load_corpus
from finesight.data.jsonl import LocatedSample, read_samples
from finesight.errors import UserError
from finesight.evaluate import custom_metric
from finesight.evaluate.task_metrics import TASK_METRICS
from finesight.recipe import load_recipe

RECIPE_FILE = "recipe.yaml"

METRIC_CHOICES = f"{', '.join(TASK_METRICS)}, or a function in a Python file: metric.py:function"


def load_eval_inputs(
    run_or_model: str,
    *,
    data: Path | None = None,
    metric: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
) -> tuple[list[LocatedSample], EvalSettings]:
    """Load the samples and settings of an evaluation.

    For a run folder, arguments that are None default to its recipe; a custom metric is loaded from
    the copy in the run folder.

    Raises:
        UserError: Data or metric is missing, or the metric does not exist.
    """
    path = Path(run_or_model) / RECIPE_FILE
    recipe = load_recipe(path) if path.is_file() else None
    overrides: dict[str, Any] = {
        "metric": metric,
        "limit": limit,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    settings: dict[str, Any] = {
        name: value for name, value in overrides.items() if value is not None
    }
    if recipe is not None and recipe.eval is not None:
        copied_metric = custom_metric.resolve_metric_path(
            recipe.eval.metric, path.parent, prefer_copy=True
        )
        settings = recipe.eval.model_dump() | {"metric": copied_metric} | settings
    if "metric" not in settings:
        raise _build_missing_error("metric", METRIC_CHOICES, run_or_model)
    if data is not None:
        samples = [LocatedSample(sample, data.parent) for sample in read_samples(data)]
    elif recipe is not None and recipe.data.eval:
        samples = load_corpus(recipe.data.eval).read_samples()
    else:
        raise _build_missing_error("data", "a JSONL file of validation samples", run_or_model)
    try:
        return samples, EvalSettings.model_validate(settings)
    except ValidationError as error:
        raise _build_settings_error(error, settings) from error


def _build_missing_error(setting: str, expected: str, run_or_model: str) -> UserError:
    """Create the UserError for an evaluation without a metric or data."""
    is_run = (Path(run_or_model) / RECIPE_FILE).is_file()
    return UserError(
        f"not set, and {run_or_model} "
        + ("has a recipe without it" if is_run else "is not a run folder with a recipe"),
        where=setting,
        expected=expected,
        remedy=f"set {setting}" if is_run else f"set {setting}, or correct the run folder",
    )


def _build_settings_error(error: ValidationError, settings: dict[str, Any]) -> UserError:
    """Build the error of invalid evaluation settings."""
    messages = {str(one["loc"][0]): one["msg"] for one in error.errors(include_url=False)}
    if "metric" not in messages:
        name, expected = next(iter(messages.items()))
        problem, remedy = f"{name} is {settings[name]}", "correct the value, or omit it"
        return UserError(problem, where=name, expected=expected, remedy=remedy)
    metric = str(settings["metric"])
    suggestions = difflib.get_close_matches(metric, TASK_METRICS, n=1)
    return UserError(
        f"unknown metric {metric!r}",
        where="metric",
        expected=METRIC_CHOICES,
        remedy=f"did you mean {suggestions[0]}?" if suggestions else "choose one of these",
    )
