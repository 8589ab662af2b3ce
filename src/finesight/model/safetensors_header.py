"""Headers of safetensors files, read without tensor data."""

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
class TensorHeader:
    """Header entry of a tensor in a safetensors file.

    `name` is the published name of the tensor and `native_name` its name in the native model.
    """

    file: Path
    name: str
    native_name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def layer_name(self) -> str:
        """Native name of the layer that owns the tensor."""
        return self.native_name.rpartition(".")[0]


def read_header(file: Path, to_native_name: Callable[[str], str] = str) -> list[TensorHeader]:
    """Read the header entries of a safetensors file.

    `to_native_name` maps published tensor names to native names.
    """
    with open_safetensors(file) as file_handle:
        pieces = {name: file_handle.get_slice(name) for name in file_handle.keys()}  # noqa: SIM118
        return [
            TensorHeader(
                file, name, to_native_name(name), tuple(piece.get_shape()), piece.get_dtype()
            )
            for name, piece in pieces.items()
        ]


def tensor_error(names: list[str], problem: str, expected: str, where: Path) -> UserError:
    """Build a UserError that lists up to five affected tensors."""
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return UserError(
        f"{len(names)} tensors are {problem}: {listed}",
        where=str(where),
        expected=expected,
        remedy=_REMEDY,
    )


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading; raises UserError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as file_handle:
            yield file_handle
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"not a complete safetensors file ({error})",
            where=str(file),
            expected="a safetensors file as published",
            remedy=_REMEDY,
        ) from error
