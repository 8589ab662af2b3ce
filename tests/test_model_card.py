"""The model card of finesight-tiny: made from facts, and refused without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from by_path import loaded

from finesight.errors import UserError
from finesight.synth.fonts import FAMILIES
from finesight.synth.tasks import FIRST, MIXTURE, TASKS

FILE = Path(__file__).parents[1] / "pretraining" / "card.py"


CARD = loaded("pretraining/card.py")

FACTS: dict[str, Any] = {
    "parameters": 12_834_560,
    "geometry": {"width of the language model": 321, "rotary base": 10.0},
    "tokens": 2987,
    "pictures": 1_234_567,
    "samples": {"first": 234_567, "run": 1_000_000},
    "mixtures": {"first": FIRST, "run": MIXTURE},
    "training": {
        "first": {"steps": 432},
        "run": {"steps": 4321, "learning rate": "0.0015, cosine"},
    },
    "curves": {
        "first": [{"step": 50, "loss": 4.5, "held_out_loss": 4.25}],
        "run": [{"step": 100, "loss": 2.5, "held_out_loss": 2.25}],
    },
    "seconds": {"draw": 300.0, "train": 1200.0, "measure": 57.4},
    "machine": "one card and 16 cores",
    "versions": {"torch": "9.9.9"},
    "measured": {
        "captions": {
            "metric": "/somewhere/else/metric.py:caption",
            "samples": 1999,
            "unreadable": 0,
            "headline": "exact",
            "scores": {"exact": 0.961, "stopped": 1.0},
            "intervals": {"exact": [0.951, 0.97], "stopped": [1.0, 1.0]},
            "details": {},
        },
        "receipts": {
            "metric": "json",
            "samples": 1998,
            "unreadable": 0,
            "headline": "f1",
            "scores": {"f1": 0.9, "exact": 0.8, "stopped": 1.0},
            "intervals": {"f1": [0.89, 0.91], "exact": [0.78, 0.82], "stopped": [1.0, 1.0]},
            "details": {"fields": {"total": {"f1": 0.5}}},
        },
    },
    "seen": {"words": 0.471, "formulas": 0.036},
}


@pytest.fixture(scope="module")
def page() -> str:
    return CARD.card(CARD.Facts.model_validate(FACTS))


def test_hubs_read_licence_and_languages(page: str) -> None:
    begin, front, text = page.split("---\n", 2)
    assert begin == ""
    about = yaml.safe_load(front)
    assert about["license"] == "apache-2.0"
    assert about["language"] == ["en", "zh"]
    assert "qwen2_vl" in about["tags"]
    assert "base_model" not in about, "it was trained from nothing"
    assert text.startswith("\n# finesight-tiny\n")


@pytest.mark.parametrize(
    "fact",
    [
        "12.8 million numbers",
        "| width of the language model | 321 |",
        "2,987 tokens",
        "1,234,567 pictures",
        "| task | first run, 234,567 | second run, 1,000,000 |",
        f"| letters | {FIRST['letters']:.0%} | {MIXTURE['letters']:.0%} |",
        "| steps | 432 | 4321 |",
        "| learning rate |  | 0.0015, cosine |",
        "| first | 50 | 4.5000 | 4.2500 |",
        "| second | 100 | 2.5000 | 2.2500 |",
        "25.0 minutes (draw 300 s, train 1,200 s), and 57 s to measure it, on one card",
        "on one card and 16 cores, with torch 9.9.9",
        "| captions | exact | 96.1% | 95.1% to 97.0% | 1999 |",
        "| receipts | f1 | 90.0% | 89.0% to 91.0% | 1998 |",
        "| receipts | exact | 80.0% | 78.0% to 82.0% | 1998 |",
        "at least 47.1% of the held-out single words occur in training",
        "formulas about 3.6% occur in training",
        "a list of 460 characters",
    ],
)
def test_facts_are_on_the_card(page: str, fact: str) -> None:
    assert fact in page


def test_nothing_is_left_to_fill_in_and_no_path_stands_there(page: str) -> None:
    assert "{" not in page
    assert "/somewhere" not in page
    assert "stopped" not in page


def test_every_font_stands_there_with_its_licence_and_its_use(page: str) -> None:
    for family in FAMILIES:
        use = "measuring" if family.unseen else "training"
        assert f"| {family.name} | {family.licence} | {use} |" in page
    assert "| Computer Modern | BaKoMa Fonts Licence | formulas |" in page


def test_every_task_stands_there_with_what_it_draws(page: str) -> None:
    assert set(MIXTURE) == set(TASKS)
    for name, share in MIXTURE.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} | ")]
        _, _, first, second, about, _ = line.split("|")
        assert (first.strip(), second.strip()) == (f"{FIRST.get(name, 0):.0%}", f"{share:.0%}")
        assert len(about) > 20, line


def test_a_curve_has_a_point_for_each_measurement_after_the_first() -> None:
    lines = [
        {"step": 0, "held_out_loss": 9.0},
        *({"step": step, "loss": float(step)} for step in (1, 2, 3)),
        {"step": 3, "held_out_loss": 8.0},
        {"step": 4, "loss": None},
        {"step": 5, "loss": 7.0},
        {"step": 5, "held_out_loss": 6.0},
        {"step": 6, "loss": 5.0},
    ]
    assert CARD.curve(lines) == [
        {"step": 3, "loss": 2.0, "held_out_loss": 8.0},
        {"step": 5, "loss": 7.0, "held_out_loss": 6.0},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": None}, "machine"),
        ({"author": "me"}, "author"),
        ({"seen": {"words": 0.5}}, "seen.formulas"),
        ({"measured": {"words": {"samples": 3}}}, "measured.words.metric"),
    ],
)
def test_wrong_facts_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS | change))
    with pytest.raises(UserError, match=message) as raised:
        CARD.read_facts(path)
    assert raised.value.where == str(path)


def test_the_command_writes_the_card_or_nothing(tmp_path: Path, page: str) -> None:
    facts, written = tmp_path / "facts.json", tmp_path / "README.md"
    facts.write_text("{")
    command = [sys.executable, str(FILE), str(facts), str(written)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, written.exists()) == (2, False), done.stderr
    assert str(facts) in done.stderr
    facts.write_text(json.dumps(FACTS))
    subprocess.run(command, check=True)
    assert written.read_text(encoding="utf-8") == page
