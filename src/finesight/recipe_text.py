"""Read and parse recipe files, with the line of each setting for messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from finesight.bounded_files import translate_os_errors
from finesight.bounded_yaml import ComposedYaml, TooManyValuesError
from finesight.errors import UserError
from finesight.run_files import RECIPE_FILE

MAX_RECIPE_BYTES = 2**20
"""Maximum size of a recipe file in bytes; typical recipes have a few thousand."""

_TOO_LARGE_REMEDY = "list many data files as a pattern, such as shards/*.tar"

MAX_VALUES = 20_000
"""Maximum number of values and names in a recipe; the longest lists are data files."""

SettingKey = tuple[str | int, ...]
"""Key of a setting: names of sections and setting, and list indices, from the outside in."""


def format_key(key: SettingKey) -> str:
    """Format the key of a setting with dots, as in overrides."""
    return ".".join(str(piece) for piece in key)


def read_recipe_text(path: Path) -> str:
    """Read the text of a recipe file.

    Raises UserError if the file is missing, too large, or not UTF-8 text.
    """
    if os.path.isdir(path):
        recipe = path / RECIPE_FILE
        raise UserError(
            "is a folder",
            where=str(path),
            expected="a YAML file",
            remedy=f"give the recipe of this run: {recipe}" if recipe.is_file() else "give a file",
        )
    remedy = "check the path and its permissions"
    with translate_os_errors(path, expected="a YAML file", remedy=remedy):
        if path.is_char_device():  # such as /dev/zero, without an end
            raise UserError(
                "is a device", where=str(path), expected="a YAML file", remedy="check the path"
            )
        with path.open("rb") as file:  # a pipe, too: <(envsubst < recipe.yaml)
            content = file.read(MAX_RECIPE_BYTES + 1)
    if len(content) > MAX_RECIPE_BYTES:
        raise UserError(
            f"has more than {MAX_RECIPE_BYTES:,} bytes",
            where=str(path),
            expected="a YAML file of settings",
            remedy=_TOO_LARGE_REMEDY,
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8 text",
            where=str(path),
            expected="a YAML file in UTF-8",
            remedy="save the file as UTF-8",
        ) from error


def parse_recipe(text: str, path: Path) -> tuple[Any, dict[SettingKey, int]]:
    """Parse the YAML of a recipe.

    Args:
        text: Text of the recipe.
        path: File of the recipe, for messages.

    Returns:
        The parsed settings, and the line of each key, counted from 1.

    Raises:
        UserError: The YAML is invalid, has more than MAX_VALUES values, or has a duplicate key.
    """
    try:
        document = ComposedYaml(text, MAX_VALUES)
        lines: dict[SettingKey, int] = {}
        if document.root is not None:
            _collect_lines(document.root, (), path, lines, ())
        return document.data(), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        too_many = isinstance(error, TooManyValuesError)
        raise UserError(
            f"{'' if too_many else 'broken YAML: '}{error.problem or error.context}",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            expected="settings as `name: value`, groups indented by spaces",
            remedy=_TOO_LARGE_REMEDY if too_many else "correct this line or the one above it",
        ) from error
    except yaml.YAMLError as error:
        raise UserError(
            f"broken YAML: {error}",
            where=str(path),
            expected="settings as `name: value`, groups indented by spaces",
            remedy="remove content that YAML does not support",
        ) from error


def _collect_lines(
    node: yaml.Node,
    key: SettingKey,
    path: Path,
    lines: dict[SettingKey, int],
    ancestors: tuple[yaml.Node, ...],
) -> None:
    """Store the line of each key in a YAML node in `lines`.

    Args:
        node: YAML node of the setting `key`.
        key: Key of the setting.
        path: File of the recipe, for messages.
        lines: Receives the line of each key, counted from 1.
        ancestors: Nodes that contain `node`, to detect aliases that contain themselves.
    """
    if node in ancestors:  # by an alias
        raise UserError(
            f"{format_key(key)} contains itself",
            where=f"{path}:{lines[key]}",
            expected="values without recursive aliases",
            remedy="write the value without the alias",
        )
    ancestors = (*ancestors, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            _collect_lines(item, (*key, index), path, lines, ancestors)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            line, child_key = name.start_mark.line + 1, (*key, str(name.value))
            if child_key in lines:
                raise UserError(
                    f"{format_key(child_key)} is duplicated, first on line {lines[child_key]}",
                    where=f"{path}:{line}",
                    expected="each setting once",
                    remedy="remove one of the two",
                )
            lines[child_key] = line
            _collect_lines(value, child_key, path, lines, ancestors)
