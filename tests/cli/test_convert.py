"""Tests of the command `finesight convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from click.testing import Result
from convert_fixtures import LLAMA_FACTORY_SETTINGS, SWIFT_SETTINGS, load_converted_recipe
from image_fixtures import write_gray_image, write_jsonl
from typer.testing import CliRunner

from finesight.cli.data import import_data
from finesight.cli.training import convert
from finesight.errors import UserError

app = typer.Typer()
app.command("convert")(convert)
app.command("import")(import_data)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings = LLAMA_FACTORY_SETTINGS | {
        "use_dora": True,
        "flash_attn": "fa2",
        "plot_loss": True,
        "x\x1b[1m": 1,
    }
    Path("train.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_summary_is_printed(work_dir):
    result = run("convert", "train.yaml", "recipe.yaml")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "recipe.yaml: from LLaMA-Factory, train.yaml"
    assert "  use_dora true: this adapter type is not supported; LoRA is used" in lines
    assert "  flash_attn: finesight selects it automatically" in lines
    assert "  x\\x1b[1m 1: unknown setting of LLaMA-Factory: check whether it matters" in lines
    assert lines[-3:] == [
        "next:",
        "  finesight import data/tickets.json samples/tickets",
        "  finesight train recipe.yaml",
    ]
    assert "lora" in (work_dir / "recipe.yaml").read_text()


def test_json_output(work_dir):
    result = run("convert", "train.yaml", "recipe.yaml", "--json")
    done = json.loads(result.output)
    assert done["program"] == "LLaMA-Factory"
    assert done["recipe_text"] == (work_dir / "recipe.yaml").read_text()
    assert {"kind", "key", "value", "text"} == set(done["notes"][0])
    assert done["import_commands"] == ["finesight import data/tickets.json samples/tickets"]


def test_failed_conversion_writes_no_files(work_dir):
    Path("rm.yaml").write_text(yaml.safe_dump(LLAMA_FACTORY_SETTINGS | {"stage": "rm"}))
    result = run("convert", "rm.yaml", "recipe.yaml")
    assert isinstance(result.exception, UserError)
    assert sorted(path.name for path in work_dir.iterdir()) == ["rm.yaml", "train.yaml"]


def test_printed_import_commands_create_the_data(work_dir):
    write_gray_image(work_dir / "a.png")
    write_gray_image(work_dir / "b.png", gray_level=90)
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
    write_jsonl(work_dir / "tickets.jsonl", rows)
    Path("s.yaml").write_text(yaml.safe_dump(SWIFT_SETTINGS | {"split_dataset_ratio": 0.5}))
    done = json.loads(run("convert", "s.yaml", "recipe.yaml", "--json").output)
    for command in done["import_commands"]:
        words = command.split()
        assert words[:2] == ["finesight", "import"]
        assert run(*words[1:]).exit_code == 0
    data = load_converted_recipe(work_dir).data
    for file in (*data.train, *data.eval):
        assert Path(file.path).exists()
