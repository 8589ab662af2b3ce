"""Run a test for all values of a grid in one case, in place of `pytest.mark.parametrize`."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def each(names: str | Sequence[str], values: Iterable[Any]) -> Callable[[Any], Any]:
    """Decorate a test to run it for each value; decorators multiply like `parametrize`.

    A failure notes the values. Each run has its own folder in `tmp_path`. The test is skipped if
    all runs are.
    """
    columns, rows = [names] if isinstance(names, str) else list(names), list(values)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            skipped: list[BaseException] = []
            for number, row in enumerate(rows):
                if "tmp_path" in fixtures:
                    folder = fixtures["tmp_path"] / str(number)
                    folder.mkdir()
                given = dict(zip(columns, [row] if isinstance(names, str) else row, strict=True))
                own = {"tmp_path": folder} if "tmp_path" in fixtures else {}
                try:
                    test(**fixtures | given | own)
                except pytest.skip.Exception as skip:
                    skipped.append(skip)
                except BaseException as error:
                    error.add_note(f"with {given}")
                    raise
            if rows and len(skipped) == len(rows):
                raise skipped[0]

        parameters = [p for name, p in signature.parameters.items() if name not in columns]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate
