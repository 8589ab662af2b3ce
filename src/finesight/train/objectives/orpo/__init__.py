"""Odds ratio preference optimization (Hong et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from finesight.objective_components import Needs, ObjectiveComponent
from finesight.settings.setting_types import CoercedFloat, SettingsSection

if TYPE_CHECKING:
    from finesight.settings.config import Recipe


class Settings(SettingsSection):
    """Section `train.orpo` of a recipe: weight of the odds ratio loss (Hong et al. 2024)."""

    beta: Annotated[CoercedFloat, Field(gt=0.0)] = 0.1


def needs(settings: Settings, recipe: Recipe) -> Needs:
    """Return the needs: pairs."""
    return Needs(
        responses="pairs",
        supports_dropout=False,
    )


COMPONENT = ObjectiveComponent(
    kind="objectives",
    name="orpo",
    title="ORPO",
    settings=Settings,
    implementation="finesight.train.objectives.orpo.loss:OrpoObjective",
    needs=needs,
    accepted_samples=frozenset({"pair"}),
    trainers="finesight.train.objectives.orpo:trainers.yaml",
    position=3,
)
