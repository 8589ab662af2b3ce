"""Tests of the sentences about results of commands, with the data that the commands write."""

import contextlib
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from html_text import read_visible_text
from run_dir_fixtures import make_run, make_sign_answers
from studio_fixtures import open_client, read_live, write_job, write_outcome, write_recipe

from finesight.app.job_results import describe_result, list_commands
from finesight.app.jobs import OUTCOME_FILE, Job, JobOutcome
from finesight.app.studio_view import STEPS, explain_metric
from finesight.cli.app import MAX_RESULT_CHARS, run_command, select_result
from finesight.operations.operation import OUTCOME_VARIABLE
from finesight.report.i18n import use_language
from finesight.report.run_reader import read_run
from finesight.report.run_verdict import judge_run

PLAN = {
    "chosen": {"fits": True, "total_bytes": 5e9, "run_s": 600.0},
    "target": {"memory_bytes": 24e9, "name": "RTX 4090", "is_measured": False},
    "startup_s": 1.0,
    "evaluation": {
        "total_s": 120.0,
        "num_cut_answers": 8,
        "num_samples": 80,
        "max_answer_tokens": 104,
    },
    "token_stats": {"num_skipped": 3},
    "warnings": ["answers are cut"],
}


def make_job(*arguments: str) -> Job:
    now = datetime.now(UTC)
    return Job(folder=Path("job"), step="data", target="", arguments=arguments, started_at=now)


def run_job(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """Run a command as a job does, and return the sentences of its result."""
    file = folder.parent / OUTCOME_FILE
    monkeypatch.setenv(OUTCOME_VARIABLE, str(file))
    with contextlib.chdir(folder):
        run_command(arguments)
    outcome = JobOutcome.model_validate_json(file.read_text("utf-8"))
    assert outcome.error is None
    return describe_result(make_job(*arguments), outcome.result)


def test_results_of_commands_are_sentences(folder, monkeypatch):
    words = ("--prompt", "Which color?", "--train-fraction", "0.75")
    sentences = run_job(folder, monkeypatch, "import", "photos", "data/a", *words)
    (text,) = sentences
    counts = re.fullmatch(r"(\d+) samples for training and (\d+) for validation are ready\.", text)
    assert counts is not None
    assert sum(map(int, counts.groups())) == 24
    sentences = run_job(folder, monkeypatch, "check", "data/a/train.jsonl")
    assert sentences[0] == f"{counts[1]} samples with {counts[1]} images were checked."
    write_recipe(folder, "a", "data/a/train.jsonl")
    fits, duration = run_job(folder, monkeypatch, "plan", "a.yaml")
    assert re.fullmatch(r"The training fits: .* GB of the \d+ GB of this machine\.", fits)
    assert duration.startswith("It takes about ")


def test_plan_is_memory_time_and_warnings():
    fits, duration, skipped, warning = describe_result(make_job("plan"), PLAN)
    assert fits == "The training fits: it needs about 5.0 GB of the 24 GB of RTX 4090."
    assert duration == "It takes about 10 min 01 s, of which about 2 min 00 s are for evaluations."
    assert skipped == "3 samples are skipped."
    assert "8 of 80 validation answers" in warning
    assert "104 tokens" in warning
    chosen = PLAN["chosen"] | {"fits": False}
    with use_language("zh"):
        assert describe_result(make_job("plan"), PLAN | {"chosen": chosen})[0].startswith("放不下")


@pytest.mark.parametrize("value", [None, 3, "a", {"a": 1}])
def test_results_of_other_versions_have_no_sentences(value):
    for key in PLAN:
        describe_result(make_job("plan"), PLAN | {key: value})
    for name in ("import", "check", "eval", "guard", "search", "merge", "export"):
        broken = dict.fromkeys(("output_files", "issues", "scores", "groups", "trials"), value)
        assert describe_result(make_job(name), broken) == []


def test_large_results_and_lists_are_not_recorded():
    assert select_result({"a": float("nan"), "b": Path("c")}) == {"a": None, "b": "c"}
    assert select_result({"a": "x" * MAX_RESULT_CHARS}) == {}
    assert select_result([1]) == {}
    (text,) = describe_result(make_job("merge"), {"folder": "models/\udcff"})
    assert text == "The merged model is in the folder models/?."


def test_serving_commands_are_copied(folder):
    add_run(folder)
    job = write_job(folder, "export", "export models/a", exit_code=0, target="runs/a")
    result = {"vllm": "vllm serve <models/a>", "sglang": None, "request": {}}
    write_outcome(job, 0, result=result)
    page = read_live(folder, "step=export&run=runs/a&lang=en")["bottom"]
    assert 'data-copy="vllm serve &lt;models/a&gt;"' in page
    assert list_commands(job, result) == {"vLLM": "vllm serve <models/a>"}
    assert list_commands(make_job("merge"), result) == {}


def add_run(folder: Path) -> Path:
    return make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0] * 4)).folder


def test_metric_is_explained(folder):
    verdict = judge_run(read_run(add_run(folder)), run=Path("runs/a"))
    explanation = explain_metric(verdict)
    assert re.fullmatch(r".+: .+\. (From 0 to \d+; higher|Lower) is better\.", explanation)
    assert explanation in read_live(folder, "step=results&run=runs/a&lang=en")["top"]


def test_pages_have_no_words_of_the_command_line(folder):
    """Options and placeholders of a terminal are only in commands, logs and attributes."""
    add_run(folder)
    write_recipe(folder, "a", "data/a/train.jsonl")
    words = re.compile(r"--[a-z][\w-]+|\b[A-Z]+_[A-Z_]+\b|\bSOURCE\b|\bOUT/\S+|data/data")
    with open_client(folder) as client:
        for step in STEPS:
            page = client.get(f"/?step={step}&run=runs/a&recipe=a.yaml&lang=en").text
            page = re.sub(r"<(code|pre|textarea)\b.*?</\1>", "", page, flags=re.DOTALL)
            assert words.findall(read_visible_text(page)) == [], step
