"""Recipes against a machine that lacks something, and the settings that are printed instead."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from doctoring import codes, only, plant_package
from small_run import make_task, write_recipe

from finesight.doctor import examine, packages, recipe_needs
from finesight.doctor.findings import Finding
from finesight.doctor.graphics import Card, Torch
from finesight.doctor.machine import GB, Place
from finesight.recipe import load_recipe

OUTPUT = Place("output", Path("/runs"), 100 * GB, True)
CPU = Torch("2.13.0+cpu")
T4 = Torch("2.13.0+cu126", cards=(Card("Tesla T4", (7, 5), 16 * GB, 15 * GB, ""),))
NONE = packages.Packages({}, (), True)
AROUND = recipe_needs.Circumstances(NONE, CPU, OUTPUT)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    made = make_task(tmp_path / "task") | {"output": str(tmp_path / "run")}
    return write_recipe(tmp_path / "my recipe.yaml", made)


def judged(path: Path, *changes: str, around: recipe_needs.Circumstances = AROUND) -> list[Finding]:
    return recipe_needs.judge(path, load_recipe(path, changes), around)


def mended(path: Path, found: Finding) -> list[str]:
    """The changes that the remedy makes to the recipe."""
    words = shlex.split(found.remedy)
    assert words[:3] == ["finesight", "train", str(path)]
    return words[3:]


def test_a_recipe_that_can_be_trained_is_fine(recipe: Path) -> None:
    assert codes(judged(recipe)) == codes(judged(recipe), "hint") == []


@pytest.mark.parametrize(
    "asked", ["train.precision=bf16", "tune.fp8=[language]"], ids=["bf16", "fp8"]
)
def test_a_precision_that_the_card_lacks_is_replaced(recipe: Path, asked: str) -> None:
    around = replace(AROUND, torch=T4)
    changes = ["train.device=auto", "tune.merger=frozen", asked]
    found = only(judged(recipe, *changes, around=around), "precision-unsupported")
    assert "Tesla T4 (7.5)" in found.what
    assert codes(judged(recipe, *changes, *mended(recipe, found), around=around)) == []


def test_a_card_that_is_not_there_is_not_asked_for(recipe: Path) -> None:
    found = only(judged(recipe, "train.device=cuda"), "no-cuda")
    assert codes(judged(recipe, *mended(recipe, found))) == []


def test_an_extra_that_a_setting_needs_is_named(recipe: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    needs = ['bitsandbytes>=0.50; extra == "quant"', 'tensorboard; extra == "track"']
    plant_package(site, "finesight", "0.1.0", needs)
    about = site / "finesight-0.1.0.dist-info" / "METADATA"
    extras = "\nProvides-Extra: quant\nProvides-Extra: track\n"
    about.write_text(about.read_text().rstrip() + extras)
    around = replace(AROUND, packages=packages.gather([str(site)]))
    changes = ("tune.nf4=[language]", "track=tensorboard")
    found = [one for one in judged(recipe, *changes, around=around) if one.severity == "fault"]
    assert codes(found) == ["recipe-needs-extra", "recipe-needs-extra"]
    assert [shlex.split(one.remedy)[-1] for one in found] == [
        "finesight[quant]",
        "finesight[track]",
    ]
    plant_package(site, "bitsandbytes", "0.50.2")
    plant_package(site, "tensorboard", "2.21")
    around = replace(AROUND, packages=packages.gather([str(site)]))
    assert codes(judged(recipe, *changes, around=around)) == []


@pytest.mark.parametrize(
    ("place", "code"),
    [(replace(OUTPUT, free=1), "disk-full"), (replace(OUTPUT, writable=False), "not-writable")],
)
def test_an_output_that_takes_nothing_is_led_elsewhere(
    recipe: Path, place: Place, code: str
) -> None:
    found = only(judged(recipe, around=replace(AROUND, output=place)), code)
    assert str(load_recipe(recipe, mended(recipe, found)).output) != "/runs"


def test_data_that_are_missing_are_looked_for(recipe: Path) -> None:
    found = only(judged(recipe, "data.train=gone/train.jsonl"), "data-missing")
    assert shlex.split(found.remedy) == ["find", ".", "-name", "train.jsonl"]


def test_a_recipe_that_holds_nothing_out_is_told(recipe: Path) -> None:
    assert codes(judged(recipe, "data.eval=[]"), "hint") == ["not-measured"]


def test_a_damaged_model_of_a_recipe_is_found(recipe: Path) -> None:
    weights = Path(load_recipe(recipe).model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert codes(judged(recipe)) == ["model-weights"]


def test_a_broken_recipe_is_a_finding(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.write_text(recipe.read_text().replace("learning_rate", "lerning_rate"))
    ((section,)) = examine.examine_recipe(recipe)
    assert codes(section.findings) == ["recipe"]
    assert "learning_rate" in section.findings[0].why


def test_the_command_looks_at_a_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine.graphics, "ask_torch", lambda: T4)
    path = write_recipe(recipe, {**_content(recipe), "data": {"train": "gone.jsonl"}})
    ((section,)) = examine.examine(str(path))
    assert codes(section.findings) == ["data-missing"]


def _content(path: Path) -> dict[str, object]:
    return yaml.safe_load(path.read_text())
