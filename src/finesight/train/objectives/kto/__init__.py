"""Kahneman-Tversky optimization (Ethayarajh et al. 2024) of desirable and other answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from finesight.objective_components import FirstRecipe, Needs, ObjectiveComponent
from finesight.settings.setting_types import CoercedFloat, SettingsSection

if TYPE_CHECKING:
    from finesight.settings.config import Recipe


class Settings(SettingsSection):
    """Section `train.kto` of a recipe: loss of answers with a label, with the names of TRL.

    `desirable_weight` and `undesirable_weight` balance different numbers of both labels.
    """

    beta: Annotated[CoercedFloat, Field(gt=0.0)] = 0.1
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: Annotated[CoercedFloat, Field(gt=0.0)] = 1.0
    undesirable_weight: Annotated[CoercedFloat, Field(gt=0.0)] = 1.0

    @property
    def has_baseline(self) -> bool:
        """Return whether the loss depends on the KL divergence of the step."""
        return self.loss_type == "kto"


def needs(settings: Settings, recipe: Recipe) -> Needs:
    """Return the needs: pairs or labels, and the log-probabilities of the reference model."""
    return Needs(
        responses="all",
        reference=True,
        mismatched_answers=settings.has_baseline,
        supports_dropout=False,
    )


COMPONENT = ObjectiveComponent(
    kind="objectives",
    name="kto",
    title="KTO",
    settings=Settings,
    implementation="finesight.train.objectives.kto.loss:KtoObjective",
    needs=needs,
    accepted_samples=frozenset({"pair", "label true", "label false"}),
    trainers="finesight.train.objectives.kto:trainers.yaml",
    position=5,
    first_recipe=FirstRecipe(
        detected_for="rated",
        comment="on answers with a label",
        learning_rate="5.0e-6",
        tiny_learning_rate="5.0e-4",
        has_eval=False,
    ),
)
