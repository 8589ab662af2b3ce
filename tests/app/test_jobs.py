"""Tests of the processes that the studio starts, without a browser."""

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from studio_fixtures import read_live, write_job

from finesight.app.jobs import JOB_FILE, OUTCOME_FILE, PID_FILE, Job, JobStore
from finesight.app.studio_page import Form
from finesight.app.studio_view import Selection
from finesight.errors import UserError

CHECK_CODES = (0, 2, 3)


def wait_for(happened: Callable[[], bool], timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.05)


def wait_for_end(job: Job) -> str:
    wait_for(lambda: job.status != "running")
    return job.status


def test_command_runs_in_the_workspace(folder):
    (folder / "yaml.py").write_text("raise SystemExit('a module of the workspace')")
    job = JobStore(folder).start(
        "data", "data/a", ["import", "photos", "data/a", "--prompt", "A b"]
    )
    assert job.status == "running"
    assert (wait_for_end(job), job.exit_code) == ("finished", 0)
    assert "24 images" in job.read_log()
    assert job.command == "finesight import photos data/a --prompt 'A b'"
    assert (folder / "data/a/data.jsonl").exists()


def test_killed_and_damaged_jobs(folder):
    jobs = JobStore(folder)
    job = jobs.start("chat", "finesight-tiny", ["web", "finesight-tiny", "--port", "0"], port=1)
    with pytest.raises(UserError, match="still starting"):
        job.stop()
    for target, port, problem in (("finesight-tiny", 2, "already running"), ("b", 1, "port 1")):
        with pytest.raises(UserError, match=problem):
            jobs.start("chat", target, ["web", target], port=port)
    assert (jobs.list_running(), job.is_ready) == ([job], False)
    wait_for((job.folder / PID_FILE).exists)
    pid = int((job.folder / PID_FILE).read_text())
    os.kill(os.getpgid(pid), signal.SIGKILL)
    assert job.status == "running"
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(job) == "killed"
    for name, content in (("empty", ""), ("list", "[]"), ("other", '{"step": 1}')):
        (job.folder.parent / name).mkdir()
        (job.folder.parent / name / JOB_FILE).write_text(content)
    (job.folder.parent / "missing").mkdir()
    assert [found.id for found in jobs.list_jobs()] == [job.id]
    assert jobs.list_jobs("train") == []


@pytest.mark.parametrize(("hours", "status"), [(1, "killed"), (-1, "killed"), (0, "running")])
def test_job_of_another_time_does_not_block_its_command(folder, hours, status):
    started_at = datetime.now(UTC) + timedelta(hours=hours)
    job = write_job(folder, "train", "train r.yaml", started_at=started_at, exit_code=None)
    assert (job.status, JobStore(folder).list_running()) == (status, [job] if not hours else [])


@pytest.mark.parametrize(
    ("outcome", "status"), [({}, "finished"), ({"error": {"what": "no page"}}, "failed")]
)
def test_check_with_issues_is_finished_unless_it_reports_an_error(folder, outcome, status):
    job = write_job(folder, "check", "check a", ok_exit_codes=CHECK_CODES)
    assert job.status == "failed", "ended by the interpreter, without an outcome"
    (job.folder / OUTCOME_FILE).write_text(json.dumps(outcome))
    assert job.status == status


def test_running_server_precedes_a_newer_command(folder, page):
    jobs = JobStore(folder)
    # As in a shell that runs the studio in the background.
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = jobs.start("export", "", ["serve", "finesight-tiny", "--port", "0"], port=1)
    signal.signal(signal.SIGINT, previous_handler)
    write_job(folder, "export", "merge runs/a models/a", name="9")
    assert f"job={server.id}" in read_live(folder, "step=export&lang=en")["url"]
    wait_for((server.folder / PID_FILE).exists)
    # Another step lists it, too, whose page stays as it is.
    assert page.run_action("stop", Selection(step="train", job=server.id), Form()) == ""
    wait_for_end(server)
