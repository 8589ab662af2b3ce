"""Supervised fine-tuning: the cross entropy of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.objective_components import FirstRecipe, Needs, ObjectiveComponent
from finesight.settings.setting_types import SettingsSection

if TYPE_CHECKING:
    from finesight.settings.config import Recipe


class Settings(SettingsSection):
    """Settings of supervised fine-tuning, which has none."""


def needs(settings: Settings, recipe: Recipe) -> Needs:
    """Return the needs: without `train.objective`, the data have neither pairs nor labels."""
    is_chosen = recipe.train.objective is not None
    return Needs(
        responses="none" if is_chosen else "pairs",
        supports_all_families=True,
        supports_splitting=True,
        supports_augmentation=True,
    )


COMPONENT = ObjectiveComponent(
    kind="objectives",
    name="sft",
    title="Supervised fine-tuning",
    settings=Settings,
    implementation="finesight.train.objectives.sft.loss:SftObjective",
    needs=needs,
    accepted_samples=frozenset({"pair", "label none", "label true"}),
    position=1,
    first_recipe=FirstRecipe(
        detected_for="partly rated",
        comment="on the chosen answers: some samples have no rejected one",
    ),
)
