"""Direct preference optimization (Rafailov et al. 2023) and its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from finesight.objective_components import FirstRecipe, Needs, ObjectiveComponent
from finesight.settings.setting_types import CoercedFloat, Names, SettingsSection, as_tuple

if TYPE_CHECKING:
    from finesight.settings.config import Recipe


DpoLossType = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "sft"]


class Settings(SettingsSection):
    """Section `train.dpo` of a recipe: a weighted sum of losses of pairs, with the names of TRL.

    `label_smoothing` is the share of swapped pairs that the loss `robust` assumes.
    """

    beta: Annotated[CoercedFloat, Field(gt=0.0)] = 0.1
    loss_type: Names[DpoLossType] = ("sigmoid",)
    loss_weights: Annotated[tuple[CoercedFloat, ...], BeforeValidator(as_tuple)] | None = None
    label_smoothing: Annotated[CoercedFloat, Field(ge=0.0, lt=0.5)] = 0.0

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"{len(self.loss_weights)} loss_weights for {len(self.loss_type)} losses of"
                " loss_type: give one weight per loss"
            )
        if self.label_smoothing and "robust" not in self.loss_type:
            raise ValueError(f"label_smoothing={self.label_smoothing} needs loss_type=robust")
        return self


def needs(settings: Settings, recipe: Recipe) -> Needs:
    """Return the needs: pairs, and the log-probabilities of the reference model."""
    return Needs(
        responses="pairs",
        reference=True,
        supports_dropout=False,
    )


COMPONENT = ObjectiveComponent(
    kind="objectives",
    name="dpo",
    title="DPO",
    settings=Settings,
    implementation="finesight.train.objectives.dpo.loss:DpoObjective",
    needs=needs,
    accepted_samples=frozenset({"pair"}),
    trainers="finesight.train.objectives.dpo:trainers.yaml",
    position=2,
    first_recipe=FirstRecipe(
        detected_for="pairs",
        comment="on pairs of answers; sft: on the chosen ones",
        learning_rate="5.0e-6",
        tiny_learning_rate="5.0e-4",
    ),
)
