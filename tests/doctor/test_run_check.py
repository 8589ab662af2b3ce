"""Diagnoses of handwritten training curves and predictions, in one table each."""

import json
import math
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from case_files import load_cases
from docs_code_blocks import ROOT
from doctor_fixtures import find_diagnosis, list_codes
from mutations import mutated_value
from PIL import Image
from run_dir_fixtures import (
    MANIFEST,
    PARAM_AUDIT,
    START_RECORD,
    FakeRunDir,
    JsonLine,
    make_evaluation_line,
    make_prediction_line,
    make_step_line,
)

from finesight.doctor import all_checks as doctor
from finesight.doctor import run_check
from finesight.doctor.diagnosis import Diagnosis, load_catalog
from finesight.report.run_reader import read_run
from finesight.samples.corpus import load_corpus
from finesight.samples.question_forms import read_prompt_format
from finesight.settings.config import TrainFileSettings
from finesight.settings.recipe import load_recipe

CASES = load_cases("run_check")

RECIPE: JsonLine = {
    "model": "m",
    "data": {"train": "t.jsonl"},
    "train": {"epochs": 2.0, "learning_rate": {"default": 1e-3, "language": 2e-3}},
    "output_dir": "runs/x",
}


def diagnose(folder: Path, lines: list[JsonLine], recipe: JsonLine = RECIPE) -> list[Diagnosis]:
    made = FakeRunDir(folder / "my run")
    made.write("recipe.yaml", yaml.safe_dump(recipe))
    made.write_lines("metrics.jsonl", [START_RECORD, *lines])
    return run_check.check_training(read_run(made.folder))


def steps(loss, count=60, noise=0.03, **more):
    """Steps with such losses, which scatter a little."""
    return [
        make_step_line(n, **more, loss=loss(n) + noise * math.sin(7 * n))
        for n in range(1, count + 1)
    ]


def apply_remedy(remedy: str, tmp_path: Path) -> dict[str, object]:
    """The recipe that a remedy trains, as `finesight train` reads it."""
    words = shlex.split(remedy)
    assert words[:3] == ["finesight", "train", str(tmp_path / "my run" / "recipe.yaml")]
    recipe = load_recipe(Path(words[2]), [word for word in words[3:] if "=" in word])
    return recipe.model_dump()


def falling(step: int) -> float:
    return 3 * math.exp(-step / 20) + 0.2


DESTROYED = """4.28 7.47 8.18 11.67 11.98 9.91 11.66 11.48 8.68 7.14 7.62 6.44 5.82 5.17 4.60 4.04
    4.09 4.07 3.95 3.83 3.75 3.69 3.68 3.65"""
"""Losses of finesight-tiny on train tickets with a learning rate of 0.05, and with 0.01, which is
stable.
"""
STOOD = """4.28 2.85 2.13 4.85 2.61 3.62 1.98 1.17 0.94 0.77 0.60 0.59 0.33 0.28 0.14 0.39 0.25 0.23
    0.03 0.09 0.11 0.11 0.06 0.10"""
LOSSES = {
    "destroyed": [make_step_line(n, loss=float(x)) for n, x in enumerate(DESTROYED.split(), 1)],
    "stood": [make_step_line(n, loss=float(x)) for n, x in enumerate(STOOD.split(), 1)],
    "rising": steps(lambda n: 2.0 - 0.05 * n if n < 20 else 1.0 + 0.05 * (n - 20)),
    "noisy": steps(lambda n: 1.0 + 0.6 * math.sin(37 * n)),
    "converging": steps(falling),
    # Small gradients after convergence are no issue.
    "converged": [
        line | {"grad_norm": 1 / line["step"] ** 2}
        for line in steps(lambda n: 3 * math.exp(-n / 4) + 0.05)
    ],
    "flat": steps(lambda n: 2.0),
    "low": steps(lambda n: 0.01, noise=0.0),
    "short": steps(lambda n: 2.0, 4),
    "jumping": [
        line | ({"loss": 9.0, "loss_spike_samples": ["t.jsonl:7"]} if n in (20, 30, 40) else {})
        for n, line in enumerate(steps(falling))
    ],
}


@pytest.mark.parametrize(
    ("curve", "code", "severity", "settings"), CASES["test_loss_curve_has_its_diagnosis_and_remedy"]
)
def test_loss_curve_has_its_diagnosis_and_remedy(curve, code, severity, settings, tmp_path):
    found = [one for one in diagnose(tmp_path, LOSSES[curve]) if one.code == code]
    assert [one.severity for one in found] == [severity]
    if settings == "show":
        assert shlex.split(found[0].remedy)[:2] == ["finesight", "show"]
    elif settings:
        train = apply_remedy(found[0].remedy, tmp_path)["train"]
        assert settings.items() <= (train | train["learning_rate"]).items()
        assert found[0].remedy.endswith("my run-2'")


@pytest.mark.parametrize(
    ("validation_losses", "metric", "section", "expected"),
    [
        ({0: 2.0, 20: 1.0, 40: 1.2, 60: 1.5}, None, "train", {"epochs": 0.67}),
        ({0: 2.0, 20: 1.0, 40: 1.2, 60: 1.5}, "captions", "eval", {"every": 0.1, "patience": 2}),
        ({0: 1.0, 30: 1.2, 60: 1.5}, None, "train", {"epochs": 2.0}),
    ],
)
def test_overfitting_suggests_a_shorter_run(validation_losses, metric, section, expected, tmp_path):
    lines = steps(lambda n: 2.0 * math.exp(-n / 15) + 0.05)
    for step, loss in validation_losses.items():
        lines.append(make_evaluation_line(step, 0.5, validation_loss=loss))
    recipe = RECIPE | ({"eval": {"metric": metric}} if metric else {})
    found = find_diagnosis(diagnose(tmp_path, lines, recipe), "overfitted")
    assert f"after step {20 if 20 in validation_losses else 0} " in found.what
    settings = apply_remedy(found.remedy, tmp_path)
    assert settings[section] | expected == settings[section]
    # A best loss before the first step indicates a high learning rate.
    is_slower = settings["train"]["learning_rate"]["default"] == 3e-4
    assert is_slower == (20 not in validation_losses)
    if not is_slower:  # Early stopping with the weights of the best evaluation
        made = FakeRunDir(tmp_path / "stopped")
        made.write_lines("metrics.jsonl", [START_RECORD, *lines])
        made.write_finished(stopped_early=True, weights_step=20)
        assert list_codes(run_check.check_training(read_run(made.folder))) == []


@pytest.mark.parametrize(
    ("scores", "is_reported"), [((5.0, 5.7, 6.4), False), ((6.4, 6.0, 5.7), True)]
)
def test_improving_score_takes_precedence_over_the_loss(scores, is_reported, tmp_path):
    lines = steps(lambda n: 2.0 * math.exp(-n / 15) + 0.05)
    for step, loss, score in zip((20, 40, 60), (1.0, 1.2, 1.5), scores, strict=True):
        lines.append(make_evaluation_line(step, score, validation_loss=loss))
    found = diagnose(tmp_path, lines, RECIPE | {"eval": {"metric": "captions"}})
    assert any(one.code == "overfitted" for one in found) == is_reported


@pytest.mark.parametrize(
    ("last", "severity"),
    [
        ({}, "ok"),
        ({"rewards/exact/mean": 0.2}, "warning"),
        ({"frac_reward_zero_std": 0.9}, "warning"),
        ({"completions/clipped_ratio": 0.8}, "warning"),
    ],
)
def test_policy_is_assessed_by_rewards(last, severity, tmp_path):
    """The rising loss is no problem."""
    usual = {"rewards/exact/mean": 0.2, "rewards/exact/std": 0.1, "frac_reward_zero_std": 0.1}
    lines = [
        line | usual | {"reward": 0.5, "completions/clipped_ratio": 0.0}
        for line in steps(lambda n: 1.0 + 0.05 * n)
    ]
    later = [line | {"rewards/exact/mean": 0.9} | last for line in lines[20:]]
    recipe = RECIPE | {"rewards": ["exact"], "train": {"objective": "grpo", "batch_size": 4}}
    diagnosis, *_ = diagnose(tmp_path, lines[:20] + later, recipe)
    assert (diagnosis.severity, diagnosis.code.partition("-")[0]) == (severity, "rewards")
    assert "Reward of the first and last" in diagnosis.what
    is_truncated = "completions/clipped_ratio" in last
    assert diagnosis.what.startswith("80% of the responses") == is_truncated
    assert ("max_completion_length=2048" in str(diagnosis.remedy)) == is_truncated


def test_step_based_recipe_gets_step_based_remedy(tmp_path: Path) -> None:
    recipe = RECIPE | {"train": {"steps": 4}}
    found = find_diagnosis(diagnose(tmp_path, steps(lambda n: 2.0, 4), recipe), "too-short")
    assert apply_remedy(found.remedy, tmp_path)["train"]["steps"] == 12


EVAL = {"metric": "latex", "limit": 50, "max_new_tokens": 64}
EVAL_RECIPE = {"model": "m", "data": {"train": "t.jsonl"}, "eval": EVAL, "output_dir": "runs/x"}


@pytest.fixture
def fake_run_dir(tmp_path: Path) -> FakeRunDir:
    made = FakeRunDir(tmp_path / "run")
    made.write_metrics()
    recipe = EVAL_RECIPE | {"train": {"epochs": 1}}
    made.write("recipe.yaml", yaml.safe_dump(recipe))
    return made


def diagnose_predictions(made: FakeRunDir) -> list[Diagnosis]:
    return run_check.check_predictions(read_run(made.folder))


def difference(verdict: str, before: float = 0.4, after: float = 0.5) -> JsonLine:
    figures = {"before": before, "after": after, "low": -0.1, "high": 0.2}
    return {"name": "similarity", "verdict": verdict, **figures}


def cut(answer: str, gold: str, count: int, total: int) -> list[JsonLine]:
    """Predictions of which some reached the token limit."""
    long = make_prediction_line("a", answer, gold, 0.1, finish_reason="length")
    return [long] * count + [make_prediction_line("b", "x", "x", 1.0)] * (total - count)


TEXT = "".join(random.Random(0).choices("abcdefghij ", k=200))
PEAK = [make_evaluation_line(n, score) for n, score in ((0, 0.5), (30, 0.7), (60, 0.4))]


@pytest.mark.parametrize(
    ("change", "lines", "answers", "code", "severity", "words"),
    [
        (("better",), None, [], "metric", "ok", ["finesight"]),
        (("worse", 0.9, 0.9), None, [], "metric-worse", "error", ["finesight report "]),
        (("worse", 0.5, 0.4), PEAK, [], "metric-worse", "error", ["step 30", "eval.patience=2"]),
        (("no clear change",), None, [], "metric-unclear", "warning", ["train.epochs=2"]),
        (None, [START_RECORD], [], "not-evaluated", "warning", ["data.eval="]),
        (
            None,
            None,
            cut("x = " + "1 + " * 30, "x = 1", 4, 10),
            "answers-unfinished",
            "error",
            ["4 of 10", "4 of them repetitive", "train.epochs=2"],
        ),
        (None, None, cut(TEXT[:100], TEXT, 3, 10), "answers-truncated", "error", ["tokens 256"]),
        (None, None, cut(TEXT[:100], TEXT, 1, 40), "predictions", "ok", ["40"]),
    ],
)
def test_predictions_have_their_diagnosis_and_remedy(
    change, lines, answers, code, severity, words, fake_run_dir
):
    if lines:
        fake_run_dir.write_lines("metrics.jsonl", lines)
    if change:
        fake_run_dir.write_finished(metric_differences=[difference(*change)])
    if answers:
        fake_run_dir.write_predictions("after", answers)
    found = diagnose_predictions(fake_run_dir)
    assert [one.severity for one in found if one.code == code] == [severity]
    one = find_diagnosis(found, code)
    assert all(word in f"{one.what} {one.remedy} finesight" for word in words), one


SIZES = ((640, 480), (300, 500), (1000, 200), (800, 800))


def boxes(made, tmp_path, message, right="pixels", off=0.0, *, has_points=False):
    """Answers whose boxes, and labels, are written in some frame; all are good but for it."""
    rng = random.Random(1)
    lines = []
    for number in range(12):
        width, height = SIZES[number % 4]
        image = tmp_path / f"{number}.png"
        Image.new("1", (width, height)).save(image)
        x1, y1 = rng.uniform(0, 0.5) * width, rng.uniform(0, 0.5) * height
        box = (x1, y1, x1 + rng.uniform(0.2, 0.45) * width, y1 + rng.uniform(0.2, 0.45) * height)
        wide, high = off * width * rng.uniform(-1, 1), off * height * rng.uniform(-1, 1)
        box = box[:2] * 2 if has_points else box
        changed = (box[0] + wide, box[1] + high, box[2] + wide, box[3] + high)
        written = [
            [{"image": 0, "label": "cat", "xyxy": list(to_frame(one, frame, width, height))}]
            for one, frame in ((changed, message), (box, right))
        ]
        texts = {"image": str(image), "boxes": written[0], "gold_boxes": written[1]}
        lines.append(make_prediction_line(str(number), "", "", 0.0, **texts))
    made.write_predictions("after", lines)


def to_frame(box, frame, width, height):
    x1, y1, x2, y2 = box
    if frame == "thousandths":
        return tuple(1000 * v / side for v, side in zip(box, (width, height) * 2, strict=True))
    if frame == "resized":
        return tuple(
            v * to / side
            for v, side, to in zip(box, (width, height) * 2, (504, 112) * 2, strict=True)
        )
    if frame == "larger":
        return tuple(2.5 * v for v in box)
    if frame == "longest":
        return tuple(448 * v / max(width, height) for v in box)
    return (x1, y1, x2 - x1, y2 - y1) if frame == "sizes" else box


@pytest.mark.parametrize(
    ("output", "right", "image", "words"), CASES["test_boxes_in_wrong_frame_are_detected"]
)
def test_boxes_in_wrong_frame_are_detected(fake_run_dir, tmp_path, output, right, image, words):
    fake_run_dir.write("recipe.yaml", yaml.safe_dump(EVAL_RECIPE | {"image": image}))
    boxes(fake_run_dir, tmp_path, output, right, off=0.02)
    found = find_diagnosis(diagnose_predictions(fake_run_dir), "box-convention-mismatch")
    assert words in found.what
    assert shlex.split(found.remedy)[:2] == ["finesight", "check"]


def test_points_in_wrong_frame_are_detected(fake_run_dir, tmp_path):
    boxes(fake_run_dir, tmp_path, "thousandths", has_points=True)
    found = find_diagnosis(diagnose_predictions(fake_run_dir), "box-convention-mismatch")
    assert "boxes of the predictions are in thousandths" in found.what


@pytest.mark.parametrize("off", [0.0, 0.1, 1.0])
def test_inaccurate_boxes_are_in_the_right_frame(fake_run_dir, tmp_path, off):
    boxes(fake_run_dir, tmp_path, "pixels", off=off)
    assert "box-convention-mismatch" not in list_codes(diagnose_predictions(fake_run_dir))


def test_boxes_without_image_files_are_skipped(fake_run_dir: FakeRunDir, tmp_path: Path) -> None:
    boxes(fake_run_dir, tmp_path, "thousandths")
    for image in tmp_path.glob("*.png"):
        image.unlink()
    assert list_codes(diagnose_predictions(fake_run_dir)) == []


VERDICTS = ("worse", "better", "no clear change")


def write_run(folder: Path, rng: random.Random) -> FakeRunDir:
    """A run of which each piece may be damaged."""

    def maybe(content: Any, often: float) -> Any:
        return mutated_value(rng, content) if rng.random() < often else content

    made = FakeRunDir(folder)
    made.write("recipe.yaml", yaml.safe_dump(maybe(CASES["damaged_recipe"], 0.5)))
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


@pytest.mark.parametrize("seed", range(16))
def test_corrupt_records_still_give_remedies(tmp_path: Path, seed: int) -> None:
    Image.new("1", (200, 100)).save(tmp_path / "image.png")
    made = write_run(tmp_path / "run", random.Random(seed))
    sections = doctor.diagnose(str(made.folder))
    assert [*sections] == ["run end", "training", "questions", "predictions"]
    for found in (one for section in sections.values() for one in section):
        assert found.severity == "ok" or (found.why and found.remedy), found


def write_questions(file: Path, *groups: tuple[int, str]) -> None:
    """Write samples, as many of each form, in which `<image>` is an image."""
    lines = []
    for count, form in groups:
        for number in range(count):
            parts: list[JsonLine] = []
            for piece in re.split("(<image>)", form.format(number)):
                if piece == "<image>":
                    parts.append({"type": "image", "image": f"{len(lines)}.png"})
                elif piece:
                    parts.append({"type": "text", "text": piece})
            question = {"role": "user", "content": parts}
            turns = [question, {"role": "assistant", "content": "yes"}]
            lines.append(json.dumps({"id": f"s{len(lines)}", "messages": turns}) + "\n")
    file.write_text("".join(lines))


@pytest.mark.parametrize(
    ("train", "evaluation", "code", "words"),
    [
        ([(9, "<image>Q{}")], [(9, "<image>R{}")], "questions", "'<image>{question}'"),
        ([(9, "<image>Q{}")], [(9, "Q{}<image>")], "questions-differ", "100% of the validation"),
        ([(9, "<image>Q{}")], [(9, "<image>\nQ{}")], "questions-differ", r"such as '<image>\nQ0'"),
        (
            [(9, "<image>Q{}")],
            [(6, "<image>Q{}"), (4, "<image>Q{} ")],
            "questions-differ",
            "40% of the validation",
        ),
        (
            [(6, "<image>Q{}"), (4, "Q{}<image>")],
            [(9, "Q{}<image>")],
            "questions-several",
            "'<image>{question}' (60%), '{question}<image>' (40%)",
        ),
    ],
)
@pytest.mark.parametrize("is_recorded", [False, True])
def test_form_of_the_questions_is_compared(
    tmp_path: Path,
    train: list[tuple[int, str]],
    evaluation: list[tuple[int, str]],
    code: str,
    words: str,
    is_recorded: bool,
) -> None:
    """A run of an earlier version has no recorded form: that of its data is read."""
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "eval")}
    write_questions(files["train"], *train)
    write_questions(files["eval"], *evaluation)
    made = FakeRunDir(tmp_path / "my run")
    data = {name: str(file) for name, file in files.items()}
    made.write("recipe.yaml", yaml.safe_dump(RECIPE | {"data": data}))
    manifest = MANIFEST | {"format_version": 2}
    if is_recorded:
        corpus = load_corpus([TrainFileSettings(path=files["train"])])
        templates = read_prompt_format(corpus, range(len(corpus))).templates
        manifest["prompt_templates"] = [one.model_dump() for one in templates]
        files["train"].unlink()
    made.write("manifest.json", json.dumps(manifest))
    (found,) = run_check.check_questions(read_run(made.folder))
    assert (found.code, found.severity) == (code, "ok" if code == "questions" else "warning")
    assert words in found.what
    assert code != "questions-several" or shlex.split(found.remedy)[-1] == "TEXT<image>"


def test_questions_of_lost_data_are_not_judged(tmp_path: Path) -> None:
    made = FakeRunDir(tmp_path / "my run")
    for path in ("gone.jsonl", "s3://bucket/data.jsonl"):
        made.write("recipe.yaml", yaml.safe_dump(RECIPE | {"data": {"train": path}}))
        assert run_check.check_questions(read_run(made.folder)) == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_codes_of_questions_are_documented(language: str) -> None:
    codes = {code.partition(".")[0] for code in load_catalog() if code.startswith("questions-")}
    rows = (ROOT / "docs" / language / "doctor.md").read_text("utf-8").splitlines()
    first_cells = [row.split("|")[1] for row in rows if row.startswith("|")]
    documented = {*re.findall(r"`(questions-\w+)`", "".join(first_cells))}
    assert documented == codes
