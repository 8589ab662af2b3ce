"""Handwritten training curves: rising, jumping, overfitted and waiting for data."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from doctor_fixtures import find_diagnosis, list_codes
from run_dir_fixtures import (
    START_RECORD,
    FakeRunDir,
    JsonLine,
    make_evaluation_line,
    make_step_line,
)

from finesight.doctor import run_check
from finesight.doctor.diagnosis import Diagnosis
from finesight.recipe import load_recipe
from finesight.report.run_reader import read_run

RECIPE: JsonLine = {
    "model": "m",
    "data": {"train": "t.jsonl"},
    "train": {"epochs": 2.0, "learning_rate": {"default": 1e-3, "language": 2e-3}},
    "output_dir": "runs/x",
}


def diagnose(
    folder: Path, lines: list[JsonLine], recipe: JsonLine = RECIPE, **result: object
) -> list[Diagnosis]:
    made = FakeRunDir(folder / "my run")
    made.write("recipe.yaml", yaml.safe_dump(recipe))
    made.write_lines("metrics.jsonl", [START_RECORD | {"num_workers": 2}, *lines])
    if result:
        made.write_finished(**result)
    return run_check.check_training(read_run(made.folder))


def steps(loss: Callable[[int], float], count: int = 60, **more: object) -> list[JsonLine]:
    """Steps with such losses, which scatter a little."""
    return [
        make_step_line(n, **more, loss=loss(n) + 0.03 * math.sin(7 * n))
        for n in range(1, count + 1)
    ]


def apply_remedy(remedy: str, tmp_path: Path) -> dict[str, object]:
    """The recipe that a remedy trains, as `finesight train` reads it."""
    words = shlex.split(remedy)
    assert words[:3] == ["finesight", "train", str(tmp_path / "my run" / "recipe.yaml")]
    recipe = load_recipe(Path(words[2]), [word for word in words[3:] if "=" in word])
    return recipe.model_dump()


def test_converging_run_has_no_issue(tmp_path: Path) -> None:
    found = diagnose(tmp_path, steps(lambda n: 3 * math.exp(-n / 20) + 0.2))
    assert [one.severity for one in found] == ["ok"]


def test_rising_loss_suggests_lower_learning_rates(tmp_path: Path) -> None:
    found = find_diagnosis(
        diagnose(tmp_path, steps(lambda n: 2.0 - 0.05 * n if n < 20 else 1.0 + 0.05 * (n - 20))),
        "learning-rate-too-high",
    )
    learning_rates = apply_remedy(found.remedy, tmp_path)["train"]["learning_rate"]
    assert (learning_rates["default"], learning_rates["language"]) == (1e-4, 2e-4)
    assert found.remedy.endswith("my run-2'")


DESTROYED = """4.28 7.47 8.18 11.67 11.98 9.91 11.66 11.48 8.68 7.14 7.62 6.44 5.82 5.17 4.60 4.04
    4.09 4.07 3.95 3.83 3.75 3.69 3.68 3.65"""
"""Losses of finesight-tiny on train tickets with a learning rate of 0.05, and with 0.01, which is
stable.
"""
STOOD = """4.28 2.85 2.13 4.85 2.61 3.62 1.98 1.17 0.94 0.77 0.60 0.59 0.33 0.28 0.14 0.39 0.25 0.23
    0.03 0.09 0.11 0.11 0.06 0.10"""


@pytest.mark.parametrize(
    ("losses", "expected"), [(DESTROYED, ["learning-rate-too-high"]), (STOOD, [])]
)
def test_loss_spike_suggests_lower_learning_rate(
    tmp_path: Path, losses: str, expected: list[str]
) -> None:
    lines = [make_step_line(n, loss=float(loss)) for n, loss in enumerate(losses.split(), start=1)]
    found = diagnose(tmp_path, lines)
    assert list_codes(found) == expected
    if expected:
        assert "rose from 4.28 to 11.7 before it fell to 3.68" in found[0].what


def test_noisy_loss_is_not_rising(tmp_path: Path) -> None:
    lines = [make_step_line(n, loss=1.0 + 0.6 * math.sin(37 * n)) for n in range(1, 61)]
    assert "learning-rate-too-high" not in list_codes(diagnose(tmp_path, lines))


def test_small_gradients_after_convergence_are_no_issue(tmp_path: Path) -> None:
    lines = steps(lambda n: 3 * math.exp(-n / 4) + 0.05)
    lines = [line | {"grad_norm": 1 / line["step"] ** 2} for line in lines]
    assert list_codes(diagnose(tmp_path, lines)) == []


def test_flat_loss_suggests_checking_the_data(tmp_path: Path) -> None:
    found = find_diagnosis(diagnose(tmp_path, steps(lambda n: 2.0)), "loss-flat")
    assert shlex.split(found.remedy)[:2] == ["finesight", "show"]


def test_low_initial_loss_is_a_hint(tmp_path: Path) -> None:
    lines = [make_step_line(n, loss=0.01) for n in range(1, 61)]
    assert list_codes(diagnose(tmp_path, lines), "warning") == ["low-initial-loss"]


def test_too_few_steps_suggests_more_epochs(tmp_path: Path) -> None:
    found = find_diagnosis(diagnose(tmp_path, steps(lambda n: 2.0, 4)), "too-short")
    assert apply_remedy(found.remedy, tmp_path)["train"]["epochs"] == 6.0


def test_loss_jumps_are_reported_with_samples(tmp_path: Path) -> None:
    lines = steps(lambda n: 3 * math.exp(-n / 20) + 0.2)
    for n in (20, 30, 40):
        lines[n] |= {"loss": 9.0, "loss_spike_samples": [f"t.jsonl:{n}"]}
    found = find_diagnosis(diagnose(tmp_path, lines), "loss-spikes")
    assert "t.jsonl:20" in found.why
    assert apply_remedy(found.remedy, tmp_path)["train"]["warmup"] == 0.1


def overfitted() -> list[JsonLine]:
    lines = steps(lambda n: 2.0 * math.exp(-n / 15) + 0.05)
    at = {0: 2.0, 20: 1.0, 40: 1.2, 60: 1.5}
    return [*lines, *(make_evaluation_line(n, 0.5, validation_loss=loss) for n, loss in at.items())]


def test_overfitting_suggests_fewer_epochs(tmp_path: Path) -> None:
    found = find_diagnosis(diagnose(tmp_path, overfitted()), "overfitted")
    assert "after step 20" in found.what
    assert apply_remedy(found.remedy, tmp_path)["train"]["epochs"] == 0.67


def test_overfitting_with_metric_suggests_patience(tmp_path: Path) -> None:
    recipe = RECIPE | {"eval": {"metric": "captions"}}
    found = find_diagnosis(diagnose(tmp_path, overfitted(), recipe), "overfitted")
    settings = apply_remedy(found.remedy, tmp_path)["eval"]
    assert (settings["every"], settings["patience"]) == (0.1, 2)


def test_rising_validation_loss_suggests_lower_rates(tmp_path: Path) -> None:
    lines = steps(lambda n: 2.0 * math.exp(-n / 15) + 0.05)
    at = {0: 1.0, 30: 1.2, 60: 1.5}
    lines += [make_evaluation_line(n, 0.5, validation_loss=loss) for n, loss in at.items()]
    found = find_diagnosis(diagnose(tmp_path, lines), "overfitted")
    assert apply_remedy(found.remedy, tmp_path)["train"]["learning_rate"]["default"] == 3e-4


@pytest.mark.parametrize("ended", [False, True])
def test_data_wait_suggests_more_workers(tmp_path: Path, ended: bool) -> None:
    lines = steps(lambda n: 3 * math.exp(-n / 20) + 0.2, data_wait_s=0.2)
    found = find_diagnosis(
        diagnose(tmp_path, lines, **({"weights_step": 60} if ended else {})), "data-wait"
    )
    assert "40%" in found.what
    assert apply_remedy(found.remedy, tmp_path)["train"]["num_workers"] > 2
    assert found.remedy.endswith("my run-2'" if ended else "--resume")


def test_step_based_recipe_gets_step_based_remedy(tmp_path: Path) -> None:
    recipe = RECIPE | {"train": {"steps": 4}}
    found = find_diagnosis(diagnose(tmp_path, steps(lambda n: 2.0, 4), recipe), "too-short")
    assert apply_remedy(found.remedy, tmp_path)["train"]["steps"] == 12
