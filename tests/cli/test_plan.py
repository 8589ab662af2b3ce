"""Tests of the command `finesight plan`: output and exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_task import make_task, write_recipe
from typer.testing import CliRunner, Result

from finesight.cli.app import app


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path / "recipe.yaml", make_task(tmp_path) | {"output_dir": str(tmp_path / "run")}
    )


def run_plan(recipe: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["plan", str(recipe), *words], catch_exceptions=False)


def test_plan_is_printed(recipe: Path) -> None:
    before = recipe.read_bytes()
    found = run_plan(recipe, "--gpu", "T4")
    assert found.exit_code == 0
    assert "target  T4 (data sheet): 16 GB" in found.stdout
    assert "data    11 samples" in found.stdout
    assert "samples/s" in found.stdout
    assert found.stdout.splitlines()[-1].startswith(f"next: finesight train {recipe}")
    assert recipe.read_bytes() == before
    assert not (recipe.parent / "run").exists()


def test_json_output_with_overrides(recipe: Path) -> None:
    found = run_plan(recipe, "train.batch_size=2", "--gpu", "h100", "--json")
    record = json.loads(found.stdout)
    assert record["batch_size"] == 2
    assert record["target"]["name"] == "H100"
    assert record["recipe"]["fits"]
    assert record["chosen"]["allocated_gb"] > 0


def test_exit_code_2_if_no_settings_fit(recipe: Path) -> None:
    file = recipe.parent / "tiny" / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config)["vocab_size"] = 2_000_000_000
    file.write_text(json.dumps(config))
    found = run_plan(recipe, "--gpu", "T4")
    assert found.exit_code == 2
    assert "does not fit: needs " in found.stdout
    assert "T4 has 16 GB; try smaller images" in found.stdout
    assert "next:" not in found.stdout
