"""Convert a training configuration of another program to a recipe, with a report.

The report lists the settings whose effect differs in finesight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from finesight.convert.config_loader import load_external_config
from finesight.convert.external_config import (
    CONVERTED_VARIABLES,
    ConversionNote,
    ExternalConfig,
    ProgramRules,
    SourceProgram,
    format_value,
    is_empty,
    load_rules,
)
from finesight.convert.llama_factory import LlamaFactoryConverter
from finesight.convert.ms_swift import MsSwiftConverter
from finesight.convert.trainer_converter import RecipeDraft, TrainerConverter
from finesight.convert.trl import TrlConverter
from finesight.errors import UserError, escape_unprintable, shorten
from finesight.files.bounded_files import load_yaml
from finesight.files.storage import check_new_path, write_new_file
from finesight.settings.recipe import recipe_from_dict

_NOTED_KEYS = ("", "dataset_name", "reward_funcs", "teacher_model", "bf16", "fp16")
"""Settings whose converters use or report expressions of a script."""

_RECORDED_KEYS = ("eval_steps", "evaluation_strategy", "freeze_parameters", "trainable_parameters")
"""Unsupported settings that ms-swift records for every run."""


@dataclass(frozen=True)
class ConvertedRecipe:
    """Result of a conversion: recipe text in YAML, notes, and arguments of the data imports."""

    program: SourceProgram
    recipe_text: str
    notes: tuple[ConversionNote, ...]
    imports: tuple[Mapping[str, object], ...]


def convert_config(source: Path, target: Path) -> ConvertedRecipe:
    """Convert the configuration file or script `source`, and write a recipe to `target`.

    Raises UserError for an unknown configuration, unsupported methods and models, values that
    recipes reject, and an existing `target`.
    """
    check_new_path(target)
    config = load_external_config(source)
    converters: dict[str, type[TrainerConverter]]
    converters = {"ms-swift": MsSwiftConverter, "LLaMA-Factory": LlamaFactoryConverter}
    converter = converters.get(config.program, TrlConverter)(config)
    converter.fill_recipe()
    draft = converter.draft
    is_changed = "adapter" in draft.settings or "full" in draft.settings.values()
    if is_changed:
        converter.reset_changed_references()
    text = draft.to_yaml(f"Converted from {config.program}, {source.name}.")
    try:
        recipe_from_dict(load_yaml(text))
    except UserError as error:
        raise UserError(
            f"results in an invalid recipe: {error.what}",
            where=config.where,
            expected=error.expected,
            remedy="correct the original setting",
        ) from error
    except yaml.YAMLError as error:
        raise UserError(
            f"has a character that a recipe cannot contain: {' '.join(str(error).split())[:200]}",
            where=config.where,
            expected="settings without control characters",
            remedy="correct the original setting",
        ) from error
    only = f"used by {converter.objective} only" if converter.objective else ""
    imports = _write_mappings(draft, target)
    notes = (
        *draft.notes,
        *config.notes,
        *_iter_expression_notes(converter.config, only),
        *_iter_value_notes(converter.config, draft, only),
        *_iter_launcher_notes(config.launcher),
        *_iter_environment_notes(config),
    )
    write_new_file(target, text.encode())
    return ConvertedRecipe(config.program, text, notes, imports)


def _write_mappings(draft: RecipeDraft, recipe: Path) -> tuple[Mapping[str, object], ...]:
    """Write the mapping files of imports next to the recipe; return the imports with their paths.

    An existing file is never overwritten: the new one has a number in its name.
    """
    imports = list(draft.imports)
    for index, mapping in draft.mappings.items():
        arguments = imports[index]
        name = f"{recipe.stem}-{Path(str(arguments['out'])).name}"
        path = recipe.with_name(f"{name}.mapping.yaml")
        number = 1
        while os.path.lexists(path):
            number += 1
            path = recipe.with_name(f"{name}-{number}.mapping.yaml")
        title = f"# Roles of the keys of {arguments['source']}, as in dataset_info.json."
        content = yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True)
        write_new_file(path, f"{escape_unprintable(title)}\n{content}".encode())
        draft.note("dataset_info.json", path, f"the mapping file of {arguments['source']}")
        imports[index] = {**arguments, "mapping": str(path)}
    return tuple(imports)


def _iter_expression_notes(config: ExternalConfig, only: str) -> Iterator[ConversionNote]:
    """Yield notes about settings of a script without a constant value.

    `only` is the text for settings of a method that the recipe does not use.
    """
    rules = config.rules
    for key, expression in config.unresolved.items():
        rule = rules.find(key)
        if key in _NOTED_KEYS or (rule and rule.is_ignored):
            continue
        text = "computed by the script, which is not executed: set it in the recipe"
        if rule:
            text = rule.reason
        elif only and key not in rules.converted and not key.startswith("**"):
            text = only
        yield ConversionNote("differs", key, _format_short(key, expression), text)


def _iter_value_notes(
    config: ExternalConfig, draft: RecipeDraft, only: str
) -> Iterator[ConversionNote]:
    """Yield notes about settings of the configuration that the recipe does not contain.

    The args.json of a run contains all settings of ms-swift: those without effect are omitted.
    """
    rules = config.rules
    skipped_keys = rules.converted | draft.used_keys | {note.key for note in draft.notes}
    for key, value in config.values.items():
        note = _describe_value(key, value, rules, only or _describe_unknown(config.program))
        is_unused = is_empty(value) or value is False or key in _RECORDED_KEYS
        is_unused = is_unused or note.kind == "ignored"
        if key not in skipped_keys and not (config.is_recorded and is_unused):
            yield note


def _iter_launcher_notes(launcher: Mapping[str, object]) -> Iterator[ConversionNote]:
    """Yield notes about settings of accelerate that the recipe does not contain."""
    rules = load_rules("accelerate")
    for key, value in launcher.items():
        if key not in rules.converted and not is_empty(value):
            yield _describe_value(key, value, rules, _describe_unknown("accelerate"))


def _describe_unknown(program: str) -> str:
    return f"unknown setting of {program}: check whether it matters"


def _describe_value(
    key: str, value: object, rules: ProgramRules, unknown_text: str
) -> ConversionNote:
    """Build the note about a setting by its rule, or with a text."""
    rule = rules.find(key)
    text = _format_short(key, value)
    if rule is None:
        return ConversionNote("unknown", key, text, unknown_text)
    if rule.is_ignored:
        return ConversionNote("ignored", key, text, rule.reason)
    if _affects_result(value, rule.equivalent_values):
        return ConversionNote("differs", key, text, rule.reason)
    return ConversionNote("ignored", key, text, "equal in finesight")


def _affects_result(value: object, equivalent_values: tuple[str, ...]) -> bool:
    """Return whether an unsupported setting has a value, or an item, that is not equivalent."""
    if isinstance(value, list | tuple) and value:
        return any(_affects_result(item, equivalent_values) for item in value)
    text = str(value).strip(" []'\"").lower()
    is_false = text in ("false", "0") and "true" not in equivalent_values
    if is_empty(value) or text in equivalent_values or is_false:
        return False
    with suppress(ValueError):
        return float(text) not in map(float, equivalent_values)
    return True


def _iter_environment_notes(config: ExternalConfig) -> Iterator[ConversionNote]:
    for name, value in config.environment.items():
        if any(word in name.upper() for word in ("VIDEO", "FPS", "NFRAMES")):
            text = "each video of a sample has its own frame rate `fps`"
            yield ConversionNote("differs", name, _format_short(name, value), text)
        elif name not in CONVERTED_VARIABLES and name.upper() == name:
            text = "environment variable of the other program"
            yield ConversionNote("ignored", name, _format_short(name, value), text)


def _format_short(key: str, value: object) -> str:
    secrets = ("token", "api_key", "secret", "password", "webhook")
    is_secret = any(word in key.lower() for word in secrets)
    return "..." if is_secret else shorten(format_value(value), 60)
