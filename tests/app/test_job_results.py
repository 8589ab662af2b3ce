"""Tests of the sentences about results of commands, with the data that the commands write."""

import contextlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from html_text import read_visible_text
from run_dir_fixtures import make_run, make_sign_answers
from studio_fixtures import open_client, read_live, write_job, write_outcome, write_recipe

from finesight.app.job_results import describe_result, explain_metric, list_commands
from finesight.app.jobs import OUTCOME_FILE, Job, JobOutcome
from finesight.app.studio_view import STEPS
from finesight.cli.app import MAX_RESULT_CHARS, run_command, select_result
from finesight.errors import Step
from finesight.operations.operation import OUTCOME_VARIABLE
from finesight.report.i18n import use_language
from finesight.report.run_reader import read_run
from finesight.report.run_verdict import judge_run

PLAN = {
    "chosen": {"fits": True, "total_bytes": 5e9, "run_s": 600.0},
    "target": {"memory_bytes": 24e9, "name": "RTX 4090", "is_measured": False, "num_gpus": 1},
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
    if arguments[0] == "plan":
        # The result has what the sentences of a plan that does not fit need.
        chosen = outcome.result["chosen"] | {"fits": False}
        result = outcome.result | {"chosen": chosen}
        assert "smaller images" in describe_result(make_job(*arguments), result)[1]
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


def test_result_with_a_name_that_is_no_text_is_read(folder, monkeypatch):
    """Neither in the result nor in the next steps of a command."""
    image = folder / "photos/caf\udce9.jpg"
    image.write_bytes(b"no image")
    image.with_suffix(".txt").write_text("red\n")
    words = ("--prompt", "Which color?", "--on-invalid-row", "skip")
    sentences = run_job(folder, monkeypatch, "import", "photos", "data/a", *words)
    assert sentences[1] == "1 rows are invalid and were skipped. Details list them."

    outcome = folder / "outcome.json"
    monkeypatch.setenv(OUTCOME_VARIABLE, str(outcome))

    @click.command
    @click.pass_obj
    def propose(report):
        report["next_steps"] = [Step("label", {"sources": ["caf\udce9"]})]

    assert run_command([], propose) == 0
    assert "caf?" in str(json.loads(outcome.read_text("utf-8"))["next_steps"])


def test_plan_is_memory_time_and_warnings():
    fits, duration, skipped, warning = describe_result(make_job("plan"), PLAN)
    assert fits == "The training fits: it needs about 5.0 GB of the 24 GB of RTX 4090."
    assert duration == "It takes about 10 min 01 s, of which about 2 min 00 s are for evaluations."
    assert skipped == "3 samples are skipped."
    assert "8 of 80 validation answers" in warning
    assert "104 tokens" in warning


def test_plan_that_does_not_fit_says_what_may_be_used_and_changed():
    chosen = PLAN["chosen"] | {"fits": False, "total_bytes": 22.3e9, "usable_bytes": 21.6e9}
    chosen |= {"exceeds_host_memory": False, "host_bytes": 90e9, "host_memory_bytes": 64e9}
    plan = PLAN | {"chosen": chosen, "memory_hints": ["smaller images", "a smaller model"]}
    problem, advice = describe_result(make_job("plan"), plan)[:2]
    assert problem == (
        "The training does not fit: it needs about 22.30 GB, and may use 21.60 GB, 90 % of the"
        " memory of RTX 4090."
    )
    assert advice == "Try one of these: smaller images, a smaller model."
    several = plan | {"target": PLAN["target"] | {"num_gpus": 4}}
    assert "of each of 4 RTX 4090." in describe_result(make_job("plan"), several)[0]
    offloaded = plan | {"chosen": chosen | {"exceeds_host_memory": True}}
    assert "90.0 GB of memory outside" in describe_result(make_job("plan"), offloaded)[0]
    with use_language("zh"):
        problem, advice = describe_result(make_job("plan"), plan)[:2]
    assert problem.startswith("放不下")
    assert "更小的图像、更小的模型" in advice


@pytest.mark.parametrize("value", [float("inf"), 1e300])
def test_invalid_durations_have_no_sentence(value):
    assert len(describe_result(make_job("plan"), PLAN | {"startup_s": value})) <= 4


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
    assert select_result({"caf\udce9.jpg": "caf\udce9"}) == {"caf?.jpg": "caf?"}
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
    for text in ("rm -r data", "vllm serve a\nrm -r data", "vllm serve a\x1b[2K"):
        assert list_commands(job, {"vllm": text}) == {}


def add_run(folder: Path) -> Path:
    return make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0] * 4)).folder


def test_metric_is_explained(folder):
    row = judge_run(read_run(add_run(folder)), run=Path("runs/a")).primary_row
    assert row is not None
    explanation = explain_metric(row.name)
    assert re.fullmatch(r".+: .+\. (From 0 to \d+; higher|Lower) is better\.", explanation)
    assert explanation in read_live(folder, "step=results&run=runs/a&lang=en")["top"]
    result = {"primary_metric": row.name, "num_samples": 8, "scores": {row.name: 0.5}}
    assert describe_result(make_job("eval"), result)[1] == explanation
    with use_language("zh"):
        assert ". " not in explain_metric("accuracy")
    assert explain_metric("own_score") == ""
    own = {"primary_metric": "own_score", "num_samples": 8, "scores": {"own_score": 0.5}}
    assert len(describe_result(make_job("eval"), own)) == 1


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
