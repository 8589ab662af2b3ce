"""`finesight convert`, through its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from click.testing import Result
from converting import FACTORY, SWIFT, recipe_of
from scenery import paint, write_jsonl
from typer.testing import CliRunner

from finesight.cli.convert import convert
from finesight.cli.data_import import import_data
from finesight.errors import UserError

app = typer.Typer()
app.command("convert")(convert)
app.command("import")(import_data)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings = FACTORY | {"use_dora": True, "flash_attn": "fa2", "plot_loss": True, "x\x1b[1m": 1}
    Path("train.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_says_what_it_did(here):
    result = run("convert", "train.yaml", "recipe.yaml")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "recipe.yaml: from LLaMA-Factory, train.yaml"
    assert "  use_dora true: no such adapters here: they become plain LoRA" in lines
    assert "  flash_attn: planned by finesight itself" in lines
    assert "  x\\x1b[1m 1: not known of LLaMA-Factory: see whether it matters" in lines
    assert lines[-3:] == [
        "next:",
        "  finesight data import data/tickets.json samples/tickets",
        "  finesight train recipe.yaml",
    ]
    assert "lora" in (here / "recipe.yaml").read_text()


def test_json(here):
    result = run("convert", "train.yaml", "recipe.yaml", "--json")
    done = json.loads(result.output)
    assert done["program"] == "LLaMA-Factory"
    assert done["recipe"] == (here / "recipe.yaml").read_text()
    assert {"kind", "key", "value", "text"} == set(done["remarks"][0])
    assert done["imports"] == ["finesight data import data/tickets.json samples/tickets"]


def test_refusals_write_nothing(here):
    Path("dpo.yaml").write_text(yaml.safe_dump(FACTORY | {"stage": "dpo"}))
    result = run("convert", "dpo.yaml", "recipe.yaml")
    assert isinstance(result.exception, UserError)
    assert sorted(path.name for path in here.iterdir()) == ["dpo.yaml", "train.yaml"]


def test_the_commands_that_it_prints_make_the_recipes_data(here):
    paint(here / "a.png")
    paint(here / "b.png", shade=90)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>What is it?"},
                {"role": "assistant", "content": f"Number {number}."},
            ],
            "images": [f"{name}.png"],
        }
        for number, name in enumerate("ab")
    ]
    write_jsonl(here / "tickets.jsonl", rows)
    Path("s.yaml").write_text(yaml.safe_dump(SWIFT | {"split_dataset_ratio": 0.5}))
    done = json.loads(run("convert", "s.yaml", "recipe.yaml", "--json").output)
    for command in done["imports"]:
        words = command.split()
        assert words[:3] == ["finesight", "data", "import"]
        assert run(*words[2:]).exit_code == 0
    data = recipe_of(here).data
    for file in (*data.train, *data.eval):
        assert Path(file.path).exists()
