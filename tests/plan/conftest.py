"""Fixtures of tests of plans."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from plan_fixtures import edit_config
from tiny_task import TinyTask

from finesight.model_folder import ModelFolder
from finesight.plan import run_plan, run_planner
from finesight.plan.settings_search import PlannedModel
from finesight.settings.config import Recipe


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyTask:
    """Task with a model of one layer, whose plans share the traced steps of equal models."""
    models, build = dict[object, PlannedModel](), run_planner.build_planned_model

    def build_once(folder: ModelFolder, recipe: Recipe, *args: Any) -> PlannedModel:
        train = recipe.train.model_copy(update={"epochs": None})
        key = recipe.tune.model_dump_json(), train.model_dump_json(), *args
        if key not in models:
            models[key] = build(folder, recipe, *args)
        return models[key]

    monkeypatch.setattr(run_planner, "build_planned_model", build_once)
    # The weights are not those of the edited configuration.
    check = partial(run_plan.check_recipe, runs_functions=False, needs_weights=False)
    monkeypatch.setattr(run_plan, "check_recipe", lambda recipe, **_: check(recipe))
    task = TinyTask(tmp_path)
    edit_config(task, num_hidden_layers=1)
    return task
