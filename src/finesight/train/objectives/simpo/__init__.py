"""Simple preference optimization (Meng et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from finesight.objective_components import Needs, ObjectiveComponent
from finesight.settings.setting_types import CoercedFloat, SettingsSection

if TYPE_CHECKING:
    from finesight.settings.config import Recipe


class Settings(SettingsSection):
    """Section `train.simpo` of a recipe: scale and target margin of rewards (Meng et al. 2024)."""

    beta: Annotated[CoercedFloat, Field(gt=0.0)] = 2.0
    simpo_gamma: Annotated[CoercedFloat, Field(ge=0.0)] = 1.0


def needs(settings: Settings, recipe: Recipe) -> Needs:
    """Return the needs: pairs."""
    return Needs(
        responses="pairs",
        supports_dropout=False,
    )


COMPONENT = ObjectiveComponent(
    kind="objectives",
    name="simpo",
    title="SimPO",
    settings=Settings,
    implementation="finesight.train.objectives.simpo.loss:SimpoObjective",
    needs=needs,
    accepted_samples=frozenset({"pair"}),
    trainers="finesight.train.objectives.simpo:trainers.yaml",
    position=4,
)
