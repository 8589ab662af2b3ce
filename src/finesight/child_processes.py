"""Keep child processes from outliving their parent and from holding its file locks.

A forked process shares the open files of its parent, and with them every `flock`. A worker that
survives the SIGKILL of a training process would keep the run folder locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

_forking = threading.RLock()
"""Held while a lock file is opened or closed, and during every fork."""


class FileLock:
    """Lock a file or folder with `flock`. Forked processes close their copy of it.

    The lock ends with `close`, or with the process that took it.
    """

    _open: ClassVar[set[FileLock]] = set()

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        """Open `path` without locking it. Raises OSError."""
        with _forking:
            self._descriptor: int | None = os.open(path, flags, 0o644)
            FileLock._open.add(self)

    def acquire(self, *, shared: bool = False, wait: bool = True) -> None:
        """Take the lock, or change the kind of the one that is held.

        Raises:
            BlockingIOError: another process holds it, and `wait` is False.
            OSError: the file system has no locks, as some network file systems.
        """
        assert self._descriptor is not None, "a lock that was closed"
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(self._descriptor, kind | (0 if wait else fcntl.LOCK_NB))

    def close(self) -> None:
        """Release the lock."""
        with _forking:
            FileLock._open.discard(self)
            if self._descriptor is not None:
                with contextlib.suppress(OSError):
                    # Also of a process that was forked just now and has not closed its copy yet.
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                os.close(self._descriptor)
            self._descriptor = None

    def _close_copy(self) -> None:
        """Close the copy that a forked process has, and leave the lock to its parent."""
        assert self._descriptor is not None, "a lock that was closed"
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _close_inherited_locks() -> None:
    """Close the locks of the parent in a process that was just forked."""
    for lock in FileLock._open:
        lock._close_copy()
    FileLock._open.clear()
    _forking.release()


os.register_at_fork(
    before=_forking.acquire,
    after_in_parent=_forking.release,
    after_in_child=_close_inherited_locks,
)


def exit_with_parent() -> None:
    """End this worker process as soon as the process that started it dies.

    For processes of `multiprocessing`, which otherwise wait for work of a dead parent. torch's
    workers notice after 5 s, and never if the parent dies before they have started.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process of multiprocessing"
    threading.Thread(target=_wait_for_death, args=(parent.sentinel,), daemon=True).start()


def _wait_for_death(sentinel: int) -> None:
    # The pipe behind the sentinel closes with the parent. Workers that were forked later hold a
    # copy of it, and end first.
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
