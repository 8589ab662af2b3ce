from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model
from typer.testing import CliRunner
from video_fixtures import write_video

from finesight.cli.results import predict
from finesight.data.sample import write_samples
from finesight.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("images")
    return write_noise_image(folder / "a.png", 80, 60), write_noise_image(
        folder / "b.png", 60, 120, seed=1
    )


def run_predict(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(predict)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_rejected(*arguments: object) -> UserError:
    result = run_predict(*arguments)
    assert isinstance(result.exception, UserError), result.output
    error = result.exception
    assert all((error.what, error.where, error.expected, error.remedy))
    return error


def test_one_json_line_per_image(tiny, image_paths):
    result = run_predict(
        tiny, *image_paths, "--prompt", "What?", "--max-new-tokens", 5, "--json", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in image_paths]
    assert all(set(line) >= {"image", "prompt", "answer", "raw_text", "boxes"} for line in lines)
    assert all(line["prompt"] == "What?" for line in lines)


def test_video_files_are_accepted(tiny, image_paths, tmp_path):
    clip = write_video(tmp_path / "clip.webm", codec="libvpx-vp9")
    ask = (tiny, clip, image_paths[0], "--prompt", "What?", "--max-new-tokens", 3)
    result = run_predict(*ask, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    video, image = (json.loads(line) for line in result.stdout.splitlines())
    assert (video["id"], video["image"]) == (str(clip), None)
    assert image["image"] == str(image_paths[0])
    lines = run_predict(*ask, "--device", "cpu").stdout.splitlines()
    assert lines[0].startswith(f"{clip}: ")
    clip.write_bytes(clip.read_bytes()[:300])
    assert run_rejected(*ask, "--device", "cpu").where == str(clip)


def test_thinking_mode_is_selected(image_paths, tmp_path):
    model = create_tiny_model(tmp_path / "qwen3_5", "qwen3_5")
    ask = (model, image_paths[0], "--prompt", "What?", "--max-new-tokens", 3, "--device", "cpu")
    for options, has_reasoning in (
        ((), False),
        (("--thinking",), True),
        (("--no-thinking",), False),
    ):
        result = run_predict(*ask, *options, "--json")
        assert result.exit_code == 0, result.output
        assert ("reasoning" in json.loads(result.stdout)) == has_reasoning
    assert "no reasoning effort" in run_rejected(*ask, "--reasoning-effort", "low").expected


def test_model_without_thinking_rejects_the_mode(tiny):
    error = run_rejected(tiny, "--prompt", "What?", "--thinking", "--device", "cpu")
    assert "non-thinking mode" in error.expected


def test_text_output(tiny, image_paths):
    result = run_predict(
        tiny, image_paths[0], "--prompt", "What?", "--max-new-tokens", 2, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{image_paths[0]}: ")


def test_samples_of_data_file_are_answered(tiny, image_paths):
    data = image_paths[0].parent / "data.jsonl"
    folder = data.parent
    requested = [
        make_sample("s0", folder, "a.png", "b.png", "Same?"),
        make_sample("s1", folder, "Why?", answer="So."),
    ]
    write_samples(data, [sample.sample for sample in requested])
    result = run_predict(tiny, "--data", data, "--max-new-tokens", 3, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["id"] for line in lines] == ["s0", "s1"]
    assert lines[0]["image"] == [str(path) for path in image_paths]
    assert lines[1]["image"] is None


def test_annotated_images_are_written(tiny, image_paths, tmp_path):
    result = run_predict(
        tiny,
        *(image_paths[0], "--prompt", "Where?", "--max-new-tokens", 2, "--device", "cpu"),
        *("--draw", tmp_path / "drawn"),
    )
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["a.png"]
    assert str(tmp_path / "drawn/a.png") in result.stderr


def test_ambiguous_arguments_are_rejected(tiny, image_paths, tmp_path):
    assert "--prompt" in str(run_rejected(tiny, image_paths[0]))
    assert "--data" in str(run_rejected(tiny, "--prompt", "What?", "--data", tmp_path / "x.jsonl"))
    assert "1 image" in str(run_rejected(tiny, image_paths[0], "--data", tmp_path / "x.jsonl"))


def test_bad_input_is_rejected(tiny, image_paths, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "model").mkdir()
    ask_what = ("--prompt", "What?")
    assert "no such image" in str(run_rejected(tiny, tmp_path / "gone.png", *ask_what))
    assert "not an image" in str(run_rejected(tiny, tmp_path / "text.png", *ask_what))
    assert "contains no samples" in str(run_rejected(tiny, "--data", tmp_path / "empty.jsonl"))
    assert "no config.json" in str(run_rejected(tmp_path / "model", image_paths[0], *ask_what))
    assert "gone" in str(run_rejected(tmp_path / "gone", image_paths[0], *ask_what))


def test_draw_file_is_a_usage_error(tiny, image_paths):
    result = run_predict(tiny, image_paths[0], "--prompt", "What?", "--draw", image_paths[1])
    assert result.exit_code == 2
    assert "--draw" in result.output


def test_zero_max_new_tokens_is_a_usage_error(tiny, image_paths):
    assert (
        run_predict(tiny, image_paths[0], "--prompt", "What?", "--max-new-tokens", 0).exit_code == 2
    )
