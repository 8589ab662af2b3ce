"""Configuration of an ms-swift or LLaMA-Factory training, with typed access to its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finesight.convert.setting_rules import ConversionNote
from finesight.convert.shell_parser import has_variable
from finesight.errors import UserError

SourceProgram = Literal["ms-swift", "LLaMA-Factory"]

_TRUE_WORDS = {"true", "yes", "on", "1", "t", "y"}
_FALSE_WORDS = {"false", "no", "off", "0", "f", "n"}


@dataclass(frozen=True)
class ExternalConfig:
    """Configuration of an ms-swift or LLaMA-Factory training.

    Attributes:
        program: Program that the configuration is written for.
        where: File of the configuration, for messages.
        values: Settings by name, as written.
        defaults: Default values of the program, for settings that are not in `values`.
        environment: Environment variables of the training.
        is_recorded: Whether ms-swift wrote the file (args.json of a run), so that `values` contains
            all settings.
        extra_notes: Notes about other content of the file, such as further commands of a script.
    """

    program: SourceProgram
    where: str
    values: Mapping[str, object]
    defaults: Mapping[str, object]
    environment: Mapping[str, str]
    is_recorded: bool = False
    extra_notes: tuple[ConversionNote, ...] = ()

    @property
    def is_script(self) -> bool:
        """True if the configuration is a shell script, whose values may contain variables."""
        return not self.where.endswith((".yaml", ".yml", ".json"))

    def has(self, key: str) -> bool:
        """Return whether the configuration sets a setting to a value other than null."""
        return not is_empty(self.values.get(key))

    def get_value(self, key: str) -> object:
        """Return the value of a setting as written, else the default of the program."""
        return self.values[key] if self.has(key) else self.defaults.get(key)

    def get_str(self, key: str) -> str | None:
        """Return a setting as text, or None if it has no value."""
        value = self.get_value(key)
        return None if is_empty(value) else format_value(value)

    def get_bool(self, key: str) -> bool:
        """Return a setting as a bool, False if it has no value.

        Raises UserError for other text than true and false.
        """
        value = self.get_value(key)
        if is_empty(value):
            return False
        text = str(value).strip().lower()
        if text in _TRUE_WORDS | _FALSE_WORDS:
            return text in _TRUE_WORDS
        raise self.build_error(key, "true or false")

    def get_float(self, key: str) -> float | None:
        """Return a setting as a finite number, or None if it has no value.

        Raises UserError for other values.
        """
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
        """Return a setting as an integer, or None if it has no value.

        Raises UserError for other values.
        """
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
        is_comma_separated = self.program == "LLaMA-Factory"
        parts = str(value).split(",") if is_comma_separated else [str(value)]
        return tuple(part.strip() for part in parts if part.strip())

    def get_env_int(self, name: str) -> int | None:
        """Return an environment variable of the training as an integer.

        Returns None if it is not set. Raises UserError for other values.
        """
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

    def is_any_set(self, *keys: str) -> bool:
        """Return whether the configuration sets at least one of the settings."""
        return any(self.has(key) for key in keys)

    def default_comment(self, *keys: str) -> str:
        """Return the recipe comment of a default value; empty if a setting is set."""
        return "" if self.is_any_set(*keys) else f"{self.program}'s default"

    def build_error(self, key: str, expected: str) -> UserError:
        """Build the error for the invalid value of a setting."""
        value = self.get_value(key)
        is_unresolved = self.is_script and has_variable(value)
        return UserError(
            f"{key} is {format_value(value)!r}",
            where=self.where,
            expected=expected,
            remedy=f"replace {key} with its value in a copy of the script"
            if is_unresolved
            else f"correct {key}",
        )


def is_empty(value: object) -> bool:
    """Return whether a value stands for None in YAML, JSON or command-line options."""
    return value is None or value in ([], {}, "") or str(value).strip() in ("null", "None")


def format_value(value: object) -> str:
    """Format a value on one line of at most MAX_VALUE_LENGTH characters."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    line = " ".join(text.split())
    return line if len(line) <= MAX_VALUE_LENGTH else f"{line[: MAX_VALUE_LENGTH - 3]}..."


MAX_VALUE_LENGTH = 4096
"""Maximum number of characters of a formatted value."""
