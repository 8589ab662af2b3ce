"""Metrics and rewards that are functions of the running Python program.

A recipe names such a function as `python:NAME`, one of the functions that `use_functions` provides.
So a run with one can be resumed and evaluated only by a program that passes it again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType
from typing import Any

from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.settings.config import PYTHON_PREFIX

PythonFunction = Callable[[EvalCase], Any]

_FUNCTIONS: ContextVar[Mapping[str, PythonFunction]] = ContextVar("functions")


@contextmanager
def use_functions(functions: Mapping[str, PythonFunction]) -> Iterator[None]:
    """Provide functions by their names in recipes within the context."""
    token = _FUNCTIONS.set(functions)
    try:
        yield
    finally:
        _FUNCTIONS.reset(token)


_REMEDIES = {
    "metric": "pass one function; for several scores, it returns a dictionary of numbers",
    "rewards": 'rewards=[function, {"name": function, "weight": 2.0}]',
}


def read_function(value: object, where: str, functions: dict[str, PythonFunction]) -> str:
    """Return the name of a metric or reward in a recipe.

    Args:
        where: Name of the argument, `metric` or `rewards`.
        functions: Functions of the call, to which one is added.

    Raises:
        UserError: The value is neither a name nor a function.
    """
    if callable(value):
        return name_function(value, functions)
    if isinstance(value, str):
        return value
    raise UserError(
        f"a {type(value).__name__} ({value!r:.60})",
        where=where,
        expected="a name or a function",
        remedy=_REMEDIES[where],
    )


def name_function(function: PythonFunction, functions: dict[str, PythonFunction]) -> str:
    """Add a function to those of a call, and return its name in recipes.

    Functions of the same name are numbered.
    """
    own_name = str(getattr(function, "__name__", type(function).__name__))
    own_name = re.sub(r"\W+", "_", own_name.strip("<>"))
    if not own_name.isidentifier():
        own_name = f"_{own_name}"
    name = f"{PYTHON_PREFIX}{own_name}"
    number = 2
    while functions.get(name, function) is not function:
        name = f"{PYTHON_PREFIX}{own_name}_{number}"
        number += 1
    functions[name] = function
    return name


def is_python_function(name: str) -> bool:
    """Return whether a metric or reward is a function of the running program."""
    return name.startswith(PYTHON_PREFIX)


def hash_functions() -> dict[str, str]:
    """Return digests of the code of the provided functions by name.

    The digest is empty for a callable without Python code. Values of variables that a function
    uses are not part of its code.
    """
    digests = {}
    for name, function in _FUNCTIONS.get({}).items():
        code = getattr(function, "__code__", None)
        digests[name] = ""
        if code is not None:
            digests[name] = hashlib.sha256(_describe_code(code).encode()).hexdigest()[:16]
    return digests


def _describe_code(code: CodeType) -> str:
    """Return the instructions, names and constants of a function."""
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constants.append(_describe_code(constant))
        elif isinstance(constant, frozenset):
            # The order of a set differs between processes.
            constants.append(repr(sorted(map(repr, constant))))
        else:
            constants.append(repr(constant))
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def find_function(name: str) -> PythonFunction | None:
    """Return the function that a metric or reward names; None for other metrics and rewards.

    Raises:
        UserError: The running program does not provide the function.
    """
    if not is_python_function(name):
        return None
    functions = _FUNCTIONS.get({})
    if name not in functions:
        own_name = name.removeprefix(PYTHON_PREFIX)
        raise UserError(
            f"{own_name} is a function of the Python program that started the run",
            where=name,
            expected="a program that passes the function",
            remedy=f"in Python, repeat finesight.train(..., resume=True), or use"
            f" finesight.load(RUN).evaluate(samples, metric={own_name}); on the command line,"
            f" write it to a file, and give FILE.py:{own_name}",
        )
    return functions[name]
