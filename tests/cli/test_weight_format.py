"""Tests of `--weight-format` for inference commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from click.testing import Result
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model
from typer.testing import CliRunner

from finesight.cli.results import evaluate, predict
from finesight.data.sample import write_samples
from finesight.errors import UserError
from finesight.infer.engine import generate
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import build_questions
from finesight.model_folder import ModelFolder

FORMATS = ("nf4", "fp8", "int8", "int4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise_image(tmp_path_factory.mktemp("images") / "a.png", 80, 60)


def run_command(command: Callable[..., None], *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", FORMATS)
def test_predict_uses_weight_format(kind: str, tiny: Path, image_path: Path) -> None:
    options = ("--prompt", "What?", "--max-new-tokens", 12, "--json", "--device", "cpu")
    result = run_command(predict, tiny, image_path, *options, "--weight-format", kind)
    assert result.exit_code == 0, result.output
    answerer = load_inference_model(str(tiny), "cpu", "auto", kind)
    prompt = answerer.renderer.encode_prompt(build_questions([image_path], "What?")[0])
    ends = answerer.renderer.end_ids
    (ids,) = generate(answerer.model, [prompt], max_new_tokens=12, end_ids=ends)
    raw = json.loads(result.stdout)["raw_text"]
    assert raw == answerer.renderer.decode_completion(ids).raw_text
    # With random weights, 4-bit quantization changes every answer.
    baseline = json.loads(run_command(predict, tiny, image_path, *options).stdout)["raw_text"]
    assert kind not in ("nf4", "int4") or raw != baseline


@pytest.mark.parametrize("kind", FORMATS)
def test_eval_uses_weight_format(kind: str, tiny: Path, image_path: Path) -> None:
    data = image_path.parent / f"{kind}.jsonl"
    write_samples(
        data, [make_sample("s", image_path.parent, "a.png", "What?", answer="That.").sample]
    )
    named = ("--data", data, "--metric", "ocr", "--max-new-tokens", 3, "--device", "cpu")
    result = run_command(evaluate, tiny, *named, "--weight-format", kind, "--json")
    assert result.exit_code == 0, result.output
    assert "cer" in result.stdout


@pytest.mark.parametrize("command", [predict, evaluate])
def test_moe_model_is_rejected(command: Callable[..., None], tmp_path: Path) -> None:
    folder = ModelFolder(create_tiny_model(tmp_path / "experts", "qwen3_vl_moe"))
    write_noise_image(tmp_path / "a.png", 80, 60)
    data = tmp_path / "data.jsonl"
    write_samples(data, [make_sample("s", tmp_path, "a.png", "What?", answer="That.").sample])
    metric = ("--metric", "ocr") if command is evaluate else ()
    result = run_command(command, folder.path, "--data", data, *metric, "--weight-format", "nf4")
    assert isinstance(result.exception, UserError), result.output
    assert result.exception.where == "--weight-format"
    assert "leave --weight-format nf4 out for experts" in result.exception.remedy


@pytest.mark.parametrize("command", [predict, evaluate])
def test_unknown_weight_format_is_rejected(command: Callable[..., None], tiny: Path) -> None:
    result = run_command(command, tiny, "--weight-format", "int3")
    assert result.exit_code == 2
    assert "int3" in result.output
