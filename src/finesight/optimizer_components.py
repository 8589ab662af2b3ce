"""Optimizers as components: what other modules know of them, and their registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

from finesight.components import Component, ComponentRegistry, SettingsT

DEFAULT_OPTIMIZER = "adamw"
"""Optimizer of a recipe that names none, and of parameters that another one does not support."""


@dataclass(frozen=True, kw_only=True)
class OptimizerComponent(Component[SettingsT], Generic[SettingsT]):
    """Light half of an optimizer. The heavy half is a subclass of `Optimizer`.

    The heavy half also tells its memory and traffic to `plan`.

    Attributes:
        only_matrices: Whether it updates only weight matrices. Embeddings, convolutions and vectors
            have the default optimizer.
        supports_sharding: Whether `train.parallel` may split the rows of parameters and state
            tensors over the ranks, also in CPU memory.
        saves_memory_of: Optimizer with the same update and a larger state, instead of which `plan`
            and errors about a full GPU memory suggest this one; empty for none.
    """

    only_matrices: bool = False
    supports_sharding: bool = False
    saves_memory_of: str = ""

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the optimizer; None if they can."""
        problem = Component.find_problem(self)
        if problem is None and not self.implementation:
            problem = "it has no implementation"
        return problem


OPTIMIZERS = ComponentRegistry[OptimizerComponent[Any]](
    "optimizers", OptimizerComponent, "finesight.train.optim"
)
"""Optimizers by name: the values of `train.optimizer`."""


def find_smaller_optimizer(name: str) -> str | None:
    """Return the built-in optimizer with the update of another one and a smaller state, if any."""
    for component in OPTIMIZERS.list_built_in():
        if component.saves_memory_of == name:
            return component.name
    return None
