"""Tests of the side bar: states of the steps, and running commands on every page."""

import re
import shutil
from pathlib import Path

import pytest
from run_dir_fixtures import make_run, make_sign_answers
from studio_fixtures import read_live, write_job, write_recipe

from finesight.app.jobs import Job
from finesight.app.studio_side import RunningJob, describe_running, find_step_states
from finesight.app.studio_view import STEPS
from finesight.files.storage import write_file
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.progress import find_progress
from finesight.report.summary import RunStatus

LOG = "data.train: 24 samples\nrows: 10/30, 20 s left\nanswers: 6/24, 7200 s left\nwarning: 1/2 a"


@pytest.mark.parametrize(
    ("done", "current", "next_step", "states"),
    [
        ([], "data", "", ["current", "open", "open", "open"]),
        ([], "plan", "", ["open", "open", "open", "current"]),
        (["data"], "data", "check", ["current", "open", "next", "open"]),
        (["data", "label"], "plan", "train", ["done", "done", "open", "current"]),
        # A step whose result exists is not marked again.
        (["data", "check"], "data", "check", ["current", "open", "done", "open"]),
    ],
)
def test_states_of_steps(done, current, next_step, states):
    found = find_step_states(STEPS, current, done, next_step)
    assert list(found) == list(STEPS)
    assert list(found.values())[:4] == states
    assert found["train"] == ("next" if next_step == "train" else "open")


def test_progress_of_a_log():
    progress = find_progress(LOG)
    assert progress is not None
    assert (progress.num_done, progress.total, progress.remaining_s) == (6, 24, 7200)
    assert find_progress("rows: 10/30") is not None
    assert find_progress(f"rows: 1/{'9' * 5000}") is None
    # A stage that has ended is no progress.
    assert find_progress(f"{LOG}\nanswers: 24/24") is None
    assert find_progress("step 10/200  loss 4.4  272 s left") is None


def test_progress_of_a_training_is_that_of_its_run(folder):
    job = write_job(folder, "train", "train a.yaml", log=LOG)
    status = RunStatus("running", 52, 600, 290.0, None)
    assert describe_running(job, status) == RunningJob(job, 52, 600, 290.0)
    assert describe_running(job, status).remaining_text == "about 5 min left"
    # Before the first step, its log has the progress of the evaluation.
    first = RunStatus("running", 0, 600, None, None)
    assert describe_running(job, first).remaining_text == "about 2 h 00 min left"


def read_side(folder: Path, query: str) -> str:
    return read_live(folder, f"lang=en&{query}")["side"]


@pytest.mark.parametrize("step", STEPS)
def test_running_commands_are_on_every_page(folder, step):
    write_recipe(folder, "a", "data/a/data.jsonl")
    write_job(folder, "chat", "predict runs/a photos", name="2", exit_code=None, log=LOG)
    page = read_live(folder, f"lang=en&step={step}&recipe=a.yaml")
    # The page of the command itself has it in the main part.
    side = page["bottom" if step == "chat" else "side"]
    assert "Reading of images" in side
    assert ("Reading of images" in page["side"]) == (step != "chat")
    assert "6 / 24 about 120 min left" not in side
    assert "6 / 24 about 2 h 00 min left" in side
    assert 'value="6" max="24"' in side
    # Labelling belongs to no item before its data set exists.
    write_job(folder, "label", "label tiny photos --out data/mugs", name="3", exit_code=None)
    page = read_live(folder, f"lang=en&step={step}")
    assert ("Labelling page mugs</a>" in page["side"]) == (step != "label")
    link = re.findall(r'(?:href|data-url)="([^"]*job=2[^"]*)"', side)
    assert link
    assert all("step=chat" in one for one in link)
    assert 'data-action="stop"' in side


def test_states_of_steps_follow_the_files(folder):
    assert 'class="next"' not in read_side(folder, "step=data")
    import_dataset(folder / "photos", folder / "data/a", ImportOptions(prompt="Which color?"))
    side = read_side(folder, "step=data")
    assert find_done(side) == []
    assert re.search(r'class="next"><a href="[^"]*step=check', side)
    recipe = write_recipe(folder, "a", "data/a/data.jsonl")
    run = make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0] * 4)).folder
    shutil.copy(recipe, run / "recipe.yaml")
    side = read_side(folder, f"step=results&run=runs/{run.name}&recipe=a.yaml")
    assert re.search(r'class="next"><a href="[^"]*step=chat', side)
    assert find_done(side) == ["data", "plan", "train"]
    assert side.count("(done)") == 3


def find_done(side: str) -> list[str]:
    return re.findall(r'class="done"><a href="[^"]*step=(\w+)', side)


def test_recipes_and_runs_of_other_data_are_no_results(folder):
    for name in "ab":
        import_dataset(folder / "photos", folder / "data" / name, ImportOptions(prompt="Color?"))
    recipe = write_recipe(folder, "a", "data/a/data.jsonl")
    run = make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0] * 4)).folder
    shutil.copy(recipe, run / "recipe.yaml")
    write_job(folder, "chat", "predict runs/a photos", target="runs/a", exit_code=0)
    items = "step=export&recipe=a.yaml&run=runs/a"
    assert find_done(read_side(folder, f"{items}&data=data/b")) == ["data"]
    done = ["data", "plan", "train", "results", "chat"]
    assert find_done(read_side(folder, f"{items}&data=data/a")) == done


def test_tick_needs_a_result(folder, monkeypatch):
    import_dataset(folder / "photos", folder / "data/a", ImportOptions(prompt="Color?"))
    run = make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0] * 4)).folder
    shutil.copy(write_recipe(folder, "a", "data/a/data.jsonl"), run / "recipe.yaml")
    query = "step=data&recipe=a.yaml&run=runs/a"
    failed = write_job(folder, "chat", "web runs/a", target="runs/a", has_page=True)
    assert failed.status == "failed"
    write_job(folder, "check", "check data/a/data.jsonl", name="2", target="data/a", exit_code=2)
    write_file(folder / ".finesight/check/data%2Fa%2Fdata.jsonl.html", b"page")
    assert find_done(read_side(folder, query)) == ["plan", "train", "results"]
    write_job(folder, "check", "check data/a/data.jsonl", name="3", target="data/a", exit_code=3)
    write_file(folder / "data/a/journal.jsonl", b"")
    job = {"name": "4", "target": "runs/a", "has_page": True, "exit_code": None}
    write_job(folder, "chat", "web runs/a", **job)
    done = ["label", "check", "plan", "train", "results"]
    assert find_done(read_side(folder, query)) == done
    monkeypatch.setattr(Job, "is_ready", True)
    assert find_done(read_side(folder, query)) == [*done, "chat"]
