"""An overfitted run reproduces its answers: training and prediction are consistent."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model

from finesight.cli.app import app
from finesight.evaluate.generation_eval import evaluate
from finesight.infer.model_loader import load_inference_model
from finesight.samples.sample import BoxPart, LocatedSample, TextPart, write_samples
from finesight.settings.config import EvalSettings, Recipe
from finesight.train.finalize import RunResult
from finesight.train.training_run import train

SIZES = [(84, 56), (56, 56), (112, 56), (56, 112)]
CHARACTERS = "abcxyz0123456789+-=^_{}\\ é"
STEPS = 130


def make_samples(folder: Path) -> list[LocatedSample]:
    """Write noise images that alone determine their answers: formulas of all lengths, boxes."""
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


def train_and_predict(
    folder: Path, family: str, tune: dict[str, object], samples: list[LocatedSample]
) -> tuple[RunResult, list[dict[str, Any]]]:
    write_samples(folder / "train.jsonl", [sample.sample for sample in samples])
    recipe = {
        "model": str(folder / "tiny"),
        "data": {"train": str(folder / "train.jsonl"), "system_prompt": "Be exact."},
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
    if family != "qwen":  # which supports only its own image size
        recipe["image"] = {"longest_side": 112}
    result = train(Recipe.model_validate(recipe))
    assert result is not None
    images = [str(folder / f"{i}.png") for i in range(len(samples))]
    words = [
        "predict",
        str(result.run_dir),
        *images,
        "--prompt",
        "Read it.",
        "--json",
        "--device",
        "cpu",
    ]
    predicted = CliRunner().invoke(app, words)
    assert predicted.exit_code == 0, predicted.output
    return result, [json.loads(line) for line in predicted.stdout.splitlines()]


FULL = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}
LORA = FULL | {"language": "lora", "lora": {"rank": 32, "alpha": 32.0, "dropout": 0.0}}


@pytest.mark.parametrize(
    ("family", "tune"),
    [
        pytest.param("qwen2_vl", FULL, id="qwen2_vl-full"),
        pytest.param("qwen2_5_vl", LORA, id="qwen2_5_vl-lora"),
        pytest.param("qwen3_vl", FULL, id="qwen3_vl-full"),
        pytest.param("qwen3_vl", LORA, id="qwen3_vl-lora"),
        pytest.param("qwen", FULL, id="qwen-full"),
        pytest.param("qwen", LORA, id="qwen-lora"),
    ],
)
def test_overfitted_run_generates_its_samples(tmp_path, family, tune):
    create_tiny_model(tmp_path / "tiny", family)
    samples = make_samples(tmp_path)
    result, predictions = train_and_predict(tmp_path, family, tune, samples)
    assert result.loss < 0.1
    for sample, found in zip(samples, predictions, strict=True):
        (right,) = sample.sample.messages[-1].content
        assert found["raw_text"].endswith("<|im_end|>")
        if isinstance(right, TextPart):
            assert (found["answer"], found["boxes"]) == (right.text, [])
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
    result, predictions = train_and_predict(tmp_path, "qwen3_vl", FULL, samples)
    for i, found in enumerate(predictions):
        assert found["answer"] == f"Number {i}"
        assert found["raw_text"] == f"Number {i}<|im_end|>"
        assert found["reasoning"] == (f"It is {i}." if i % 2 else "")
    # Scored is the answer alone, beside the data's answer alone.
    settings = EvalSettings.model_validate({"metric": "classification", "max_new_tokens": 32})
    answerer = load_inference_model(result.run_dir, "cpu")
    scored = evaluate(answerer.model, answerer.renderer, samples, settings)
    assert scored.scores["accuracy"] == 1.0
