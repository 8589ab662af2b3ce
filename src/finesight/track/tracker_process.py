"""Process that runs one tracker package and replies to records from a socket.

A separate process limits side effects of the package, such as signal handlers, threads and hangs at
exit. Usage: `python -m finesight.track.tracker_process KIND FILE_DESCRIPTOR`.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from typing import BinaryIO

from finesight.config import TrackerKind
from finesight.track.backends import TRACKERS
from finesight.track.tracker_records import (
    RECORD_ADAPTER,
    FinishRecord,
    RecordReply,
    redact,
)

ORPHAN_TIMEOUT_S = 60.0
"""Maximum seconds to close the run after the training process has died."""


def main(kind: TrackerKind, connection: socket.socket) -> None:
    """Pass records from a connection to one tracker until the run ends.

    If the training process dies, the run is closed as failed.
    """
    # A scheduler signals all processes of a job. This process ends after the run.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(
        target=read_lines, args=(connection.makefile("rb"), lines), daemon=True
    ).start()
    tracker = None
    while line := lines.get():
        record = RECORD_ADAPTER.validate_json(line)
        try:
            tracker = tracker or TRACKERS[kind]()
            reply = RecordReply(started=tracker.handle(record))
        except Exception as error:  # any error of the package
            traceback.print_exc()
            reply = RecordReply(error=redact(f"{type(error).__name__}: {error}"))
        connection.sendall(reply.model_dump_json().encode() + b"\n")
        if reply.error is not None or isinstance(record, FinishRecord):
            return
    if tracker is not None:
        tracker.finish_run(FinishRecord(state="failed", reason="the training process died"))


def read_lines(file: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    """Queue the lines of the connection.

    At its end, when the training process has finished or died, end this process after
    ORPHAN_TIMEOUT_S, even if the package hangs.
    """
    # The connection is reset when the training process dies before it has read a reply.
    with suppress(ConnectionError):
        for line in file:
            lines.put(line)
    lines.put(b"")
    threading.Event().wait(ORPHAN_TIMEOUT_S)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
