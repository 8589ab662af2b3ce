"""--weights of the commands that answer: what is loaded is what was named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from asking import ask, noise
from click.testing import Result
from typer.testing import CliRunner

from finesight.cli.evaluate import evaluate
from finesight.cli.predict import predict
from finesight.data.jsonl import write_samples
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer.generate import generate
from finesight.infer.load import load_answerer
from finesight.infer.predict import questions
from finesight.model.tiny import make_tiny

FEW = ("nf4", "fp8", "int8", "int4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("pictures") / "a.png", 80, 60)


def _run(command: Callable[..., None], *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", FEW)
def test_predict_answers_with_the_weights_named(kind: str, tiny: Path, picture: Path) -> None:
    options = ("--prompt", "What?", "--max-new-tokens", 12, "--json", "--device", "cpu")
    result = _run(predict, tiny, picture, *options, "--weights", kind)
    assert result.exit_code == 0, result.output
    answerer = load_answerer(str(tiny), "cpu", "auto", kind)
    prompt = answerer.renderer.prompt(questions([picture], "What?")[0])
    ends = answerer.renderer.end_ids
    (ids,) = generate(answerer.model, [prompt], max_new_tokens=12, end_ids=ends)
    raw = json.loads(result.stdout)["raw"]
    assert raw == answerer.renderer.answer(ids).raw
    # Of random weights, four bits turn every answer into another one.
    plain = json.loads(_run(predict, tiny, picture, *options).stdout)["raw"]
    assert kind not in ("nf4", "int4") or raw != plain


@pytest.mark.parametrize("kind", FEW)
def test_eval_scores_with_the_weights_named(kind: str, tiny: Path, picture: Path) -> None:
    data = picture.parent / f"{kind}.jsonl"
    write_samples(data, [ask("s", picture.parent, "a.png", "What?", answer="That.").sample])
    named = ("--data", data, "--metric", "ocr", "--max-new-tokens", 3, "--device", "cpu")
    result = _run(evaluate, tiny, *named, "--weights", kind, "--json")
    assert result.exit_code == 0, result.output
    assert "cer" in result.stdout


@pytest.mark.parametrize("command", [predict, evaluate])
def test_what_has_experts_is_refused(command: Callable[..., None], tmp_path: Path) -> None:
    folder = ModelFolder(make_tiny(tmp_path / "experts", "qwen3_vl_moe"))
    noise(tmp_path / "a.png", 80, 60)
    data = tmp_path / "data.jsonl"
    write_samples(data, [ask("s", tmp_path, "a.png", "What?", answer="That.").sample])
    metric = ("--metric", "ocr") if command is evaluate else ()
    result = _run(command, folder.path, "--data", data, *metric, "--weights", "nf4")
    assert isinstance(result.exception, UserError), result.output
    assert result.exception.where == "--weights"
    assert "leave --weights nf4 out for experts" in result.exception.remedy


@pytest.mark.parametrize("command", [predict, evaluate])
def test_kinds_that_there_are_not_are_refused(command: Callable[..., None], tiny: Path) -> None:
    result = _run(command, tiny, "--weights", "int3")
    assert result.exit_code == 2
    assert "int3" in result.output
