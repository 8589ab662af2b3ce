"""`finesight data plan`, from a recipe to its lines and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import make_task, write_recipe
from typer.testing import CliRunner, Result

from finesight.cli.app import data


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path / "recipe.yaml", make_task(tmp_path) | {"output": str(tmp_path / "run")}
    )


def planned(recipe: Path, *words: str) -> Result:
    return CliRunner().invoke(data, ["plan", str(recipe), *words], catch_exceptions=False)


def test_lines(recipe: Path) -> None:
    before = recipe.read_bytes()
    found = planned(recipe, "--gpu", "T4")
    assert found.exit_code == 0
    assert "target  T4, by its data sheet: 16 GB" in found.stdout
    assert "data    11 samples" in found.stdout
    assert "samples/s" in found.stdout
    assert recipe.read_bytes() == before
    assert not (recipe.parent / "run").exists()


def test_json_with_settings_in_place_of_the_recipe_s(recipe: Path) -> None:
    found = planned(recipe, "train.batch=2", "--gpu", "h100", "--json")
    record = json.loads(found.stdout)
    assert record["batch"] == 2
    assert record["target"]["name"] == "H100"
    assert record["written"]["fits"]
    assert record["chosen"]["memory_gb"] > 0


def test_what_nothing_makes_fit_ends_with_2(recipe: Path) -> None:
    file = recipe.parent / "tiny" / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config)["vocab_size"] = 2_000_000_000
    file.write_text(json.dumps(config))
    found = planned(recipe, "--gpu", "T4")
    assert found.exit_code == 2
    assert "does not fit: needs " in found.stdout
    assert "T4 has 16; try smaller pictures" in found.stdout
