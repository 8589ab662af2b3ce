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


ENVIRONMENTS = ComponentRegistry[EnvironmentComponent](
    "environments", EnvironmentComponent, "finesight.evaluate.environments"
)
"""Environments by name: values of `environment` of an objective, beside classes in files."""
