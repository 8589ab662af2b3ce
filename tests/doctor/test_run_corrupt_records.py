"""Records that are damaged anywhere: whatever stands in them, `doctor` says something."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from case_files import load_cases
from each_value import each
from mutations import mutated_value
from PIL import Image
from run_dir_fixtures import (
    MANIFEST,
    PARAM_AUDIT,
    START_RECORD,
    FakeRunDir,
    make_evaluation_line,
    make_prediction_line,
    make_step_line,
)

from finesight.doctor import diagnose

CASES = load_cases("run_corrupt_records")

RECIPE = CASES["recipe"]
VERDICTS = ("worse", "better", "no clear change")


def write_run(folder: Path, rng: random.Random) -> FakeRunDir:
    """A run of which each piece may be damaged."""

    def maybe(content: Any, often: float) -> Any:
        return mutated_value(rng, content) if rng.random() < often else content

    made = FakeRunDir(folder)
    made.write("recipe.yaml", yaml.safe_dump(maybe(RECIPE, 0.5)))
    more = {"data_wait_s": 0.1, "pack_tokens": 1024, "activation_checkpointing": 0.0}
    steps = [
        maybe(
            make_step_line(
                n,
                **more,
                nonfinite_samples=["t:1"] if n % 17 == 0 else [],
                loss_spike_samples=["t:1"] * (n % 9),
            ),
            0.1,
        )
        for n in range(1, rng.choice([2, 14, 40]))
    ]
    measured = [maybe(make_evaluation_line(n, 0.2), 0.3) for n in (0, 20, 40)]
    made.write_lines("metrics.jsonl", [maybe(START_RECORD, 0.3), *measured, *steps])
    change = {"name": "similarity", "before": 0.1, "after": 0.2, "low": -0.1, "high": 0.3}
    differences = [change | {"verdict": rng.choice(VERDICTS)}]
    if rng.random() < 0.6:
        made.write(
            "result.json", json.dumps(maybe({"steps": 60, "metric_differences": differences}, 0.7))
        )
    made.write("param_audit.json", json.dumps(maybe(PARAM_AUDIT, 0.5)))
    made.write_lines("skipped_samples.jsonl", [maybe({"id": "a", "reason": "over 9 tokens"}, 0.5)])
    made.write("manifest.json", json.dumps(maybe(MANIFEST, 0.3)))
    box = {"image": 0, "label": "c", "xyxy": [1, 2, 30, 40]}
    image = str(folder.parent / "image.png")
    boxes = {"image": image, "boxes": [box], "gold_boxes": [box | {"xyxy": [9, 20, 90, 80]}]}
    lines = [
        make_prediction_line(
            "a", "b " * 9, "c", 0.3, **boxes, finish_reason=("length", "stop")[n < 6]
        )
        for n in range(12)
    ]
    made.write_predictions("after", [maybe(line, 0.2) for line in lines])
    return made


@each("seed", range(16))
def test_corrupt_records_still_give_remedies(tmp_path: Path, seed: int) -> None:
    Image.new("1", (200, 100)).save(tmp_path / "image.png")
    made = write_run(tmp_path / "run", random.Random(seed))
    sections = diagnose(str(made.folder))
    assert [*sections] == ["run end", "training", "predictions"]
    for found in (one for section in sections.values() for one in section):
        assert found.severity == "ok" or (found.why and found.remedy), found
