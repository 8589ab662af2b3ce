"""Training objectives as components: their needs, the first recipe with them, their registry."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, get_args

from yaml import YAMLError

from finesight.components import (
    Component,
    ComponentRegistry,
    SettingProblem,
    SettingsT,
    find_no_problem,
)
from finesight.environment_components import EpisodeSettings
from finesight.settings.setting_types import WeightFormat, iter_paths
from finesight.settings.trainer_tables import load_trainer_tables

DEFAULT_OBJECTIVE = "sft"
"""Objective of a recipe that names none."""

SampleKind = Literal["pair", "label none", "label true", "label false"]
"""Kind of a sample: with a rejected answer, or without one by its label."""

_LENGTH_SETTING = "max_completion_length"
"""Setting of all objectives that train by rewards, which a new recipe has."""

PLAIN_SAMPLES: frozenset[SampleKind] = frozenset({"label none"})
"""Kinds of samples without a rejected answer and without a label."""

_SAMPLE_WORDS: dict[SampleKind, str] = {
    "pair": "a rejected answer",
    "label none": "neither a rejected answer nor a label",
    "label true": "the label true",
    "label false": "the label false",
}
"""What a sample of a kind has, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Responses of the trained model that a training step samples.

    Attributes:
        section: Section of the recipe with these settings, such as `train.NAME`. They are called
            `max_completion_length`, `temperature` and `mask_truncated_completions`.
        num_generations: Responses to a prompt.
        share: Share of the samples with responses.
        max_completion_length: Maximum number of tokens of a response.
        temperature: Divisor of the logits.
        batch_size: Largest number of responses that are generated at once.
        masks_truncated: Whether truncated responses have no loss.
        episodes: Environment whose tools the responses call, from the setting `environment` of the
            section; None for responses without tools.
    """

    section: str
    num_generations: int
    share: float = 1.0
    max_completion_length: int
    temperature: float
    batch_size: int
    masks_truncated: bool = False
    episodes: EpisodeSettings | None = None


@dataclass(frozen=True, slots=True)
class Teacher:
    """Frozen model that processes the packs of the trained model.

    Attributes:
        model: Folder, run or hub name.
        section: Section of the recipe with the settings `teacher` and `weight_format`.
    """

    model: str
    weight_format: WeightFormat
    section: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Data, models and properties of a run that its objective needs.

    Defaults need the least and, apart from dropout, permit the least.

    Attributes:
        responses: Samples whose answers are responses to a prompt, in sequences of their own.
        rewards: Whether the recipe needs `rewards`, which score the sampled responses; other
            recipes have none.
        sampling: Responses of the trained model in each step.
        reference: Whether the loss compares with the model before the first step, whose
            log-probabilities are computed once.
        mismatched_answers: Whether a sample includes the answer of another sample, from which the
            baseline of a step is estimated.
        teacher: Model whose hidden states the loss compares.
        supports_all_families: Whether the objective supports the transformers backend and Qwen-VL.
        supports_splitting: Whether ranks may share a long sample (context parallelism).
        supports_augmentation: Whether images may change in every step.
        supports_dropout: Whether LoRA dropout applies, which changes likelihoods: False if the loss
            compares those of several models.
    """

    responses: Literal["none", "pairs", "all"] = "none"
    rewards: bool = False
    sampling: Sampling | None = None
    reference: bool = False
    mismatched_answers: bool = False
    teacher: Teacher | None = None
    supports_all_families: bool = False
    supports_splitting: bool = False
    supports_augmentation: bool = False
    supports_dropout: bool = True

    def __post_init__(self) -> None:
        if self.responses not in ("none", "pairs", "all"):
            raise ValueError(f"responses is {self.responses!r}: one of none, pairs, all")
        if self.rewards and self.sampling is None:
            raise ValueError("rewards score sampled responses: set sampling, too")

    @property
    def has_rollouts(self) -> bool:
        """Whether the steps contain responses that the objective samples (`sample_steps`)."""
        return self.sampling is not None

    @property
    def steps_contain_images(self) -> bool:
        """Whether steps need the pixels of their images: to sample, or for the teacher."""
        return self.has_rollouts or self.teacher is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstRecipe:
    """Lines of a new recipe with an objective, as `init` writes them.

    Attributes:
        detected_for: Data that suggest the objective: all samples are pairs, all are pairs or have
            a label, or only some.
        comment: Explanation of the line `objective`; empty for none.
        learning_rate: Usual learning rate with LoRA.
        tiny_learning_rate: That of finesight-tiny.
        has_rewards: Whether the objective trains by rewards, as `Needs.rewards` says, too. A new
            recipe has rewards, and the setting `max_completion_length` of the objective.
        has_eval: Whether all answers are references of a metric.
    """

    detected_for: Literal["pairs", "rated", "partly rated"] | None = None
    comment: str = ""
    learning_rate: str = "1.0e-4"
    tiny_learning_rate: str = "2.0e-3"
    has_rewards: bool = False
    has_eval: bool = True


def add_no_settings(settings: Any) -> Mapping[str, object]:
    """Return no settings: those of other trainers have the same defaults."""
    return {}


@dataclass(frozen=True, kw_only=True)
class ObjectiveComponent(Component[SettingsT], Generic[SettingsT]):
    """Light half of a training objective. The heavy half is a subclass of `Objective`.

    Attributes:
        needs: What the objective needs from other modules, by its settings and the `Recipe`.
        accepted_samples: Kinds of samples that the objective can train on.
        check_settings: Rules over the own settings that hold if the objective is chosen.
        first_recipe: Lines of a new recipe.
        model_settings: Own settings that name models.
        methods: Names of the objective in other trainers, beside its own.
        trainers: File with the names and values of its settings in other trainers, as
            `package:file`; empty for none.
        complete_converted: Settings to add to those of another trainer, with the same meaning.
        command: Words of a command that chooses the objective.
        guesses: Words that users type for the command.
    """

    needs: Callable[[SettingsT, Any], Needs]
    accepted_samples: frozenset[SampleKind] = PLAIN_SAMPLES
    check_settings: Callable[[SettingsT], Iterator[SettingProblem]] = field(default=find_no_problem)
    first_recipe: FirstRecipe = FirstRecipe()
    model_settings: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    trainers: str = ""
    complete_converted: Callable[[SettingsT], Mapping[str, object]] = field(default=add_no_settings)
    command: str = ""
    guesses: str = ""

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the objective; None if they can."""
        problem = Component.find_problem(self)
        if problem is not None:
            return problem
        if not self.implementation:
            return "it has no implementation"
        if not callable(self.needs):
            return f"needs is {self.needs!r:.60}, no function"
        kinds = get_args(SampleKind)
        unknown = self.accepted_samples - {*kinds}
        if unknown:
            return f"unknown kind of samples {min(unknown)!r}: one of {', '.join(kinds)}"
        if self.first_recipe.has_rewards and _LENGTH_SETTING not in self.settings.model_fields:
            return f"first_recipe.has_rewards needs the setting {_LENGTH_SETTING}"
        if self.trainers:
            try:
                load_trainer_tables(self.trainers)
            except (OSError, ImportError, TypeError, ValueError, YAMLError) as error:
                reason = " ".join(str(error).split())
                return f"trainers {self.trainers!r:.60} cannot be read: {reason:.300}"
        for name in self.model_settings:
            if name not in self.settings.model_fields:
                return f"model_settings has {name!r:.60}, which is no setting"
        return None

    def list_models(self, settings: SettingsT) -> list[str]:
        """List the models and paths that settings of this objective name."""
        models = []
        for name, value in dict(settings).items():
            if value is not None and name in self.model_settings:
                models.append(str(value))
        return [*models, *map(str, iter_paths(settings))]


OBJECTIVES = ComponentRegistry[ObjectiveComponent[Any]](
    "objectives",
    ObjectiveComponent,
    "finesight.train.objectives",
    helpers=("objective", "response_objective"),
)
"""Objectives by name: the values of `train.objective`."""


def get_needs(recipe: Any) -> Needs:
    """Return the needs of the objective of a `Recipe`.

    Raises:
        UserError: The function of a plug-in does not work.
    """
    component = recipe.train.component
    settings = component.settings_of(recipe.train)
    needs = OBJECTIVES.call(component.name, component.needs, settings, recipe)
    if not isinstance(needs, Needs):
        problem = f"returns {needs!r:.80} instead of Needs"
        raise OBJECTIVES.build_call_error(component.name, component.needs, problem)
    if needs.rewards != component.first_recipe.has_rewards:
        problem = f"rewards is {needs.rewards}, but first_recipe.has_rewards is not"
        raise OBJECTIVES.build_call_error(component.name, component.needs, problem)
    return needs


def get_accepted_samples(objective: str | None) -> frozenset[SampleKind]:
    """Return the kinds of samples that `train.objective` can train on; None for the default.

    Without a chosen objective, pairs and labels are no data of the default: they suggest another.
    """
    if objective is None:
        return PLAIN_SAMPLES
    return OBJECTIVES[objective].accepted_samples


def describe_samples(kinds: Collection[SampleKind]) -> str:
    """Describe what samples of several kinds have."""
    texts = dict(_SAMPLE_WORDS)
    if "pair" in kinds:
        texts["label none"] = "no label"
    words = [text for kind, text in texts.items() if kind in kinds]
    if {"label true", "label false"} <= {*kinds}:
        words = [text for text in words if not text.startswith("the label")]
        words.append("a label")
    return " or ".join(words)


def suggest_objectives(objective: str | None, kind: SampleKind) -> str:
    """Return the remedy for samples of a kind that `train.objective` cannot train on."""
    remedies = []
    if kind == "label none" and "pair" in get_accepted_samples(objective):
        remedies.append("add rejected answers")
    accepting: list[ObjectiveComponent[Any]] = []
    for one in OBJECTIVES.list_available():
        # Others need more than data: rewards, or another model.
        needs_more = one.first_recipe.has_rewards or bool(one.model_settings)
        if kind in one.accepted_samples and not needs_more:
            accepting.append(one)
    # First the one that `init` chooses for such data.
    detected = {"pair": "pairs", "label true": "rated", "label false": "rated"}.get(kind)
    accepting.sort(key=lambda one: detected is None or one.first_recipe.detected_for != detected)
    if accepting:
        first, *others = accepting
        choice = f"set train.objective={first.name}"
        if first.first_recipe.detected_for == detected:
            choice += f" ({first.first_recipe.comment})"
        if others:
            choice += f", or to {' or '.join(one.name for one in others)}"
        remedies.append(choice)
    remedies.append("remove these samples")
    return ", or ".join(remedies)


def list_reward_objectives() -> list[str]:
    """List the objectives that train by rewards."""
    return [one.name for one in OBJECTIVES.list_available() if one.first_recipe.has_rewards]
