"""Load recipe files, apply overrides, and validate the settings with detailed errors."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finesight.bounded_files import ComposedYaml, TooManyValuesError, load_yaml, translate_os_errors
from finesight.config import Recipe, SettingsSection
from finesight.errors import UserError
from finesight.manifest import RECIPE_FILE

MAX_RECIPE_BYTES = 2**20
"""Maximum size of a recipe file in bytes; typical recipes have a few thousand."""

_TOO_LARGE_REMEDY = "list many data files as a pattern, such as shards/*.tar"

MAX_VALUES = 20_000
"""Maximum number of values and names in a recipe; the longest lists are data files."""

SettingKey = tuple[str | int, ...]


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

    Returns:
        The parsed settings, and the line of each key, counted from 1.
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


MAX_REPORTED_ERRORS = 20
"""Maximum number of invalid settings that an error message describes; others are counted."""

MAX_SHOWN_CHARS = 60

MIN_SIMILARITY = 0.7
"""Minimum similarity (difflib ratio) of a suggested setting in another section."""

_LIST_INDEX = re.compile("[0-9]{1,9}")

_EXPECTED_BY_TYPE = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number, such as 0.1",
    "float_parsing": "a number, such as 0.1",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "path_type": "a path",
    "is_instance_of": "a path",
    "finite_number": "a finite number",
    "literal_error": "one of {expected}",
    "string_pattern_mismatch": "a function in a Python file, such as metric.py:score",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
"""Description of the expected value for each pydantic error type.

Braces are replaced by values of the error context.
"""

_EXAMPLES = {
    "model": "Qwen/Qwen2-VL-2B-Instruct",
    "data": "{train: my/train.jsonl, eval: my/eval.jsonl}",
    "train": "my/train.jsonl",
    "path": "my/train.jsonl",
    "output_dir": "runs/first",
    "metric": "captions",
    "kind": "tensorboard",
    "default": "1.0e-4",
    "height": "280",
    "width": "280",
    "longest_side": "512",
    "min_pixels": "3136",
    "max_pixels": "401408",
}


@dataclass(frozen=True)
class _SettingError:
    """An invalid setting: its key, and problem, expected value and remedy for the message."""

    key: SettingKey
    what: str
    expected: str
    remedy: str


Overrides = Sequence[str] | Mapping[str, object]
"""Overrides of recipe settings.

Either a list of `group.setting=value` as typed in a command, with values in YAML, or a mapping from
dotted setting names to values.
"""


def load_recipe(path: Path, overrides: Overrides = ()) -> Recipe:
    """Load a recipe from a YAML file, and apply overrides.

    Paths in the recipe are relative to the working directory, not to the recipe.
    """
    text = read_recipe_text(path)
    content, lines = parse_recipe(text, path)
    if not isinstance(content, dict):
        raise UserError(
            f"contains {_truncate_repr(content)}, which is not a recipe",
            where=str(path),
            expected="settings by name, such as model, data, output",
            remedy="start from one of the files in recipes/",
        )
    return _validate_recipe(content, str(path), lines, overrides)


def recipe_from_dict(content: Mapping[str, Any], overrides: Overrides = ()) -> Recipe:
    """Build a recipe from nested settings, as in the YAML file, and apply overrides.

    `content` is not modified. Raises UserError like `load_recipe`.
    """
    return _validate_recipe(deepcopy(dict(content)), "recipe", {}, overrides)


def _validate_recipe(
    content: dict[str, Any], where: str, lines: dict[SettingKey, int], overrides: Overrides
) -> Recipe:
    """Apply overrides to parsed settings, and validate the result.

    Args:
        content: Nested settings; modified by the overrides.

    Raises UserError with all invalid settings.
    """
    assignments: list[tuple[str, object, str]]
    if isinstance(overrides, Mapping):
        assignments = [
            (name, deepcopy(value), f"{name}={value}") for name, value in overrides.items()
        ]
    else:
        assignments = [(*_parse_override(override), override) for override in overrides]
    overridden = {
        _apply_override(content, name, value, override): override
        for name, value, override in assignments
    }
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        wrong = _wrong_settings(error.errors(include_url=False), content)
        setting_errors = [
            _build_setting_error(key, group)
            for key, group in islice(wrong.items(), MAX_REPORTED_ERRORS)
        ]
        locations = [_format_location(where, m.key, lines, overridden) for m in setting_errors]
        raise _to_user_error(where, setting_errors, locations, len(wrong)) from error


def dump_recipe(recipe: Recipe) -> str:
    """Format all settings of a recipe, including defaults, as YAML for `load_recipe`."""
    content = recipe.model_dump(mode="json")
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def list_setting_names(section: type[SettingsSection] = Recipe) -> list[str]:
    """List the dotted names of all settings in a section, such as `data.train.path`."""
    names = []
    for name, field in section.model_fields.items():
        groups = list(_iter_sections(field.annotation))
        leaf_names = [f"{name}.{leaf}" for group in groups for leaf in list_setting_names(group)]
        names += leaf_names or [name]
    return names


def _iter_sections(annotation: object) -> Iterator[type[SettingsSection]]:
    if isinstance(annotation, type) and issubclass(annotation, SettingsSection):
        yield annotation
    for argument in get_args(annotation):
        yield from _iter_sections(argument)


def _parse_override(override: str) -> tuple[str, object]:
    """Parse an override `group.setting=value` into dotted name and value."""
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise UserError(
            f"{override!r} is not an override",
            where="command line",
            expected="group.setting=value",
            remedy="for example train.batch_size=8",
        )
    try:
        value: object = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{_truncate_repr(text)} cannot be read as YAML",
            where=f"override {name}",
            expected="a value such as 8, 1e-4, lora, [a, b] or {height: 112, width: 504}",
            remedy="put quotes around text with special characters",
        ) from error
    return name, value


def _apply_override(content: dict[str, Any], name: str, value: object, override: str) -> SettingKey:
    key: SettingKey = tuple(
        int(p) if _LIST_INDEX.fullmatch(p) else p for p in name.strip().split(".")
    )
    node: Any = content
    for depth, segment in enumerate(key):
        if not _can_contain(node, segment):
            raise UserError(
                f"{format_key(key[:depth])} is {_truncate_repr(node)}, which has no"
                f" {segment!r} inside",
                where=f"override {override}",
                expected=f"a section with the setting {segment!r}",
                remedy=f"override {format_key(key[:depth])} completely, or change the recipe",
            )
        if depth == len(key) - 1:
            node[segment] = value
        elif isinstance(node, dict) and node.get(segment) is None:
            node[segment] = {}
        node = node[segment]
    return key


def _can_contain(node: object, segment: str | int) -> bool:
    if isinstance(segment, int):
        return isinstance(node, list) and segment < len(node)
    return isinstance(node, dict)


def _wrong_settings(
    errors: Sequence[ErrorDetails], content: dict[str, Any]
) -> dict[SettingKey, list[ErrorDetails]]:
    """Group the errors of pydantic by setting.

    For a union type, pydantic reports errors for every member. Only those of the member with the
    fewest errors are kept, since the user probably meant it.
    """
    forms: dict[SettingKey, dict[str | int, list[ErrorDetails]]] = {}
    for error in errors:
        key, choice, form = _locate_error(error, content)
        # Errors inside one section of a union are compared per member.
        forms.setdefault(key[:choice], {}).setdefault(form, []).append(error)
    found: dict[SettingKey, list[ErrorDetails]] = {}
    for by_form in forms.values():
        fewest = min(len(group) for group in by_form.values())
        for group in by_form.values():
            if len(group) == fewest:
                for error in group:
                    found.setdefault(_locate_error(error, content)[0], []).append(error)
    return found


def _locate_error(
    error: ErrorDetails, content: dict[str, Any]
) -> tuple[SettingKey, int, str | int]:
    """Return the key of a pydantic error, and depth and member of a union.

    Pydantic inserts the names of union members into the location of an error: these are the
    segments that the settings do not contain. Without a union, the depth is the length of the key.
    """
    node: Any = content
    key: list[str | int] = []
    union_depth: int | None = None
    member: str | int = ""
    for index, segment in enumerate(error["loc"]):
        is_last = index == len(error["loc"]) - 1
        if _can_contain(node, segment) and (isinstance(segment, int) or segment in node):
            node = node[segment]
            key.append(segment)
        elif is_last and error["type"] == "missing" and isinstance(node, dict):
            key.append(segment)
        elif union_depth is None:
            union_depth, member = len(key), segment
    return tuple(key), len(key) if union_depth is None else union_depth, member


def _build_setting_error(key: SettingKey, errors: Sequence[ErrorDetails]) -> _SettingError:
    first = errors[0]
    value = _truncate_repr(first["input"])
    if first["type"] == "extra_forbidden":
        suggestion = _suggest_setting(key)
        siblings = ", ".join(_list_group_names(key[:-1]))
        remedy = f"did you mean {suggestion}?" if suggestion else "remove it or correct its name"
        return _SettingError(key, f"unknown setting, given {value}", f"one of {siblings}", remedy)
    if first["type"] == "missing" and first["loc"][-1] == key[-1]:
        example = _EXAMPLES[str(key[-1])]
        group = f"under {format_key(key[:-1])}" if key[:-1] else "at the top level"
        remedy = f"add {key[-1]} {group}"
        return _SettingError(key, "this setting is missing", f"for example {example}", remedy)
    if first["type"] == "value_error":
        reason = first["msg"].removeprefix("Value error, ")
        return _SettingError(key, reason, "consistent settings", "change one of them")
    expected = " or ".join(dict.fromkeys(_format_expected(key, error) for error in errors))
    remedy = f"change {format_key(key)}" if key else "correct the name"
    return _SettingError(key, f"has the invalid value {value}", expected, remedy)


def _format_expected(key: SettingKey, error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"a section with {', '.join(_list_group_names(key))}"
    if error["type"] == "missing":  # in a list of fixed length
        return f"a list with an item {error['loc'][-1]} (0-based)"
    template = _EXPECTED_BY_TYPE.get(error["type"])
    return template.format(**error.get("ctx", {})) if template else error["msg"]


def _list_group_names(group: SettingKey) -> list[str]:
    prefix = "".join(f"{segment}." for segment in group if isinstance(segment, str))
    suffixes = (n.removeprefix(prefix) for n in list_setting_names() if n.startswith(prefix))
    return list(dict.fromkeys(name.split(".")[0] for name in suffixes))


def _suggest_setting(key: SettingKey) -> str | None:
    """Return the known setting that an unknown key probably means.

    Settings of the same section have precedence. Returns None if no name is similar.
    """
    wanted = str(key[-1])
    if len(wanted) > MAX_SHOWN_CHARS:
        return None
    sibling = _closest_name(wanted, _list_group_names(key[:-1]))
    if sibling:
        return format_key((*key[:-1], sibling))
    paths = [name.split(".") for name in list_setting_names()]
    by_segment = {
        p[depth]: ".".join(p[: depth + 1])
        for depth in (3, 2, 1, 0)
        for p in reversed(paths)
        if depth < len(p)
    }
    # Many names are compared: a weak similarity would be a coincidence.
    near_names = [name for name in by_segment if _is_near(wanted, name)]
    closest = _closest_name(wanted, near_names)
    return by_segment[closest] if closest else None


def _closest_name(wanted: str, names: Iterable[str]) -> str | None:
    """Return the most similar name, or the one that `wanted` abbreviates (lr for learning_rate).

    Returns None if no name is similar.
    """
    by_abbreviation = {_abbreviate(name): name for name in names}
    if len(wanted) > 1 and wanted in by_abbreviation:
        return by_abbreviation[wanted]
    matches = difflib.get_close_matches(wanted, list(names), n=1)
    return matches[0] if matches else None


def _is_near(wanted: str, name: str) -> bool:
    """Return whether two names are spelled alike or share all words of one."""
    wanted_words, name_words = set(wanted.split("_")), set(name.split("_"))
    if wanted_words <= name_words or name_words <= wanted_words or _abbreviate(name) == wanted:
        return True
    return difflib.SequenceMatcher(None, name, wanted).ratio() >= MIN_SIMILARITY


def _abbreviate(name: str) -> str:
    return "".join(word[0] for word in name.split("_"))


def _truncate_repr(value: object) -> str:
    text = "null" if value is None else repr(value)
    text = re.sub(r"\s+", " ", text)
    return _truncate(text)


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def _format_location(
    source: str, key: SettingKey, lines: dict[SettingKey, int], overridden: dict[SettingKey, str]
) -> str:
    for depth in range(len(key), 0, -1):
        if key[:depth] in overridden:
            return f"override {overridden[key[:depth]]}"
        inner_overrides = [override for k, override in overridden.items() if k[:depth] == key]
        if inner_overrides and key not in lines:
            return f"override {inner_overrides[0]}"
        if key[:depth] in lines:
            return f"{source}:{lines[key[:depth]]}"
    return source


def _to_user_error(
    where: str, setting_errors: list[_SettingError], locations: list[str], count: int
) -> UserError:
    """Combine the errors of several settings into one UserError.

    `count` is the number of all invalid settings, including those without a description.
    """
    errors = [
        UserError(
            f"{_truncate(format_key(m.key))}: {m.what}" if m.key else m.what,
            where=location,
            expected=m.expected,
            remedy=m.remedy,
        )
        for m, location in zip(setting_errors, locations, strict=True)
    ]
    if count == 1:
        return errors[0]
    messages = "\n".join(str(error) for error in errors)
    more = f"\nand {count - len(errors):,} more" if count > len(errors) else ""
    return UserError(f"{count:,} settings are wrong\n{messages}{more}", where=where)
