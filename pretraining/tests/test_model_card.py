"""Tests of the model card of finesight-tiny: rendering and validation of facts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from case_files import load_cases
from module_loader import load_module
from synthetic_tasks.fonts import FONT_FAMILIES
from synthetic_tasks.tasks import MAIN_MIXTURE, TASK_GENERATORS, WARMUP_MIXTURE

from finesight.errors import UserError

CASES = load_cases("model_card")

FILE = Path(__file__).parents[1] / "model_card.py"


CARD = load_module("pretraining/model_card.py")

FACTS: dict[str, Any] = {
    "num_params": 12_834_560,
    "architecture": {"decoder hidden size": 321, "rotary base": 10.0},
    "vocab_size": 2987,
    "num_images": 1_234_567,
    "num_samples": {"first": 234_567, "run": 1_000_000},
    "mixtures": {"first": WARMUP_MIXTURE, "run": MAIN_MIXTURE},
    "training": {
        "first": {"steps": 432},
        "run": {"steps": 4321, "learning rate": "0.0015, cosine"},
    },
    "loss_curves": {
        "first": [{"step": 50, "loss": 4.5, "validation_loss": 4.25}],
        "run": [{"step": 100, "loss": 2.5, "validation_loss": 2.25}],
    },
    "stage_seconds": {"draw": 300.0, "train": 1200.0, "evaluation": 57.4},
    "machine": "one card and 16 cores",
    "versions": {"torch": "9.9.9"},
    "eval_results": {
        "captions": {
            "metric": "/somewhere/else/caption_metric.py:caption",
            "num_samples": 1999,
            "corrupt_samples": 0,
            "primary_metric": "exact",
            "scores": {"exact": 0.961, "ended_with_eos": 1.0},
            "intervals": {"exact": [0.951, 0.97], "ended_with_eos": [1.0, 1.0]},
            "details": {},
        },
        "receipts": {
            "metric": "json",
            "num_samples": 1998,
            "corrupt_samples": 0,
            "primary_metric": "f1",
            "scores": {"f1": 0.9, "exact": 0.8, "ended_with_eos": 1.0},
            "intervals": {"f1": [0.89, 0.91], "exact": [0.78, 0.82], "ended_with_eos": [1.0, 1.0]},
            "details": {"fields": {"total": {"f1": 0.5}}},
        },
    },
    "train_overlap": {"words": 0.471, "formulas": 0.036},
}


@pytest.fixture(scope="module")
def page() -> str:
    return CARD.render_card(CARD.ModelCardFacts.model_validate(FACTS))


def test_hub_metadata_is_valid(page: str) -> None:
    begin, front, text = page.split("---\n", 2)
    assert begin == ""
    about = yaml.safe_load(front)
    assert about["license"] == "apache-2.0"
    assert about["language"] == ["en", "zh"]
    assert "qwen2_vl" in about["tags"]
    assert "base_model" not in about, "it was trained from scratch"
    assert text.startswith("\n# finesight-tiny\n")


@pytest.mark.parametrize(
    "fact",
    [
        "12.8 million parameters",
        "| decoder hidden size | 321 |",
        "2,987 tokens",
        "1,234,567 images",
        "| task | first stage, 234,567 | second stage, 1,000,000 |",
        f"| letters | {WARMUP_MIXTURE['letters']:.0%} | {MAIN_MIXTURE['letters']:.0%} |",
        "| steps | 432 | 4321 |",
        "| learning rate |  | 0.0015, cosine |",
        "| first | 50 | 4.5000 | 4.2500 |",
        "| second | 100 | 2.5000 | 2.2500 |",
        "25.0 minutes (draw 300 s, train 1,200 s), and evaluation in 57 s, on one card",
        "on one card and 16 cores, with torch 9.9.9",
        "| captions | exact | 96.1% | 95.1% to 97.0% | 1999 |",
        "| receipts | f1 | 90.0% | 89.0% to 91.0% | 1998 |",
        "| receipts | exact | 80.0% | 78.0% to 82.0% | 1998 |",
        "An estimated 47.1% or more of the single words",
        "About 3.6% of the evaluation formulas occur in the training data",
        "460 Chinese characters",
    ],
)
def test_facts_are_on_the_card(page: str, fact: str) -> None:
    assert fact in page


def test_card_has_no_placeholders_or_paths(page: str) -> None:
    assert "{" not in page
    assert "/somewhere" not in page
    assert "ended_with_eos" not in page


def test_every_font_is_listed_with_license(page: str) -> None:
    for family in FONT_FAMILIES:
        use = "evaluation" if family.is_unseen else "training"
        assert f"| {family.name} | {family.license} | {use} |" in page
    assert "| Computer Modern | BaKoMa Fonts Licence | formulas |" in page


def test_every_task_is_listed_with_weight(page: str) -> None:
    assert set(MAIN_MIXTURE) == set(TASK_GENERATORS)
    for name, share in MAIN_MIXTURE.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} | ")]
        _, _, first, second, about, _ = line.split("|")
        assert (first.strip(), second.strip()) == (
            f"{WARMUP_MIXTURE.get(name, 0):.0%}",
            f"{share:.0%}",
        )
        assert len(about) > 20, line


def test_loss_curve_has_a_point_per_evaluation() -> None:
    lines = [
        {"step": 0, "validation_loss": 9.0},
        *({"step": step, "loss": float(step)} for step in (1, 2, 3)),
        {"step": 3, "validation_loss": 8.0},
        {"step": 4, "loss": None},
        {"step": 5, "loss": 7.0},
        {"step": 5, "validation_loss": 6.0},
        {"step": 6, "loss": 5.0},
    ]
    assert CARD.loss_curve(lines) == [
        {"step": 3, "loss": 2.0, "validation_loss": 8.0},
        {"step": 5, "loss": 7.0, "validation_loss": 6.0},
    ]


@pytest.mark.parametrize(("change", "message"), CASES["test_invalid_facts_are_rejected"])
def test_invalid_facts_are_rejected(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS | change))
    with pytest.raises(UserError, match=message) as raised:
        CARD.read_facts(path)
    assert raised.value.where == str(path)


def test_command_writes_the_card_or_fails(tmp_path: Path, page: str) -> None:
    facts, written = tmp_path / "facts.json", tmp_path / "README.md"
    facts.write_text("{")
    command = [sys.executable, str(FILE), str(facts), str(written)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, written.exists()) == (2, False), done.stderr
    assert str(facts) in done.stderr
    facts.write_text(json.dumps(FACTS))
    subprocess.run(command, check=True)
    assert written.read_text(encoding="utf-8") == page
