"""An overfitted run reproduces its answers.

This requires consistent tokens, loss masks, positions, end tokens, exported weights and manifest
settings between training and prediction.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import typer
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model
from typer.testing import CliRunner

from finesight.cli.results import predict
from finesight.config import EvalSettings, Recipe
from finesight.data.sample import BoxPart, LocatedSample, TextPart, write_samples
from finesight.evaluate.generation_eval import evaluate
from finesight.infer.model_loader import load_inference_model
from finesight.train.training_run import train

SIZES = [(84, 56), (56, 56), (112, 56), (56, 112)]
CHARACTERS = "abcxyz0123456789+-=^_{}\\ é"
STEPS = 130


def _samples(folder: Path) -> list[LocatedSample]:
    """Write noise images, three of each size, with formulas of all lengths and boxes as answers.

    Only the image determines the correct answer.
    """
    chance = random.Random(0)
    samples = []
    for i in range(12):
        width, height = SIZES[i % len(SIZES)]
        write_noise_image(folder / f"{i}.png", width, height, seed=i)
        answer: str | BoxPart = "x" + "".join(chance.choices(CHARACTERS, k=3 * i)) + "."
        if i >= 9:
            answer = BoxPart(label=f"thing {i}", xyxy=(i, i + 1, width - 2 * i, height - i))
        samples.append(make_sample(str(i), folder, f"{i}.png", "Read it.", answer=answer))
    return samples


def _recipe(folder: Path, family: str, tune: dict[str, object]) -> Recipe:
    # The first Qwen-VL supports only its own image size.
    image = {} if family == "qwen" else {"image": {"longest_side": 112}}
    return Recipe.model_validate(
        {
            "model": str(folder / "tiny"),
            "data": {"train": str(folder / "train.jsonl"), "system_prompt": "Be exact."},
            **image,
            "tune": tune,
            "train": {
                "steps": STEPS,
                "batch_size": 12,
                "learning_rate": 4e-3,
                "device": "cpu",
                "num_workers": 0,
            },
            "output_dir": str(folder / "run"),
        }
    )


FULL = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}
LORA = {"rank": 32, "alpha": 32.0, "dropout": 0.0}


@pytest.mark.parametrize(
    ("family", "tune"),
    [
        ("qwen2_vl", FULL),
        ("qwen2_5_vl", FULL | {"language": "lora", "lora": LORA}),
        ("qwen3_vl", FULL),
        ("qwen3_vl", FULL | {"language": "lora", "lora": LORA}),
        ("qwen", FULL),
        ("qwen", FULL | {"language": "lora", "lora": LORA}),
    ],
    ids=[
        "qwen2_vl-full",
        "qwen2_5_vl-lora",
        "qwen3_vl-full",
        "qwen3_vl-lora",
        "qwen-full",
        "qwen-lora",
    ],
)
def test_overfitted_run_generates_its_samples(tmp_path, family, tune):
    create_tiny_model(tmp_path / "tiny", family)
    samples = _samples(tmp_path)
    write_samples(tmp_path / "train.jsonl", [sample.sample for sample in samples])
    result = train(_recipe(tmp_path, family, tune))
    assert result.loss is not None
    assert result.loss < 0.1

    app = typer.Typer()
    app.command()(predict)
    images = [str(tmp_path / f"{i}.png") for i in range(12)]
    predicted = CliRunner().invoke(
        app, [result.run_dir, *images, "--prompt", "Read it.", "--json", "--device", "cpu"]
    )
    assert predicted.exit_code == 0, predicted.output
    for sample, line in zip(samples, predicted.stdout.splitlines(), strict=True):
        found = json.loads(line)
        (right,) = sample.sample.messages[-1].content
        assert found["raw_text"].endswith("<|im_end|>")
        if isinstance(right, TextPart):
            assert found["answer"] == right.text
            assert found["boxes"] == []
        else:
            (box,) = found["boxes"]
            assert box["label"] == right.label
            # The family uses thousandths or whole pixels of the resized image.
            assert box["xyxy"] == pytest.approx(right.xyxy, abs=0.51)


def test_reasoning_model_separates_reasoning_from_answer(tmp_path):
    create_tiny_model(tmp_path / "tiny", "qwen3_vl")
    (tmp_path / "tiny" / "chat_template.jinja").write_text("{{ '<think>' }}")
    samples = []
    for i in range(6):
        write_noise_image(tmp_path / f"{i}.png", 64, 64, seed=i)
        thought = f"<think>\nIt is {i}.\n</think>\n\n" if i % 2 else ""
        answer = f"{thought}Number {i}"
        samples.append(make_sample(str(i), tmp_path, f"{i}.png", "Read it.", answer=answer))
    write_samples(tmp_path / "train.jsonl", [sample.sample for sample in samples])
    result = train(_recipe(tmp_path, "qwen3_vl", FULL))

    images = [str(tmp_path / f"{i}.png") for i in range(6)]
    app = typer.Typer()
    app.command()(predict)
    words = [result.run_dir, *images, "--prompt", "Read it.", "--device", "cpu"]
    predicted = CliRunner().invoke(app, [*words, "--json"])
    assert predicted.exit_code == 0, predicted.output
    for i, line in enumerate(predicted.stdout.splitlines()):
        found = json.loads(line)
        assert found["answer"] == f"Number {i}"
        assert found["raw_text"] == f"Number {i}<|im_end|>"
        assert found["reasoning"] == (f"It is {i}." if i % 2 else "")
    # Scored is the answer alone, beside the data's answer alone.
    settings = EvalSettings.model_validate({"metric": "classification", "max_new_tokens": 32})
    answerer = load_inference_model(result.run_dir, "cpu")
    scored = evaluate(answerer.model, answerer.renderer, samples, settings)
    assert scored.scores["accuracy"] == 1.0
