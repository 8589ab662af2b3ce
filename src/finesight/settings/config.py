"""Settings of a recipe as pydantic models, which validate types, ranges and unknown keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from finesight.components import (
    Component,
    ComponentRegistry,
    SettingProblem,
    is_component_name,
    join_problems,
)
from finesight.errors import UserError, suggest_name
from finesight.metric_components import METRICS
from finesight.objective_components import (
    DEFAULT_OBJECTIVE,
    OBJECTIVES,
    Needs,
    ObjectiveComponent,
    get_needs,
    list_reward_objectives,
)
from finesight.optimizer_components import DEFAULT_OPTIMIZER, OPTIMIZERS, OptimizerComponent
from finesight.plugins import Registry
from finesight.reward_components import REWARDS, RewardComponent, RewardSettings
from finesight.settings.setting_types import (
    CoercedFloat,
    ExpandedPath,
    Fraction,
    Names,
    PathOrUrl,
    PositiveInt,
    Seed,
    SettingsSection,
    SideLength,
    StepsOrFraction,
    as_tuple,
    iter_paths,
)
from finesight.tracker_components import TRACKERS, require_track_package


class DataFileSettings(SettingsSection):
    """A data file of a recipe, or a glob pattern of several.

    Files are JSONL, Parquet or tar. `limit` is the number of samples used from the start; None for
    all.
    """

    path: PathOrUrl
    limit: PositiveInt | None = None


class TrainFileSettings(DataFileSettings):
    """A training file of a recipe.

    `weight` is the number of passes over its samples per epoch. With 0.5, each epoch uses a
    different half.
    """

    weight: Annotated[CoercedFloat, Field(gt=0.0, le=10_000.0)] = 1.0


def _as_sections(key: str, value: object) -> object:
    """Convert sections or values of their setting `key` to a list: several, one or none."""
    if value is None:
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({key: item} if isinstance(item, str | Path) else item for item in items)


_as_files = BeforeValidator(partial(_as_sections, "path"))
TrainFiles = Annotated[tuple[TrainFileSettings, ...], _as_files, Field(min_length=1)]
EvalFiles = Annotated[tuple[DataFileSettings, ...], _as_files]


class AugmentSettings(SettingsSection):
    """Setting `data.augment` of a recipe: random variants of training images.

    Attributes:
        crop: Maximum share of each side that a crop removes.
        scale: Maximum enlargement of the visible window beyond the image.
        rotate: Maximum angle in degrees.
        flip: Whether half of the images are mirrored if no text names a side or a text.
        color: Maximum change of brightness, contrast and saturation.
        blur: Share of images with a Gaussian blur.
        jpeg: Share of images with JPEG artifacts.
    """

    crop: Annotated[CoercedFloat, Field(ge=0.0, le=0.5)] = 0.0
    scale: Annotated[CoercedFloat, Field(ge=0.0, le=1.0)] = 0.0
    rotate: Annotated[CoercedFloat, Field(ge=0.0, le=30.0)] = 0.0
    flip: Literal["auto", "never"] = "never"
    color: Annotated[CoercedFloat, Field(ge=0.0, le=0.8)] = 0.0
    blur: Annotated[CoercedFloat, Field(ge=0.0, le=1.0)] = 0.0
    jpeg: Annotated[CoercedFloat, Field(ge=0.0, le=1.0)] = 0.0


_AUGMENT_PRESETS: dict[object, dict[str, object]] = {
    "light": {"crop": 0.15, "scale": 0.1, "rotate": 2, "color": 0.15, "jpeg": 0.1},
    "strong": {
        **{"crop": 0.3, "scale": 0.25, "rotate": 5, "flip": "auto"},
        **{"color": 0.3, "blur": 0.1, "jpeg": 0.2},
    },
}


def _as_augment(value: object) -> object:
    if isinstance(value, str) and value not in _AUGMENT_PRESETS:
        expected = "'light', 'strong', or a section with " + ", ".join(AugmentSettings.model_fields)
        raise PydanticCustomError("literal_error", "not {expected}", {"expected": expected})
    return _AUGMENT_PRESETS[value] if isinstance(value, str) else value


class DataSettings(SettingsSection):
    """Section `data` of a recipe: training and validation data.

    `supervise` selects the answers of a conversation that contribute to the loss: all, or the last.
    """

    train: TrainFiles
    eval: EvalFiles = ()
    system_prompt: str | None = None
    max_length: PositiveInt = 8192
    supervise: Literal["all", "last"] = "all"
    augment: Annotated[AugmentSettings | None, BeforeValidator(_as_augment)] = None
    on_invalid_sample: Literal["skip", "fail"] = "skip"


class PixelLimits(SettingsSection):
    """Image rule of a recipe with a minimum or maximum number of pixels, or both.

    The rule of the model provides a missing limit.
    """

    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        low, high = self.min_pixels, self.max_pixels
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_pixels {low} is above max_pixels {high}")
        return self

    def complete(self, default: PixelRange) -> PixelRange:
        """Return the range with a missing limit from `default`, moved if it contradicts."""
        low, high = self.min_pixels, self.max_pixels
        if low is None:
            low = min(default.min_pixels, high or default.min_pixels)
        return PixelRange(min_pixels=low, max_pixels=high or max(default.max_pixels, low))


class PixelRange(PixelLimits):
    """Image rule that resizes to a number of pixels within a range.

    The aspect ratio is kept. It is the rule of the published Qwen2-VL and newer models.
    """

    min_pixels: PositiveInt
    max_pixels: PositiveInt


class ExactSize(SettingsSection):
    """Image rule that resizes every image to one size, in multiples of the patch size."""

    height: SideLength
    width: SideLength


class LongestSide(SettingsSection):
    """Image rule that scales the longer side, and keeps the aspect ratio."""

    longest_side: SideLength


ImageRule = PixelRange | ExactSize | LongestSide
ImageSettings = PixelLimits | ExactSize | LongestSide
"""Section `image` of a recipe: an image rule that may lack a limit."""


TuneMode = Literal["frozen", "lora", "full"]

Device = Literal["auto", "cpu", "cuda"]

ParallelMode = Literal["ddp", "zero2", "fsdp", "fsdp_offload"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
VisionCacheMode = Literal["auto", "never", "memory", "disk"]


class LoraSettings(SettingsSection):
    """Section `tune.lora` of a recipe: LoRA adapters (Hu et al. 2021) with scale alpha / rank.

    `target_modules` restricts LoRA to linear layers with these names, such as `q_proj` (the last
    component of the published parameter name). The default is all linear layers.
    """

    rank: Annotated[int, Field(gt=0, le=65_536)] = 64
    alpha: Annotated[CoercedFloat, Field(gt=0.0, le=1e9)] = 16.0
    dropout: Annotated[CoercedFloat, Field(ge=0.0, lt=1.0)] = 0.05
    target_modules: Names[str] | None = None


QuantizablePart = Literal["vision", "merger", "language", "embeddings"]
"""Parts that NF4 can quantize; of the embeddings, only the output head: the rest is a lookup."""


Fp8Part = Literal["vision", "language"]
"""Parts of the model that FP8 can quantize, which have nearly all FLOPs of a step.

The merger has few FLOPs, and rounding errors of the output head would affect the loss directly.
"""


def _sort_parts(parts: tuple[QuantizablePart, ...]) -> tuple[QuantizablePart, ...]:
    """Sort the parts, so that their order in the recipe does not matter."""
    return tuple(part for part in get_args(QuantizablePart) if part in parts)


class QuantizeSettings(SettingsSection):
    """Section `tune.quantize` of a recipe: quantization of frozen linear layers, by part.

    NF4 weights use double quantization (Dettmers et al. 2023). FP8 uses FP8 matrix products
    (Micikevicius et al. 2022).
    """

    nf4: Annotated[Names[QuantizablePart], AfterValidator(_sort_parts)] | None = None
    fp8: Annotated[Names[Fp8Part], AfterValidator(_sort_parts)] | None = None


class TuneSettings(SettingsSection):
    """Section `tune` of a recipe: training mode of each model part, LoRA and quantization."""

    vision: TuneMode = "frozen"
    merger: TuneMode = "frozen"
    language: TuneMode = "lora"
    embeddings: Literal["frozen", "full"] = "frozen"
    lora: LoraSettings = LoraSettings()
    quantize: QuantizeSettings = QuantizeSettings()

    @model_validator(mode="after")
    def _check_modes(self) -> TuneSettings:
        modes = dict(self)
        nf4, fp8 = self.quantize.nf4 or (), self.quantize.fp8 or ()
        for part in (*nf4, *fp8):
            if modes[part] == "full":
                setting = "quantize.nf4" if part in nf4 else "quantize.fp8"
                allowed = "frozen" if part == "embeddings" else "lora or frozen"
                raise ValueError(
                    f"{part} is full and in {setting}, but quantized weights cannot be trained:"
                    f" set tune.{part} to {allowed}, or remove it from {setting}"
                )
        if both := [part for part in fp8 if part in nf4]:
            settings = "quantize.nf4 and in quantize.fp8"
            raise ValueError(f"{both[0]} is in {settings}: remove it from one of them")
        if not (self.has_mode("lora") or self.has_mode("full")):
            raise ValueError("every part is frozen: set at least one to lora or full")
        return self

    def has_mode(self, mode: TuneMode) -> bool:
        """Return whether at least one part of the model has this training mode."""
        return mode in (self.vision, self.merger, self.language, self.embeddings)


LearningRate = Annotated[CoercedFloat, Field(gt=0.0)]
Beta = Annotated[CoercedFloat, Field(ge=0.0, lt=1.0)]


class LearningRates(SettingsSection):
    """Learning rates by part of the model; `default` applies to parts without their own."""

    default: LearningRate = 1e-4
    vision: LearningRate | None = None
    merger: LearningRate | None = None
    language: LearningRate | None = None
    embeddings: LearningRate | None = None


def _as_learning_rates(value: object) -> object:
    return value if isinstance(value, dict | LearningRates) else {"default": value}


COMPONENT_ERROR = "component_error"
"""Type of the pydantic errors of plug-ins, whose context has the parts of a `UserError`."""


@contextmanager
def _report_component_errors() -> Iterator[None]:
    """Convert errors of plug-ins to those of pydantic, which have the line of the setting."""
    try:
        yield
    except UserError as error:
        raise _build_component_error(error) from error


def _build_component_error(error: UserError) -> PydanticCustomError:
    parts = {"expected": error.expected, "remedy": str(error.remedy)}
    what = f"{error.where}: {error.what}" if error.where else error.what
    return PydanticCustomError(COMPONENT_ERROR, "{what}", {"what": what, **parts})


TRAIN_COMPONENTS: Mapping[str, ComponentRegistry[Any]] = {
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
}
"""Registries of the components that may have a section of `train`, by the setting of the choice."""


def _check_other_kinds(registry: ComponentRegistry[Any], name: str) -> None:
    """Raise UserError if a component of another kind has the same section of `train`."""
    plugin = registry.find_plugin(name)
    for setting, other in TRAIN_COMPONENTS.items():
        if other is registry or name not in other:
            continue
        owner = other.find_plugin(name)
        owner_name = "finesight"
        remedy = "rename it in the package, or remove the package"
        if owner is not None:
            owner_name = f"{owner.package} {owner.version}"
            remedy = "rename it in the package, or remove one of both packages"
        raise UserError(
            f"{owner_name} has a component of the same name, for train.{setting}",
            where="" if plugin is None else plugin.describe(),
            expected="names that are unique among the components with a section of train",
            remedy=remedy,
        )


def _parse_component(setting: str, value: object) -> str:
    """Return the name of a component, which may be that of a plug-in."""
    registry = TRAIN_COMPONENTS[setting]
    if isinstance(value, str) and value in registry:
        with _report_component_errors():
            registry.check_name(value, {*TrainSettings.model_fields}, "train")
            if not registry.is_built_in(value):
                _check_other_kinds(registry, value)
            registry[value]  # a plug-in that cannot be imported
        return value
    *names, last = map(repr, registry)
    expected = f"{', '.join(names)} or {last}"
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})


class TrainSettings(SettingsSection):
    """Section `train` of a recipe: optimizer, schedule, batch sizes and parallelism.

    Attributes:
        objective: Name of an objective (`train/objectives/`). The default is supervised fine-tuning
            on data without pairs and labels.
        batch_size: Samples per optimizer step over all GPUs.
        pack_tokens: Token budget of one packed micro-batch. A longer sample has its own
            micro-batch, a much longer one is split over all ranks (context parallelism).
        vision_cache: Storage of the outputs of a frozen vision encoder.
        parallel: Replicated (DDP), or sharded over the ranks: gradients and optimizer state
            (ZeRO-2), or also weights (FSDP2), optionally with CPU offloading.
    """

    # Sections of components are extra settings, which `_validate_sections` checks.
    model_config = ConfigDict(extra="allow")

    objective: Annotated[str, BeforeValidator(partial(_parse_component, "objective"))] | None = None
    epochs: Annotated[CoercedFloat, Field(gt=0.0, le=1e6)] | None = None
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    pack_tokens: PositiveInt = 4096
    optimizer: Annotated[str, BeforeValidator(partial(_parse_component, "optimizer"))] = (
        DEFAULT_OPTIMIZER
    )
    learning_rate: Annotated[LearningRates, BeforeValidator(_as_learning_rates)] = LearningRates()
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: StepsOrFraction = 0.03
    weight_decay: Annotated[CoercedFloat, Field(ge=0.0)] = 0.0
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(as_tuple)] = (0.9, 0.999)
    max_grad_norm: Annotated[CoercedFloat, Field(gt=0.0)] | None = 1.0
    activation_checkpointing: bool | Fraction = False
    precision: Precision = "auto"
    device: Device = "auto"
    seed: Seed = 0
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    vision_cache: VisionCacheMode = "auto"
    parallel: ParallelMode = "ddp"
    save_every: StepsOrFraction | None = None
    keep_checkpoints: PositiveInt = 2

    # The first validator, so that the others see a train section with valid component sections.
    @model_validator(mode="wrap")
    @classmethod
    def _validate_sections(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate the section of each component by its settings, the others by pydantic."""
        if not isinstance(value, dict):
            return handler(value)
        fixed: dict[Any, Any] = {}
        sections: dict[str, SettingsSection] = {}
        errors: list[InitErrorDetails] = []
        for key, content in value.items():
            if key in cls.model_fields or not isinstance(key, str):
                fixed[key] = content
                continue
            try:
                registry = find_section_owner(key)
                if registry is None:
                    errors.append({"type": "extra_forbidden", "loc": (key,), "input": content})
                else:
                    sections[key] = _validate_section(registry, key, content)
            except ValidationError as error:
                errors += _list_errors(error, key)
            except UserError as error:
                kind = _build_component_error(error)
                errors.append({"type": kind, "loc": (key,), "input": content})
        try:
            train = handler(fixed)
        except ValidationError as error:
            errors += _list_errors(error)
        if errors:
            keys = [*cls.list_fields(), *value]
            # Errors of the section itself have no location.
            errors.sort(key=lambda error: _find_key(error["loc"][:1], keys))
            raise ValidationError.from_exception_data(cls.__name__, errors)
        with _report_component_errors():
            train._set_sections(sections)
        return train

    def _set_sections(self, given: Mapping[str, SettingsSection]) -> None:
        """Store the sections of the built-in components, and those given or chosen of plug-ins."""
        sections = self.__pydantic_extra__
        assert sections is not None, "no sections"
        names: list[str] = []
        chosen = [*given]
        for registry, component in self.components:
            names += [one.name for one in registry.list_built_in()]
            chosen.append(component.name)
        names += sorted({*chosen} - {*names})
        sections.clear()
        for name in names:
            found = find_section_owner(name)
            if found is not None:
                sections[name] = given.get(name) or found[name].settings()

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the settings as dictionary, with the sections behind `objective`."""
        content = handler(self)
        names = ("objective", *self.sections, *content)
        return {name: content[name] for name in names if name in content}

    @classmethod
    def list_fields(cls) -> dict[str, FieldInfo]:
        """Return the fields by name, with the sections of built-in components."""
        fields: dict[str, FieldInfo] = {}
        for name, field in cls.model_fields.items():
            fields[name] = field
            if name in TRAIN_COMPONENTS:
                for component in TRAIN_COMPONENTS[name].list_built_in():
                    if component.has_section:
                        fields[component.name] = _build_field(component)
        return fields

    @classmethod
    def find_field(cls, name: str) -> FieldInfo | None:
        """Return the field of a setting or of the section of a component, also of a plug-in."""
        field = cls.model_fields.get(name)
        if field is not None:
            return field
        try:
            registry = find_section_owner(name)
        except UserError:  # The validation of the recipe reports it.
            return None
        return None if registry is None else _build_field(registry[name])

    @model_validator(mode="after")
    def _check_duration(self) -> TrainSettings:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"epochs={self.epochs} and steps={self.steps} are both set: set one of them to null"
            )
        with _report_component_errors():
            component = self.component
            settings = component.settings_of(self)
            rule = component.check_settings
            problems = OBJECTIVES.list_problems(component.name, rule, settings)
        if problems:
            raise ValueError(join_problems(problems))
        return self

    def list_models(self) -> list[str]:
        """List the models and paths that the sections of components name."""
        models = []
        for name, settings in self.sections.items():
            if name in OBJECTIVES:
                models += OBJECTIVES[name].list_models(settings)
            else:
                models += [str(path) for path in iter_paths(settings)]
        return models

    @property
    def component(self) -> ObjectiveComponent[Any]:
        """Component of the objective."""
        return OBJECTIVES[self.objective or DEFAULT_OBJECTIVE]

    @property
    def optimizer_component(self) -> OptimizerComponent[Any]:
        """Component of the optimizer."""
        return OPTIMIZERS[self.optimizer]

    @property
    def components(self) -> Sequence[tuple[ComponentRegistry[Any], Component[Any]]]:
        """Components of the objective and the optimizer, with their registries."""
        return ((OBJECTIVES, self.component), (OPTIMIZERS, self.optimizer_component))

    @property
    def sections(self) -> Mapping[str, SettingsSection]:
        """Sections of components by name."""
        return MappingProxyType(self.__pydantic_extra__ or {})


def find_section_owner(name: object) -> ComponentRegistry[Any] | None:
    """Return the registry of the component with a section of this name; None for other names.

    Built-in components have precedence over plug-ins of another kind.

    Raises:
        UserError: A plug-in of this name cannot be imported, or several packages define it.
    """
    if not isinstance(name, str) or not is_component_name(name):
        return None
    registries = TRAIN_COMPONENTS.values()
    built_in = (one for one in registries if one.is_built_in(name))
    others = (one for one in registries if name in one)
    owner = next(chain(built_in, others), None)
    if owner is None or not owner[name].has_section:
        return None
    return owner


def _validate_section(
    registry: ComponentRegistry[Any], name: str, content: object
) -> SettingsSection:
    """Return the validated section of a component.

    Raises:
        ValidationError: Settings are invalid.
        UserError: A validator of a plug-in does not work.
    """
    validate = registry[name].settings.model_validate
    section: SettingsSection = registry.call(name, validate, content, passes=(ValidationError,))
    return section


def _build_field(component: Component[Any]) -> FieldInfo:
    return FieldInfo.from_annotated_attribute(component.settings, component.settings())


def _find_key(location: tuple[str | int, ...], keys: Sequence[object]) -> int:
    """Return the index of a key, which is text or a number in the location of its error."""
    for index, key in enumerate(keys):
        if location in ((key,), (str(key),)):
            return index
    return len(keys)


def _list_errors(error: ValidationError, *section: str) -> Iterator[InitErrorDetails]:
    """Yield the errors of a validation again, at locations in a section."""
    for one in error.errors(include_url=False):
        # The message is formatted, and its type may be an own one.
        kind = PydanticCustomError(one["type"], one["msg"], one.get("ctx"))
        yield {"type": kind, "loc": (*section, *one["loc"]), "input": one["input"]}


PYTHON_PREFIX = "python:"
"""Prefix of the name of a metric or reward that is a function of the running Python program."""

_FILE_FUNCTION = re.compile(r"\.py:[A-Za-z_]\w*$")


def _is_function(value: str) -> bool:
    """Return whether a name is that of a function in a file or of the running program."""
    if value.startswith(PYTHON_PREFIX):
        return value.removeprefix(PYTHON_PREFIX).isidentifier()
    return _FILE_FUNCTION.search(value) is not None


def _check_name(names: Registry[Any], value: object, or_: str = "") -> str:
    """Return the name of a built-in object, or of a plug-in without import.

    With `or_`, a function in a Python file or of the running program is valid, too.
    """
    if or_ and isinstance(value, str) and _is_function(value):
        return value
    if isinstance(value, str) and value in names:
        names.find_plugin(value)
        return value
    expected = f"{', '.join(map(repr, names))}{or_}"
    raise PydanticCustomError("literal_error", "not one of {expected}", {"expected": expected})


_OR_FUNCTION = " or a function in a Python file, such as metric.py:score"
MetricSpec = Annotated[str, BeforeValidator(partial(_check_name, METRICS, or_=_OR_FUNCTION))]
"""A task metric, or a function in a Python file, as `path/to/metric.py:function`."""

MetricName = Annotated[str, BeforeValidator(partial(_check_name, METRICS))]


EVAL_BATCH_SIZE = 32
"""Answers that an evaluation generates at the same time; halved when GPU memory is exhausted."""


class EvalSettings(SettingsSection):
    """Section `eval` of a recipe: evaluation by generation on validation samples.

    The model is evaluated before the first and after the last step.

    `every` is the interval of evaluations during training. By default, there are about five
    evaluations after the start of training, at least ten steps apart. Evaluations are then compared
    on a random subset of 64 samples. `every: 0` disables interim evaluations. `patience` stops the
    run after this number of evaluations without improvement of the primary metric; the run then
    keeps the weights of the best evaluation.
    """

    metric: MetricSpec
    every: StepsOrFraction | None = None
    patience: PositiveInt | None = None
    limit: PositiveInt | None = None
    max_new_tokens: Annotated[int, Field(gt=0, le=1_048_576)] = 512

    @model_validator(mode="after")
    def _check_patience(self) -> EvalSettings:
        if self.patience is not None and self.every is None:
            reason = "because default evaluations use 64 samples: add eval.every=0.1"
            raise ValueError(f"eval.patience requires an explicit eval.every, {reason}")
        return self


def _check_reward(value: object) -> str:
    name = value.partition(".")[0] if isinstance(value, str) else value
    if isinstance(name, str) and name in METRICS and not str(value).endswith("."):
        _check_name(METRICS, name)
        return str(value)
    or_ = f", {', '.join(map(repr, METRICS))}, a score of these, such as grounding.iou,"
    return _check_name(REWARDS, value, f"{or_} or a function such as rewards.py:score")


def _find_reward(value: object) -> RewardComponent[Any] | None:
    """Return the component of an item of `rewards`; None for metrics and functions.

    Raises:
        UserError: Several packages define the reward.
    """
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    if not isinstance(name, str) or name not in REWARDS:
        return None
    plugin = REWARDS.find_plugin(name)
    with _report_component_errors():
        component = REWARDS[name]
        if plugin is not None:
            _check_plugin_options(component, value)
    return component


@cache
def _build_reward_form(settings: type[RewardSettings]) -> type[RewardSettings]:
    """Return the settings of a reward with the options of all built-in ones.

    In recipes of runs, options of other rewards are null. They have types in other recipes, too,
    and their names are suggested for misspelled ones.
    """
    fields: dict[str, Any] = {}
    for name, field in settings.list_fields().items():
        if name not in RewardSettings.model_fields:
            fields[name] = field.annotation, field
    fields["name"] = Annotated[str, BeforeValidator(_check_reward)], ...
    return create_model("RewardSettings", __base__=RewardSettings, **fields)


def _validate_reward(
    component: RewardComponent[Any] | None, settings: type[RewardSettings], content: object
) -> RewardSettings:
    """Return validated settings of a reward, in which validators of a plug-in may not work."""
    if component is None:
        return settings.model_validate(content)
    validate = settings.model_validate
    with _report_component_errors():
        return REWARDS.call(component.name, validate, content, passes=(ValidationError,))


def _check_plugin_options(component: RewardComponent[Any], content: Mapping[str, object]) -> None:
    """Verify the settings of a reward of a plug-in, which the list of all settings lacks.

    Raises:
        UserError: The reward has no such setting.
    """
    for name in content:
        if name not in component.settings.list_fields():
            known = [*component.settings.model_fields]
            raise UserError(
                f"the reward {component.name} has no setting {name!r:.80}",
                expected=f"one of {', '.join(known)}",
                remedy=suggest_name(str(name), known, "remove it or correct its name"),
            )


def parse_reward(value: object) -> RewardSettings:
    """Return an item of `rewards`, with the settings of the reward that it names.

    Raises:
        ValueError: Settings are invalid, or are options of another reward.
        UserError: Several packages define the reward.
    """
    if isinstance(value, RewardSettings):
        return value
    component = _find_reward(value)
    settings: type[RewardSettings] = RewardSettings
    if component is not None:
        settings = component.settings
    form = _validate_reward(component, _build_reward_form(settings), value)
    assert isinstance(value, dict), "no section"
    given = {name: content for name, content in value.items() if name in settings.model_fields}
    reward = None
    for one in REWARDS.list_built_in():
        if one is component:
            reward = _validate_reward(component, settings, given)
            continue
        others = [option for option in one.options if option not in settings.model_fields]
        unused = [option for option in others if dict(form)[option] is not None]
        if unused:
            raise ValueError(f"the reward {form.name} does not use {' or '.join(unused)}")
    if reward is None:
        reward = _validate_reward(component, settings, given)
    return reward


def _list_reward_problems(reward: RewardSettings, recipe: Recipe) -> Sequence[SettingProblem]:
    """List the contradictions between a reward and other settings of a recipe."""
    component = REWARDS.get(reward.name)
    if component is None:
        return ()
    return REWARDS.list_problems(component.name, component.check, reward, recipe)


RewardList = Annotated[
    tuple[Annotated[RewardSettings, PlainValidator(parse_reward), SerializeAsAny()], ...],
    BeforeValidator(partial(_as_sections, "name")),
]


def _check_tracker(value: object) -> str:
    with _report_component_errors():
        require_track_package()
    return _check_name(TRACKERS, value)


TrackerKind = Annotated[str, BeforeValidator(_check_tracker)]

MAX_RUN_NAME_CHARS = 100
"""Maximum number of characters of a run name, which all trackers accept."""

MAX_RUN_DESCRIPTION_CHARS = 1024
"""Maximum number of characters of the description of a run, which all trackers accept."""


def _as_json(value: object) -> object:
    """Convert values of YAML that JSON does not have, such as dates, to text."""
    try:
        return json.loads(json.dumps(value, default=str, allow_nan=False))
    except (TypeError, ValueError) as error:
        remedy = "use texts as keys, and texts and finite numbers as values"
        raise ValueError(f"not a JSON object ({error}): {remedy}") from error


class TrackerSettings(SettingsSection):
    """An item of `track` in a recipe: tracker package, project and server URI.

    Trackers receive the metrics in addition to `metrics.jsonl`.

    Attributes:
        run_name: Name of the run in the tracker; None for the name of the run folder.
        description: Notes on the run.
        config: Values of the user, shown beside the settings of the run.
    """

    kind: TrackerKind
    project: Annotated[str, Field(min_length=1)] = "finesight"
    run_name: Annotated[str, Field(min_length=1, max_length=MAX_RUN_NAME_CHARS)] | None = None
    description: (
        Annotated[str, Field(min_length=1, max_length=MAX_RUN_DESCRIPTION_CHARS)] | None
    ) = None
    config: Annotated[dict[str, Any], BeforeValidator(_as_json)] | None = None
    # The search for credentials takes quadratic time.
    uri: Annotated[str, Field(min_length=1, max_length=2000)] | None = None

    @model_validator(mode="after")
    def _check_uri(self) -> TrackerSettings:
        if self.uri is None:
            needs_uri = False
            with suppress(UserError):  # Training reports a tracker that cannot be imported.
                needs_uri = TRACKERS[self.kind].needs_uri
            if needs_uri:
                raise ValueError(f"{self.kind} needs uri: add it to the item of track")
            return self
        with _report_component_errors():
            problem = TRACKERS.call(self.kind, TRACKERS[self.kind].find_uri_problem, self.uri)
            if not isinstance(problem, str | None):
                text = f"returns {problem!r:.60} instead of a text"
                rule = TRACKERS[self.kind].check_uri
                raise TRACKERS.build_call_error(self.kind, rule, text)
        if problem is not None:
            remedy = "" if ": " in problem else ": change uri of the item of track"
            raise ValueError(f"{problem}{remedy}")
        if _SECRET_PATTERN.search(self.uri):
            raise ValueError(
                f"uri of {self.kind} contains a password or token, which would be saved"
                " in the run: remove it and set it in the environment of the package"
            )
        return self


_SECRET_PATTERN = re.compile("(?i)://[^/]*@|[?&][^=&]*(?:key|token|secret|sig|pass)[^=&]*=")
"""Pattern of credentials in a URL: user information before the host, or a secret parameter."""


def _check_unique(trackers: tuple[TrackerSettings, ...]) -> tuple[TrackerSettings, ...]:
    kinds = [tracker.kind for tracker in trackers]
    if duplicates := [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) > 1]:
        raise ValueError(f"{duplicates[0]} is duplicated: list each tracker once")
    return trackers


TrackerList = Annotated[
    tuple[TrackerSettings, ...],
    BeforeValidator(partial(_as_sections, "kind")),
    AfterValidator(_check_unique),
]


class Recipe(SettingsSection):
    """Settings of one run, as in the YAML file of a recipe."""

    model: str
    adapter: ExpandedPath | None = None
    data: DataSettings
    image: ImageSettings | None = None
    tune: TuneSettings = TuneSettings()
    train: TrainSettings = TrainSettings()
    rewards: RewardList = ()
    eval: EvalSettings | None = None
    track: TrackerList = ()
    output_dir: ExpandedPath

    @model_validator(mode="after")
    def _check_augmentation(self) -> Self:
        if self.data.augment is None:
            return self
        if not self._parse_needs().supports_augmentation:
            problem = f"data.augment does not support train.objective={self.train.objective}"
            raise ValueError(f"{problem}: set it to null, or train.objective to sft")
        if (mode := self.train.vision_cache) in ("memory", "disk"):
            problem = "data.augment changes the images of every step"
            remedy = "set train.vision_cache to auto, or data.augment to null"
            raise ValueError(f"{problem}, but train.vision_cache={mode} keeps features: {remedy}")
        return self

    @model_validator(mode="after")
    def _check_needs(self) -> Self:
        needs_rewards = self._parse_needs().rewards
        if self.rewards and not needs_rewards:
            choices = " or ".join(f"train.objective={name}" for name in list_reward_objectives())
            raise ValueError(f"rewards require {choices}: add it, or remove rewards")
        if needs_rewards and not self.rewards:
            problem = f"train.objective={self.train.objective} requires rewards"
            example = REWARDS.list_built_in()[0].name
            raise ValueError(f"{problem}: add rewards=[{example}] or others")
        contradictions: list[SettingProblem] = []
        with _report_component_errors():
            for registry, component in self.train.components:
                settings = component.settings_of(self.train)
                name = component.name
                contradictions += registry.list_problems(name, component.check, settings, self)
            for reward in self.rewards:
                contradictions += _list_reward_problems(reward, self)
        if contradictions:
            raise ValueError(join_problems(contradictions))
        return self

    def _parse_needs(self) -> Needs:
        """Return the needs while the recipe is validated."""
        with _report_component_errors():
            return self.needs

    @property
    def needs(self) -> Needs:
        """Needs of the objective."""
        return get_needs(self)
