"""A recipe as it was written: its text, and the line of every setting in it."""

from __future__ import annotations

from pathlib import Path

import yaml

from finesight.errors import UserError, look_beside
from finesight.yaml_text import composed, parsed

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
        return path.read_text(encoding="utf-8")
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


def lines_of_keys(text: str, path: Path) -> dict[Key, int]:
    """The line of every key, counted from 1; refuses broken YAML and keys given twice."""
    try:
        root = composed(text)
        lines: dict[Key, int] = {}
        if root is not None:
            _collect_lines(root, (), path, lines, ())
        parsed(text)  # unknown tags and impossible values show only when it builds
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"broken YAML: {error.problem or error.context}",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            expected="settings as `name: value`, groups indented by spaces",
            remedy="correct this line or the one above it",
        ) from error
    except yaml.YAMLError as error:
        raise UserError(
            f"broken YAML: {error}",
            where=str(path),
            expected="settings as `name: value`, groups indented by spaces",
            remedy="remove what YAML cannot hold",
        ) from error
    return lines


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
