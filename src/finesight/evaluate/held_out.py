"""What to measure on, and how: as told, and for what is left out as the run's recipe says."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finesight.config import Eval
from finesight.data.jsonl import Located, read_samples
from finesight.data.sources import load_sources
from finesight.errors import UserError
from finesight.evaluate import own
from finesight.evaluate.score import TASKS
from finesight.recipe import load_recipe

RECIPE = "recipe.yaml"

METRICS = f"{', '.join(TASKS)}, or a function in a Python file: metric.py:function"


def held_out(
    run_or_model: str,
    *,
    data: Path | None = None,
    metric: str | None = None,
    limit: int | None = None,
    batch: int | None = None,
    max_new_tokens: int | None = None,
) -> tuple[list[Located], Eval]:
    """Samples and settings of an evaluation.

    For a run folder, what is None comes from its recipe, and a metric of the user's own from the
    copy that the run keeps. Raises UserError when data or metric is neither given nor in a recipe,
    and for a metric that there is not.
    """
    path = Path(run_or_model) / RECIPE
    recipe = load_recipe(path) if path.is_file() else None
    given: dict[str, Any] = {
        "metric": metric,
        "limit": limit,
        "batch": batch,
        "max_new_tokens": max_new_tokens,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if recipe is not None and recipe.eval is not None:
        kept = own.found(recipe.eval.metric, path.parent, copy_first=True)
        settings = recipe.eval.model_dump() | {"metric": kept} | settings
    if "metric" not in settings:
        raise _missing("metric", METRICS, run_or_model)
    if data is not None:
        samples = [Located(sample, data.parent) for sample in read_samples(data)]
    elif recipe is not None and recipe.data.eval:
        samples = load_sources(recipe.data.eval).read()
    else:
        raise _missing("data", "a JSONL file of held-out samples", run_or_model)
    try:
        return samples, Eval.model_validate(settings)
    except ValidationError as error:
        raise _wrong(error, settings) from error


def _missing(what: str, expected: str, run_or_model: str) -> UserError:
    """No metric or no data is named."""
    is_run = (Path(run_or_model) / RECIPE).is_file()
    return UserError(
        f"{run_or_model} {'has a recipe without it' if is_run else 'is no run with a recipe'}",
        where=what,
        expected=expected,
        remedy=f"say which {what}" if is_run else f"say which {what}, or correct the run's folder",
    )


def _wrong(error: ValidationError, settings: dict[str, Any]) -> UserError:
    """What the settings of an evaluation are told."""
    wrong = {str(one["loc"][0]): one["msg"] for one in error.errors(include_url=False)}
    if "metric" not in wrong:
        name, expected = next(iter(wrong.items()))
        what, remedy = f"{name} is {settings[name]}", "correct it, or leave it out"
        return UserError(what, where=name, expected=expected, remedy=remedy)
    metric = str(settings["metric"])
    near = difflib.get_close_matches(metric, TASKS, n=1)
    return UserError(
        f"no metric {metric!r}",
        where="metric",
        expected=METRICS,
        remedy=f"did you mean {near[0]}?" if near else "choose one of these",
    )
