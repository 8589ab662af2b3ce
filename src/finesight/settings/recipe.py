"""Load recipe files, apply overrides, and validate the settings with detailed errors."""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args, get_origin

import yaml
from pydantic import BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from finesight.errors import Remedy, Step, UserError, shorten, suggest_name
from finesight.files.bounded_files import (
    ComposedYaml,
    RecursiveAliasError,
    TooManyValuesError,
    load_yaml,
    translate_os_errors,
)
from finesight.files.path_patterns import SearchBudget, has_match
from finesight.metric_components import METRICS
from finesight.objective_components import OBJECTIVES
from finesight.reward_components import REWARDS, RewardSettings
from finesight.settings.config import COMPONENT_ERROR, TRAIN_COMPONENTS, Recipe, TrainSettings
from finesight.settings.manifest import (
    MANIFEST_FILE,
    RECIPE_FILE,
    read_recipe_sections,
    require_run_plugins,
)
from finesight.settings.setting_types import SettingsSection
from finesight.settings.trainer_tables import load_trainer_tables
from finesight.tracker_components import get_example_tracker

MAX_RECIPE_BYTES = 2**20
"""Maximum size of a recipe file in bytes; typical recipes have a few thousand."""

_TOO_LARGE_REMEDY = "list many data files as a pattern, such as shards/*.tar"

MAX_VALUES = 20_000
"""Maximum number of values and names in a recipe; the longest lists are data files."""

_DATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".xlsx", ".parquet", ".tar", ".zip")

SEARCH_SECTION = "search"
"""Section of a recipe with the ranges of a search, which is no setting of a run."""

SettingKey = tuple[str | int, ...]


def format_key(key: SettingKey) -> str:
    """Format the key of a setting with dots, as in overrides."""
    return ".".join(str(piece) for piece in key)


def read_recipe_text(path: Path) -> str:
    """Read the text of a recipe file.

    Raises UserError if the file is missing, too large, or not UTF-8 text.
    """

    def reject(what: str, remedy: Remedy) -> UserError:
        expected = "a recipe, a YAML file of settings"
        return UserError(what, where=str(path), expected=expected, remedy=remedy)

    if os.path.isdir(path):
        recipe = path / RECIPE_FILE
        if recipe.is_file():
            raise reject("is a folder", f"give the recipe of this run: {recipe}")
        raise reject("is a folder", "give a file")
    if path.suffix.lower() in _DATA_SUFFIXES and path.is_file():
        step = Step("init", {"data": str(path)}, "write one for these data")
        raise reject("is a data file", step)
    remedy = "check the path, its permissions and its encoding"
    with translate_os_errors(path, "a YAML file in UTF-8", remedy):
        if path.is_char_device():  # a terminal would wait for input
            raise reject("is a device", "check the path")
        with path.open("rb") as file:  # a pipe, too: <(envsubst < recipe.yaml)
            content = file.read(MAX_RECIPE_BYTES + 1)
        if len(content) > MAX_RECIPE_BYTES:
            raise reject(f"has more than {MAX_RECIPE_BYTES:,} bytes", _TOO_LARGE_REMEDY)
        return content.decode()


def parse_recipe(text: str, path: Path) -> tuple[Any, dict[SettingKey, int]]:
    """Parse the YAML of a recipe.

    Returns:
        The parsed settings, and the line of each key, counted from 1.
    """
    try:
        document = ComposedYaml(text, MAX_VALUES)
        lines: dict[SettingKey, int] = {}
        if document.root is not None:
            _collect_lines(document.root, (), path, lines)
        return document.data(), lines
    except yaml.YAMLError as error:
        raise _build_yaml_error(error, text, path) from error


def _build_yaml_error(error: yaml.YAMLError, text: str, path: Path) -> UserError:
    """Build the error for the text of a recipe that is no valid YAML."""
    what = f"broken YAML: {error}"
    where = str(path)
    remedy = "remove content that YAML does not support"
    if isinstance(error, yaml.MarkedYAMLError):
        what = f"{error.problem or error.context}"
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            where += f":{mark.line + 1}"
        if isinstance(error, RecursiveAliasError):
            remedy = "write the value without the alias"
        elif isinstance(error, TooManyValuesError):
            remedy = _TOO_LARGE_REMEDY
        else:
            what = f"broken YAML: {what}"
            remedy = _suggest_yaml_fix(text, mark)
    expected = "settings as `name: value`, groups indented by spaces"
    return UserError(what, where=where, expected=expected, remedy=remedy)


def _suggest_yaml_fix(text: str, mark: yaml.Mark | None) -> str:
    """Return the remedy for broken YAML at a mark: a tab, a missing colon, or missing quotes."""
    lines: list[str] = []
    if mark is not None:
        lines = text.splitlines()[: mark.line + 1]
    if lines and "\t" in lines[-1]:
        return "replace the tab by spaces"
    if len(lines) > 1:
        words = lines[-2].split()
        if words and not re.search(":|^ *#", lines[-2]):
            value = " ".join(words[1:])
            return f"add a colon on line {len(lines) - 1}: {words[0]}: {value}".rstrip()
    if lines and lines[-1].count(": ") > 1:
        return "put quotes around the value with a colon"
    return "correct this line or the one above it; the settings of a group have the same indent"


def _collect_lines(
    node: yaml.Node, key: SettingKey, path: Path, lines: dict[SettingKey, int]
) -> None:
    """Store the line of each key, from 1, in `lines`."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            _collect_lines(item, (*key, index), path, lines)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            line = name.start_mark.line + 1
            child_key = (*key, str(name.value))
            if child_key in lines:
                raise UserError(
                    f"{format_key(child_key)} is duplicated, first on line {lines[child_key]}",
                    where=f"{path}:{line}",
                    expected="each setting once",
                    remedy="remove one of the two",
                )
            lines[child_key] = line
            _collect_lines(value, child_key, path, lines)


MAX_REPORTED_ERRORS = 20
"""Maximum number of invalid settings that an error message describes; others are counted."""

MAX_SHOWN_CHARS = 60

MIN_SIMILARITY = 0.75
"""Minimum similarity (difflib ratio) of a suggested setting: one wrong letter of four."""

MIN_FOREIGN_SETTINGS = 3
"""Minimum number of unknown settings of another trainer to suggest a conversion."""

MIN_WORD_CHARS = 5
"""Minimum length of a word of a name that suggests a setting of the same section."""

_EXCLUDED_SETTINGS: Mapping[str, set[str]] = {"train.epochs": {"steps"}, "train.steps": {"epochs"}}
"""Settings that an override of another setting replaces."""

_LIST_INDEX = re.compile("[0-9]{1,9}")

_EXPECTED_BY_TYPE = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number, such as 0.1"),
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    **dict.fromkeys(("path_type", "is_instance_of"), "a path"),
    "finite_number": "a finite number",
    "literal_error": "one of {expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
"""Description of the expected value by pydantic error type; braces are values of its context."""

_EXAMPLES = {
    "model": "Qwen/Qwen2-VL-2B-Instruct",
    "data": "{train: my/train.jsonl, eval: my/eval.jsonl}",
    "data.train": "my/train.jsonl",
    "data.train.path": "my/train.jsonl",
    "data.eval.path": "my/eval.jsonl",
    **dict.fromkeys(("image.height", "image.width"), "280"),
    "image.longest_side": "512",
    "output_dir": "runs/first",
}
"""Example of each required setting, apart from those that name a component."""


Overrides = Sequence[str] | Mapping[str, object]
"""Overrides of recipe settings.

Either a list of `group.setting=value` as typed in a command, with values in YAML, or a mapping from
dotted setting names to values.
"""


def load_recipe(path: Path, overrides: Overrides = ()) -> Recipe:
    """Load a recipe from a YAML file, and apply overrides.

    Paths in the recipe are relative to the working directory. Inputs that do not exist there are
    searched in the folder of the recipe.
    """
    return recipe_from_text(read_recipe_text(path), path, overrides)


def recipe_from_text(text: str, path: Path, overrides: Overrides = ()) -> Recipe:
    """Build a recipe from the YAML text of a file, and apply overrides."""
    content, lines = parse_recipe(text, path)
    if not isinstance(content, dict):
        raise UserError(
            f"contains {_truncate_repr(content)}, which is not a recipe",
            where=str(path),
            expected="settings by name, such as model, data, output",
            remedy="start from one of the files in recipes/",
        )
    _resolve_paths(content, path.parent)
    try:
        if path.name == RECIPE_FILE and (path.parent / MANIFEST_FILE).is_file():
            _remove_unused_sections(content, read_recipe_sections(path.parent))
            _remove_unused_options(content)
        return _validate_recipe(content, str(path), lines, overrides)
    except UserError:
        # The names of missing plug-ins are invalid. The manifest of the run has their packages.
        for folder in (path.parent, Path(str(content.get("output_dir")))):
            require_run_plugins(folder)
        raise


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """Replace paths that exist only beside the recipe, unless a search takes long."""
    budget = SearchBudget()

    def exists_beside(name: str) -> bool:
        with suppress(UserError):  # The budget is used up, and a path stays as it is.
            return not has_match(name, budget) and has_match(str(folder / name), budget)
        return False

    def resolve(value: Any, is_path: bool) -> Any:
        if isinstance(value, list):
            return [resolve(item, is_path) for item in value]
        if isinstance(value, dict):
            inner = value.keys() & {"path", "name"}
            return value | {key: resolve(value[key], is_path) for key in inner}
        if not isinstance(value, str):
            return value
        if is_path:
            name = value
        elif ".py:" in value:
            name = value.rpartition(":")[0]
        else:
            return value
        return str(folder / value) if exists_beside(name) else value

    sections: list[tuple[Any, tuple[str, ...]]] = [
        (content, ("model", "adapter", "rewards")),
        (content.get("data"), ("train", "eval")),
        (content.get("eval"), ("metric",)),
    ]
    train = content.get("train")
    if isinstance(train, dict):
        sections += [(section, ("environment",)) for section in train.values()]
    for settings, names in sections:
        if isinstance(settings, dict):
            for name in settings.keys() & {*names}:
                is_path = name not in ("metric", "rewards", "environment")
                settings[name] = resolve(settings[name], is_path)


def recipe_from_dict(content: Mapping[str, Any], overrides: Overrides = ()) -> Recipe:
    """Build a recipe from nested settings, as in the YAML file, and apply overrides.

    `content` is not modified. Raises UserError like `load_recipe`.
    """
    return _validate_recipe(deepcopy(dict(content)), "recipe", {}, overrides)


def _validate_recipe(
    content: dict[str, Any], where: str, lines: dict[SettingKey, int], overrides: Overrides
) -> Recipe:
    """Apply overrides to `content`, and validate it. Raises UserError with all invalid settings."""
    _remove_former_settings(content)
    overridden: dict[SettingKey, str] = {}
    for override in _parse_overrides(overrides):
        value = deepcopy(override.value)
        key = _apply_override(content, override.name, value, override.text, overridden)
        overridden[key] = override.text
    content.pop(SEARCH_SECTION, None)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        wrong = _wrong_settings(error.errors(include_url=False), content)
        raise _build_settings_error(wrong, where, lines, overridden) from error


def recipe_from_run(content: Mapping[str, Any], folder: Path | None = None) -> Recipe:
    """Build a recipe from the settings of a run folder, whose paths are those of the run.

    Raises:
        ValidationError: Settings are invalid.
        UserError: The plug-in of the objective does not work.
    """
    settings = deepcopy(dict(content))
    _remove_former_settings(settings)
    if folder is not None:
        _remove_unused_sections(settings, read_recipe_sections(folder))
    _remove_unused_options(settings)
    return Recipe.model_validate(settings)


def _remove_unused_sections(content: dict[str, Any], recorded: Sequence[str]) -> None:
    """Remove the sections of components that a run did not use and that are not installed.

    The recipe of a run has a section of each component that was built in.

    Args:
        recorded: Components whose sections the run has written. Other names may be misspelled.
    """
    train = content.get("train")
    if not isinstance(train, dict):
        return
    chosen = train.get("objective"), train.get("optimizer")
    registries = TRAIN_COMPONENTS.values()
    for name in recorded:
        is_known = name in TrainSettings.model_fields or any(name in one for one in registries)
        if name not in chosen and not is_known:
            train.pop(name, None)


def _remove_unused_options(content: dict[str, Any]) -> None:
    """Remove unknown options of rewards that are null, as the recipe of a run may have them.

    They belong to rewards that were built in.
    """
    rewards = content.get("rewards")
    if not isinstance(rewards, list):
        return
    for item in rewards:
        if not isinstance(item, dict):
            continue
        component = REWARDS.get(str(item.get("name")))
        settings = RewardSettings if component is None else component.settings
        for name, value in list(item.items()):
            if value is None and name not in settings.list_fields():
                del item[name]


def _remove_former_settings(content: dict[str, Any]) -> None:
    """Remove two settings of earlier versions: a second seed, and one without effect."""
    evaluation = content.get("eval")
    if isinstance(evaluation, dict):
        evaluation.pop("batch_size", None)
    train = content.get("train")
    if isinstance(train, dict) and train.get("data_seed") == train.get("seed", 0):
        train.pop("data_seed", None)


def _build_settings_error(
    wrong: Mapping[SettingKey, Sequence[ErrorDetails]],
    where: str,
    lines: dict[SettingKey, int],
    overridden: dict[SettingKey, str],
) -> UserError:
    """Build the error for invalid settings, from the errors of pydantic by setting."""
    setting_errors = []
    for key, group in islice(wrong.items(), MAX_REPORTED_ERRORS):
        what, expected, remedy = _explain_error(key, group)
        if key:
            what = f"{shorten(format_key(key), MAX_SHOWN_CHARS)}: {what}"
        location = _format_location(where, key, lines, overridden)
        setting_errors.append(UserError(what, where=location, expected=expected, remedy=remedy))
    if len(wrong) == 1:
        return setting_errors[0]

    problems = [f"{len(wrong):,} settings are wrong"]
    problems += map(str, setting_errors)
    num_others = len(wrong) - len(setting_errors)
    if num_others:
        problems.append(f"and {num_others:,} more")
    step: Remedy = ""
    num_foreign = sum(len(key) == 1 and key[0] in _load_advice() for key in wrong)
    if num_foreign >= MIN_FOREIGN_SETTINGS:
        purpose = "to convert the configuration of another trainer"
        step = Step("convert", {"source": "FILE", "recipe": "RECIPE"}, purpose)
    return UserError("\n".join(problems), where=where, remedy=step)


def dump_recipe(recipe: Recipe) -> str:
    """Format all settings of a recipe, including defaults, as YAML for `load_recipe`."""
    content = recipe.model_dump(mode="json")
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def list_setting_names(section: type[SettingsSection] = Recipe) -> list[str]:
    """List the dotted names of all settings in a section, such as `data.train.path`."""
    names = []
    for name, field in section.list_fields().items():
        leaf_names: list[str] = []
        for group in _iter_sections(field.annotation):
            leaf_names += [f"{name}.{leaf}" for leaf in list_setting_names(group)]
        names += leaf_names or [name]
    return names


def _iter_sections(annotation: object) -> Iterator[type[SettingsSection]]:
    if isinstance(annotation, type) and issubclass(annotation, SettingsSection):
        yield annotation
    for argument in get_args(annotation):
        yield from _iter_sections(argument)


class _Override(NamedTuple):
    """Override of a recipe setting.

    Attributes:
        text: Override as typed in a command.
        name: Dotted name of the setting.
    """

    text: str
    name: str
    value: object


def _parse_overrides(overrides: Overrides) -> list[_Override]:
    """Parse all overrides, before the first one is applied."""
    if isinstance(overrides, Mapping):
        return [_Override(f"{name}={value}", name, value) for name, value in overrides.items()]
    return [_parse_override(override) for override in overrides]


def _parse_override(override: str) -> _Override:
    """Parse an override `group.setting=value`, with a value in YAML."""
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        remedy = "for example train.batch_size=8"
        if tuple(override.split(".")) in _list_paths():
            remedy = f"write {override}=VALUE"
        raise UserError(
            f"{override!r} is not an override",
            where="command line",
            expected="group.setting=value",
            remedy=remedy,
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
    return _Override(override, name, value)


def _apply_override(
    content: dict[str, Any],
    name: str,
    value: object,
    override: str,
    overridden: Collection[SettingKey],
) -> SettingKey:
    """Set a setting in `content`, and return its key.

    Short forms on the way are expanded, and settings that exclude the new one are removed unless
    they are `overridden` too.
    """
    key = _parse_key(name)
    node: Any = content
    sections: list[type[SettingsSection]] = [Recipe]
    field: FieldInfo | None = None
    for depth, segment in enumerate(key):
        if not _can_contain(node, segment):
            raise _build_override_error(key, depth, node, override)
        if isinstance(segment, str):
            field = _find_field(sections, segment)
            if value is not None:
                for rival in _list_excluded(key[:depth], segment, sections):
                    if (*key[:depth], rival) not in overridden:
                        node.pop(rival, None)
        if depth == len(key) - 1:
            node[segment] = value
            break
        short_form = node[segment] if isinstance(segment, int) else node.get(segment)
        inner = _expand_short_form(short_form, field, key[depth + 1])
        node[segment] = inner
        node = inner
        sections = []
        if field is not None:
            sections = list(_iter_sections(field.annotation))
    return key


def _parse_key(name: str) -> SettingKey:
    """Parse a dotted name of an override, in which numbers are indices of a list."""
    segments = name.strip().split(".")
    return tuple(int(one) if _LIST_INDEX.fullmatch(one) else one for one in segments)


def _find_field(sections: Sequence[type[SettingsSection]], name: str) -> FieldInfo | None:
    """Return the field of a setting in the first section that has it, if any."""
    for section in sections:
        field = section.find_field(name)
        if field is not None:
            return field
    return None


def _list_excluded(
    group: SettingKey, name: str, sections: Sequence[type[SettingsSection]]
) -> set[str]:
    """List the settings that a setting excludes, such as those of other image rules."""
    compatible: set[str] = set()
    others: set[str] = set()
    for section in sections:
        fields = section.list_fields()
        if name in fields:
            compatible.update(fields)
        else:
            others.update(fields)
    excluded = set(_EXCLUDED_SETTINGS.get(format_key((*group, name)), ()))
    if compatible:  # an unknown setting excludes no others
        excluded |= others - compatible
    return excluded


def _expand_short_form(value: object, field: FieldInfo | None, inner: str | int) -> Any:
    """Convert the value of a setting to the form that can contain the key `inner`.

    This is a list for an index. For a name, it is a group: that of the only entry of a list.
    """
    if field is not None:
        value = _expand_field_value(value, field, inner)
    return {} if value is None else value


def _expand_field_value(value: object, field: FieldInfo, inner: str | int) -> object:
    """Convert the short form of a value to a list or group, like its validators."""
    is_list = get_origin(field.annotation) is tuple
    if value is None and is_list:
        value = () if field.is_required() else field.default
    steps: list[object] = [*field.metadata]
    for member in get_args(field.annotation):
        steps += get_args(member)
    for step in steps:
        if isinstance(step, BeforeValidator) and value is not None:
            # An invalid value stays as it is: it contains no setting, or the override corrects it.
            with suppress(ValueError):
                value = cast(Callable[[object], object], step.func)(value)
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, list) and isinstance(inner, str) and any(_iter_sections(field.annotation)):
        if len(value) == 1:
            value = value[0]
        elif not value:
            value = {}
    if isinstance(value, SettingsSection):
        value = value.model_dump()
    return value


def _build_override_error(key: SettingKey, depth: int, node: object, override: str) -> UserError:
    """Build the error for an override of a setting inside `node`, which cannot contain it."""
    parent = format_key(key[:depth])
    segment = key[depth]
    if isinstance(node, list) and node:
        what = f"{parent} has {len(node)} entries" if len(node) > 1 else f"{parent} has 1 entry"
        expected = f"an index from 0 to {len(node) - 1}"
        inner = key[depth + 1 :] if isinstance(segment, int) else key[depth:]
        setting = format_key((*key[:depth], 0, *inner))
        value = override.partition("=")[2]
        remedy = f"use {setting}={value} for the first"
    else:
        what = f"{parent} is {_truncate_repr(node)}, which has no {segment!r} inside"
        container = "section with the setting"
        if isinstance(segment, int):
            container = "list with the index"
        expected = f"a {container} {segment!r}"
        remedy = "change the recipe"
    remedy += f", or override {parent} completely"
    return UserError(what, where=f"override {override}", expected=expected, remedy=remedy)


def _can_contain(node: object, segment: str | int) -> bool:
    if isinstance(segment, int):
        return isinstance(node, list) and segment < len(node)
    return isinstance(node, dict)


def _wrong_settings(
    errors: Sequence[ErrorDetails], content: dict[str, Any]
) -> dict[SettingKey, list[ErrorDetails]]:
    """Group the errors of pydantic by setting.

    For a union type, pydantic reports errors for every member. Only those of the member with the
    fewest unknown settings and errors are kept, since the user probably meant it.
    """
    forms: dict[SettingKey, dict[str | int, list[tuple[SettingKey, ErrorDetails]]]] = {}
    for error in errors:
        key, choice, form = _locate_error(error, content)
        # Errors inside one section of a union are compared per member.
        forms.setdefault(key[:choice], {}).setdefault(form, []).append((key, error))
    found: dict[SettingKey, list[ErrorDetails]] = {}
    for by_form in forms.values():
        min_cost = min(map(_count_errors, by_form.values()))
        for group in by_form.values():
            if _count_errors(group) == min_cost:
                for key, error in group:
                    found.setdefault(key, []).append(error)
    return found


def _count_errors(group: Sequence[tuple[SettingKey, ErrorDetails]]) -> tuple[int, int]:
    """Count the unknown settings and all errors of a union member."""
    num_unknown = sum(error["type"] == "extra_forbidden" for _, error in group)
    return num_unknown, len(group)


def _can_lack(node: object, segment: str | int) -> bool:
    """Return whether a missing setting belongs to a section, which may be written as its name."""
    return isinstance(node, dict) or (isinstance(node, str) and isinstance(segment, str))


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
        elif is_last and error["type"] == "missing" and _can_lack(node, segment):
            key.append(segment)
        elif union_depth is None:
            union_depth = len(key)
            member = segment
    if union_depth is None:
        union_depth = len(key)
    return tuple(key), union_depth, member


def _explain_error(key: SettingKey, errors: Sequence[ErrorDetails]) -> tuple[str, str, str]:
    """Return the problem of a setting, the expected value and the remedy."""
    first = errors[0]
    if first["type"] == COMPONENT_ERROR:
        parts = first["ctx"]
        return first["msg"], parts["expected"], parts["remedy"]
    value = _truncate_repr(first["input"])
    if first["type"] == "extra_forbidden":
        siblings = _list_group_names(key[:-1])
        if key[-1] in siblings:
            what = "this setting excludes the others of its section"
            return what, "settings of one rule", "remove it or the others"
        remedy = _suggest_remedy(key, first["input"])
        return f"unknown setting, given {value}", f"one of {', '.join(siblings)}", remedy
    if first["type"] == "missing" and first["loc"][-1] == key[-1]:
        example = _find_example(key, first["input"])
        expected = f"for example {example}" if example else "a value"
        location = "at the top level"
        if key[:-1]:
            location = f"under {format_key(key[:-1])}"
        return "this setting is missing", expected, f"add {key[-1]} {location}"
    if first["type"] == "value_error":
        what, _, remedy = first["msg"].removeprefix("Value error, ").partition(": ")
        return what, "consistent settings", remedy or "change one of them"
    expected = " or ".join(dict.fromkeys(_format_expected(key, error) for error in errors))
    remedy = f"change {format_key(key)}" if key else "correct the name"
    choices: list[str] = []
    if first["type"] == "literal_error":
        choices = re.findall("'([^']*)'", expected)
    remedy = suggest_name(str(first["input"]), choices, remedy, f"{format_key(key)}: ")
    return f"has the invalid value {value}", expected, remedy


def _find_example(key: SettingKey, section: object) -> str:
    """Return an example of a missing setting that fits the others of its section.

    That of a plug-in has none.
    """
    name = _format_setting_name(key)
    example = _EXAMPLES.get(name, "")
    if name == "track.kind":
        example = get_example_tracker()
    if name == "eval.metric":
        example = next(iter(METRICS))
    if name == "rewards.name" and isinstance(section, Mapping):
        rewards = REWARDS.list_built_in()
        example = rewards[0].name
        for reward in rewards:
            if not section.keys().isdisjoint(reward.options):
                example = reward.name
    return example


def _format_expected(key: SettingKey, error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"a section with {', '.join(_list_group_names(key))}"
    if error["type"] == "missing":  # in a list of fixed length
        return f"a list with an item {error['loc'][-1]} (0-based)"
    template = _EXPECTED_BY_TYPE.get(error["type"])
    if template is None:
        return error["msg"]
    return template.format(**error.get("ctx", {}))


def _format_setting_name(key: SettingKey) -> str:
    """Format the key of a setting with dots; list indices are left out."""
    return ".".join(segment for segment in key if isinstance(segment, str))


def _list_group_names(group: SettingKey) -> list[str]:
    """List the names in a section; list indices in its key are left out."""
    prefix = _format_setting_name((*group, ""))
    names = []
    for setting in list_setting_names():
        if setting.startswith(prefix):
            name, _, _ = setting.removeprefix(prefix).partition(".")
            names.append(name)
    if not names:
        names = _list_plugin_names(group)
    return list(dict.fromkeys(names))


def _list_plugin_names(group: SettingKey) -> list[str]:
    """List the settings of a section that a plug-in defines; empty for other sections."""
    sections: list[type[SettingsSection]] = [Recipe]
    for segment in group:
        field = _find_field(sections, str(segment))
        if field is None:
            return []
        sections = list(_iter_sections(field.annotation))
    names: list[str] = []
    for section in sections:
        names += section.list_fields()
    return names


def _suggest_remedy(key: SettingKey, value: object) -> str:
    """Return the remedy for an unknown setting.

    A name of another trainer is replaced, else a name of another section or a similar one is
    suggested. Settings of the same section have precedence.
    """
    wanted = str(key[-1]).replace("-", "_")
    if len(wanted) > MAX_SHOWN_CHARS:
        return "remove it or correct its name"
    if isinstance(value, dict) and len(key) == 1 and (section := _find_section(value)):
        return f"rename it to {section}"
    advice = _load_advice()
    for name in (format_key(key), _format_setting_name(key), wanted):
        if name in advice and "use" in advice[name]:
            return _format_replacement(advice[name], value)
    settings = [format_key(path) for path in _list_paths() if path[-1] == wanted]
    if settings:
        if not isinstance(value, dict | list):
            settings = [f"{setting}={_format_value(value)}" for setting in settings]
        choices = " or ".join(settings)
        return f"use {choices}" if len(key) == 1 else f"did you mean {choices}?"
    known = advice.get(wanted) or advice.get(_find_wildcard(wanted, advice))
    if known is not None:
        return f"remove it: {known['reason']}"
    similar = _find_similar_setting(wanted, key[:-1])
    if similar is None:
        return "remove it or correct its name"
    return f"did you mean {similar}?"


def _find_section(settings: Mapping[str, object]) -> str | None:
    """Return the only section that may contain all given settings; None without such a section."""
    if not settings:
        return None
    found = []
    for name in _list_group_names(()):
        if settings.keys() <= {*_list_group_names((name,))}:
            found.append(name)
    return found[0] if len(found) == 1 else None


def _find_wildcard(wanted: str, names: Iterable[str]) -> str:
    """Return the first name with a final asterisk that includes `wanted`, or an empty text."""
    for name in names:
        if name[-1] == "*" and wanted.startswith(name[:-1]):
            return name
    return ""


def _find_similar_setting(wanted: str, group: SettingKey) -> str | None:
    """Return the dotted name of a similar setting, preferably of the same section, if any."""
    spellings: dict[str, list[str]] = {}
    for name in _list_group_names(group):
        long_words = [word for word in name.split("_") if len(word) >= MIN_WORD_CHARS]
        spellings[name] = [name, *long_words]
    sibling = _closest_name(wanted, spellings)
    if sibling is not None:
        return format_key((*group, sibling))

    paths = _list_paths()
    words = {*wanted.split("_")}
    for path in paths:  # train_batch_size for train.batch_size
        if {*path[-1].split("_")} <= words <= {*"_".join(path).split("_")}:
            return format_key(path)
    return _closest_name(wanted, {format_key(path): [path[-1]] for path in paths})


def suggest_override(name: str, text: str) -> str | None:
    """Return the remedy for a setting, or one of another trainer, written as an option.

    Returns None for an unknown name.
    """
    key = tuple(name.split("."))
    paths = _list_paths()
    if key in paths:
        return f"use {name}={shlex.quote(text)}"
    known = {path[-1] for path in paths} | _load_advice().keys()
    wanted = key[-1].replace("-", "_")
    if name in known or wanted in known or _find_wildcard(wanted, known):
        return _suggest_remedy(key, _parse_override(f"{name}={text}").value)
    return None


def _list_paths() -> list[tuple[str, ...]]:
    """List the keys of all sections and settings, sections first."""
    paths: dict[tuple[str, ...], None] = {}
    for name in list_setting_names():
        key = tuple(name.split("."))
        for depth in range(1, len(key) + 1):
            paths[key[:depth]] = None
    return sorted(paths, key=len)


def _closest_name(wanted: str, spellings: Mapping[str, Iterable[str]]) -> str | None:
    """Return the name with the spelling closest to `wanted`; None without a similar one.

    An abbreviation, the first half of a spelling, is similar.
    """
    names: dict[str, str] = {}
    for name, several in reversed([*spellings.items()]):  # the first name keeps its spellings
        names.update(dict.fromkeys(several, name))
    closest = difflib.get_close_matches(wanted, names, n=1, cutoff=MIN_SIMILARITY)
    closest += [n for n in names if n.startswith(wanted) and 2 * len(wanted) >= len(n)]
    return names[closest[0]] if closest else None


@cache
def load_trainer_settings() -> dict[str, Any]:
    """Load the settings of other trainers, and their replacements.

    Those in `trainer_settings.yaml` come first, then those of the objectives by their names:
    `objective_rules` has their rules, and `method_defaults` the defaults of methods by trainer.
    """
    file = importlib.resources.files("finesight.settings") / "trainer_settings.yaml"
    content: dict[str, Any] = load_yaml(file.read_text(encoding="utf-8"))
    rules: dict[str, Any] = {}
    defaults: dict[str, dict[str, Any]] = {}
    method_keys: dict[str, str] = {}
    losses: dict[str, str] = {}
    # Keys that identify a method: the last objectives have those that no other one has.
    for component in reversed(OBJECTIVES.list_available()):
        if not component.trainers:
            continue
        own = load_trainer_tables(component.trainers)
        rules[component.name] = own.rules.model_dump(exclude_unset=True)
        for trainer, values in own.defaults.items():
            defaults.setdefault(trainer, {}).update(values)
        method_keys |= own.method_keys
        losses |= own.losses
        content["renamed"] |= own.renamed
        content["transformers"]["unsupported"] |= own.unsupported
        for program in [content[name] for name in content["programs"].split()]:
            program["converted"] += f" {own.converted.get(program['trainer'], '')}"
        content["method_classes"] += f" {own.method_classes}"
        content["scripts"] += f" {own.scripts}"
    content["objective_rules"] = rules
    content["method_defaults"] = defaults
    content["method_keys"] = method_keys
    content["losses"] = losses
    return content


def invert_groups(groups: Mapping[str, str]) -> dict[str, str]:
    """Map each name of `trainer_settings.yaml` to the text of its group."""
    texts = {}
    for text, names in groups.items():
        for item in names.split():
            name, _, _ = item.partition("=")
            texts[name] = text
    return texts


@cache
def _load_advice() -> dict[str, dict[str, Any]]:
    """Load the replacements of other trainers' settings, or why they have none."""
    content = load_trainer_settings()
    trainers = [*reversed(content["objective_rules"].values())]
    trainers += [content[name] for name in content["advice_order"]]
    reasons = []
    for kind in ("ignored", "unsupported"):
        reasons += [trainer.get(kind, {}) for trainer in trainers]
    reasons.append(content["obsolete"])
    advice: dict[str, dict[str, Any]] = {}
    for groups in reasons:
        for name, text in invert_groups(groups).items():
            advice[name] = {"reason": text}
    for group in ({"settings": content["renamed"]}, *content["replacements"]):
        for setting, names in group["settings"].items():
            template = f"{setting}={{}}" if setting else "{}"
            advice |= dict.fromkeys(names.split(), group | {"use": template})
    for trainer in trainers:
        for old, new in invert_groups(trainer.get("aliases", {})).items():
            if new in advice:
                advice.setdefault(old, advice[new])
    return advice


def _format_replacement(group: Mapping[str, Any], value: object) -> str:
    """Format the replacement of a setting of another trainer, with its converted value."""
    if group.get("is_list") and isinstance(value, str) and "," in value:
        value = [item.strip() for item in value.split(",")]
    text = _format_value(value)
    values = invert_groups(group.get("values", {}))
    replacement = group["use"].format(values.get(text.lower(), group.get("other", text)))
    if "note" in group:
        return f"use {replacement}: {group['note']}"
    return f"use {replacement}"


def _format_value(value: object) -> str:
    """Format a value for an override in a shell."""
    if isinstance(value, list | tuple):
        items = ",".join(map(_format_scalar, value))
        text = f"[{items}]"
    else:
        text = _format_scalar(value)
    return shlex.quote(shorten(text, MAX_SHOWN_CHARS))


def _format_scalar(value: object) -> str:
    """Format a value as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _truncate_repr(value: object) -> str:
    text = repr(value)
    if value is None or isinstance(value, bool):
        text = _format_scalar(value)
    return shorten(re.sub(r"\s+", " ", text), MAX_SHOWN_CHARS)


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
