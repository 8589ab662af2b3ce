"""Records that are damaged anywhere: whatever stands in them, `doctor` says something."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from run_folders import MANIFEST, MOVED, START, MadeRun, answer_line, measured_line, step_line

from finesight.doctor.examine import examine_run

ODD = (None, "", -1, 0, 1e300, float("nan"), float("inf"), [], {}, True, [1], {"a": 1}, [None], "x")
RECIPE = {
    "model": "m",
    "data": {"train": [{"path": "t.jsonl"}], "eval": [{"path": "e.jsonl"}]},
    "picture": {"height": 112, "width": 504},
    "train": {"epochs": 2.0, "learning_rate": {"default": 1e-3, "language": 2e-3}},
    "eval": {"metric": "latex", "limit": 50},
    "output": "r",
}
VERDICTS = ("worse", "better", "no clear change")


def odd(content: Any, rng: random.Random) -> Any:
    """The content with something else somewhere inside, or something missing."""
    if isinstance(content, dict) and content and rng.random() < 0.85:
        key = rng.choice(list(content))
        rest = {name: value for name, value in content.items() if name != key}
        return rest if rng.random() < 0.3 else rest | {key: odd(content[key], rng)}
    if isinstance(content, list) and content and rng.random() < 0.7:
        place = rng.randrange(len(content))
        return [*content[:place], odd(content[place], rng), *content[place + 1 :]]
    return rng.choice(ODD)


def plant(folder: Path, rng: random.Random) -> MadeRun:
    """A run of which each piece may be damaged."""

    def maybe(content: Any, often: float) -> Any:
        return odd(content, rng) if rng.random() < often else content

    made = MadeRun(folder)
    made.write("recipe.yaml", yaml.safe_dump(maybe(RECIPE, 0.5)))
    more = {"waited_s": 0.1, "pack_tokens": 1024, "recompute": 0.0}
    steps = [
        maybe(
            step_line(n, **more, void=["t:1"] if n % 17 == 0 else [], jumped=["t:1"] * (n % 9)), 0.1
        )
        for n in range(1, rng.choice([2, 14, 40]))
    ]
    measured = [maybe(measured_line(n, 0.2), 0.3) for n in (0, 20, 40)]
    made.lines("metrics.jsonl", [maybe(START, 0.3), *measured, *steps])
    change = {"name": "similarity", "before": 0.1, "after": 0.2, "low": -0.1, "high": 0.3}
    differences = [change | {"verdict": rng.choice(VERDICTS)}]
    if rng.random() < 0.6:
        made.write("result.json", json.dumps(maybe({"steps": 60, "differences": differences}, 0.7)))
    made.write("moved.json", json.dumps(maybe(MOVED, 0.5)))
    made.lines("dropped.jsonl", [maybe({"id": "a", "reason": "over 9 tokens"}, 0.5)])
    made.write("manifest.json", json.dumps(maybe(MANIFEST, 0.3)))
    box = {"image": 0, "label": "c", "xyxy": [1, 2, 30, 40]}
    picture = str(folder.parent / "picture.png")
    boxes = {"image": picture, "boxes": [box], "gold_boxes": [box | {"xyxy": [9, 20, 90, 80]}]}
    lines = [answer_line("a", "b " * 9, "c", 0.3, **boxes, stopped=n < 6) for n in range(12)]
    made.answered("after", [maybe(line, 0.2) for line in lines])
    return made


@pytest.mark.parametrize("seed", range(16))
def test_whatever_is_damaged_every_finding_has_its_remedy(tmp_path: Path, seed: int) -> None:
    Image.new("1", (200, 100)).save(tmp_path / "picture.png")
    made = plant(tmp_path / "run", random.Random(seed))
    sections = examine_run(made.folder)
    assert [section.title for section in sections] == ["end", "course", "answers"]
    for found in (one for section in sections for one in section.findings):
        assert found.severity == "fine" or (found.why and found.remedy), found
