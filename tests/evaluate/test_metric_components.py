"""Tests of metrics as components: light halves, names in other modules, and plug-ins."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_fixtures import install, write_package

import finesight
from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.task_metrics import check_references, compute_metrics
from finesight.metric_components import METRICS, Score, find_score, get_metric, get_score
from finesight.report.metric_rows import describe_metric, format_metric_name

SOURCE = Path(finesight.__file__).parent

WITHOUT_NUMPY = """
import sys
for name in ("torch", "numpy", "transformers", "PIL"):
    sys.modules[name] = None  # an import fails
import finesight.settings.config
assert not [name for name in sys.modules if name.startswith("finesight.evaluate")]
from finesight.metric_components import METRICS, get_score
assert all(METRICS[name].scores for name in METRICS)
assert get_score("cer").lower_is_better
"""


def test_light_halves_need_no_numpy():
    command = [sys.executable, "-c", WITHOUT_NUMPY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scores_of_the_same_name_are_equal_in_all_metrics():
    for component in METRICS.list_built_in():
        for name, score in component.scores.items():
            assert score == find_score(name), (component.name, name)
        assert component.primary_score in component.scores


OTHER_MEANINGS = {
    "ingest/formats/coco.py": "values of --box-task",
    "ingest/formats/conversation_rows.py": "key of a turn",
    "ingest/formats/dataset_format.py": "values of --box-task",
    "ingest/formats/fiftyone.py": "kinds of data",
    "ingest/formats/image_annotations.py": "values of --box-task",
    "ingest/formats/label_studio.py": "values of --box-task",
    "ingest/formats/labelme.py": "values of --box-task",
    "ingest/formats/openai.py": "key of a turn",
    "ingest/import_source.py": "values of --box-task",
    "ingest/mapped_rows.py": "values of --box-task",
    "ingest/formats/row_keys.py": "names of texts in data",
    "ingest/source_options.py": "values of --box-task",
    "serve/chat_completions.py": "key of a message",
    "evaluate/rewards/boxes.py": "metrics whose reward it is",
    "evaluate/rewards/math/__init__.py": "extra latex",
}
"""Files with texts that are equal to the name of a metric, and what these are.

`json` is not searched, because it is also a format of files.
"""


def iter_texts(tree: ast.AST) -> Iterator[object]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            yield node.value


def test_no_other_module_names_a_metric():
    names = {one.name for one in METRICS.list_built_in()} - {"json"}
    found = set()
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        texts = set(iter_texts(ast.parse(path.read_text("utf-8"))))
        if not name.startswith("evaluate/metrics/") and texts & names:
            found.add(name)
    assert found == {name for name in OTHER_MEANINGS if (SOURCE / name).is_file()}


METERS = """
from finesight.evaluate.eval_case import MetricResult, mean_metrics
from finesight.evaluate.task_metrics import TaskMetric
from finesight.metric_components import MetricComponent, Score, TaskSuggestion


def score(cases):
    scores = []
    for case in cases:
        is_right = case.answer in case.references
        scores.append({"meters_right": float(is_right), "meters_wrong": 0.0})
    return MetricResult(scores, mean_metrics(scores))


OLD = TaskMetric("meters_right", score)
ARGUMENTS = {"kind": "metrics", "name": "meters", "title": "Meters"}
ARGUMENTS |= {"implementation": "meters:score", "primary_score": "meters_right"}
NEW = MetricComponent(
    **ARGUMENTS,
    scores={
        "meters_right": Score(title="right readings", description="readings without an error"),
        "meters_wrong": Score(title="wrong digits", lower_is_better=True),
    },
)
"""
CASES = [EvalCase(answer, (), ("12",), ()) for answer in ("12", "13")]


def install_meters(
    folder: Path, monkeypatch: pytest.MonkeyPatch, target: str, more: str = ""
) -> None:
    write_package(folder, "meters", {"metrics meters": f"meters:{target}"}, METERS + more)
    monkeypatch.delitem(sys.modules, "meters", raising=False)
    install(folder, monkeypatch)


@pytest.mark.parametrize("target", ["OLD", "NEW"])
def test_metric_of_a_plugin_scores_answers(target, tmp_path, monkeypatch):
    install_meters(tmp_path, monkeypatch, target)
    component = METRICS["meters"]
    assert (component.name, component.primary_score) == ("meters", "meters_right")
    assert component.reference_kind == "text"
    assert compute_metrics("meters", CASES).scores["meters_right"] == 0.5
    check_references("meters", [(("12",), ())])


def test_page_shows_the_scores_of_a_plugin(tmp_path, monkeypatch):
    assert get_score("meters_wrong") == Score(title="meters_wrong")
    install_meters(tmp_path, monkeypatch, "NEW")
    assert METRICS["meters"].name == "meters"
    assert format_metric_name("meters_right") == "right readings"
    assert describe_metric("meters_right") == "readings without an error; higher is better"
    assert describe_metric("meters_wrong") == "lower is better"


def test_page_shows_the_scores_of_an_old_plugin_by_name(tmp_path, monkeypatch):
    install_meters(tmp_path, monkeypatch, "OLD")
    assert not METRICS["meters"].scores
    assert (format_metric_name("meters_right"), describe_metric("meters_right")) == (
        "meters_right",
        "higher is better",
    )


REDEFINED = {
    "accuracy": "'accuracy' has another direction or maximum in the metric classification",
    "anls": "'anls' has another direction or maximum in the metric",
    "ended_with_eos": "all metrics have a score ended_with_eos",
}


@pytest.mark.parametrize("name", REDEFINED)
def test_plugin_cannot_redefine_a_score(name, tmp_path, monkeypatch):
    change = f"SCORE = Score(title='s', lower_is_better=True)\nSCORES = {{{name!r}: SCORE}}\n"
    bad = "BAD = MetricComponent(**ARGUMENTS, scores=SCORES)\n"
    install_meters(tmp_path, monkeypatch, "BAD", change + bad)
    with pytest.raises(UserError, match=REDEFINED[name]):
        compute_metrics("meters", CASES)
    assert get_score(name).title != "s"


def test_plugin_may_share_a_built_in_score(tmp_path, monkeypatch):
    accuracy = "from finesight.metric_components import METRICS\n"
    accuracy += "SCORE = METRICS['classification'].scores['accuracy']\n"
    good = "GOOD = MetricComponent(**ARGUMENTS, scores={'accuracy': SCORE})\n"
    install_meters(tmp_path, monkeypatch, "GOOD", accuracy + good)
    assert METRICS["meters"].scores["accuracy"] == get_score("accuracy")


def test_installed_plugin_that_is_not_used_changes_no_score(tmp_path, monkeypatch):
    """Two that are used agree on a score."""
    code = METERS.replace('"meters"', '"gauges"').replace("meters:", "gauges:")
    write_package(tmp_path / "b", "gauges", {"metrics gauges": "gauges:NEW"}, code + GAUGES)
    monkeypatch.delitem(sys.modules, "gauges", raising=False)
    install(tmp_path / "b", monkeypatch)
    install_meters(tmp_path / "a", monkeypatch, "NEW")
    assert METRICS["meters"].scores["meters_wrong"].title == "wrong digits"
    assert get_score("meters_wrong").title == "wrong digits"
    with pytest.raises(UserError, match="in the metric meters: give it another name"):
        METRICS["gauges"]
    assert get_score("meters_wrong").title == "wrong digits"


GAUGES = """
NEW = MetricComponent(**ARGUMENTS, scores={"meters_wrong": Score(title="other")})
"""


def test_first_score_of_a_plugin_is_higher_for_better_answers(tmp_path, monkeypatch):
    change = """
ARGUMENTS["primary_score"] = ""
SCORE = Score(title="r", lower_is_better=True)
BAD = MetricComponent(**ARGUMENTS, scores={"meters_right": SCORE})
"""
    install_meters(tmp_path, monkeypatch, "BAD", change)
    with pytest.raises(UserError, match="lower values of the primary score meters_right"):
        check_references("meters", [(("12",), ())])


BROKEN = {
    "it has no implementation": "MetricComponent(kind='metrics', name='meters', title='M')",
    "is no function": "MetricComponent(**ARGUMENTS | {'implementation': 'meters:ARGUMENTS'})",
    "No module named 'absent'": "MetricComponent(**ARGUMENTS | {'implementation': 'absent:f'})",
    "reference_kind is 'sound'": "MetricComponent(**ARGUMENTS, reference_kind='sound')",
    "answer_content is 'sound'": "MetricComponent(**ARGUMENTS, answer_content='sound')",
    "scores has 'r' for 'meters'": "MetricComponent(**ARGUMENTS, scores={'meters': 'r'})",
    "lower values of its primary score meters_right are better": (
        "MetricComponent(**ARGUMENTS, scores="
        "{'meters_right': Score(title='r', lower_is_better=True)})"
    ),
    "score 'meters': title is None": (
        "MetricComponent(**ARGUMENTS, scores={'meters': Score(title=None)})"
    ),
    "score 'meters': maximum is '10'": (
        "MetricComponent(**ARGUMENTS, scores={'meters': Score(title='m', maximum='10')})"
    ),
    "counts_answers with a maximum of 100": (
        "MetricComponent(**ARGUMENTS, scores={'meters': Score("
        "title='m', maximum=100, counts_answers=True)})"
    ),
    "two scores have the same title": (
        "MetricComponent(**ARGUMENTS, scores="
        "{'meters': Score(title='m'), 'meters_2': Score(title='m')})"
    ),
    "suggestion: max_pixels is 'large'": (
        "MetricComponent(**ARGUMENTS, suggestion=TaskSuggestion(max_pixels='large'))"
    ),
    "size_warning '.* has other placeholders": (
        "MetricComponent(**ARGUMENTS, size_warning='{} has {} samples, 100 {')"
    ),
    "its kind is 'trackers'": "MetricComponent(**ARGUMENTS | {'kind': 'trackers'})",
    "the metric is named 'gauges'": "MetricComponent(**ARGUMENTS | {'name': 'gauges'})",
    "does not implement MetricComponent": "TaskMetric",
}


@pytest.mark.parametrize("problem", BROKEN)
def test_broken_metric_of_a_plugin_is_a_user_error(problem, tmp_path, monkeypatch):
    install_meters(tmp_path, monkeypatch, "BAD", f"BAD = {BROKEN[problem]}\n")
    with pytest.raises(UserError, match=problem) as caught:
        compute_metrics("meters", CASES)
    assert "plug-in meters of meters 1.0 (finesight.metrics: " in str(caught.value)
    assert describe_metric("meters_right") == "higher is better"
    assert get_metric("absent").answer_content == "text"
