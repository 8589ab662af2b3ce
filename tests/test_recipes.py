"""The shipped recipes: short, loadable, and prepared by the very commands in their comments."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from each_value import each
from PIL import Image

from finesight.cli.app import run_command
from finesight.data.sample import BoxPart, read_samples
from finesight.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def _commands(recipe: Path) -> list[list[str]]:
    """The commands in a recipe's comments, without the word finesight."""
    comments = [line[1:] for line in recipe.read_text().splitlines() if line.startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(comments))
    return [shlex.split(line)[1:] for line in text.splitlines() if line.strip()[:9] == "finesight"]


CASES = [
    pytest.param(recipe, command, id=f"{recipe.stem}-{command[2]}")
    for recipe in RECIPES
    for command in _commands(recipe)
]


@pytest.fixture
def source_data_folder(tmp_path, monkeypatch):
    """A working folder with small files of the names and columns that the comments speak of."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(400):
        path = f"images/{number}.png"
        Path(path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (number % 256, number // 256, 0)).save(path)
        row = {"image_path": path, "text": f"x ^ {number}", "caption": f"Number {number}."}
        rows.append(row | {"number": str(number), "date": "2 May 2026", "total": f"${number}.00"})
    for name in ("coco.csv", "latex_ocr_train.csv", "invoices.csv"):
        with Path(name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    questions = {
        "data_vl.json": "COCO Yes: <|vision_start|>{image_path}<|vision_end|>",
        "dataset.json": "COCO Yes: <|vision_start|>{image_path}<|vision_end|>",
        # As the first Qwen-VL's script reads them.
        "chat.json": "Picture 1: <img>{image_path}</img>\nWhat is it?",
    }
    for name, question in questions.items():
        examples = [_conversation(row, question.format_map(row)) for row in rows]
        Path(name).write_text(json.dumps(examples))
    _write_parquet(rows)
    return tmp_path


def _conversation(row: dict[str, str], question: str) -> dict[str, object]:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": row["caption"]}]
    return {"id": row["image_path"], "conversations": turns}


def _write_parquet(rows: list[dict[str, str]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {
        "image": [{"bytes": Path(row["image_path"]).read_bytes(), "path": None} for row in rows],
        "question": ["Where is it?"] * len(rows),
        "bbox": [[3.0, 4.0, 20.0, 10.0]] * len(rows),
    }
    parquet.write_table(pyarrow.table(table), "textvqa.parquet")


@each("recipe", RECIPES)
def test_recipe_is_valid(recipe):
    loaded = load_recipe(recipe)
    assert loaded.data.eval, f"{recipe} has no validation data"
    assert loaded.eval is not None, f"{recipe} measures nothing"
    assert _commands(recipe), f"{recipe} does not say how to prepare its data"


@pytest.mark.parametrize(("recipe", "command"), CASES)
def test_commands_in_comments_prepare_the_data(recipe, command, source_data_folder):
    assert run_command(command) == 0
    data = load_recipe(recipe).data
    train = read_samples(data.train[0].path)
    validation = read_samples(data.eval[0].path)
    assert len(train) + len(validation) == 400
    answer = train[0].messages[-1].content[0]
    metric = load_recipe(recipe).eval.metric
    if metric == "grounding":
        assert isinstance(answer, BoxPart)
        assert answer.xyxy == (3.0, 4.0, 23.0, 14.0)
    elif metric == "json":
        fields = json.loads(answer.text)
        assert fields["total"] == f"${fields['number']}.00"
        assert list(fields) == ["number", "date", "total"]
    else:
        assert answer.text.startswith(("x ^", "Number"))
