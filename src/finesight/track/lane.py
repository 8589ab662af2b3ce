"""The way to one tracker: a queue, a thread that empties it, and a process that the package is in.

Nothing here keeps the run waiting: records are put into the queue and forgotten. A tracker that
fails, falls silent or dies ends its own lane, once, and its process is killed.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from finesight.config import TrackerKind
from finesight.track.kinds import REPORTS_OFF
from finesight.track.records import Begin, Begun, End, Figures, Record, Reply, Row

CALL = 120.0
"""Seconds that a tracker may take over one record: beyond a network that was gone for a minute."""

MOST = 10_000
"""Records that wait for a slow tracker; those beyond are left out. They are a kilobyte each, but
for the pictures of an evaluation, which are few."""

TOGETHER = 50
"""Steps whose figures go in one record, at most."""

LEAVING = 5.0
"""Seconds for the process to end in, after the run has been closed."""


class _Lost(Exception):
    """Why a tracker takes no more records."""


class Gone(NamedTuple):
    """It takes no more records: what to tell people."""

    told: str


class Lane:
    """One tracker. `log` takes what its package prints."""

    def __init__(self, kind: TrackerKind, log: Path) -> None:
        self.kind, self._log = kind, log
        self.taken, self.delivered = 0, 0
        self._waiting: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[Begun | Gone] = queue.SimpleQueue()
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._serve, name=f"track {kind}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Hand a record over, at once. It is counted also where it cannot be delivered."""
        self.taken += 1
        room = isinstance(record, Begin | End) or self._waiting.qsize() < MOST
        if room and not self._over.is_set():
            self._waiting.put(record)

    def heard(self) -> Iterator[Begun | Gone]:
        """What there is to tell since it was asked for last."""
        while not self._heard.empty():
            yield self._heard.get()

    def wait(self, seconds: float) -> bool:
        """Whether it has come to its end within so many seconds."""
        return self._over.wait(seconds)

    def kill(self) -> None:
        """End it now, whatever it does, unless it has come to its end."""
        if self._over.is_set():
            return
        self._heard.put(Gone("was not done yet, and was ended"))
        self._over.set()
        if self._process is not None:
            self._process.kill()

    def _serve(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with ours, ours.makefile("rb") as answers:
                with theirs:
                    self._process = _started(self.kind, theirs, self._log)
                if not self._over.is_set():
                    self._empty(ours, answers)
        except (_Lost, OSError, ValueError) as error:
            # Killed, it has said why already.
            if not self._over.is_set():
                silent = isinstance(error, TimeoutError)
                why = f"no answer for {CALL:g} s" if silent else str(error)
                self._heard.put(Gone(f"{why}; the run goes on without it"))
        finally:
            self._over.set()
            if self._process is not None:
                _reap(self._process)

    def _empty(self, link: socket.socket, answers: BinaryIO) -> None:
        link.settimeout(CALL)
        for record in self._together():
            link.sendall(record.model_dump_json().encode() + b"\n")
            line = answers.readline()
            if not line.endswith(b"\n"):
                raise _Lost(f"its process has died; {self._log} has what it said")
            reply = Reply.model_validate_json(line)
            if reply.failed is not None:
                raise _Lost(reply.failed)
            self.delivered += len(record.rows) if isinstance(record, Figures) else 1
            if reply.begun is not None:
                self._heard.put(reply.begun)

    def _together(self) -> Iterator[Record]:
        """What waits, up to the end of the run. Figures that wait one after the other go in one: a
        tracker that asks a server far away each time keeps up with quick steps only so."""
        record: Record | None = None
        while True:
            record = self._waiting.get() if record is None else record
            rows: list[Row] = []
            while isinstance(record, Figures) and len(rows) < TOGETHER:
                rows += record.rows
                record = None if self._waiting.empty() else self._waiting.get()
            if rows:
                yield Figures(rows=tuple(rows))
            elif record is not None:
                yield record
                if isinstance(record, End):
                    return
                record = None


def _started(kind: TrackerKind, link: socket.socket, log: Path) -> subprocess.Popen[bytes]:
    descriptor = link.fileno()
    # -P: what lies in the working directory, a folder `wandb` for one, is no package.
    command = [sys.executable, "-P", "-m", "finesight.track.child", kind, str(descriptor)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as told:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            env=REPORTS_OFF[kind] | os.environ,
            pass_fds=[descriptor],
            # Ctrl-C is for the run, which tells its trackers.
            start_new_session=True,
        )


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(LEAVING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
