from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from asking import ask, noise
from click.testing import Result
from typer.testing import CliRunner

from finesight.cli.predict import predict
from finesight.data.jsonl import write_samples
from finesight.errors import UserError
from finesight.model.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return noise(folder / "a.png", 80, 60), noise(folder / "b.png", 60, 120, seed=1)


def _run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(predict)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _refusal(*arguments: object) -> UserError:
    result = _run(*arguments)
    assert isinstance(result.exception, UserError), result.output
    error = result.exception
    assert all((error.what, error.where, error.expected, error.remedy))
    return error


def test_each_picture_is_a_line_of_json(tiny, pictures):
    result = _run(
        tiny, *pictures, "--prompt", "What?", "--max-new-tokens", 5, "--json", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in pictures]
    assert all(set(line) >= {"image", "prompt", "answer", "raw", "boxes"} for line in lines)
    assert all(line["prompt"] == "What?" for line in lines)


def test_text_for_people(tiny, pictures):
    result = _run(tiny, pictures[0], "--prompt", "What?", "--max-new-tokens", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{pictures[0]}: ")


def test_samples_of_a_file_are_answered(tiny, pictures):
    data = pictures[0].parent / "data.jsonl"
    folder = data.parent
    asked = [ask("s0", folder, "a.png", "b.png", "Same?"), ask("s1", folder, "Why?", answer="So.")]
    write_samples(data, [sample.sample for sample in asked])
    result = _run(tiny, "--data", data, "--max-new-tokens", 3, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["id"] for line in lines] == ["s0", "s1"]
    assert lines[0]["image"] == [str(path) for path in pictures]
    assert lines[1]["image"] is None


def test_pictures_are_drawn_on_request(tiny, pictures, tmp_path):
    result = _run(
        tiny,
        *(pictures[0], "--prompt", "Where?", "--max-new-tokens", 2, "--device", "cpu"),
        *("--draw", tmp_path / "drawn"),
    )
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["a.png"]
    assert str(tmp_path / "drawn/a.png") in result.stderr


def test_what_is_asked_must_be_clear(tiny, pictures, tmp_path):
    assert "--prompt" in str(_refusal(tiny, pictures[0]))
    assert "--data" in str(_refusal(tiny, "--prompt", "What?", "--data", tmp_path / "x.jsonl"))
    assert "1 pictures" in str(_refusal(tiny, pictures[0], "--data", tmp_path / "x.jsonl"))


def test_bad_input_is_refused(tiny, pictures, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "model").mkdir()
    ask_what = ("--prompt", "What?")
    assert "no such picture" in str(_refusal(tiny, tmp_path / "gone.png", *ask_what))
    assert "not a picture" in str(_refusal(tiny, tmp_path / "text.png", *ask_what))
    assert "holds no samples" in str(_refusal(tiny, "--data", tmp_path / "empty.jsonl"))
    assert "no config.json" in str(_refusal(tmp_path / "model", pictures[0], *ask_what))
    assert "gone" in str(_refusal(tmp_path / "gone", pictures[0], *ask_what))


def test_a_file_in_place_of_the_drawings_is_a_usage_error(tiny, pictures):
    result = _run(tiny, pictures[0], "--prompt", "What?", "--draw", pictures[1])
    assert result.exit_code == 2
    assert "--draw" in result.output


def test_less_than_one_token_is_a_usage_error(tiny, pictures):
    assert _run(tiny, pictures[0], "--prompt", "What?", "--max-new-tokens", 0).exit_code == 2
