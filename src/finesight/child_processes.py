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
"""Lock that prevents a fork while the file of a FileLock is opened or closed."""


class FileLock:
    """Lock on a file or folder with `flock`, which forked processes do not inherit.

    The lock is released by `close`, or when the process that acquired it ends.
    """

    _open: ClassVar[set[FileLock]] = set()

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        """Open `path` with the given `os.open` flags, without locking it. Raises OSError."""
        with _forking:
            self._descriptor: int | None = os.open(path, flags, 0o644)
            FileLock._open.add(self)

    def acquire(self, *, shared: bool = False, wait: bool = True) -> None:
        """Acquire the lock, or convert it between shared and exclusive.

        Args:
            shared: Acquire a shared lock, which several processes can hold, instead of an exclusive
                one.
            wait: Wait until other processes release the lock.

        Raises:
            BlockingIOError: Another process holds the lock, and `wait` is False.
            OSError: The file system does not support locks, as some network file systems.
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
        """Close the file in a forked process without releasing the lock of its parent."""
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
    """Close the lock files of the parent in a process that was just forked."""
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

    Called in processes of `multiprocessing`, which would otherwise wait for work forever.
    DataLoader workers of torch notice a dead parent after 5 s, and never if it dies before they
    have started.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process of multiprocessing"
    threading.Thread(target=_wait_for_death, args=(parent.sentinel,), daemon=True).start()


def _wait_for_death(sentinel: int) -> None:
    # The pipe behind the sentinel closes with the parent. Workers that were forked later hold a
    # copy of it, and end first.
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
