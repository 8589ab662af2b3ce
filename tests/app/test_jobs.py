"""Tests of the processes that the studio starts, without a browser."""

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from studio_fixtures import read_live, write_job, write_outcome

from finesight.app import jobs as jobs_module
from finesight.app.jobs import JOB_FILE, LOCK_FILE, OUTCOME_FILE, Job, JobStore
from finesight.app.studio_page import Form
from finesight.app.studio_view import Selection
from finesight.errors import UserError
from finesight.files import storage
from finesight.files.storage import FileSystem


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
    assert wait_for_end(job) == "finished"
    assert "24 images" in job.read_log()
    assert job.command == "finesight import photos data/a --prompt 'A b'"
    assert (folder / "data/a/data.jsonl").exists()


def test_killed_and_damaged_jobs(folder):
    jobs = JobStore(folder)
    job = jobs.start("chat", "finesight-tiny", ["web", "finesight-tiny", "--port", "0"], port=1)
    for target, port, problem in (("finesight-tiny", 2, "already running"), ("b", 1, "port 1")):
        with pytest.raises(UserError, match=problem):
            jobs.start("chat", target, ["web", target], port=port)
    assert (jobs.list_running(), job.is_ready) == ([job], False)
    os.kill(int((job.folder / LOCK_FILE).read_text()), signal.SIGKILL)
    assert wait_for_end(job) == "killed"
    for name, content in (("empty", ""), ("list", "[]"), ("other", '{"step": 1}')):
        (job.folder.parent / name).mkdir()
        (job.folder.parent / name / JOB_FILE).write_text(content)
    (job.folder.parent / "missing").mkdir()
    assert [found.id for found in jobs.list_jobs()] == [job.id]
    assert jobs.list_jobs("train") == []


def test_job_of_another_person_has_no_links_and_pipes(folder, page):
    (folder / "secret.txt").write_text("secret")
    for name, damage in (
        ("link", lambda job: (job / "log.txt").symlink_to(folder / "secret.txt")),
        ("zeros", lambda job: (job / OUTCOME_FILE).symlink_to("/dev/zero")),
        ("pipe", lambda job: os.mkfifo(job / LOCK_FILE)),
        ("no words", lambda job: (job / JOB_FILE).write_text('{"step": "chat", "arguments": []}')),
    ):
        job = write_job(folder, "chat", "web", name=name).folder
        for file in (job / "log.txt", job / OUTCOME_FILE):
            file.unlink()
        damage(job)
    (folder / ".finesight/jobs/folder").symlink_to(job)
    assert page.view.jobs.list_jobs() == []
    write_outcome(
        merge := write_job(folder, "export", "merge"), 2, next_steps=[{"operation": "format-disk"}]
    )
    assert merge.read_outcome() is None
    assert "killed" in page.render(Selection(step="export"))


def test_files_of_jobs_are_private(folder):
    """They contain prompts, answers and paths, whatever the umask is."""
    (folder / ".finesight/jobs").mkdir(parents=True, exist_ok=True)
    umask = os.umask(0)
    try:
        jobs = JobStore(folder)
        job = jobs.start("data", "", ["import", "missing", "data/a"])
        wait_for_end(job)
        server = jobs.start("chat", "", ["web", "finesight-tiny", "--port", "0"], port=1)
        server.stop()
        wait_for_end(server)
    finally:
        os.umask(umask)
    assert job.read_outcome().exit_code == 2
    files = {path: path.stat().st_mode & 0o777 for path in (folder / ".finesight").rglob("*")}
    names = {path.name for path in files}
    assert {JOB_FILE, LOCK_FILE, OUTCOME_FILE, "log.txt", "stop_requested", "jobs"} <= names
    for path, mode in {**files, folder / ".finesight": 0o700}.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("name", [".finesight", ".finesight/jobs"])
def test_folder_of_jobs_is_no_link(folder, tmp_path, name):
    (tmp_path / "other").mkdir()
    shutil.rmtree(folder / ".finesight", ignore_errors=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="is a link"):
        JobStore(folder).start("data", "", ["import", "photos", "data/a"])
    assert [*(tmp_path / "other").iterdir()] == []


def test_job_of_another_user_is_left_out(folder, monkeypatch):
    """Its lock could name any process, which the button Stop would end."""
    write_job(folder, "chat", "web")
    assert len(JobStore(folder).list_jobs()) == 1
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert JobStore(folder).list_jobs() == []
    with pytest.raises(UserError, match=f"of the user {own}"):
        JobStore(folder).protect()


@pytest.mark.parametrize(
    ("outcome", "status"), [({}, "finished"), ({"error": {"what": "no page"}}, "failed")]
)
def test_check_with_issues_is_finished_unless_it_reports_an_error(folder, outcome, status):
    job = write_job(folder, "check", "check a")
    write_outcome(job, 2, **outcome)
    assert job.status == status


def test_running_server_precedes_a_newer_command(folder, page):
    jobs = JobStore(folder)
    server = jobs.start("export", "", ["serve", "finesight-tiny", "--port", "0"], port=1)
    write_job(folder, "export", "merge runs/a models/a", name="9")
    assert f"job={server.id}" in read_live(folder, "step=export&lang=en")["url"]
    # Another step lists it, too, whose page stays as it is.
    assert page.run_action("stop", Selection(step="train", job=server.id), Form()) == ""
    wait_for_end(server)


class FullDisk(FileSystem):
    """File system on which files with a name cannot be created."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create(self, path: Path) -> int:
        if self._name in path.name:
            raise OSError(errno.ENOSPC, "full")
        return super().create(path)


@pytest.mark.parametrize("name", [JOB_FILE, LOCK_FILE, "log.txt"])
def test_no_command_starts_on_a_full_disk(tmp_path, monkeypatch, name):
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: commands.append(command))
    monkeypatch.setattr(storage, "file_system", FullDisk(name))
    with pytest.raises(UserError, match="no space left"):
        JobStore(tmp_path).start("data", "", ["import", "photos", "data/a"])
    assert commands == []
    assert [*(tmp_path / ".finesight/jobs").iterdir()] == []


def test_command_that_no_page_would_show_is_ended(folder, monkeypatch):
    jobs, started = JobStore(folder), []
    start = subprocess.Popen

    def record(*arguments, **options):
        started.append(start(*arguments, **options))
        return started[-1]

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(subprocess, "Popen", record)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="full"):
        jobs.start("chat", "", ["web", "finesight-tiny", "--port", "0"], port=1)
    assert started[0].wait(60) == -signal.SIGKILL
    assert jobs.list_jobs() == []


def test_files_of_another_person_may_have_any_size(folder, page):
    """Pages read all jobs, and wait for none."""
    for name in (JOB_FILE, OUTCOME_FILE, LOCK_FILE, "log.txt"):
        job = write_job(folder, "chat", "web", name=name, log="the log")
        (job.folder / LOCK_FILE).touch()
        os.truncate(job.folder / name, 300 << 30)
    found = page.view.jobs.list_jobs()
    assert {job.id for job in found} == {OUTCOME_FILE, LOCK_FILE, "log.txt"}
    assert [job.status for job in found if job.id == OUTCOME_FILE] == ["killed"]
    assert "<title>" in page.render(Selection(step="chat"))
    for job in found:
        with pytest.raises(UserError, match="expected: a running command"):
            job.stop()


def test_newest_jobs_are_listed(folder, monkeypatch):
    monkeypatch.setattr(jobs_module, "MAX_JOBS", 3)
    for number in range(5):
        write_job(folder, "chat", "web", name=str(number))
    jobs = JobStore(folder)
    assert [job.id for job in jobs.list_jobs()] == ["4", "3", "2"]
    # A changed file is read again.
    write_job(folder, "chat", "serve m", name="4")
    os.utime(folder / ".finesight/jobs/4" / JOB_FILE, (0, 0))
    assert jobs.list_jobs()[0].arguments == ("serve", "m")
    shutil.rmtree(folder / ".finesight/jobs/3")
    assert [job.id for job in jobs.list_jobs()] == ["4", "2", "1"]
