"""Configuration of a training with another program: settings, rules and model family."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pydantic import FiniteFloat, TypeAdapter

from finesight.errors import UserError, shorten
from finesight.family_components import FAMILIES, TrainerModels
from finesight.files.bounded_files import read_json_object
from finesight.objective_components import OBJECTIVES
from finesight.settings.recipe import invert_groups, load_trainer_settings

SourceProgram = Literal[
    "ms-swift",
    "LLaMA-Factory",
    "Transformers",
    "TRL",
    "Unsloth",
    "Qwen-VL",
    "Qwen-VL-Series-Finetune",
]
PARTS = ("vision", "merger", "language")

UNKNOWN_COUNT = "unknown"
"""Value of NPROC_PER_NODE if a launcher determines the number of processes at run time."""

CONVERTED_VARIABLES = {
    "MAX_PIXELS",
    "MIN_PIXELS",
    "IMAGE_MAX_TOKEN_NUM",
    "IMAGE_MIN_TOKEN_NUM",
    "USE_HF",
    "NPROC_PER_NODE",
    "NNODES",
    "CUDA_VISIBLE_DEVICES",
    "USE_MODELSCOPE_HUB",
}
"""Environment variables that the converters read; others are only reported."""

ValueT = TypeVar("ValueT", bool, int, float)


class SettingRule(NamedTuple):
    """Rule for a setting that recipes do not have: a text, and whether the setting has no effect.

    `equivalent_values` of an unsupported setting match the behavior of finesight.
    """

    reason: str
    is_ignored: bool
    equivalent_values: tuple[str, ...] = ()


class ProgramRules(NamedTuple):
    """Rules for settings: defaults, current names of renamed settings, those that a converter
    reads, and rules for all others."""

    defaults: Mapping[str, object]
    aliases: Mapping[str, str]
    converted: frozenset[str]
    other: Mapping[str, SettingRule]

    def find(self, key: str) -> SettingRule | None:
        """Return the rule for a setting, or that for its prefix, such as `galore_*`."""
        if key in self.converted:
            return None
        prefixes = (name for name in self.other if name[-1] == "*" and key.startswith(name[:-1]))
        return self.other.get(key) or self.other.get(next(prefixes, ""))


@cache
def map_objective_methods() -> dict[str, str]:
    """Map the training methods of other programs to objectives of recipes."""
    objectives: dict[str, str] = {}
    for component in OBJECTIVES.list_available():
        objectives |= dict.fromkeys((component.name, *component.methods), component.name)
    return objectives


@cache
def load_rules(program: SourceProgram | Literal["accelerate"], method: str = "") -> ProgramRules:
    """Load the rules of a program, with those of the transformers Trainer and of a method.

    Those of accelerate are the rules for its own configuration file.
    """
    content = load_trainer_settings()
    rules: dict[str, SettingRule | None] = {}
    own = content[program]
    sections = [own]
    if program != "accelerate":
        objective = map_objective_methods().get(method, "")
        sections = [content["transformers"], own, content["objective_rules"].get(objective, {})]
    for section in sections:
        for kind in ("ignored", "unsupported"):
            for reason, items in section.get(kind, {}).items():
                for key, _, values in (item.partition("=") for item in items.split()):
                    equivalent = tuple(filter(None, values.split("|")))
                    rules[key] = SettingRule(reason, kind == "ignored", equivalent)
        read_keys = section.get("defaults", ()), section.get("aliases", ())
        rules |= dict.fromkeys([*section.get("converted", "").split(), *chain(*read_keys)])
    converted = frozenset(key for key, rule in rules.items() if rule is None)
    other = {key: rule for key, rule in rules.items() if rule is not None}
    defaults = content["transformers"]["defaults"] | own["defaults"]
    defaults |= content["method_defaults"].get(own.get("trainer"), {}).get(method, {})
    return ProgramRules(defaults, invert_groups(own["aliases"]), converted, other)


NoteKind = Literal["differs", "unknown", "note", "ignored"]


@dataclass(frozen=True)
class ConversionNote:
    """Note for the user about one setting, with its value as written."""

    kind: NoteKind
    key: str
    value: str
    text: str


@dataclass(frozen=True)
class ExternalConfig:
    """Configuration of a training with another program.

    `is_recorded` is True for the args.json of an ms-swift run, which contains all settings.
    `unresolved` are expressions of a Python script for settings without a constant value, and
    `notes` report its code. `launcher` has the settings of accelerate. `method` is the training
    method, if it is known. Methods that read a setting raise UserError for values of another type.
    """

    program: SourceProgram
    where: str
    values: Mapping[str, object]
    environment: Mapping[str, str]
    is_recorded: bool = False
    unresolved: Mapping[str, str] = field(default_factory=dict)
    method: str = ""
    launcher: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[ConversionNote, ...] = ()

    @property
    def rules(self) -> ProgramRules:
        """Rules of the program for this training method."""
        return load_rules(self.program, self.method)

    def has(self, *keys: str) -> bool:
        """Return whether the configuration sets one of the settings to a value other than null."""
        return any(not is_empty(self.values.get(key)) for key in keys)

    def get_value(self, key: str) -> object:
        """Return a setting or environment variable as written, else the default of the program."""
        given = self.environment.get(key, self.values.get(key))
        return self.rules.defaults.get(key) if is_empty(given) else given

    def get_str(self, key: str) -> str | None:
        """Return a setting as text, or None if it has no value."""
        value = self.get_value(key)
        return None if is_empty(value) else format_value(value)

    def _parse(self, key: str, kind: type[ValueT], expected: str) -> ValueT | None:
        value = self.get_value(key)
        try:
            if isinstance(value, bool) and kind is not bool:
                raise ValueError(f"{value} is no number")
            return None if is_empty(value) else TypeAdapter(kind).validate_python(value)
        except ValueError as error:
            raise self.build_error(key, expected) from error

    def get_bool(self, key: str) -> bool:
        """Return a setting as a bool, False if it has no value."""
        return self._parse(key, bool, "true or false") or False

    def get_float(self, key: str) -> float | None:
        """Return a setting as a finite number, or None if it has no value."""
        return self._parse(key, FiniteFloat, "a number")

    def get_int(self, key: str) -> int | None:
        """Return a setting as an integer, or None if it has no value."""
        return self._parse(key, int, "an integer")

    def get_list(self, key: str) -> tuple[str, ...]:
        """Return a setting as a list of texts, empty if it has no value.

        LLaMA-Factory separates items by commas. A text of another program is one item, or a list
        in brackets.
        """
        value = self.get_value(key)
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            value = [item.strip(" '\"") for item in value[1:-1].split(",")]
        items: Sequence[object] = [value]
        if isinstance(value, list | tuple):
            items = value
        elif self.program == "LLaMA-Factory" and isinstance(value, str):
            items = value.split(",")
        elif is_empty(value):
            items = []
        return tuple(filter(None, (format_value(item).strip() for item in items)))

    def default_comment(self, *keys: str) -> str:
        """Return the recipe comment of a default value; empty if a setting is set."""
        if self.has(*keys):
            return ""
        owner = f"{self.program}'" if self.program.endswith("s") else f"{self.program}'s"
        return f"{owner} default"

    def build_error(self, key: str, expected: str) -> UserError:
        """Build the error for the invalid value of a setting."""
        what = f"{key} is {format_value(self.get_value(key))!r}"
        return UserError(what, where=self.where, expected=expected, remedy=f"correct {key}")


def build_external_config(
    program: SourceProgram,
    content: Mapping[str, object],
    path: Path,
    environment: Mapping[str, str],
    launcher: Mapping[str, object] | None = None,
) -> ExternalConfig:
    """Build a configuration from named settings, whose former names become the current ones."""
    aliases = load_rules(program).aliases
    values = {aliases.get(key, key): value for key, value in content.items()}
    file_environment = values.pop("env" if program == "TRL" else "ENV", None)
    variables = dict(environment)
    if isinstance(file_environment, Mapping):
        # Variables set outside take precedence.
        variables = {str(k): str(v) for k, v in file_environment.items()} | variables
    is_recorded = program == "ms-swift" and "swift_version" in values
    return ExternalConfig(
        program, str(path), values, variables, is_recorded, launcher=launcher or {}
    )


def is_empty(value: object) -> bool:
    """Return whether a value stands for None in YAML, JSON or command-line options."""
    return value is None or value in ([], {}, "") or str(value).strip() in ("null", "None")


def format_value(value: object) -> str:
    """Format a value on one line of at most 4096 characters."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return shorten(" ".join(text.split()), 4096)


class FamilySettings(NamedTuple):
    """Properties of a model family that determine recipe settings.

    `token_size` is the side of the image area of one token in pixels, 0 for a fixed image size.
    `layers` are the last name components of the linear layers, by part of the model.
    """

    name: str
    token_size: int
    min_pixels: int
    max_length: int
    layers: Mapping[str, Sequence[str]]


def detect_family(model: str, hints: tuple[str | None, ...], where: str) -> FamilySettings:
    """Detect the model family from config.json, else from the name of the model, else from hints.

    Hints are the model type and template settings of the configuration.

    Other vision-language models have the family `other`: finesight trains them on the transformers
    backend.

    Raises UserError if the model is not known to be a vision-language model.
    """
    what = f"cannot determine whether {model!r} is a vision-language model"
    families, found = _load_families(), None
    by_hint: dict[str, str] = {}
    for key, entry in families.items():
        for name in entry.names:
            by_hint.setdefault(name, key)
    by_type = by_hint | {key: key for key in families}
    model_type = _read_model_type(Path(model).expanduser(), by_type) if model else None
    if model_type is not None:
        found, what = by_type.get(model_type), f"{model} has the model type {model_type}"
    elif model:
        # The patterns take quadratic time.
        name = re.sub(r"[_ ]", "-", model.rstrip("/").rpartition("/")[2].lower())[:1000]
        starts: dict[str, tuple[int, int]] = {}
        for key, entry in families.items():
            match = re.search(entry.pattern, name)
            if match is not None:
                starts[key] = _rank_family(key), match.start()
        if starts:
            # The name may contain that of another model, as in x-vl-distilled-from-y-vl.
            found = min(starts, key=lambda key: starts[key])
        else:
            found = next((by_hint[hint] for hint in hints if hint in by_hint), None)
    if found is None:
        raise UserError(
            what if model else "the configuration has no model",
            where=where,
            expected="a Qwen vision-language model, or another one that transformers contains",
            remedy="use the name on its hub, or run this command where the model folder exists",
        )
    entry = families[found]
    layers = {"vision": entry.vision, "merger": entry.merger, "language": entry.language}
    return FamilySettings(found, entry.token_size, entry.min_pixels, entry.max_length, layers)


def _rank_family(name: str) -> int:
    """Return the precedence of a family: built-in, of a plug-in, or `other` with general words."""
    if FAMILIES.is_built_in(name):
        return 0
    if name in FAMILIES:
        return 1
    return 2


def _load_families() -> dict[str, TrainerModels]:
    """Load the models of native families by name, then those of the family `other`."""
    families: dict[str, TrainerModels] = {}
    for component in FAMILIES.list_available():
        if component.trainer_models is not None:
            families[component.name] = component.trainer_models
    others = dict(load_trainer_settings()["other_models"])
    for key in ("names", "vision", "merger", "language"):
        others[key] = tuple(others[key].split())
    families["other"] = TrainerModels(**others)
    return families


def _read_model_type(folder: Path, known_types: Container[str]) -> str | None:
    """Return `model_type` of config.json in a folder, or None if the file cannot be read.

    Unknown vision-language models have the type `other`.
    """
    try:
        content = read_json_object(folder / "config.json")
    except UserError:
        return None
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        return "other" if "vision_config" in content else None
    models = FAMILIES.describe(model_type).trainer_models
    if models is not None and models.required_key and models.required_key not in content:
        return f"{model_type} without a vision encoder"
    if "vision_config" in content and model_type not in known_types:
        return "other"
    return model_type
