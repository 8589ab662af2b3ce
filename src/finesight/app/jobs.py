"""Commands that run in processes of their own, with their state in the workspace.

A job is a folder with `job.json` (command), `log.txt` (its output), `lock` and, after the end,
`outcome.json` (exit code, and next steps or error). The process of the command holds the lock,
which contains its ID, so a job outlives the studio, and another studio finds it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG, S_ISSOCK
from typing import Annotated, Any, Literal

import httpx2
from pydantic import AwareDatetime, BaseModel, Field

from finesight.errors import Remedy, Step, UserError
from finesight.files.bounded_files import read_json, read_json_object
from finesight.files.storage import PRIVATE_FILE_MODE, FileLock, make_private_folder, write_file
from finesight.operations.operation import OUTCOME_VARIABLE

JOBS_FOLDER = Path(".finesight", "jobs")
"""Folder of all jobs in a workspace."""

JOB_FILE, LOG_FILE, OUTCOME_FILE = "job.json", "log.txt", "outcome.json"
STOP_FILE, LOCK_FILE, SOCKET_FILE = "stop_requested", "lock", "socket"

PYTHON = (sys.executable, "-P", "-m")
"""Start of a command that never imports modules of its working directory, the workspace."""

NEW_JOB_FILE = f"new-{JOB_FILE}"
"""Name of the job file before the start of the process."""

MAX_JOBS = 1000
"""Maximum number of jobs, the newest ones, that the page knows."""

MAX_JOB_BYTES = 8 << 20
MAX_OUTCOME_BYTES = 1 << 20
"""Maximum sizes of the files of a job. Those of another person may have any size."""

PID_WIDTH = 20
"""Number of bytes of the process ID in the lock file, which are there before the process."""

MAX_LOG_START_BYTES = 1 << 18
"""Number of bytes of the log of a server in which its address is searched."""

MAX_LOG_BYTES = 20_000
"""Maximum number of bytes at the end of a log that the page shows."""

CONNECT_TIMEOUT_S = 0.5
"""Seconds within which a server that has loaded its model answers."""

STOPPED_EXIT_CODES = (75, 130)
"""Exit codes of commands that were stopped, with or without a checkpoint."""

JobStatus = Literal["running", "finished", "stopped", "failed", "killed"]


class ErrorParts(BaseModel, frozen=True):
    """Parts of the `UserError` with which a command has ended."""

    what: str
    where: str = ""
    expected: str = ""
    remedy: Remedy = ""


class JobOutcome(BaseModel, frozen=True):
    """Outcome of a command.

    Attributes:
        result: Data of its result; empty for a command without any, or with large ones.
    """

    exit_code: int
    error: ErrorParts | None = None
    next_steps: tuple[Step, ...] = ()
    result: dict[str, Any] = {}


class Job(BaseModel, frozen=True):
    """Command with its state on disk.

    Attributes:
        step: Step of the page that shows the job.
        target: Data set, recipe or run that the job belongs to, relative to the workspace.
        port: Port of a server of this machine, else 0.
        has_page: Whether the command serves a page, on the Unix socket of the job.
        form: Texts of the form that started the command, by field.
    """

    folder: Path
    step: str
    target: str
    arguments: Annotated[tuple[str, ...], Field(min_length=1)]
    started_at: AwareDatetime
    port: int = 0
    has_page: bool = False
    form: dict[str, str] = {}

    @property
    def is_server(self) -> bool:
        """Return whether the command runs until it is stopped."""
        return self.has_page or self.port > 0

    @property
    def socket(self) -> Path:
        """Socket of the page. The shortest path is used, because long ones cannot be bound."""
        file = self.folder.absolute() / SOCKET_FILE
        return Path(min(str(file), os.path.relpath(file), key=len))

    @property
    def id(self) -> str:
        """Name of the job folder, which sorts by time."""
        return self.folder.name

    @property
    def out(self) -> str:
        """Value of the option --out; empty without it."""
        words = (*self.arguments, "--out", "")
        return words[words.index("--out") + 1]

    @property
    def command(self) -> str:
        """Command line, as typed in a terminal in the workspace."""
        return shlex.join(["finesight", *self.arguments])

    @property
    def status(self) -> JobStatus:
        """State of the process. Killed: it ended without an outcome."""
        is_running = self.has_process()
        # Read afterwards: the command may have ended meanwhile.
        outcome = self.read_outcome()
        if outcome is None:
            if is_running:
                return "running"
            if (self.folder / STOP_FILE).exists():
                return "stopped"
            return "killed"
        # A server ends only when it is stopped.
        if outcome.exit_code in STOPPED_EXIT_CODES or (self.is_server and outcome.exit_code == 0):
            return "stopped"
        # Other exit codes without an error are results, such as those of a check.
        return "failed" if outcome.error or outcome.exit_code == 1 else "finished"

    def read_log(self) -> str:
        """Return the end of the output."""
        with contextlib.suppress(OSError), (self.folder / LOG_FILE).open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - MAX_LOG_BYTES))
            return log.read().decode("utf-8", "replace").strip()
        return ""

    def read_outcome(self) -> JobOutcome | None:
        """Return the outcome of an ended command; None before its end and for a killed job."""
        with contextlib.suppress(UserError, AssertionError, LookupError, TypeError, ValueError):
            content = read_json(self.folder / OUTCOME_FILE, max_bytes=MAX_OUTCOME_BYTES)
            outcome = JobOutcome.model_validate(content)
            # Steps of another version, or of another person, may not exist here.
            steps = (*outcome.next_steps, outcome.error.remedy if outcome.error else "")
            return outcome if all(map(str, filter(None, steps))) else None
        return None

    @property
    def address(self) -> str:
        """Base URL of an HTTP server of this machine."""
        return f"http://127.0.0.1:{self.port}/v1"

    def read_model_names(self) -> list[str]:
        """Return the models of an HTTP server that listens at its port; empty before.

        Its process prints them after it has bound the port. Until it stops, no other program can
        answer there. A stopping server has closed its port before its process ends.
        """
        names: list[str] = []
        with contextlib.suppress(OSError), (self.folder / LOG_FILE).open("rb") as log:
            text = log.read(MAX_LOG_START_BYTES).decode("utf-8", "replace")
            if match := re.search(rf"^serving (.+) at {re.escape(self.address)}$", text, re.M):
                names = match[1].split(", ")
        is_server = self.port > 0 and self.arguments[0] == "serve"
        is_running = self.status == "running" and not self.is_stopping
        return names if is_server and is_running else []

    @property
    def is_stopping(self) -> bool:
        """Return whether the command runs after a request to stop it."""
        return (self.folder / STOP_FILE).exists() and self.status == "running"

    @property
    def is_ready(self) -> bool:
        """Return whether a server answers. It accepts connections before its model is loaded."""
        transport = httpx2.HTTPTransport(uds=str(self.socket) if self.has_page else None)
        address = "http://page/" if self.has_page else f"http://127.0.0.1:{self.port}/"
        with (
            contextlib.suppress(httpx2.TransportError),
            httpx2.Client(transport=transport, timeout=CONNECT_TIMEOUT_S) as client,
            client.stream("GET", f"{address}static/base.css"),
        ):
            return True
        return False

    def stop(self, *, again: bool = False) -> None:
        """Send SIGINT to the command. Training then saves a checkpoint and ends.

        A server gets SIGTERM: while it loads modules, Python may lose a SIGINT.

        Args:
            again: Send another SIGINT, which ends training without a checkpoint. By default,
                further calls have no effect.

        Raises:
            UserError: The job is not running.
        """
        with contextlib.suppress(OSError, ValueError):
            with (self.folder / LOCK_FILE).open("rb") as lock:
                pid = int(lock.read(PID_WIDTH))
            if self.has_process():
                with contextlib.suppress(FileExistsError):
                    (self.folder / STOP_FILE).touch(PRIVATE_FILE_MODE, exist_ok=False)
                    again = True
                if again:
                    os.kill(pid, signal.SIGTERM if self.is_server else signal.SIGINT)
                return
        raise UserError(
            f"the command is {self.status}",
            where=self.step,
            expected="a running command",
            remedy="reload the page",
        )

    def has_process(self) -> bool:
        """Return whether a process holds the lock of the job."""
        with contextlib.suppress(FileNotFoundError), FileLock(self.folder / LOCK_FILE) as lock:
            try:
                lock.acquire(shared=True, wait=False)
            except BlockingIOError:
                return True
        return False


class JobStore:
    """Jobs of a workspace."""

    def __init__(self, workspace: Path) -> None:
        self._workspace, self._folder = workspace, workspace / JOBS_FOLDER
        # By folder name. Ended jobs do not change, so each is read once. The time of its file shows
        # whether it was replaced.
        self._ended: dict[str, tuple[int, Job]] = {}
        # Children of this studio. `list_jobs` polls them, so that ended ones do not stay zombies.
        self._processes: list[subprocess.Popen[bytes]] = []

    def protect(self) -> None:
        """Close the folders of jobs to other users. Raises UserError for a link.

        Logs and forms have contents of the user, and lock files name processes to stop.
        """
        make_private_folder(self._folder.parent)
        make_private_folder(self._folder)

    def start(
        self,
        step: str,
        target: str,
        arguments: Sequence[str],
        *,
        port: int = 0,
        **attributes: Any,
    ) -> Job:
        """Start a command in a process that outlives this one.

        Args:
            attributes: Further attributes of the job.

        Raises:
            UserError: The same command is running, or another server uses its target or port.
        """
        self.protect()
        with FileLock(self._folder) as lock:
            lock.acquire()
            for running in self.list_running():
                is_same = (running.step, running.target) == (step, target) and (
                    running.arguments == tuple(arguments) or bool(port and running.port)
                )
                if is_same or (port and running.port == port):
                    raise UserError(
                        "the command is already running"
                        if is_same
                        else f"port {port} is used by another server of this workspace",
                        where=running.step,
                        expected="one process per command and port",
                        remedy="wait for its end, or stop it",
                    )
            attributes |= {"step": step, "target": target, "arguments": tuple(arguments)}
            return self._start_process(port=port, **attributes)

    def _start_process(self, **attributes: Any) -> Job:
        now = datetime.now(UTC)
        folder = self._folder / f"{now:%Y%m%d-%H%M%S-%f}-{secrets.token_hex(3)}"
        job = Job(folder=folder, started_at=now, **attributes)
        command = [*PYTHON, "finesight", *job.arguments]
        if job.has_page:
            # A longer path cannot be bound.
            command += ["--socket", str(JOBS_FOLDER / job.id / SOCKET_FILE)]
        # GOMP_SPINCOUNT was chosen for this process; let the command choose its own.
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        environment[OUTCOME_VARIABLE] = str(folder.resolve() / OUTCOME_FILE)
        make_private_folder(folder)
        try:
            # All files are written first: on a full disk, no command starts that no page shows.
            content = job.model_dump_json(exclude={"folder"}).encode()
            for name, data in (
                (NEW_JOB_FILE, content),
                (LOCK_FILE, b" " * PID_WIDTH),
                (LOG_FILE, b""),
            ):
                write_file(folder / name, data, is_private=True)
            process = self._start_locked(folder, command, environment)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._processes.append(process)
        return job

    def _start_locked(
        self, folder: Path, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start the process of a job, which inherits the lock with its ID."""
        with (folder / LOG_FILE).open("ab") as log, (folder / LOCK_FILE).open("r+b", 0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = subprocess.Popen(
                command,
                cwd=self._workspace,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
            try:
                lock.write(str(process.pid).encode().ljust(PID_WIDTH))
                (folder / NEW_JOB_FILE).rename(folder / JOB_FILE)
            except OSError:
                process.kill()  # No page could stop it.
                raise
        return process

    def list_jobs(self, step: str | None = None, target: str | None = None) -> list[Job]:
        """Return the jobs of a step and a target, newest first. Damaged ones are left out."""
        self._processes = [process for process in self._processes if process.poll() is None]
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(self._folder), reverse=True)[:MAX_JOBS]
        jobs = []
        for job in filter(None, map(self._read, names)):
            if step in (None, job.step) and target in (None, job.target):
                jobs.append(job)
        return jobs

    def _read(self, name: str) -> Job | None:
        """Return a job; None for a damaged one. Ended jobs, which do not change, are read once."""
        folder = self._folder / name
        try:
            version = (folder / JOB_FILE).lstat().st_mtime_ns
            known = self._ended.get(name)
            if known is not None and known[0] == version:
                return known[1]
            job = read_job(folder)
        except (OSError, UserError, ValueError):
            return None
        self._ended.pop(name, None)
        if not job.has_process():
            self._ended[name] = version, job
        return job

    def list_running(self) -> list[Job]:
        """Return all running jobs, newest first."""
        jobs = (job for job in self.list_jobs() if job.id not in self._ended)
        return [job for job in jobs if job.status == "running"]

    def find(self, job_id: str) -> Job:
        """Return the job with an ID. Raises UserError if there is none."""
        # Each request of a page comes here, so other jobs are not read.
        with contextlib.suppress(OSError, UserError, ValueError):
            if job_id in os.listdir(self._folder):
                return read_job(self._folder / job_id)
        raise UserError(
            f"{job_id!r:.80} is unknown",
            where="job",
            expected="a job of this workspace",
            remedy="reload the page",
        )


def read_job(folder: Path) -> Job:
    """Read the command of a job folder. Damage raises OSError, UserError or ValueError."""
    files = [file.lstat() for file in folder.iterdir()]
    # The workspace of another person may have links out of it, pipes that block, and a lock with
    # the ID of any process, which a button would stop.
    is_plain = all(S_ISREG(one.st_mode) or S_ISSOCK(one.st_mode) for one in files)
    is_own = all(one.st_uid == os.getuid() for one in (folder.lstat(), *files))
    if folder.is_symlink() or not is_plain or not is_own:
        raise ValueError(f"{folder} has a link, a special file or a file of another user")
    content = read_json_object(folder / JOB_FILE, max_bytes=MAX_JOB_BYTES)
    return Job.model_validate({**content, "folder": folder})
