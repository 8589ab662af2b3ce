"""Format of an answer, by a regular expression or a JSON schema."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, model_validator

from finesight.reward_components import ExtraPackage, RewardComponent, RewardSettings

MAX_PATTERN_CHARS = 1000
"""Maximum length of a regular expression, which limits the time of its compilation."""


def _check_pattern(pattern: str) -> str:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"longer than {MAX_PATTERN_CHARS} characters: shorten it")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression ({error}): correct it") from error
    return pattern


class Settings(RewardSettings):
    """Item `format` of `rewards` in a recipe.

    Attributes:
        pattern: Regular expression that the complete answer matches.
        json_schema: JSON schema that the complete answer matches, instead of `pattern`.
    """

    pattern: Annotated[str, AfterValidator(_check_pattern)] | None = None
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if (self.pattern is None) == (self.json_schema is None):
            raise ValueError("the reward format requires pattern or json_schema")
        return self


def list_packages(settings: Settings) -> Sequence[ExtraPackage]:
    """Return the package that a JSON schema requires."""
    if settings.json_schema is None:
        return ()
    return (ExtraPackage("jsonschema", extra="schema"),)


COMPONENT = RewardComponent[Settings](
    kind="rewards",
    name="format",
    title="Format",
    settings=Settings,
    implementation="finesight.evaluate.rewards.format.score:FormatReward",
    packages=list_packages,
    compares_references=False,
    position=4,
)
