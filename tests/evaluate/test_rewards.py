"""Rewards of responses: built-in ones, metrics, and functions that misbehave."""

import json
import os

import pytest
from case_files import load_cases

from finesight.errors import UserError
from finesight.evaluate import reward_scorer, score_function
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metrics.latex import score as latex_score
from finesight.evaluate.reward_scorer import RewardScorer
from finesight.evaluate.rewards.format import score as format_score
from finesight.evaluate.rewards.math import score as math_score
from finesight.evaluate.score_function import RewardError
from finesight.samples.sample import create_region
from finesight.settings.config import parse_reward
from finesight.settings.recipe import recipe_from_dict
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
    with RewardScorer([parse_reward(settings)]) as scorer:
        (scores,) = scorer.score(cases)
    return scores


BOX = (10, 10, 30, 30)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(("reward", "case", "expected"), CASES["test_built_in_rewards"])
def test_built_in_rewards(reward, case, expected):
    assert score(reward, make_case(**case)) == [pytest.approx(expected)]


FUNCTIONS = """
import os, subprocess, sys, threading, time
import numpy as np

def fine(case): return len(case.answer)
def missing(case): return None if case.answer == "a" else float("nan") if case.answer else 1
def fails(case): return 1 / 0
def hangs(case): time.sleep(1000)
def spins(case):
    while True: pass
def shape(case): return [1.0]
def prints(case): print("x" * 2_000_000); sys.stderr.write("x" * 2_000_000); return 1
def exits(case): os._exit(3)
def waits_for_a_process(case):
    return subprocess.run([sys.executable, "-c", "raise SystemExit(3)"]).returncode
def forks(case):
    os.fork()
    return 1
def forks_forever(case):
    if os.fork() == 0:
        time.sleep(1000)
    return 1
def starts_thread(case): threading.Thread(target=time.sleep, args=(1000,)).start(); return 1
def reads_input(case): return 1 + len(sys.stdin.read())
def numpy_scalar(case): return np.float32(1)
def numpy_bool(case): return np.all([True])
def true(case): return True
def eats(case): return len(bytearray(1 << 40))
def huge(case): return 10**400
def digits(case): return 10**5000
def infinite(case): return float("inf")
def overflows(case): return 1e300
def text(case): return "1.0"
def array(case): return np.ones(3)
def generator(case): yield 1
def complex_number(case): return 1j
class Faulty(float):
    def __float__(self): raise RuntimeError("no number")
    def __repr__(self): raise RuntimeError("no text")
def faulty(case): return Faulty(1)
def unprintable(case): return [Faulty(1)]
class FaultyError(Exception):
    def __str__(self): raise RuntimeError("no text")
def raises_faulty(case): raise FaultyError
def leaves(case): sys.exit(3)
def interrupts(case): raise KeyboardInterrupt
def recurses(case): return recurses(case)
def long_error(case): raise ValueError("x" * 10_000_000)
def killed(case): os.kill(os.getpid(), 9)
def stopped(case): os.kill(os.getpid(), 19)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def test_functions_score_responses(file):
    cases = [make_case("a"), make_case("bb"), make_case("")]
    assert score(f"{file}:fine", *cases) == [1, 2, 0]
    assert score(f"{file}:missing", *cases) == [None, None, 1]
    assert score(f"{file}:prints", *cases) == [1, 1, 1]
    assert score(f"{file}:waits_for_a_process", *cases) == [3, 3, 3]
    pid = os.getpid()
    for name in ("forks", "forks_forever", "starts_thread", "reads_input"):
        assert score(f"{file}:{name}", *cases) == [1, 1, 1]
    for name in ("numpy_scalar", "numpy_bool", "true"):
        assert score(f"{file}:{name}", *cases) == [1, 1, 1]
    assert os.getpid() == pid


@pytest.mark.parametrize(("function", "text"), CASES["test_failures_name_the_function"])
def test_failures_name_the_function(file, function, text, monkeypatch):
    if text == "took more than":
        monkeypatch.setattr(score_function, "CALL_SECONDS", 0.1)
    with pytest.raises(RewardError, match=text) as caught:
        score(f"{file}:{function}", make_case("a"))
    assert caught.value.what.startswith(f"reward {function}: ")
    assert len(caught.value.what) < 2000
    assert "rewards.py" in caught.value.where
    assert ("sample-1" in caught.value.what) == (function != "absent")
    assert "--resume" in caught.value.remedy


@pytest.mark.parametrize("reward", ["json.g1", "captions", "ocr.cer", "latex.edit_distance"])
def test_score_that_rewards_no_correct_response_is_an_error(reward):
    with pytest.raises(UserError, match="no score") as caught:
        RewardScorer([parse_reward({"name": reward})])
    assert caught.value.where == f"rewards, {reward}"
    metric = reward.partition(".")[0]
    remedy = {"name": str(caught.value.remedy).removeprefix("use ")}
    assert RewardScorer([parse_reward(remedy)]).names
    # A score without its metric is unknown; the error lists the metrics.
    with pytest.raises(ValueError, match=f"'{metric}'.*such as grounding.iou"):
        parse_reward({"name": reward.partition(".")[2] or "rouge_l"})


def test_formulas_are_compared_by_value(monkeypatch):
    """In one worker: it imports SymPy for a second."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr(math_score, "MAX_CPU_S", 2.0)
    answers, references, expected = zip(*CASES["test_formulas_are_compared_by_value"], strict=True)
    assert score("math", *map(make_case, answers, references)) == [*expected]


def test_missing_packages_are_errors(monkeypatch):
    monkeypatch.setattr(reward_scorer.util, "find_spec", lambda name: None)
    schema = {"name": "format", "json_schema": SCHEMA}
    for settings, name in (({"name": "math"}, "math-verify"), (schema, "jsonschema")):
        with pytest.raises(UserError, match=name) as caught:
            RewardScorer([parse_reward(settings)])
        assert "pip install 'finesight[" in caught.value.remedy


@pytest.mark.parametrize(
    ("answer", "expected"), [('{"b": [], "a": 1}', 1), ('{"a": "1"}', 0), ("a: 1", 0)]
)
def test_format_is_checked_by_a_json_schema(answer, expected):
    pytest.importorskip("jsonschema")
    assert score({"name": "format", "json_schema": SCHEMA}, make_case(answer)) == [expected]


EXPONENTIAL = r"^\W?(\w+\s?)+\.$"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pattern", EXPONENTIAL),
        ("json_schema", {"pattern": EXPONENTIAL}),
        ("json_schema", {"not": {"anyOf": [{"pattern": EXPONENTIAL}]}}),
        ("json_schema", {"propertyNames": {"pattern": EXPONENTIAL}}),
        ("json_schema", {"patternProperties": {EXPONENTIAL: {}}}),
        ("json_schema", {"$ref": "#"}),
    ],
)
def test_format_without_an_end_names_the_sample(option, value, monkeypatch):
    pytest.importorskip("jsonschema")
    monkeypatch.setattr(format_score, "MAX_PATTERN_CPU_S", 0.2)
    monkeypatch.setattr(format_score, "SCHEMA_CPU_S", 2.0)
    answer = json.dumps({"a" * 61: 1} if "ropert" in str(value) else "a" * 61)
    with pytest.raises(RewardError, match=r"took more than|RecursionError") as caught:
        score({"name": "format", option: value}, make_case(answer))
    assert "sample-1" in caught.value.what
    assert caught.value.where == f"rewards, {option}"
    assert "--resume" in str(caught.value.remedy)


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "[z-a]", "a" * 1001])
def test_invalid_patterns_are_errors_of_the_recipe(pattern):
    with pytest.raises(ValueError, match=r"not a regular expression|longer than"):
        parse_reward({"name": "format", "pattern": pattern})


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "("},
        {"pattern": "a{99999999999999999999}"},
        {"type": "objekt"},
        {"$ref": "#/$defs/a"},
        {"$ref": "https://a.example/b"},
    ],
)
def test_invalid_schemas_are_errors(schema):
    pytest.importorskip("jsonschema")
    with pytest.raises(RewardError) as caught:
        score({"name": "format", "json_schema": schema}, make_case("{}"))
    assert caught.value.where == "rewards, json_schema"


def test_formulas_are_rendered_for_their_score_only(monkeypatch):
    def fail(formulas):
        raise AssertionError(formulas)

    monkeypatch.setattr(latex_score, "render_digests", fail)
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
    with RewardScorer([parse_reward({"name": name}) for name in rewards], run.path) as scorer:
        assert scorer.score([make_case("abc", "abc")]) == [[1], [3]]
