"""Commands that run in processes of their own, with their state in the workspace.

A job is a folder with `job.json` (command), `log.txt` (its output), `pid` and, after the end,
`exit_code`. The process of a job holds a lock on the folder, so a job outlives the studio, and
another studio finds it again. `python -m finesight.studio.studio_jobs FOLDER` runs the command of a
job folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal

from pydantic import BaseModel

from finesight.bounded_files import parse_json
from finesight.errors import UserError
from finesight.storage import FileLock, write_file

JOBS_FOLDER = Path(".finesight", "jobs")
"""Folder of all jobs in a workspace."""

JOB_FILE, LOG_FILE, PID_FILE, EXIT_CODE_FILE = "job.json", "log.txt", "pid", "exit_code"

PYTHON = (sys.executable, "-P", "-m")
"""Start of a command that never imports modules of its working directory, the workspace."""

MAX_LOG_BYTES = 20_000
"""Maximum number of bytes at the end of a log that the page shows."""

START_TIMEOUT_S = 20.0
"""Seconds after which a job without a running process counts as killed."""

STOPPED_EXIT_CODES = (75, 130, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of commands that were stopped, with or without a checkpoint."""

JobStatus = Literal["running", "finished", "stopped", "failed", "killed"]


class Job(BaseModel, frozen=True):
    """Command with its state on disk.

    Attributes:
        step: Step of the page that shows the job.
        target: Data set, recipe or run that the job belongs to, relative to the workspace.
        arguments: Arguments of `finesight`.
        ok_exit_codes: Exit codes of success.
        port: Port of a server, else 0.
        form: Texts of the form that started the command.
    """

    folder: Path
    step: str
    target: str
    arguments: tuple[str, ...]
    started_at: datetime
    ok_exit_codes: tuple[int, ...] = (0,)
    port: int = 0
    form: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Name of the job folder, which sorts by time."""
        return self.folder.name

    @property
    def command(self) -> str:
        """Command line, as typed in a terminal in the workspace."""
        return format_command(self.arguments)

    @property
    def exit_code(self) -> int | None:
        """Exit code of the command; None before its end and for a killed job."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / EXIT_CODE_FILE).read_text())
        return None

    @property
    def status(self) -> JobStatus:
        """State of the process. Killed: it ended without an exit code."""
        is_running = self._is_running()
        code = self.exit_code
        if code is not None:
            # A server ends only when it is stopped.
            if code in STOPPED_EXIT_CODES or (self.port and code == 0):
                return "stopped"
            return "finished" if code in self.ok_exit_codes else "failed"
        return "running" if is_running else "killed"

    def read_log(self) -> str:
        """Return the end of the output."""
        with contextlib.suppress(OSError), (self.folder / LOG_FILE).open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - MAX_LOG_BYTES))
            return log.read().decode("utf-8", "replace").strip()
        return ""

    def stop(self) -> None:
        """Send SIGINT to the command. Training then saves a checkpoint and ends.

        Raises:
            UserError: The job is not running.
        """
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / PID_FILE).read_text())
            if self._is_running():
                os.kill(pid, signal.SIGINT)
                return
        raise UserError(
            f"the job is {self.status}",
            where=self.command,
            expected="a running job",
            remedy="reload the page",
        )

    def _is_running(self) -> bool:
        """Return whether a process holds the lock of the job, or is about to take it."""
        age_s = (datetime.now(UTC) - self.started_at).total_seconds()
        if not (self.folder / PID_FILE).exists():
            return age_s < START_TIMEOUT_S
        with FileLock(self.folder) as lock:
            try:
                lock.acquire(shared=True, wait=False)
            except BlockingIOError:
                return True
        return False


def format_command(arguments: Sequence[str]) -> str:
    """Format arguments of `finesight` as a command line."""
    return shlex.join(["finesight", *arguments])


class JobStore:
    """Jobs of a workspace."""

    def __init__(self, workspace: Path) -> None:
        self._workspace, self._folder = workspace, workspace / JOBS_FOLDER
        # Ended processes of this studio are reaped when jobs are listed.
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        step: str,
        target: str,
        arguments: Sequence[str],
        *,
        ok_exit_codes: Sequence[int] = (0,),
        port: int = 0,
        form: Sequence[str] = (),
    ) -> Job:
        """Start a command in a process that outlives this one.

        Raises:
            UserError: The same command is running.
        """
        for running in self.list_jobs(step, target):
            if running.arguments == tuple(arguments) and running.status == "running":
                raise UserError(
                    "the command is already running",
                    where=running.command,
                    expected="one process per command",
                    remedy="wait for its end, or stop it",
                )
        started_at = datetime.now(UTC)
        folder = self._folder / f"{started_at:%Y%m%d-%H%M%S-%f}-{secrets.token_hex(3)}"
        job = Job(
            folder=folder,
            step=step,
            target=target,
            arguments=tuple(arguments),
            started_at=started_at,
            ok_exit_codes=tuple(ok_exit_codes),
            port=port,
            form=tuple(form),
        )
        write_file(folder / JOB_FILE, job.model_dump_json(exclude={"folder"}).encode())
        # GOMP_SPINCOUNT was chosen for this process; let the child choose its own.
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        with (folder / LOG_FILE).open("wb") as log:
            process = subprocess.Popen(
                [*PYTHON, __name__, str(folder.resolve())],
                cwd=self._workspace,
                env=environment | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return job

    def list_jobs(self, step: str | None = None, target: str | None = None) -> list[Job]:
        """Return the jobs of a step and a target, newest first. Damaged ones are left out."""
        self._processes = [process for process in self._processes if process.poll() is None]
        jobs = []
        for folder in sorted(self._folder.glob("*"), reverse=True):
            with contextlib.suppress(OSError, TypeError, ValueError):
                job = read_job(folder)
                if step in (None, job.step) and target in (None, job.target):
                    jobs.append(job)
        return jobs

    def find(self, job_id: str) -> Job:
        """Return the job with an ID. Raises UserError if there is none."""
        for job in self.list_jobs():
            if job.id == job_id:
                return job
        raise UserError(
            f"{job_id!r:.80} is unknown",
            where="job",
            expected="a job of this workspace",
            remedy="reload the page",
        )


def read_job(folder: Path) -> Job:
    """Read the command of a job folder. Damage raises OSError, TypeError or ValueError."""
    return Job.model_validate({**parse_json((folder / JOB_FILE).read_text()), "folder": folder})


def run_job(folder: Path) -> int:
    """Run the command of a job folder in a child process, and write its exit code.

    SIGINT and SIGTERM are forwarded to the child.
    """
    job = read_job(folder)
    with FileLock(folder) as lock:
        lock.acquire()
        child = subprocess.Popen([*PYTHON, "finesight", *job.arguments])

        def forward(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward)
        write_file(folder / PID_FILE, str(os.getpid()).encode())
        exit_code = child.wait()
        write_file(folder / EXIT_CODE_FILE, str(exit_code).encode())
    return exit_code


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1])))
