"""Configuration of an ms-swift or LLaMA-Factory training, with typed access to its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from finesight.errors import UserError
from finesight.recipe import load_trainer_settings

SourceProgram = Literal["ms-swift", "LLaMA-Factory"]

MAX_VALUE_LENGTH = 4096
"""Maximum number of characters of a formatted value."""

_TRUE_WORDS = {"true", "yes", "on", "1", "t", "y"}
_FALSE_WORDS = {"false", "no", "off", "0", "f", "n"}


@dataclass(frozen=True)
class SettingRule:
    """Rule for a setting that recipes do not have.

    Attributes:
        reason: Text for the user.
        is_ignored: Whether the setting does not affect the trained model.
        equivalent_values: Values of an unsupported setting that match the behavior of finesight.
    """

    reason: str
    is_ignored: bool
    equivalent_values: tuple[object, ...] = ()


@dataclass(frozen=True)
class ProgramRules:
    """Rules for settings: defaults, current names of renamed settings, those that a converter
    reads, and rules for all others."""

    defaults: Mapping[str, object]
    aliases: Mapping[str, str]
    converted: frozenset[str]
    other: Mapping[str, SettingRule]


@cache
def load_rules(program: SourceProgram) -> ProgramRules:
    """Load the rules of a program, including those of the transformers Trainer."""
    content = load_trainer_settings()
    other: dict[str, SettingRule] = {}
    converted: set[str] = set()
    for section in (content["transformers"], content[program]):
        for group in (*section["ignored"], *section["unsupported"]):
            is_ignored = group in section["ignored"]
            rule = SettingRule(group["reason"], is_ignored, tuple(group.get("equivalent", ())))
            other |= dict.fromkeys(group["keys"].split(), rule)
            converted -= set(group["keys"].split())
        converted |= set(section["converted"].split())
        other = {key: rule for key, rule in other.items() if key not in converted}
    own = content[program]
    return ProgramRules(own["defaults"], own["aliases"], frozenset(converted), other)


@dataclass(frozen=True)
class ConversionNote:
    """Note for the user about one setting.

    `value` is the value as written, empty if the setting is not set.
    """

    kind: Literal["differs", "unknown", "note", "ignored"]
    key: str
    value: str
    text: str


@dataclass(frozen=True)
class ExternalConfig:
    """Configuration of an ms-swift or LLaMA-Factory training.

    Methods that read a setting raise UserError for values of another type.

    Attributes:
        where: File of the configuration, for messages.
        values: Settings by name, as written.
        environment: Environment variables of the training.
        is_recorded: Whether ms-swift wrote the file (args.json of a run), so that `values` contains
            all settings.
        extra_notes: Notes about other content of the file, such as further commands of a script.
    """

    program: SourceProgram
    where: str
    values: Mapping[str, object]
    environment: Mapping[str, str]
    is_recorded: bool = False
    extra_notes: tuple[ConversionNote, ...] = ()

    def has(self, *keys: str) -> bool:
        """Return whether the configuration sets one of the settings to a value other than null."""
        return any(not is_empty(self.values.get(key)) for key in keys)

    def get_value(self, key: str) -> object:
        """Return the value of a setting as written, else the default of the program."""
        return self.values[key] if self.has(key) else load_rules(self.program).defaults.get(key)

    def get_str(self, key: str) -> str | None:
        """Return a setting as text, or None if it has no value."""
        value = self.get_value(key)
        return None if is_empty(value) else format_value(value)

    def get_bool(self, key: str) -> bool:
        """Return a setting as a bool, False if it has no value."""
        text = (self.get_str(key) or "false").lower()
        if text in _TRUE_WORDS | _FALSE_WORDS:
            return text in _TRUE_WORDS
        raise self.build_error(key, "true or false")

    def get_float(self, key: str) -> float | None:
        """Return a setting as a finite number, or None if it has no value."""
        value = self.get_value(key)
        if is_empty(value):
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(str(value).replace("_", ""))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.build_error(key, "a number")
        return number

    def get_int(self, key: str) -> int | None:
        """Return a setting as an integer, or None if it has no value."""
        number = self.get_float(key)
        if number is not None and not number.is_integer():
            raise self.build_error(key, "an integer")
        return None if number is None else int(number)

    def get_list(self, key: str) -> tuple[str, ...]:
        """Return a setting as a list of texts, empty if it has no value.

        LLaMA-Factory separates items by commas. A text of ms-swift is one item.
        """
        value = self.get_value(key)
        if is_empty(value):
            return ()
        if isinstance(value, list | tuple):
            return tuple(format_value(item) for item in value)
        parts = str(value).split(",") if self.program == "LLaMA-Factory" else [str(value)]
        return tuple(part.strip() for part in parts if part.strip())

    def get_env_int(self, name: str) -> int | None:
        """Return an environment variable of the training as an integer, None if it is not set."""
        text = self.environment.get(name, "").strip()
        if not text:
            return None
        if not text.isdecimal() or len(text) > 18:
            raise UserError(
                f"the variable {name} is {text!r}",
                where=self.where,
                expected="an integer",
                remedy=f"set {name} to its value",
            )
        return int(text)

    def is_env_enabled(self, variable: str) -> bool:
        """Return whether an environment variable of the training is 1 or true."""
        return self.environment.get(variable, "0").lower() in ("1", "true")

    def default_comment(self, *keys: str) -> str:
        """Return the recipe comment of a default value; empty if a setting is set."""
        return "" if self.has(*keys) else f"{self.program}'s default"

    def build_error(self, key: str, expected: str) -> UserError:
        """Build the error for the invalid value of a setting."""
        return UserError(
            f"{key} is {format_value(self.get_value(key))!r}",
            where=self.where,
            expected=expected,
            remedy=f"correct {key}",
        )


def is_empty(value: object) -> bool:
    """Return whether a value stands for None in YAML, JSON or command-line options."""
    return value is None or value in ([], {}, "") or str(value).strip() in ("null", "None")


def format_value(value: object) -> str:
    """Format a value on one line of at most MAX_VALUE_LENGTH characters."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    line = " ".join(text.split())
    return line if len(line) <= MAX_VALUE_LENGTH else f"{line[: MAX_VALUE_LENGTH - 3]}..."
