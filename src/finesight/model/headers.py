"""What the headers of safetensors files say, before any number is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finesight.errors import UserError

_REMEDY = "download the model again"


@dataclass(frozen=True)
class Stored:
    """What a file's header says of a tensor; `native` is the name here of what it calls `name`."""

    file: Path
    name: str
    native: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def layer(self) -> str:
        """What it belongs to."""
        return self.native.rpartition(".")[0]


def header(file: Path, named: Callable[[str], str] = str) -> list[Stored]:
    """Every tensor of a file; `named` makes the name here of the one there."""
    with opened(file) as weights:
        pieces = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        return [
            Stored(file, name, named(name), tuple(piece.get_shape()), piece.get_dtype())
            for name, piece in pieces.items()
        ]


def misfit(names: list[str], what: str, expected: str, where: Path) -> UserError:
    """Tensors of which something is wrong."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return UserError(
        f"{len(names)} tensors are {what}: {shown}",
        where=str(where),
        expected=expected,
        remedy=_REMEDY,
    )


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file to read. Raises UserError for one that is damaged."""
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"not a whole safetensors file ({error})",
            where=str(file),
            expected="a safetensors file as it was published",
            remedy=_REMEDY,
        ) from error
