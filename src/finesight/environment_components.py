"""Environments of reinforcement tuning as components, and their registry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finesight.components import Component, ComponentRegistry
from finesight.errors import UserError, describe_choices


@dataclass(frozen=True, kw_only=True)
class EnvironmentComponent(Component[Any]):
    """Light half of an environment. The heavy half is a class with tools as methods.

    The heavy half is imported in the processes of the episodes only.
    """

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the environment; None if they can."""
        problem = Component.find_problem(self)
        if problem is None and not self.implementation:
            problem = "it has no implementation"
        return problem


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings:
    """Environment of episodes, and their limits.

    Attributes:
        environment: `FILE.py:CLASS`, or the name of a component.
        max_tool_calling_iterations: Maximum number of turns with tool calls.
        tool_timeout: Maximum number of seconds of a call of the environment.
        turn_timeout: Maximum number of seconds of all calls of a turn.
        max_tokens: Maximum number of tokens after the prompt, with the results of tools.
    """

    environment: str
    max_tool_calling_iterations: int = 5
    tool_timeout: float = 30.0
    turn_timeout: float = 60.0
    max_tokens: int = 4096


ENVIRONMENTS = ComponentRegistry[EnvironmentComponent](
    "environments", EnvironmentComponent, "finesight.evaluate.environments"
)
"""Environments by name: values of `environment` of an objective, beside classes in files."""

# A name with `python:` is that of a function of the running program.
_FILE_CLASS = re.compile(r"(?!python:).+\.py:[A-Za-z_]\w*")


def is_environment(name: str) -> bool:
    """Return whether a name is that of a class in a Python file, or of a component."""
    return _FILE_CLASS.fullmatch(name) is not None or name in ENVIRONMENTS


def require_environment(name: str) -> None:
    """Verify the name of an environment. Other files than Python files are never executed.

    Raises:
        UserError: It is neither `FILE.py:CLASS` nor the name of a component.
    """
    if not is_environment(name):
        raise UserError(
            f"no environment {name!r:.80}",
            where="environment",
            expected=describe_choices([*ENVIRONMENTS], "environment, or FILE.py:CLASS"),
            remedy="correct the name",
        )
