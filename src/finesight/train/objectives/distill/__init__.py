"""Distillation from a larger model (Agarwal et al. 2024, GKD)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from finesight.components import SettingProblem
from finesight.objective_components import Needs, ObjectiveComponent, Sampling, Teacher
from finesight.settings.setting_types import (
    CoercedFloat,
    PositiveInt,
    SettingsSection,
    WeightFormat,
)

if TYPE_CHECKING:
    from finesight.settings.config import Recipe


class Settings(SettingsSection):
    """Section `train.distill` of a recipe: imitation of a larger model (Agarwal et al. 2024, GKD).

    Attributes:
        teacher: Model with the same tokenizer: a folder, a run or a hub name.
        weight_format: Format of the teacher's weights.
        beta: Divergence from 0 (forward KL) to 1 (reverse KL); between, generalized JSD.
        lmbda: Share of samples with a response of the trained model instead of the answer.
        temperature: Divisor of the logits in the loss and in sampling.
        top_k: Number of the teacher's most probable tokens that the loss compares; None for all.
        batch_size: Largest number of responses that are generated at once.
    """

    teacher: str | None = None
    weight_format: WeightFormat = "auto"
    beta: Annotated[CoercedFloat, Field(ge=0.0, le=1.0)] = 0.5
    lmbda: Annotated[CoercedFloat, Field(ge=0.0, le=1.0)] = 0.5
    temperature: Annotated[CoercedFloat, Field(gt=0.0, le=100.0)] = 1.0
    top_k: PositiveInt | None = None
    max_completion_length: Annotated[int, Field(gt=0, le=1_048_576)] = 512
    batch_size: PositiveInt = 256


def needs(settings: Settings, recipe: Recipe) -> Needs:
    """Return the needs: the teacher, and responses to a share of the samples."""
    sampling = None
    if settings.lmbda:
        sampling = Sampling(
            section="train.distill",
            num_generations=1,
            share=settings.lmbda,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
        )
    return Needs(
        sampling=sampling,
        teacher=Teacher(settings.teacher or "", settings.weight_format, "train.distill"),
        supports_dropout=False,
    )


def check_settings(settings: Settings) -> Iterator[SettingProblem]:
    """Yield the problem of a missing teacher."""
    if settings.teacher is None:
        yield SettingProblem("objective=distill needs a model", "set train.distill.teacher")


COMPONENT = ObjectiveComponent(
    kind="objectives",
    name="distill",
    title="Distillation",
    settings=Settings,
    implementation="finesight.train.objectives.distill.loss:DistillObjective",
    needs=needs,
    accepted_samples=frozenset({"pair", "label none", "label true"}),
    trainers="finesight.train.objectives.distill:trainers.yaml",
    check_settings=check_settings,
    position=7,
    model_settings=("teacher",),
    methods=("gkd", "distillation"),
    command="train RECIPE train.objective=distill train.distill.teacher=MODEL",
    guesses="distill distil gkd kd",
)
