"""Rewards of responses: built-in ones, metrics, and functions that misbehave."""

import os

import pytest
from case_files import load_cases
from each_value import each

from finesight.config import RewardSettings
from finesight.data.sample import create_region
from finesight.errors import UserError
from finesight.evaluate import latex_metrics, rewards
from finesight.evaluate.custom_metric import RewardError
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.rewards import RewardScorer
from finesight.recipe import recipe_from_dict
from finesight.train.run_dir import RunDir

CASES = load_cases("rewards")


def make_case(answer: str = "", reference: str = "", boxes=(), reference_boxes=()) -> EvalCase:
    found, expected = (
        tuple(create_region((*one, *one)[:4], None, is_point=len(one) == 2) for one in both)
        for both in (boxes, reference_boxes)
    )
    return EvalCase(answer, found, (reference,), expected, "sample-1")


def score(reward: object, *cases: EvalCase) -> list[float | None]:
    settings = {"name": reward} if isinstance(reward, str) else reward
    with RewardScorer([RewardSettings.model_validate(settings)]) as scorer:
        (scores,) = scorer.score(cases)
    return scores


BOX = (10, 10, 30, 30)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@each(("reward", "case", "expected"), CASES["test_built_in_rewards"])
def test_built_in_rewards(reward, case, expected):
    assert score(reward, make_case(**case)) == [pytest.approx(expected)]


FUNCTIONS = """
import os, time

def fine(case): return len(case.answer)
def missing(case): return None if case.answer == "a" else float("nan") if case.answer else 1
def fails(case): return 1 / 0
def hangs(case): time.sleep(1000)
def spins(case):
    while True: pass
def shape(case): return [1.0]
def prints(case): print("x" * 2_000_000); return 1
def exits(case): os._exit(3)
def forks(case):
    os.fork()
    return 1
def eats(case): return len(bytearray(1 << 40))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "MAX_CPU_S", 0.3)
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def test_functions_score_responses(file):
    cases = [make_case("a"), make_case("bb"), make_case("")]
    assert score(f"{file}:fine", *cases) == [1, 2, 0]
    assert score(f"{file}:missing", *cases) == [None, None, 1]
    assert score(f"{file}:prints", *cases) == [1, 1, 1]
    pid = os.getpid()
    assert score(f"{file}:forks", *cases) == [1, 1, 1]
    assert os.getpid() == pid


@each(("function", "text"), CASES["test_failures_name_the_function"])
def test_failures_name_the_function(file, function, text, monkeypatch):
    # On a busy machine, a crash long after the start counts as a time limit.
    monkeypatch.setattr(rewards, "MAX_CPU_S", 0.1 if text == "took more than" else 20.0)
    with pytest.raises(RewardError, match=text) as caught:
        score(f"{file}:{function}", make_case("a"))
    assert caught.value.what.startswith(f"reward {function}: ")
    assert "rewards.py" in caught.value.where
    assert "--resume" in caught.value.remedy


@each("reward", ["json.g1", "captions", "ocr.cer", "latex.edit_distance"])
def test_score_that_rewards_no_correct_response_is_an_error(reward):
    with pytest.raises(UserError, match="no score") as caught:
        RewardScorer([RewardSettings(name=reward)])
    assert caught.value.where == f"rewards, {reward}"
    metric = reward.partition(".")[0]
    assert RewardScorer([RewardSettings(name=caught.value.remedy.removeprefix("use "))]).names
    # A score without its metric is unknown; the error lists the metrics.
    with pytest.raises(ValueError, match=f"'{metric}'.*such as grounding.iou"):
        RewardSettings(name=str(reward).partition(".")[2] or "rouge_l")


def test_formulas_are_compared_by_value(monkeypatch):
    """In one worker: it imports SymPy for a second."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr(rewards, "MATH_CPU_S", 2.0)
    answers, references, expected = zip(*CASES["test_formulas_are_compared_by_value"], strict=True)
    assert score("math", *map(make_case, answers, references)) == [*expected]


def test_missing_packages_are_errors(monkeypatch):
    monkeypatch.setattr(rewards.util, "find_spec", lambda name: None)
    schema = {"name": "format", "json_schema": SCHEMA}
    for settings, name in (({"name": "math"}, "math-verify"), (schema, "jsonschema")):
        with pytest.raises(UserError, match=name) as caught:
            RewardScorer([RewardSettings.model_validate(settings)])
        assert "pip install 'finesight[" in caught.value.remedy


@each(("answer", "expected"), [('{"b": [], "a": 1}', 1), ('{"a": "1"}', 0), ("a: 1", 0)])
def test_format_is_checked_by_a_json_schema(answer, expected):
    pytest.importorskip("jsonschema")
    assert score({"name": "format", "json_schema": SCHEMA}, make_case(answer)) == [expected]


@each("schema", [{"type": "objekt"}, {"$ref": "#/$defs/a"}, {"$ref": "https://a.example/b"}])
def test_invalid_schemas_are_errors(schema):
    pytest.importorskip("jsonschema")
    with pytest.raises(RewardError) as caught:
        score({"name": "format", "json_schema": schema}, make_case("{}"))
    assert caught.value.where == "rewards, json_schema"


def test_formulas_are_rendered_for_their_score_only(monkeypatch):
    def fail(formulas):
        raise AssertionError(formulas)

    monkeypatch.setattr(latex_metrics, "render_digests", fail)
    assert score("latex", make_case("x^2", "x^3")) == [pytest.approx(2 / 3)]
    with pytest.raises(AssertionError):
        score("latex.rendered", make_case("x^2", "x^3"))


def test_copy_in_the_run_replaces_a_missing_file(file, tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    rewards = ["exact", f"{file}:fine"]
    settings = {"model": "m", "data": {"train": "a.jsonl"}, "output_dir": str(run.path)}
    settings |= {"train": {"objective": "grpo"}, "rewards": rewards}
    run.copy_functions(recipe_from_dict(settings, []))
    file.unlink()
    with RewardScorer([RewardSettings(name=name) for name in rewards], run.path) as scorer:
        assert scorer.score([make_case("abc", "abc")]) == [[1], [3]]
