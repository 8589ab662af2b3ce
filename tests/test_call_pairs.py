"""Few pairs of files call each other in both directions, and the recorder finds such pairs."""

from pathlib import Path
from typing import Any

import pytest
from call_pairs import PATHS
from call_recorder import PACKAGE_FOLDER, CallRecorder, find_mutual_calls

# Lower the bounds as pairs are removed; never raise them.
MAX_PAIRS = {"step": 0, "step, DPO": 0, "request": 1, "evaluation": 3}

CALLER = """
def use_callback():
    total = sum(map(lambda n: n, [1]))
    return apply(lambda: total)

def use_generator():
    return [*count()]

class Body:
    value = apply(int)

def leave():
    return 1
"""
CALLED = """
def apply(function):
    return function()

def count():
    yield 1
    yield 2
"""


def define_functions() -> dict[str, Any]:
    """Define functions of two files that would be in the package."""
    namespace: dict[str, Any] = {}
    for name, source in (("called.py", CALLED), ("caller.py", CALLER)):
        exec(compile(source, f"{PACKAGE_FOLDER}{name}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize(("function", "num_pairs"), [("use_callback", 1), ("use_generator", 0)])
def test_callbacks_are_calls_back(function: str, num_pairs: int) -> None:
    namespace = define_functions()
    recorder = CallRecorder(namespace[function])
    with recorder.profile():
        define_functions()
        namespace[function]()
        namespace["leave"]()
    assert len(find_mutual_calls(recorder.calls())) == num_pairs
    assert recorder.files == {"called.py", "caller.py"}
    assert "leave" not in [call.callee.name for call in recorder.calls()]
    entries = [call.caller.name for call in recorder.calls() if call.callee.name == "count"]
    assert entries == ["use_generator"] * (function == "use_generator")


@pytest.mark.parametrize("name", PATHS)
def test_paths_have_few_pairs(tmp_path: Path, name: str) -> None:
    result = PATHS[name](tmp_path)
    assert len(result.pairs) <= MAX_PAIRS[name], result.pairs
