"""Group relative policy optimization (Shao et al. 2024) and its variants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from finesight.components import SettingProblem
from finesight.environment_components import ENVIRONMENTS, EpisodeSettings, is_environment
from finesight.objective_components import FirstRecipe, Needs, ObjectiveComponent, Sampling
from finesight.settings.setting_types import CoercedFloat, PositiveInt, SettingsSection

if TYPE_CHECKING:
    from finesight.settings.config import Recipe


ENVIRONMENT_SETTINGS = (
    "environment",
    "max_tool_calling_iterations",
    "tool_timeout",
)


class Settings(SettingsSection):
    """Section `train.grpo` of a recipe: policy optimization by rewards, with the names of TRL.

    `loss_type` is GRPO (Shao et al. 2024), DAPO (Yu et al. 2025), Dr. GRPO (Liu et al. 2025), BNPO,
    CISPO (MiniMax 2025) or SAPO (Gao et al. 2025). GSPO (Zheng et al. 2025) is
    `importance_sampling_level=sequence` with `loss_type=grpo`.

    Attributes:
        num_generations: Responses of each sample, the group in which rewards are compared.
        max_completion_length: Maximum number of tokens of a response, with the results of tools.
        epsilon_high: Upper clipping of the probability ratio; by default 0.28 for DAPO, `epsilon`
            for others. For CISPO, the largest ratio itself, by default 5.
        beta: Weight of the KL divergence from the model without adapter.
        scale_rewards: Whether advantages are divided by the standard deviation of the group, of all
            groups of a step, or not at all.
        num_iterations: Updates with the same responses.
        importance_sampling_mode: Correction of the difference between sampler and trainer.
        max_refills: Number of times that groups with equal rewards are replaced in a step; never
            with `beta`, because the KL divergence gives them a gradient.
        batch_size: Largest number of responses that are generated at once.
        environment: Class of a Python file, `environment.py:Class`, or the name of a component,
            whose methods are tools that the responses call.
        max_tool_calling_iterations: Maximum number of turns with tool calls in a response.
        tool_timeout: Maximum number of seconds of a call of the environment.
        turn_timeout: Maximum number of seconds of all calls of a turn together; by default twice
            `tool_timeout`.
    """

    num_generations: Annotated[int, Field(ge=2, le=1024)] = 8
    max_completion_length: Annotated[int, Field(gt=0, le=1_048_576)] = 512
    temperature: Annotated[CoercedFloat, Field(gt=0.0, le=100.0)] = 1.0
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: Annotated[CoercedFloat, Field(gt=0.0, lt=1.0)] = 0.2
    epsilon_high: Annotated[CoercedFloat, Field(gt=0.0)] | None = None
    beta: Annotated[CoercedFloat, Field(ge=0.0)] = 0.0
    use_bias_correction_kl: bool = True
    scale_rewards: Literal["group", "batch", "none"] = "group"
    num_iterations: Annotated[int, Field(ge=1, le=16)] = 1
    mask_truncated_completions: bool = False
    importance_sampling_mode: Literal[
        "sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "none"
    ] = "sequence_mask"
    importance_sampling_clip_max: Annotated[CoercedFloat, Field(gt=1.0)] = 3.0
    max_refills: Annotated[int, Field(ge=0, le=16)] = 1
    batch_size: PositiveInt = 256
    environment: Annotated[str, Field(min_length=1)] | None = None
    max_tool_calling_iterations: Annotated[int, Field(ge=1, le=1000)] = 5
    tool_timeout: Annotated[CoercedFloat, Field(gt=0.0, le=3600.0)] = 30.0
    turn_timeout: Annotated[CoercedFloat, Field(gt=0.0, le=7200.0)] | None = None

    @model_serializer(mode="wrap")
    def _omit_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit unused settings of environments, which checkpoints of earlier versions lack."""
        values: dict[str, Any] = serialize(self)
        for name in ENVIRONMENT_SETTINGS:
            is_default = dict(self)[name] == type(self).model_fields[name].default
            if is_default and self.environment is None:
                values.pop(name, None)
        if self.turn_timeout is None:
            values.pop("turn_timeout", None)
        return values

    @property
    def effective_epsilon_high(self) -> float:
        """Upper clipping of the probability ratio, with the default of the loss."""
        defaults = {"cispo": 5.0, "dapo": 0.28}
        return self.epsilon_high or defaults.get(self.loss_type, self.epsilon)


def needs(settings: Settings, recipe: Recipe) -> Needs:
    """Return the needs: rewards, and groups of sampled responses."""
    episodes = None
    if settings.environment is not None:
        episodes = EpisodeSettings(
            environment=settings.environment,
            max_tool_calling_iterations=settings.max_tool_calling_iterations,
            tool_timeout=settings.tool_timeout,
            turn_timeout=settings.turn_timeout or 2 * settings.tool_timeout,
            max_tokens=settings.max_completion_length,
        )
    return Needs(
        rewards=True,
        sampling=Sampling(
            section="train.grpo",
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
            masks_truncated=settings.mask_truncated_completions,
            episodes=episodes,
        ),
        supports_dropout=False,
    )


def check(settings: Settings, recipe: Recipe) -> Iterator[SettingProblem]:
    """Yield problems of the environment, and a KL divergence from a model that changes."""
    name = settings.environment
    if name is not None and not is_environment(name):
        known = ", ".join(ENVIRONMENTS)
        yield SettingProblem(
            f"train.grpo.environment is {name!r:.80}",
            f"use FILE.py:CLASS, or one of {known}",
        )
    if settings.turn_timeout is not None and settings.turn_timeout < settings.tool_timeout:
        yield SettingProblem(
            f"train.grpo.turn_timeout is {settings.turn_timeout:g}, less than the"
            f" {settings.tool_timeout:g} s of tool_timeout",
            "raise turn_timeout, or lower tool_timeout",
        )
    if not settings.beta:
        return
    problem = "train.grpo.beta refers to the model without adapter"
    if recipe.tune.has_mode("full"):
        yield SettingProblem(
            f"{problem}, which full tuning changes",
            "set it to 0, or set all parts of tune to lora or frozen",
        )
    if recipe.adapter is not None:
        yield SettingProblem(
            f"{problem}, but adapter is set",
            "set it to 0, or merge the adapter and start from the merged model",
        )


def complete_converted(settings: Settings) -> dict[str, object]:
    """Return the upper clipping of other trainers, which is `epsilon` for each loss."""
    if settings.loss_type == "dapo" and settings.epsilon_high is None:
        return {"epsilon_high": settings.epsilon}
    return {}


COMPONENT = ObjectiveComponent(
    kind="objectives",
    name="grpo",
    title="GRPO",
    settings=Settings,
    implementation="finesight.train.objectives.grpo.loss:GrpoObjective",
    needs=needs,
    accepted_samples=frozenset({"pair", "label none", "label true"}),
    trainers="finesight.train.objectives.grpo:trainers.yaml",
    complete_converted=complete_converted,
    check=check,
    position=6,
    first_recipe=FirstRecipe(
        comment="on sampled responses; fine-tune on answers first",
        learning_rate="1.0e-5",
        tiny_learning_rate="5.0e-4",
        has_rewards=True,
    ),
    command="init DATA --objective grpo",
    guesses="grpo rl rlhf rlvr ppo",
)
