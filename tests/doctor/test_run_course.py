"""Courses of runs, written by hand: rising, jumping, learned by heart, waiting."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from doctoring import codes, only
from run_folders import START, Line, MadeRun, measured_line, step_line

from finesight.doctor import run_course
from finesight.doctor.findings import Finding
from finesight.recipe import load_recipe
from finesight.report.record import read_record

RECIPE: Line = {
    "model": "m",
    "data": {"train": "t.jsonl"},
    "train": {"epochs": 2.0, "learning_rate": {"default": 1e-3, "language": 2e-3}},
    "output": "runs/x",
}


def judged(
    folder: Path, lines: list[Line], recipe: Line = RECIPE, **result: object
) -> list[Finding]:
    made = MadeRun(folder / "my run")
    made.write("recipe.yaml", yaml.safe_dump(recipe))
    made.lines("metrics.jsonl", [START | {"workers": 2}, *lines])
    if result:
        made.finished(**result)
    return run_course.judge(read_record(made.folder))


def steps(loss: Callable[[int], float], count: int = 60, **more: object) -> list[Line]:
    """Steps with such losses, which scatter a little."""
    return [
        step_line(n, **more, loss=loss(n) + 0.03 * math.sin(7 * n)) for n in range(1, count + 1)
    ]


def changed(remedy: str, tmp_path: Path) -> dict[str, object]:
    """The recipe that a remedy trains, as `finesight train` reads it."""
    words = shlex.split(remedy)
    assert words[:3] == ["finesight", "train", str(tmp_path / "my run" / "recipe.yaml")]
    recipe = load_recipe(Path(words[2]), [word for word in words[3:] if "=" in word])
    return recipe.model_dump()


def test_a_run_that_learns_is_fine(tmp_path: Path) -> None:
    found = judged(tmp_path, steps(lambda n: 3 * math.exp(-n / 20) + 0.2))
    assert [one.severity for one in found] == ["fine"]


def test_a_loss_that_rises_lowers_all_rates(tmp_path: Path) -> None:
    found = only(
        judged(tmp_path, steps(lambda n: 2.0 - 0.05 * n if n < 20 else 1.0 + 0.05 * (n - 20))),
        "rate-too-high",
    )
    rates = changed(found.remedy, tmp_path)["train"]["learning_rate"]
    assert (rates["default"], rates["language"]) == (1e-4, 2e-4)
    assert found.remedy.endswith("my run-2'")


DESTROYED = """4.28 7.47 8.18 11.67 11.98 9.91 11.66 11.48 8.68 7.14 7.62 6.44 5.82 5.17 4.60 4.04
    4.09 4.07 3.95 3.83 3.75 3.69 3.68 3.65"""
"""Losses of finesight-tiny on train tickets at a rate of 0.05; and at 0.01, which it stands."""
STOOD = """4.28 2.85 2.13 4.85 2.61 3.62 1.98 1.17 0.94 0.77 0.60 0.59 0.33 0.28 0.14 0.39 0.25 0.23
    0.03 0.09 0.11 0.11 0.06 0.10"""


@pytest.mark.parametrize(("losses", "expected"), [(DESTROYED, ["rate-too-high"]), (STOOD, [])])
def test_a_loss_that_bursts_and_falls_again_is_no_learning(
    tmp_path: Path, losses: str, expected: list[str]
) -> None:
    lines = [step_line(n, loss=float(loss)) for n, loss in enumerate(losses.split(), start=1)]
    found = judged(tmp_path, lines)
    assert codes(found) == expected
    if expected:
        assert "rose from 4.28 to 11.7 before it fell to 3.68" in found[0].what


def test_a_loss_that_scatters_widely_has_not_risen(tmp_path: Path) -> None:
    lines = [step_line(n, loss=1.0 + 0.6 * math.sin(37 * n)) for n in range(1, 61)]
    assert "rate-too-high" not in codes(judged(tmp_path, lines))


def test_small_gradients_of_a_run_that_has_arrived_are_fine(tmp_path: Path) -> None:
    lines = steps(lambda n: 3 * math.exp(-n / 4) + 0.05)
    lines = [line | {"grad_norm": 1 / line["step"] ** 2} for line in lines]
    assert codes(judged(tmp_path, lines)) == []


def test_a_flat_loss_at_a_usual_rate_leads_to_the_data(tmp_path: Path) -> None:
    found = only(judged(tmp_path, steps(lambda n: 2.0)), "loss-flat")
    assert shlex.split(found.remedy)[:3] == ["finesight", "data", "show"]


def test_what_was_known_before_is_a_hint(tmp_path: Path) -> None:
    lines = [step_line(n, loss=0.01) for n in range(1, 61)]
    assert codes(judged(tmp_path, lines), "hint") == ["nothing-to-learn"]


def test_too_few_steps_say_nothing_and_more_are_asked_for(tmp_path: Path) -> None:
    found = only(judged(tmp_path, steps(lambda n: 2.0, 4)), "too-short")
    assert changed(found.remedy, tmp_path)["train"]["epochs"] == 6.0


def test_jumps_are_told_with_their_samples(tmp_path: Path) -> None:
    lines = steps(lambda n: 3 * math.exp(-n / 20) + 0.2)
    for n in (20, 30, 40):
        lines[n] |= {"loss": 9.0, "jumped": [f"t.jsonl:{n}"]}
    found = only(judged(tmp_path, lines), "loss-jumps")
    assert "t.jsonl:20" in found.why
    assert changed(found.remedy, tmp_path)["train"]["warmup"] == 0.1


def overfitted() -> list[Line]:
    lines = steps(lambda n: 2.0 * math.exp(-n / 15) + 0.05)
    at = {0: 2.0, 20: 1.0, 40: 1.2, 60: 1.5}
    return [*lines, *(measured_line(n, 0.5, held_out_loss=loss) for n, loss in at.items())]


def test_learned_by_heart_ends_where_it_was_best(tmp_path: Path) -> None:
    found = only(judged(tmp_path, overfitted()), "overfitted")
    assert "after step 20" in found.what
    assert changed(found.remedy, tmp_path)["train"]["epochs"] == 0.67


def test_learned_by_heart_with_a_metric_gets_patience(tmp_path: Path) -> None:
    recipe = RECIPE | {"eval": {"metric": "captions"}}
    found = only(judged(tmp_path, overfitted(), recipe), "overfitted")
    settings = changed(found.remedy, tmp_path)["eval"]
    assert (settings["every"], settings["patience"]) == (0.1, 2)


def test_a_held_out_loss_that_never_fell_lowers_the_rates(tmp_path: Path) -> None:
    lines = steps(lambda n: 2.0 * math.exp(-n / 15) + 0.05)
    at = {0: 1.0, 30: 1.2, 60: 1.5}
    lines += [measured_line(n, 0.5, held_out_loss=loss) for n, loss in at.items()]
    found = only(judged(tmp_path, lines), "overfitted")
    assert changed(found.remedy, tmp_path)["train"]["learning_rate"]["default"] == 3e-4


@pytest.mark.parametrize("ended", [False, True])
def test_waiting_for_data_asks_for_more_reading_processes(tmp_path: Path, ended: bool) -> None:
    lines = steps(lambda n: 3 * math.exp(-n / 20) + 0.2, waited_s=0.2)
    found = only(judged(tmp_path, lines, **({"weights_of": 60} if ended else {})), "waits-for-data")
    assert "40%" in found.what
    assert changed(found.remedy, tmp_path)["train"]["workers"] > 2
    assert found.remedy.endswith("my run-2'" if ended else "--resume")


def test_steps_are_counted_where_the_recipe_counts_them(tmp_path: Path) -> None:
    recipe = RECIPE | {"train": {"steps": 4}}
    found = only(judged(tmp_path, steps(lambda n: 2.0, 4), recipe), "too-short")
    assert changed(found.remedy, tmp_path)["train"]["steps"] == 12
