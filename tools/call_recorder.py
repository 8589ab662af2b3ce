"""Record which functions of the package call each other, in all threads and in worker processes.

A call counts if caller and callee are functions of files in `src/finesight`, and nothing but
built-in code, such as `map` or `functools.partial`, is between them:

- Python reports a property, a comprehension, a lambda and a nested function as a call. It belongs
  to the file in which it is written, so a callback counts as a call of that file.
- A generator or coroutine is called once: by the function that enters it first.
- Methods that PyTorch, asyncio or `contextlib` call, such as `forward`, have no caller here, and
  bodies of modules and classes, which run at import, neither.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import finesight

PACKAGE_FOLDER = f"{Path(finesight.__file__).parent}/"
SUSPENDED_KINDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Function(NamedTuple):
    """File of a function, relative to the package, and its qualified name."""

    file: str
    name: str


class Call(NamedTuple):
    """Functions of a direct call."""

    caller: Function
    callee: Function


class CallRecorder:
    """Profile function that records calls between functions of the package.

    Args:
        path_function: Function whose calls are the path. Without it, `record` starts and ends the
            recording.
        log_path: File for the calls of a process that ends without returning them.

    Attributes:
        files: Files of the package with a function that was called.
    """

    def __init__(
        self, path_function: Callable[..., Any] | None = None, log_path: Path | None = None
    ) -> None:
        self.files: set[str] = set()
        self.is_active = False
        self._path_code = None if path_function is None else path_function.__code__
        self._log_path = log_path
        self._calls: set[tuple[CodeType | None, CodeType]] = set()

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "call":
            if self.is_active and is_package_function(code) and is_first_entry(frame):
                self._add(frame.f_back, code)
            elif code is self._path_code:
                # The call of the path itself is not on it.
                self.is_active = True
                self.files.add(describe(code).file)
        elif event == "return" and code is self._path_code:
            self.is_active = False

    def _add(self, caller_frame: FrameType | None, callee: CodeType) -> None:
        caller = None
        if caller_frame is not None and is_package_function(caller_frame.f_code):
            caller = caller_frame.f_code
        if (caller, callee) in self._calls:
            return
        self._calls.add((caller, callee))
        self.files.add(describe(callee).file)
        if self._log_path is not None and caller is not None:
            with self._log_path.open("a") as log:
                log.write("\t".join((*describe(caller), *describe(callee))) + "\n")

    @contextmanager
    def profile(self) -> Iterator[None]:
        """Observe this thread, and those that start within the block."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the calls of all observed threads within the block."""
        self.is_active = True
        try:
            yield
        finally:
            self.is_active = False

    def calls(self) -> list[Call]:
        """Return the recorded calls, sorted, each once."""
        known = [(caller, callee) for caller, callee in self._calls if caller is not None]
        return sorted({Call(describe(caller), describe(callee)) for caller, callee in known})


@cache
def is_package_function(code: CodeType) -> bool:
    """Return whether code is that of a function of the package, not of a module or class body."""
    is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
    return is_function and code.co_filename.startswith(PACKAGE_FOLDER)


def is_first_entry(frame: FrameType) -> bool:
    """Return whether a called frame starts; False for a generator or coroutine that continues."""
    if not frame.f_code.co_flags & SUSPENDED_KINDS:
        return True
    return frame.f_lasti == find_start(frame.f_code)


@cache
def find_start(code: CodeType) -> int:
    """Return the offset of the instruction at which a generator or coroutine is entered."""
    resumes = (one.offset for one in dis.get_instructions(code) if one.opname == "RESUME")
    return next(resumes)


def describe(code: CodeType) -> Function:
    return Function(code.co_filename.removeprefix(PACKAGE_FOLDER), code.co_qualname)


def load_recorded_state(log_folder: Path, load: Callable[..., Any], *args: Any) -> Any:
    """Load the state of worker processes, and record the calls of the workers forked afterwards.

    Args:
        log_folder: Folder of the log that `read_worker_log` reads.
        load: Function that loads the state, such as `load_worker_state`.
    """
    state = load(*args)
    recorder = CallRecorder(log_path=log_folder / "calls.tsv")
    recorder.is_active = True
    sys.setprofile(recorder)
    return state


def read_worker_log(log_folder: Path) -> list[Call]:
    """Read the calls of worker processes; empty if none ran."""
    path = log_folder / "calls.tsv"
    if not path.exists():
        return []
    calls = []
    for line in path.read_text().splitlines():
        caller_file, caller_name, callee_file, callee_name = line.split("\t")
        calls.append(Call(Function(caller_file, caller_name), Function(callee_file, callee_name)))
    return calls


def find_mutual_calls(calls: Sequence[Call]) -> list[tuple[Call, Call]]:
    """Return an example in both directions for each pair of files that call each other."""
    first_calls: dict[tuple[str, str], Call] = {}
    for call in sorted(calls):
        first_calls.setdefault((call.caller.file, call.callee.file), call)
    pairs = []
    for (caller_file, callee_file), call in first_calls.items():
        call_back = first_calls.get((callee_file, caller_file))
        if caller_file < callee_file and call_back is not None:
            pairs.append((call, call_back))
    return pairs
