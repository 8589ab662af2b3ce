"""Tests of the side bar: states of the steps, and running commands on every page."""

import re
from pathlib import Path

import pytest
from run_dir_fixtures import make_run, make_sign_answers
from studio_fixtures import read_live, write_job, write_recipe

from finesight.app.studio_side import RunningJob, describe_running, find_step_states
from finesight.app.studio_view import STEPS
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.progress import find_progress
from finesight.report.summary import RunStatus

LOG = "data.train: 24 samples\nrows: 10/30, 20 s left\nanswers: 6/24, 7200 s left\nwarning: 1/2 a"


@pytest.mark.parametrize(
    ("done", "current", "states"),
    [
        ([], "data", ["current", "open", "open", "open"]),
        ([], "plan", ["next", "open", "open", "current"]),
        (["data", "label"], "data", ["current", "done", "next", "open"]),
        # A step that was left out does not come next.
        (["data", "label", "plan"], "plan", ["done", "done", "open", "current"]),
    ],
)
def test_states_of_steps(done, current, states):
    found = find_step_states(STEPS, current, done)
    assert list(found) == list(STEPS)
    assert list(found.values())[:4] == states
    assert found["train"] == ("next" if "plan" in done else "open")


def test_progress_of_a_log():
    progress = find_progress(LOG)
    assert progress is not None
    assert (progress.num_done, progress.total, progress.remaining_s) == (6, 24, 7200)
    assert find_progress("rows: 10/30") is not None
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
    side = read_side(folder, f"step={step}&recipe=a.yaml")
    assert "Reading of images" in side
    assert "6 / 24 about 120 min left" not in side
    assert "6 / 24 about 2 h 00 min left" in side
    assert 'value="6" max="24"' in side
    # Labelling belongs to no item before its data set exists.
    write_job(folder, "label", "label tiny photos --out data/mugs", name="3", exit_code=None)
    assert re.search(r"Labelling page mugs</a>", read_side(folder, f"step={step}"))
    link = re.findall(r'href="([^"]*job=2[^"]*)"', side)
    assert link
    assert all("step=chat" in one for one in link)
    # The page of the command itself has its buttons in the main part.
    assert ('data-action="stop"' in side) == (step != "chat")


def test_states_of_steps_follow_the_files(folder):
    assert 'class="next"' not in read_side(folder, "step=data")
    import_dataset(folder / "photos", folder / "data/a", ImportOptions(prompt="Which color?"))
    side = read_side(folder, "step=data")
    assert side.count('class="done"') == 1
    assert re.search(r'class="next"><a href="[^"]*step=check', side)
    write_recipe(folder, "a", "data/a/data.jsonl")
    run = make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0] * 4)).folder
    side = read_side(folder, f"step=results&run=runs/{run.name}&recipe=a.yaml")
    assert re.search(r'class="next"><a href="[^"]*step=chat', side)
    assert side.count("(done)") == side.count('class="done"') >= 3
