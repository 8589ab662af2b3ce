"""Convert a training configuration of ms-swift or LLaMA-Factory to a recipe, with a report.

The report lists the settings whose effect differs in finesight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finesight.bounded_yaml import load_yaml
from finesight.config import Recipe
from finesight.convert import (
    llama_factory_config,
    llama_factory_rules,
    ms_swift_config,
    ms_swift_rules,
)
from finesight.convert.config_loader import load_external_config
from finesight.convert.external_config import ExternalConfig, SourceProgram, format_value, is_empty
from finesight.convert.recipe_draft import RecipeDraft
from finesight.convert.setting_rules import (
    ConversionNote,
    IgnoredSetting,
    SettingRule,
    SettingRules,
    UnsupportedSetting,
)
from finesight.convert.shell_parser import has_variable
from finesight.errors import UserError
from finesight.storage import raise_if_exists, write_file

_RULES: Mapping[SourceProgram, SettingRules] = {
    "ms-swift": ms_swift_rules.RULES,
    "LLaMA-Factory": llama_factory_rules.RULES,
}
_CONVERTERS: Mapping[SourceProgram, Callable[[ExternalConfig, RecipeDraft], None]] = {
    "ms-swift": ms_swift_config.fill_recipe,
    "LLaMA-Factory": llama_factory_config.fill_recipe,
}
_CONVERTED_VARIABLES = {
    *("MAX_PIXELS", "MIN_PIXELS", "IMAGE_MAX_TOKEN_NUM", "IMAGE_MIN_TOKEN_NUM", "USE_HF"),
    *("NPROC_PER_NODE", "NNODES", "CUDA_VISIBLE_DEVICES", "USE_MODELSCOPE_HUB"),
}
"""Environment variables that the converters read; others are only reported."""

_SECRET_WORDS = ("token", "api_key", "secret", "password", "webhook")
"""Parts of the names of settings whose values are not printed."""

_EVAL_KEYS = ("eval_steps", "eval_strategy", "evaluation_strategy")
"""Settings that define when the other program evaluates."""

_VIDEO_VARIABLES = ("VIDEO", "FPS", "NFRAMES")


@dataclass(frozen=True)
class ConvertedRecipe:
    """Result of a conversion.

    Attributes:
        program: Program of the converted configuration.
        recipe_text: YAML text of the recipe.
        notes: Notes for the user about settings.
        import_commands: Shell commands that create the data files of the recipe.
    """

    program: SourceProgram
    recipe_text: str
    notes: tuple[ConversionNote, ...]
    import_commands: tuple[str, ...]


def convert_config(source: Path, target: Path) -> ConvertedRecipe:
    """Convert the configuration file or script `source`, and write a recipe to `target`.

    Raises UserError for an unknown configuration, unsupported methods and models, and an existing
    `target`.
    """
    raise_if_exists(target)
    converted = convert_settings(load_external_config(source))
    write_file(target, converted.recipe_text.encode())
    return converted


def convert_settings(config: ExternalConfig) -> ConvertedRecipe:
    """Convert a loaded configuration to a recipe.

    Raises UserError for unsupported methods and models, and for values that recipes reject.
    """
    draft = RecipeDraft()
    _CONVERTERS[config.program](config, draft)
    text = draft.to_yaml(
        f"From {config.program}, {Path(config.where).name}, by `finesight convert`."
    )
    _validate_recipe(text, config)
    notes = (*draft.notes, *_iter_value_notes(config, draft), *_iter_environment_notes(config))
    return ConvertedRecipe(config.program, text, notes, tuple(draft.import_commands))


def _validate_recipe(text: str, config: ExternalConfig) -> None:
    try:
        Recipe.model_validate(load_yaml(text))
    except ValidationError as error:
        first_error = error.errors(include_url=False)[0]
        location = ".".join(str(segment) for segment in first_error["loc"])
        raise UserError(
            f"results in an invalid recipe: {location}: {first_error['msg']}, given"
            f" {format_value(first_error['input'])[:80]}",
            where=config.where,
            expected="valid recipe settings",
            remedy="correct the original setting",
        ) from error


def _iter_value_notes(config: ExternalConfig, draft: RecipeDraft) -> Iterator[ConversionNote]:
    """Yield notes about settings of the configuration that the recipe does not contain.

    The args.json of a run contains all settings of ms-swift: those without effect are only counted.
    """
    rules = _RULES[config.program]
    noted_keys = {note.key for note in draft.notes}
    num_ignored = 0
    for key, value in config.values.items():
        note = None if key in noted_keys else _build_value_note(config, rules.get(key), key, value)
        if key in _EVAL_KEYS and "data.eval" not in draft.settings:
            note = ConversionNote(
                "ignored", key, _format_short(key, value), "there is no validation split"
            )
        if note is None:
            continue
        if config.is_recorded and (note.kind == "ignored" or is_empty(value) or value is False):
            num_ignored += 1
        else:
            yield note
    if num_ignored:
        text = "recorded by the run, no effect on the result"
        yield ConversionNote("ignored", f"{num_ignored} settings", "", text)


def _build_value_note(
    config: ExternalConfig, rule: SettingRule | None, key: str, value: object
) -> ConversionNote | None:
    formatted = _format_short(key, value)
    if config.is_script and has_variable(value):
        return ConversionNote("unknown", key, formatted, "the script does not define its value")
    if rule is None:
        text = f"unknown setting of {config.program}: check whether it matters"
        return ConversionNote("unknown", key, formatted, text)
    if isinstance(rule, IgnoredSetting):
        return ConversionNote("ignored", key, formatted, rule.reason)
    if isinstance(rule, UnsupportedSetting):
        affects_result = _affects_result(value, rule.equivalent_values)
        message = rule.message if affects_result else "equal in finesight"
        return ConversionNote("differs" if affects_result else "ignored", key, formatted, message)
    return None


def _affects_result(value: object, equivalent_values: tuple[object, ...]) -> bool:
    """Return whether the value of an unsupported setting changes the result of the training.

    `equivalent_values` are values that match the behavior of finesight.
    """
    text = str(value).strip().lower()
    if is_empty(value) or (text in ("false", "0") and True not in equivalent_values):
        return False
    return not any(_is_equivalent(text, equivalent) for equivalent in equivalent_values)


def _is_equivalent(text: str, equivalent: object) -> bool:
    if isinstance(equivalent, bool) or not isinstance(equivalent, int | float):
        return text == str(equivalent).lower()
    try:
        return float(text) == equivalent
    except ValueError:
        return False


def _iter_environment_notes(config: ExternalConfig) -> Iterator[ConversionNote]:
    yield from config.extra_notes
    for name, value in config.environment.items():
        if any(word in name.upper() for word in _VIDEO_VARIABLES):
            text = "videos are imported as images of their frames"
            yield ConversionNote("differs", name, _format_short(name, value), text)
        elif name not in _CONVERTED_VARIABLES and name.upper() == name:
            text = "environment variable of the other program"
            yield ConversionNote("ignored", name, _format_short(name, value), text)


def _format_short(key: str, value: object) -> str:
    if any(word in key.lower() for word in _SECRET_WORDS):
        return "..."
    text = format_value(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
