"""`finesight data export`, through its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from scenery import paint, write_jsonl
from typer.testing import CliRunner

from finesight.cli.data_export import export_data
from finesight.errors import UserError

app = typer.Typer()
app.command()(export_data)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    paint(tmp_path / "a.png")
    asked = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where?"}]
    answer = [{"type": "box", "label": "door", "xyxy": [1, 2, 30, 14]}]
    record = {
        "id": "1",
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        "references": ["There."],
    }
    return write_jsonl(tmp_path / "data.jsonl", [record])


def test_says_what_it_did(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(samples, out, "--to", "llama-factory")
    assert result.exit_code == 0, result.output
    assert f"{out}: 1 samples in the format llama-factory" in result.output
    assert f"{out / 'data.jsonl'}, {out / 'dataset_info.json'}" in result.output
    assert "no place for: 1 references" in result.output
    assert "note: the boxes of 1 samples are JSON in the answers" in result.output


def test_json(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(samples, out, "--to", "ms-swift", "--copy-pictures", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.output)
    assert done.pop("notes")
    assert done == {
        "format": "ms-swift",
        "samples": 1,
        "files": [str(out / "data.jsonl")],
        "pictures": 1,
        "lost": {"references": 1},
    }
    row = json.loads((out / "data.jsonl").read_text())
    assert row["images"] == ["pictures/a.png"]
    assert (out / "pictures" / "a.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "where"), [(["--to", "swift"], "--to"), (["--to", "picture-path"], "")]
)
def test_refused(samples: Path, tmp_path: Path, arguments: list[str], where: str) -> None:
    messages = json.loads(samples.read_text())["messages"]
    messages[0]["content"].reverse()
    write_jsonl(samples, [{"id": "1", "messages": messages}])
    result = run(samples, tmp_path / "out", *arguments)
    assert isinstance(result.exception, UserError)
    assert result.exception.where == where
    assert not (tmp_path / "out").exists()


def test_the_format_is_asked_for(samples: Path, tmp_path: Path) -> None:
    assert run(samples, tmp_path / "out").exit_code == 2


def test_help_has_an_example() -> None:
    assert "Example: finesight data export" in run("--help").output
