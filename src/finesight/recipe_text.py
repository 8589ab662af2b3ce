"""A recipe as it was written: its text, and the line of every setting in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from finesight.errors import UserError, look_beside
from finesight.yaml_text import Composed, TooManyValues

LARGEST = 2**20
"""Bytes of a recipe; those of people have a few thousand."""

_FEWER = "name many data files by a pattern, such as shards/*.tar"

VALUES = 20_000
"""Settings of a recipe with their names, at most: its longest lists are those of data files."""

Key = tuple[str | int, ...]
"""A place in a recipe: names of groups and settings, numbers in lists."""


def dotted(key: Key) -> str:
    """A key as overrides and messages name it."""
    return ".".join(str(piece) for piece in key)


def read_text(path: Path) -> str:
    """What a recipe file says. Raises UserError for one that is not there, or is no text."""
    try:
        if path.is_char_device():  # such as /dev/zero, without an end
            raise UserError(
                "is a device",
                where=str(path),
                expected="a YAML file",
                remedy="check the path",
            )
        with path.open("rb") as file:  # a pipe, too: <(envsubst < recipe.yaml)
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(
                f"has more than {LARGEST:,} bytes",
                where=str(path),
                expected="a YAML file of settings",
                remedy=_FEWER,
            )
        return content.decode()
    except FileNotFoundError as error:
        raise UserError(
            "no such recipe",
            where=str(path),
            expected="a YAML file",
            remedy=look_beside(path),
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8 text",
            where=str(path),
            expected="a YAML file in UTF-8",
            remedy="save the file as UTF-8",
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            expected="a YAML file",
            remedy="check the path and its permissions",
        ) from error


def parse_recipe(text: str, path: Path) -> tuple[Any, dict[Key, int]]:
    """Parse the YAML of a recipe.

    Args:
        text: The text of the recipe.
        path: Its file, which errors name.

    Returns:
        The data, and the line of every key, counted from 1.

    Raises:
        UserError: The YAML is broken, has more than VALUES values, or gives a key twice.
    """
    try:
        composed = Composed(text, VALUES)
        lines: dict[Key, int] = {}
        if composed.root is not None:
            _collect_lines(composed.root, (), path, lines, ())
        return composed.data(), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        too_many = isinstance(error, TooManyValues)
        raise UserError(
            f"{'' if too_many else 'broken YAML: '}{error.problem or error.context}",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            expected="settings as `name: value`, groups indented by spaces",
            remedy=_FEWER if too_many else "correct this line or the one above it",
        ) from error
    except yaml.YAMLError as error:
        raise UserError(
            f"broken YAML: {error}",
            where=str(path),
            expected="settings as `name: value`, groups indented by spaces",
            remedy="remove what YAML cannot hold",
        ) from error


def _collect_lines(
    node: yaml.Node, key: Key, path: Path, lines: dict[Key, int], above: tuple[yaml.Node, ...]
) -> None:
    """Note the lines of all keys below `key`; `above` are the nodes that this one stands in."""
    if node in above:  # by an alias
        raise UserError(
            f"{dotted(key)} stands inside of itself",
            where=f"{path}:{lines[key]}",
            expected="values that have an end",
            remedy="write the value out, without the alias",
        )
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            _collect_lines(item, (*key, index), path, lines, above)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            line, inner = name.start_mark.line + 1, (*key, str(name.value))
            if inner in lines:
                raise UserError(
                    f"{dotted(inner)} is given twice, first on line {lines[inner]}",
                    where=f"{path}:{line}",
                    expected="each setting once",
                    remedy="remove one of the two",
                )
            lines[inner] = line
            _collect_lines(value, inner, path, lines, above)
