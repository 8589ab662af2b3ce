"""Tests of the command `finesight plan`: output and exit code."""

import json
from pathlib import Path

import pytest
from tiny_task import make_task, write_recipe


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(Path("recipe.yaml"), make_task(Path("task")) | {"output_dir": "run"})


def test_plan_is_printed(cli):
    before = Path("recipe.yaml").read_bytes()
    printed = cli("plan", "recipe.yaml", "--gpu", "T4")
    assert "target  T4 (data sheet): 16 GB" in printed.out
    assert "data    11 samples" in printed.out
    assert "samples/s" in printed.out
    assert printed.next_steps.startswith("finesight train recipe.yaml")
    assert Path("recipe.yaml").read_bytes() == before
    assert not Path("run").exists()


def test_json_output_with_overrides(cli):
    record = cli("plan", "recipe.yaml", "train.batch_size=2", "--gpu", "h100", "--json").json
    assert (record["batch_size"], record["target"]["name"]) == (2, "H100")
    assert record["recipe"]["fits"]
    assert record["chosen"]["allocated_gb"] > 0


def test_exit_code_2_if_no_settings_fit(cli):
    file = Path("task/tiny/config.json")
    config = json.loads(file.read_text())
    config.get("text_config", config)["vocab_size"] = 2_000_000_000
    file.write_text(json.dumps(config))
    printed = cli("plan", "recipe.yaml", "--gpu", "T4", code=2)
    assert "does not fit: needs " in printed.out
    assert "T4 has 16 GB; try smaller images" in printed.out
    assert not printed.next_steps
