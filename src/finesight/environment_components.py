"""Environments of reinforcement tuning as components, and their registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finesight.components import Component, ComponentRegistry


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
        max_tokens: Maximum number of tokens after the prompt, with the results of tools.
    """

    environment: str
    max_tool_calling_iterations: int = 5
    tool_timeout: float = 30.0
    max_tokens: int = 4096


ENVIRONMENTS = ComponentRegistry[EnvironmentComponent](
    "environments", EnvironmentComponent, "finesight.evaluate.environments"
)
"""Environments by name: values of `environment` of an objective, beside classes in files."""
