"""Types of settings: base class of sections, numbers, names and paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo


def iter_paths(value: object) -> Iterator[Path]:
    """Yield the paths in settings, also those in nested sections and lists."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        yield from iter_paths(dict(value))
    elif isinstance(value, Mapping):
        yield from iter_paths([*value.values()])
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from iter_paths(item)


class SettingsSection(BaseModel):
    """Base class of the sections of a recipe: immutable, strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def list_fields(cls) -> dict[str, FieldInfo]:
        """Return the fields by name."""
        return dict(cls.model_fields)

    @classmethod
    def find_field(cls, name: str) -> FieldInfo | None:
        """Return the field of a setting; None for an unknown name."""
        return cls.model_fields.get(name)


def as_tuple(value: object) -> object:
    """Convert a text or a list to a tuple."""
    value = [value] if isinstance(value, str) else value
    return tuple(value) if isinstance(value, list) else value


Name = TypeVar("Name", bound=str)
Names = Annotated[tuple[Name, ...], BeforeValidator(as_tuple), Field(min_length=1)]
"""One or more names; a single one needs no list."""


def _as_path(value: object) -> object:
    is_path = isinstance(value, str) and not is_url(value)
    return Path(os.path.expanduser(str(value))) if is_path else value


def _as_float(value: object) -> object:
    # YAML parses 1 as an integer and, without a dot, 1e-4 as text: accept both as floats.
    if isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    return value


ExpandedPath = Annotated[Path, BeforeValidator(_as_path)]
CoercedFloat = Annotated[float, BeforeValidator(_as_float)]

MAX_COUNT = 1_000_000_000
"""Maximum of settings that are counts; larger ones are typing errors that exhaust the memory."""

PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
StepCount = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0)]
SideLength = Annotated[int, Field(gt=0, le=65_535)]
"""Side length of an image in pixels, up to the maximum of JPEG."""

Fraction = Annotated[CoercedFloat, Field(gt=0.0, lt=1.0)]
StepsOrFraction = StepCount | Fraction
"""Number of optimizer steps (an integer), or a fraction of all steps of the run (below 1)."""


def is_url(value: object) -> bool:
    """Return whether a value is a URL in object storage, such as `s3://BUCKET/NAME`."""
    return isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) is not None


PathOrUrl = Annotated[Path | str, BeforeValidator(_as_path)]
"""A local path, or the URL of a file in object storage."""

WeightFormat = Literal["auto", "nf4", "fp8", "int8", "int4"]
"""Format of the language model weights for inference.

`auto` is the stored format, or the format of the training of a run. Other formats quantize the
weights while loading.
"""
