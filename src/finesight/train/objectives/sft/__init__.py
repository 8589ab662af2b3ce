"""Supervised fine-tuning: the cross entropy of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.objective_components import FirstRecipe, Needs, ObjectiveComponent, SampleKind
from finesight.setting_types import SettingsSection
from finesight.train.objectives.sample_remedies import LABELED, PAIRS, UNDESIRABLE

if TYPE_CHECKING:
    from finesight.config import Recipe


class Settings(SettingsSection):
    """Settings of supervised fine-tuning, which has none."""


def needs(settings: Settings, recipe: Recipe) -> Needs:
    """Return the needs: without `train.objective`, the data have neither pairs nor labels."""
    is_chosen = recipe.train.objective is not None
    accepted: set[SampleKind] = {"label none"}
    if is_chosen:
        accepted |= {"pair", "label true"}
    return Needs(
        responses="none" if is_chosen else "pairs",
        accepted_samples=frozenset(accepted),
        remedies=UNDESIRABLE if is_chosen else {**PAIRS, **LABELED},
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
    position=1,
    first_recipe=FirstRecipe(
        detected_for="partly rated",
        comment="on the chosen answers: some samples have no rejected one",
    ),
)
