"""The settings that another program was given, read by the kind of value that each one is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finesight.convert.rules import Remark
from finesight.convert.shell import is_open
from finesight.errors import UserError

Program = Literal["ms-swift", "LLaMA-Factory"]

_TRUE = {"true", "yes", "on", "1", "t", "y"}
_FALSE = {"false", "no", "off", "0", "f", "n"}


@dataclass(frozen=True)
class Given:
    """A configuration: `values` as they were written, `defaults` the program's own, `environment`
    the variables that were set for it.

    `finished`: it was recorded by a run, with each default. `aside`: what else is in the file.
    """

    program: Program
    where: str
    values: Mapping[str, object]
    defaults: Mapping[str, object]
    environment: Mapping[str, str]
    finished: bool = False
    aside: tuple[Remark, ...] = ()

    @property
    def scripted(self) -> bool:
        """Whether a shell script was read, in whose values variables may be left."""
        return not self.where.endswith((".yaml", ".yml", ".json"))

    def has(self, key: str) -> bool:
        """Whether it was written, and as more than nothing."""
        return not is_nothing(self.values.get(key))

    def value(self, key: str) -> object:
        """As it was written, else the program's default."""
        return self.values[key] if self.has(key) else self.defaults.get(key)

    def text(self, key: str) -> str | None:
        """As text; None where there is none."""
        value = self.value(key)
        return None if is_nothing(value) else shown(value)

    def flag(self, key: str) -> bool:
        """As true or false; none is false. Raises UserError for what is neither."""
        value = self.value(key)
        if is_nothing(value):
            return False
        word = str(value).strip().lower()
        if word in _TRUE | _FALSE:
            return word in _TRUE
        raise self.refused(key, "true or false")

    def number(self, key: str) -> float | None:
        """As a finite number; None where there is none. Raises UserError for anything else."""
        value = self.value(key)
        if is_nothing(value):
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(str(value).replace("_", ""))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.refused(key, "a number")
        return number

    def count(self, key: str) -> int | None:
        """As a whole number; None where there is none. Raises UserError for anything else."""
        number = self.number(key)
        if number is not None and not number.is_integer():
            raise self.refused(key, "a whole number")
        return None if number is None else int(number)

    def words(self, key: str) -> tuple[str, ...]:
        """As a list of words: LLaMA-Factory parts them by commas, ms-swift by blanks."""
        value = self.value(key)
        if is_nothing(value):
            return ()
        if isinstance(value, list | tuple):
            return tuple(shown(item) for item in value)
        comma = self.program == "LLaMA-Factory"
        pieces = str(value).split(",") if comma else [str(value)]
        return tuple(piece.strip() for piece in pieces if piece.strip())

    def variable(self, name: str) -> int | None:
        """A variable of the environment as a whole number. Raises UserError for anything else."""
        text = self.environment.get(name, "").strip()
        if not text:
            return None
        if not text.isdecimal() or len(text) > 18:
            raise UserError(
                f"the variable {name} is {text!r}",
                where=self.where,
                expected="a whole number",
                remedy=f"write the number that {name} had",
            )
        return int(text)

    def switched(self, variable: str) -> bool:
        """Whether a variable of the environment is on."""
        return self.environment.get(variable, "0").lower() in ("1", "true")

    def told(self, *keys: str) -> bool:
        """Whether one of them was written."""
        return any(self.has(key) for key in keys)

    def default(self, *keys: str) -> str:
        """The comment on what none of them was written for."""
        return "" if self.told(*keys) else f"{self.program}'s default"

    def refused(self, key: str, expected: str) -> UserError:
        """What a value of a wrong kind is told."""
        value = self.value(key)
        unsaid = self.scripted and is_open(value)
        return UserError(
            f"{key} is {shown(value)!r}",
            where=self.where,
            expected=expected,
            remedy=f"write what {key} was into a copy" if unsaid else f"correct {key}",
        )


def is_nothing(value: object) -> bool:
    """What all three ways of writing mean by no value."""
    return value is None or value in ([], {}, "") or str(value).strip() in ("null", "None")


def shown(value: object) -> str:
    """A value on one line, true and false as they are typed, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


LONGEST = 4096
"""Characters of a value that are looked at."""
