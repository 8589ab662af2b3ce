"""Tests of the detection of recipes among YAML files."""

import os

import pytest
import yaml

from finesight.app import recipe_detector
from finesight.app.recipe_detector import RecipeDetector, YamlBudget

RECIPE = "model: m\ndata: {train: a.jsonl}\n"


@pytest.fixture
def detector():
    detector = RecipeDetector()
    detector.start_page()
    return detector


@pytest.mark.parametrize(
    ("text", "is_recipe"),
    [
        (RECIPE, True),
        ("model: m\ndata: {train: [a, b], eval: c}\nunknown: 1\n", True),
        ("model: m\n", False),
        ("[model, data]", False),
        ("", False),
        ("model: [\n", False),
        ("model: m\ndata: &a [*a]\n", False),
        (f"{RECIPE}x: {list(range(6000))}\n", False),
        (RECIPE + "#" * 100_000, False),
    ],
)
def test_recipe_has_a_model_and_data(tmp_path, detector, text, is_recipe):
    (tmp_path / "a.yaml").write_text(text)
    assert detector.is_recipe(tmp_path / "a.yaml") == is_recipe


def test_missing_and_special_files_are_no_recipes(tmp_path, detector):
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "missing.yaml", "."):
        assert not detector.is_recipe(tmp_path / name)


def test_further_files_are_parsed_for_the_next_page(tmp_path, detector, monkeypatch):
    files = [tmp_path / f"{number}.yaml" for number in range(6)]
    for file in files:
        file.write_text(RECIPE)
    # Each recipe has 7 values with its keys and groups.
    monkeypatch.setattr(recipe_detector, "MAX_PAGE_VALUES", 10)
    for num_found in (2, 4, 6):
        detector.start_page()
        assert sum(map(detector.is_recipe, files)) == num_found
    files[0].write_text("model: m\n")
    assert not detector.is_recipe(files[0])


def test_broken_files_count_as_well(tmp_path, detector, monkeypatch):
    for number in range(5):
        (tmp_path / f"{number}.yaml").write_text("[a, " * 20)
    (tmp_path / "a.yaml").write_text(RECIPE)
    monkeypatch.setattr(recipe_detector, "MAX_PAGE_VALUES", 100)
    detector.start_page()
    assert not any(detector.is_recipe(tmp_path / f"{number}.yaml") for number in range(5))
    assert not detector.is_recipe(tmp_path / "a.yaml")
    detector.start_page()
    assert detector.is_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(("text", "num_parsed"), [(RECIPE, 2), ("[a, ", 0)])
def test_budget_ends_after_the_values_of_several_texts(text, num_parsed):
    budget = YamlBudget(8)
    for _ in range(num_parsed):
        assert not budget.is_used_up
        assert budget.compose(text).num_values == 7
    for _ in range(3):
        with pytest.raises(yaml.YAMLError):
            budget.compose(text)
    assert budget.is_used_up
    with pytest.raises(yaml.YAMLError, match="too many values of several recipes"):
        budget.compose("a")
