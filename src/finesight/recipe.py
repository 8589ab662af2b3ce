"""A recipe file becomes typed settings, or one message that names every mistake in it."""

from __future__ import annotations

import difflib
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

from finesight.config import Recipe, Section
from finesight.errors import UserError
from finesight.recipe_text import Key, dotted, parse_recipe, read_text
from finesight.yaml_text import parsed

MOST_TOLD = 20
"""Mistakes that a message explains; it counts the others."""

LONGEST = 60
"""Characters of a value, or of a name, that a message shows."""

_NUMBER = re.compile("[0-9]{1,9}")
"""A place in a list, as overrides name it."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
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
    "greater_than_equal": "a number from {ge} upwards",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number up to {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
"""What a setting should have been, by pydantic's error types; the braces are filled from them."""

_EXAMPLES = {
    "model": "Qwen/Qwen2-VL-2B-Instruct",
    "data": "{train: my/train.jsonl, eval: my/eval.jsonl}",
    "train": "my/train.jsonl",
    "path": "my/train.jsonl",
    "output": "runs/first",
    "metric": "captions",
    "kind": "tensorboard",
    "default": "1.0e-4",
    "height": "280",
    "width": "280",
    "longest_side": "512",
    "min_pixels": "3136",
    "max_pixels": "401408",
}
"""Something to write for each setting that has no default."""


@dataclass(frozen=True)
class _Mistake:
    """One wrong setting, in the pieces of a UserError."""

    key: Key
    what: str
    expected: str
    remedy: str


Overrides = Sequence[str] | Mapping[str, object]
"""Settings in place of a recipe's: `group.setting=value` as it is typed, the value read as YAML, or
values by the settings' dotted names."""


def load_recipe(path: Path, overrides: Overrides = ()) -> Recipe:
    """Read a YAML recipe and apply overrides.

    Paths inside stay as written: relative ones are relative to the current working directory, not
    to the recipe's folder. Raises UserError for a file that cannot be read, broken YAML, a key
    given twice, and for settings that are unknown, missing or of a wrong type (all in one message).
    """
    text = read_text(path)
    content, lines = parse_recipe(text, path)
    if not isinstance(content, dict):
        raise UserError(
            f"holds {_shown(content)}, which is not a recipe",
            where=str(path),
            expected="settings by name, such as model, data, output",
            remedy="start from one of the files in recipes/",
        )
    return _validated(content, str(path), lines, overrides)


def recipe_of(content: Mapping[str, Any], overrides: Overrides = ()) -> Recipe:
    """The recipe of settings that a program made, in the form that YAML would have.

    `content` stays as it is. Raises UserError as `load_recipe` does.
    """
    return _validated(deepcopy(dict(content)), "recipe", {}, overrides)


def _validated(
    content: dict[str, Any], where: str, lines: dict[Key, int], overrides: Overrides
) -> Recipe:
    """The content, changed by the overrides, as settings; `lines` are those of its keys in the file
    `where`."""
    given: list[tuple[str, object, str]]
    if isinstance(overrides, Mapping):
        given = [(name, deepcopy(value), f"{name}={value}") for name, value in overrides.items()]
    else:
        given = [(*_assigned(override), override) for override in overrides]
    changed = {_put(content, name, value, override): override for name, value, override in given}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        wrong = _wrong_settings(error.errors(include_url=False), content)
        mistakes = [_mistake(key, group) for key, group in islice(wrong.items(), MOST_TOLD)]
        places = [_place(where, m.key, lines, changed) for m in mistakes]
        raise _as_user_error(where, mistakes, places, len(wrong)) from error


def dump_recipe(recipe: Recipe) -> str:
    """Every setting in force, defaults included, as YAML that `load_recipe` reads back."""
    content = recipe.model_dump(mode="json")
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def setting_names(section: type[Section] = Recipe) -> list[str]:
    """Dotted names of all settings, groups opened up: `model`, `data.train.path`, ..."""
    names = []
    for name, field in section.model_fields.items():
        groups = list(_sections_in(field.annotation))
        inner = [f"{name}.{leaf}" for group in groups for leaf in setting_names(group)]
        names += inner or [name]
    return names


def _sections_in(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _assigned(override: str) -> tuple[str, object]:
    """The name and the value of one `a.b=value`."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UserError(
            f"{override!r} is not an override",
            where="command line",
            expected="group.setting=value",
            remedy="for example train.batch=8",
        )
    try:
        value: object = parsed(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{_shown(text)} cannot be read as YAML",
            where=f"override {name}",
            expected="a value such as 8, 1e-4, lora, [a, b] or {height: 112, width: 504}",
            remedy="put quotes around text with special characters",
        ) from error
    return name, value


def _put(content: dict[str, Any], name: str, value: object, override: str) -> Key:
    """Set what one override names in the content; gives the key it set."""
    key: Key = tuple(int(p) if _NUMBER.fullmatch(p) else p for p in name.strip().split("."))
    node: Any = content
    for depth, piece in enumerate(key):
        if not _can_hold(node, piece):
            raise UserError(
                f"{dotted(key[:depth])} is {_shown(node)}, which has no {piece!r} inside",
                where=f"override {override}",
                expected=f"a group with the setting {piece!r}",
                remedy=f"override {dotted(key[:depth])} as a whole, or change the recipe",
            )
        if depth == len(key) - 1:
            node[piece] = value
        elif isinstance(node, dict) and node.get(piece) is None:
            node[piece] = {}
        node = node[piece]
    return key


def _can_hold(node: object, piece: str | int) -> bool:
    if isinstance(piece, int):
        return isinstance(node, list) and piece < len(node)
    return isinstance(node, dict)


def _wrong_settings(
    errors: Sequence[ErrorDetails], content: dict[str, Any]
) -> dict[Key, list[ErrorDetails]]:
    """Pydantic's errors by the settings they are about. Where a setting may take several forms,
    pydantic reports every form's errors: the form with the fewest is the one that was meant."""
    forms: dict[Key, dict[str | int, list[ErrorDetails]]] = {}
    for error in errors:
        key, choice, form = _split(error, content)
        # Errors inside one group of several possible forms compete as a whole.
        forms.setdefault(key[:choice], {}).setdefault(form, []).append(error)
    found: dict[Key, list[ErrorDetails]] = {}
    for by_form in forms.values():
        fewest = min(len(group) for group in by_form.values())
        for group in by_form.values():
            if len(group) == fewest:
                for error in group:
                    found.setdefault(_split(error, content)[0], []).append(error)
    return found


def _split(error: ErrorDetails, content: dict[str, Any]) -> tuple[Key, int, str | int]:
    """The error's place as the user wrote it, how deep a choice of forms was in it (its whole
    length where there was none), and the form that was tried.

    Pydantic mixes the names of a union's members into the place; they are what cannot be found in
    the content.
    """
    node: Any = content
    key: list[str | int] = []
    choice: int | None = None
    form: str | int = ""
    for index, piece in enumerate(error["loc"]):
        last = index == len(error["loc"]) - 1
        if _can_hold(node, piece) and (isinstance(piece, int) or piece in node):
            node = node[piece]
            key.append(piece)
        elif last and error["type"] == "missing" and isinstance(node, dict):
            key.append(piece)
        elif choice is None:
            choice, form = len(key), piece
    return tuple(key), len(key) if choice is None else choice, form


def _mistake(key: Key, errors: Sequence[ErrorDetails]) -> _Mistake:
    first = errors[0]
    value = _shown(first["input"])
    if first["type"] == "extra_forbidden":
        near = _nearest(key)
        siblings = ", ".join(_names_in(key[:-1]))
        remedy = f"did you mean {near}?" if near else "remove it or correct its name"
        return _Mistake(key, f"unknown setting, given {value}", f"one of {siblings}", remedy)
    if first["type"] == "missing" and first["loc"][-1] == key[-1]:
        example = _EXAMPLES[str(key[-1])]
        remedy = f"add {key[-1]} {_inside(key[:-1])}"
        return _Mistake(key, "this setting is missing", f"for example {example}", remedy)
    if first["type"] == "value_error":
        reason = first["msg"].removeprefix("Value error, ")
        return _Mistake(key, reason, "settings that agree with each other", "change one of them")
    expected = " or ".join(dict.fromkeys(_expected(key, error) for error in errors))
    remedy = f"change {dotted(key)}" if key else "correct the name"
    return _Mistake(key, f"has the wrong value {value}", expected, remedy)


def _expected(key: Key, error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"a group with {', '.join(_names_in(key))}"
    if error["type"] == "missing":  # in a list of fixed length
        return f"a list with an item number {error['loc'][-1]}, counted from 0"
    template = _EXPECTED.get(error["type"])
    return template.format(**error.get("ctx", {})) if template else error["msg"]


def _names_in(group: Key) -> list[str]:
    """Names of the settings and groups directly inside a group."""
    start = "".join(f"{piece}." for piece in group if isinstance(piece, str))
    inner = (n.removeprefix(start) for n in setting_names() if n.startswith(start))
    return list(dict.fromkeys(name.split(".")[0] for name in inner))


def _nearest(key: Key) -> str | None:
    """The known setting most like an unknown one: in its own group, else anywhere."""
    wanted = str(key[-1])
    beside = _most_like(wanted, _names_in(key[:-1]))
    if beside:
        return dotted((*key[:-1], beside))
    pieces = [name.split(".") for name in setting_names()]
    by_end = {
        p[depth]: ".".join(p[: depth + 1])
        for depth in (3, 2, 1, 0)
        for p in reversed(pieces)
        if depth < len(p)
    }
    elsewhere = _most_like(wanted, by_end)
    return by_end[elsewhere] if elsewhere else None


def _most_like(wanted: str, names: Iterable[str]) -> str | None:
    """The name most like the wanted one; also the one it abbreviates (lr for learning_rate)."""
    if len(wanted) > LONGEST:
        return None
    named = {"".join(word[0] for word in name.split("_")): name for name in names}
    if len(wanted) > 1 and wanted in named:
        return named[wanted]
    near = difflib.get_close_matches(wanted, list(names), n=1)
    return near[0] if near else None


def _inside(group: Key) -> str:
    return f"under {dotted(group)}" if group else "at the top level"


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    text = re.sub(r"\s+", " ", text)
    return _clipped(text)


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _place(where: str, key: Key, lines: dict[Key, int], changed: dict[Key, str]) -> str:
    """Where a key was written: an override, or the file and the nearest line known."""
    for depth in range(len(key), 0, -1):
        if key[:depth] in changed:
            return f"override {changed[key[:depth]]}"
        inside = [override for k, override in changed.items() if k[:depth] == key]
        if inside and key not in lines:
            return f"override {inside[0]}"
        if key[:depth] in lines:
            return f"{where}:{lines[key[:depth]]}"
    return where


def _as_user_error(
    where: str, mistakes: list[_Mistake], places: list[str], count: int
) -> UserError:
    """One error that tells the mistakes, the first of `count`."""
    errors = [
        UserError(
            f"{_clipped(dotted(m.key))}: {m.what}" if m.key else m.what,
            where=place,
            expected=m.expected,
            remedy=m.remedy,
        )
        for m, place in zip(mistakes, places, strict=True)
    ]
    if count == 1:
        return errors[0]
    listed = "\n".join(str(error) for error in errors)
    more = f"\nand {count - len(errors):,} more" if count > len(errors) else ""
    return UserError(f"{count:,} settings are wrong\n{listed}{more}", where=where)
