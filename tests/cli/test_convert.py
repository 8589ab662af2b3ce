"""Tests of the command `finesight convert`."""

import json
from pathlib import Path

import pytest
import yaml
from convert_fixtures import LLAMA_FACTORY_SETTINGS, SWIFT_SETTINGS, load_converted_recipe
from image_fixtures import write_gray_image, write_jsonl

ODD_SETTINGS = {"use_dora": True, "flash_attn": "fa2", "plot_loss": True, "x\x1b[1m": 1}


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(yaml.safe_dump(LLAMA_FACTORY_SETTINGS | ODD_SETTINGS))
    return tmp_path


def test_summary_is_printed(work_dir, cli):
    printed = cli("convert", "train.yaml", "recipe.yaml")
    lines = printed.lines
    assert lines[0] == "recipe.yaml: from LLaMA-Factory, train.yaml"
    assert "  use_dora true: this adapter type is not supported; LoRA is used" in lines
    assert "  flash_attn: finesight selects it automatically" in lines
    assert "  x\\x1b[1m 1: unknown setting of LLaMA-Factory: check whether it matters" in lines
    command = "finesight import data/tickets.json samples/tickets"
    assert printed.err == f"next:\n  {command}\n  finesight train recipe.yaml\n"
    assert "lora" in Path("recipe.yaml").read_text()
    done = json.loads(cli("convert", "train.yaml", "second.yaml", "--json").out)
    assert done["program"] == "LLaMA-Factory"
    assert done["recipe_text"] == Path("second.yaml").read_text()
    assert {"kind", "key", "value", "text"} == set(done["notes"][0])
    assert done["import_commands"] == [command]


def test_failed_conversion_writes_no_files(work_dir, cli):
    Path("rm.yaml").write_text(yaml.safe_dump(LLAMA_FACTORY_SETTINGS | {"stage": "rm"}))
    cli("convert", "rm.yaml", "recipe.yaml", code=2)
    assert sorted(path.name for path in work_dir.iterdir()) == ["rm.yaml", "train.yaml"]


def test_printed_import_commands_create_the_data(work_dir, cli):
    rows = []
    for number, name in enumerate(("a.png", "b.png")):
        write_gray_image(Path(name), gray_level=90 * number)
        question = {"role": "user", "content": "<image>What is it?"}
        answer = {"role": "assistant", "content": f"Number {number}."}
        rows.append({"messages": [question, answer], "images": [name]})
    write_jsonl(Path("tickets.jsonl"), rows)
    Path("s.yaml").write_text(yaml.safe_dump(SWIFT_SETTINGS | {"split_dataset_ratio": 0.5}))
    for command in cli("convert", "s.yaml", "recipe.yaml", "--json").json["import_commands"]:
        words = command.split()
        assert words[:2] == ["finesight", "import"]
        cli(*words[1:])
    data = load_converted_recipe(work_dir).data
    assert all(Path(file.path).exists() for file in (*data.train, *data.eval))
