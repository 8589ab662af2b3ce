"""Suites of the regression guard, and its verdicts."""

from pathlib import Path

import pytest
from engine_fixtures import write_noise_image
from module_loader import load_module
from PIL import Image

from finesight.errors import UserError
from finesight.evaluate.regression_guard import (
    BELOW_MINIMUM,
    BUILT_IN_SUITE,
    DROPPED,
    compare_answers,
    load_suite,
    update_suite,
)
from finesight.infer.prediction import Prediction

SUITE = """\
groups:
  words:  # of signs
    metric: qa
    allowed_drop: 0.1
    questions:
      - {prompt: Read., image: a.png, answer: [exit, way out]}
      - {prompt: Greet., answer: hello}
  inline: {metric: qa, min_score: 0.5, questions: [{prompt: p, answer: a}]}
"""


def write_suite(folder: Path, text: str = SUITE) -> Path:
    write_noise_image(folder / "a.png", 60, 60)
    (folder / "suite.yaml").write_text(text)
    return folder / "suite.yaml"


WRONG_SUITES = [
    ("metric: qa", "metric: quality", 3, "classification"),
    ("metric: qa", "metric: mine.py:score", 3, "ocr"),
    ("metric: qa", "metric: grounding", 2, "box"),
    ("allowed_drop", "alowed_drop", 4, "did you mean allowed_drop"),
    ("allowed_drop: 0.1", "allowed_drop: -1", 4, "greater than or equal"),
    ("answer: hello", "answers: hello", 7, "answer"),
    (", answer: hello", "", 7, "required"),
    ("answer: hello", "answer: ''", 7, "empty"),
    ("min_score: 0.5,", "data: more.jsonl,", 8, "either"),
    ("inline: {metric: qa,", "inline: {metric: qa", 8, "YAML"),
    (SUITE, "groups: {}", 1, "at least 1"),
]


@pytest.mark.parametrize(("old", "new", "line", "word"), WRONG_SUITES)
def test_error_of_a_suite_names_its_line(tmp_path, old, new, line, word):
    path = write_suite(tmp_path, SUITE.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_suite(path)
    assert str(caught.value.where).startswith(f"{path}:{line}")
    assert word in str(caught.value)


def make_predictions(num_correct: int, count: int) -> list[Prediction]:
    answers = ["right"] * num_correct + ["?"] * (count - num_correct)
    return [
        Prediction(f"q{n}", (), "Say right.", answer, answer, (), 1, "stop")
        for n, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("count", "before", "after", "settings", "verdicts"),
    [
        (40, 40, 20, "", (True, False)),
        (40, 40, 20, "allowed_drop: 0.3", (True, False)),
        (40, 40, 20, "allowed_drop: 0.4", (False, False)),  # within the interval
        (40, 20, 40, "min_score: 1", (False, False)),
        (40, 40, 39, "min_score: 0.98", (False, True)),  # no clear change
        (3, 3, 0, "", (False, False)),  # too few for a verdict
        (3, 3, 0, "min_score: 0.5", (False, True)),
    ],
)
def test_group_fails_beyond_the_allowed_drop_or_below_its_minimum(
    tmp_path, count, before, after, settings, verdicts
):
    questions = "[" + ", ".join(["{prompt: Say right., answer: right}"] * count) + "]"
    text = f"groups: {{g: {{metric: classification, questions: {questions}, {settings}}}}}"
    (group,) = load_suite(write_suite(tmp_path, text))
    answers = [make_predictions(before, count)], [make_predictions(after, count)]
    (result,) = compare_answers([group], *answers)
    assert (DROPPED in result.problems, BELOW_MINIMUM in result.problems) == verdicts
    lost = [one["after"] for one in result.lost_answers]
    assert lost == ["?"] * min(5, max(0, before - after))


def test_groups_fail_together(tmp_path):
    """A drop that fails a single group is no clear drop among four groups, in one of them."""
    questions = "[" + ", ".join(["{prompt: Say right., answer: right}"] * 20) + "]"
    group = f"{{metric: classification, questions: {questions}}}"
    text = "groups:\n" + "".join(f"  group-{number}: {group}\n" for number in range(4))
    groups = load_suite(write_suite(tmp_path, text))
    all_correct = make_predictions(20, 20)
    some_lost = make_predictions(14, 20)
    (alone,) = compare_answers(groups[:1], [all_correct], [some_lost])
    assert alone.problems == [DROPPED]
    # Ten gained and lost answers: no difference, but a test.
    mixed = [*make_predictions(10, 10), *make_predictions(0, 10)]
    before = [all_correct, mixed, mixed, mixed]
    results = compare_answers(groups, before, [some_lost, *[mixed[::-1]] * 3])
    assert not any(one.problems for one in results)
    assert results[0].difference.high == 0
    # Groups in which nothing changed do not count.
    results = compare_answers(groups, [all_correct] * 4, [some_lost, *[all_correct] * 3])
    assert [one.problems for one in results] == [[DROPPED], [], [], []]


def test_updated_suite_keeps_its_text_and_accepts_the_same_answers(tmp_path):
    path = write_suite(tmp_path)
    for _ in range(2):
        groups = load_suite(path)
        answers = [make_predictions(1, len(one.samples)) for one in groups]
        answers[0][0] = make_predictions(0, 1)[0]
        results = compare_answers(groups, answers, answers)
        updated = update_suite(path, groups, results)
        assert not any(one.problems for one in compare_answers(updated, answers, answers))
    old, new = SUITE.splitlines(), path.read_text().splitlines()
    assert new[2] == "    min_score: 0"
    assert [*new[:2], *new[3:8]] == old[:7]
    assert new[8] == old[7].replace("0.5", "0")
    assert [one.settings.min_score for one in updated] == [0, 0]


def test_linked_suite_is_updated_in_its_place(tmp_path):
    suite, link = write_suite(tmp_path), tmp_path / "link.yaml"
    link.symlink_to(suite.name)
    groups = load_suite(link)
    answers = [make_predictions(1, len(one.samples)) for one in groups]
    results = compare_answers(groups, answers, answers)
    update_suite(link, groups, results)
    assert link.is_symlink()
    assert suite.read_text().count("min_score: ") == len(groups)


def test_groups_of_an_alias_get_the_least_score(tmp_path):
    path = tmp_path / "suite.yaml"
    group = "{metric: qa, questions: [{prompt: p, answer: right}]}"
    path.write_text(f"groups:\n  a: &same {group}\n  b: *same\n")
    groups = load_suite(path)
    answers = [make_predictions(0, 1), make_predictions(1, 1)]
    results = compare_answers(groups, answers, answers)
    scores = sorted(one.difference.after for one in results)
    assert scores[0] < scores[1]
    assert {one.settings.min_score for one in update_suite(path, groups, results)} == {0}


def test_built_in_suite_is_that_of_its_generator(tmp_path):
    load_module("tools/guard_suite.py").write_guard_suite(tmp_path)
    folder = BUILT_IN_SUITE.parent
    assert {one.name for one in tmp_path.iterdir()} == {one.name for one in folder.iterdir()}
    for file in folder.iterdir():
        if file.suffix == ".png":
            shown, drawn = (Image.open(one).convert("RGB") for one in (file, tmp_path / file.name))
            assert shown.tobytes() == drawn.tobytes(), file.name
        else:
            assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name
    groups = load_suite(BUILT_IN_SUITE)
    assert [one.name for one in groups] == ["reading", "counting", "boxes", "chat"]
    for group in groups:
        assert len({*map(str, group.samples)}) == 32, group.name
