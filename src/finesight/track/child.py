"""A tracker's own process: takes records from a socket, one after the other, and answers each.

What a package does to a process, take signals and the terminal, start threads, hang while Python
ends, it does to this one. `python -m finesight.track.child KIND DESCRIPTOR`.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import traceback
from typing import BinaryIO, cast

from finesight.config import TrackerKind
from finesight.track.kinds import writer_of
from finesight.track.records import RECORD, Alert, Begin, Begun, End, Figures, Pictures, Reply
from finesight.track.secrets import cleaned
from finesight.track.writer import Writer

ALONE = 60.0
"""Seconds that are left to close the run in, after the process that trains has died."""


def main(kind: TrackerKind, link: socket.socket) -> None:
    """Serve one tracker until the run ends, or its process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # A scheduler sends them to all processes of a job: this one ends after the run.
        signal.signal(number, signal.SIG_IGN)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(link.makefile("rb"), lines), daemon=True).start()
    writer = None
    while line := lines.get():
        record = RECORD.validate_json(line)
        try:
            writer = writer or writer_of(kind)
            reply = Reply(begun=_given(writer, record))
        except Exception as error:  # of whatever package
            traceback.print_exc()
            reply = Reply(failed=cleaned(f"{type(error).__name__}: {error}"))
        link.sendall(reply.model_dump_json().encode() + b"\n")
        if reply.failed is not None or isinstance(record, End):
            return
    if writer is not None:
        writer.end(End(state="failed", reason="the process that trained has died"))


def _read(file: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    """Pass lines on; after the last one, see to it that the process ends, hang what may."""
    for line in file:
        lines.put(line)
    lines.put(b"")
    threading.Event().wait(ALONE)
    os._exit(1)


def _given(writer: Writer, record: Begin | Figures | Pictures | Alert | End) -> Begun | None:
    match record:
        case Begin():
            return writer.begin(record)
        case Figures():
            writer.figures(record)
        case Pictures():
            writer.pictures(record)
        case Alert():
            writer.alert(record)
        case End():
            writer.end(record)
    return None


if __name__ == "__main__":
    main(cast(TrackerKind, sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
