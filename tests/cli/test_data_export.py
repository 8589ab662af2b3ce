"""Tests of the command `finesight data export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from image_fixtures import write_gray_image, write_jsonl
from typer.testing import CliRunner

from finesight.cli.app import app as finesight_app
from finesight.cli.data import export_data
from finesight.errors import UserError

app = typer.Typer()
app.command()(export_data)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    write_gray_image(tmp_path / "a.png")
    requested = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where?"}]
    answer = [{"type": "box", "label": "door", "xyxy": [1, 2, 30, 14]}]
    record = {
        "id": "1",
        "messages": [
            {"role": "user", "content": requested},
            {"role": "assistant", "content": answer},
        ],
        "references": ["There."],
    }
    return write_jsonl(tmp_path / "data.jsonl", [record])


def test_summary_is_printed(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(samples, out, "--to", "llama-factory")
    assert result.exit_code == 0, result.output
    assert f"{out}: 1 sample in the format llama-factory" in result.output
    assert f"{out / 'data.jsonl'}, {out / 'dataset_info.json'}" in result.output
    assert "not supported: 1 references" in result.output
    *_, last = result.output.splitlines()
    assert last == f"next: finesight check {out / 'data.jsonl'} --format llama-factory"
    commands = CliRunner().invoke(finesight_app, last.split()[2:])
    assert commands.exit_code == 0, commands.output
    assert "note: the boxes of 1 samples are JSON in the answers" in result.output


def test_json_output(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(samples, out, "--to", "ms-swift", "--copy-images", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.output)
    assert done.pop("notes")
    assert done == {
        "format": "ms-swift",
        "num_samples": 1,
        "files": [str(out / "data.jsonl")],
        "num_images": 1,
        "lost_counts": {"references": 1},
    }
    row = json.loads((out / "data.jsonl").read_text())
    assert row["images"] == ["images/a.png"]
    assert (out / "images" / "a.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "where"), [(["--to", "swift"], "--to"), (["--to", "image-path"], "")]
)
def test_invalid_export_is_rejected(
    samples: Path, tmp_path: Path, arguments: list[str], where: str
) -> None:
    messages = json.loads(samples.read_text())["messages"]
    messages[0]["content"].reverse()
    write_jsonl(samples, [{"id": "1", "messages": messages}])
    result = run(samples, tmp_path / "out", *arguments)
    assert isinstance(result.exception, UserError)
    assert result.exception.where == where
    assert not (tmp_path / "out").exists()


def test_format_is_required(samples: Path, tmp_path: Path) -> None:
    assert run(samples, tmp_path / "out").exit_code == 2


def test_help_has_an_example() -> None:
    assert "Example: finesight data export" in run("--help").output
