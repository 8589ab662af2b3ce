"""The fixture that runs commands in the process of the test."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from finesight.cli.app import run_command


@dataclass(frozen=True)
class Printed:
    """Output of a command."""

    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def next_steps(self) -> str:
        """Commands that follow the text `next:`."""
        return self.err.partition("next:")[2].strip()

    @property
    def records(self) -> list[Any]:
        return [json.loads(line) for line in self.lines]

    @property
    def json(self) -> Any:
        return self.records[-1]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Run a command line, and check its exit code. The error of exit code 2 has no traceback."""

    def run(*words: object, code: int = 0) -> Printed:
        capsys.readouterr()
        found = run_command([str(word) for word in words])
        printed = Printed(*capsys.readouterr())
        assert found == code, printed.text
        assert "Traceback" not in printed.text
        return printed

    return run
