"""Build the configuration of a training from a Python script or notebook."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finesight.convert.external_config import (
    ConversionNote,
    ExternalConfig,
    SourceProgram,
    is_empty,
    load_rules,
)
from finesight.convert.python_script import AmbiguousConfigError, Script, ScriptArgument
from finesight.convert.python_values import read_items
from finesight.convert.script_code import ScriptCode, read_script_code
from finesight.convert.source_file import build_source_error, check_code_length
from finesight.errors import Remedy, Step, UserError
from finesight.files.bounded_files import parse_json
from finesight.settings.recipe import load_trainer_settings

_PADDING_COLLATORS = (
    "DataCollatorForSeq2Seq",
    "DataCollatorWithPadding",
    "default_data_collator",
    "DefaultDataCollator",
)
_START_REMEDY = (
    "write the values into a copy of the script, or save the command that starts it in a file"
    " ending in .sh and convert that file"
)
_EVAL_DATA_SETTINGS = {
    "eval_dataset_name": "path",
    "eval_dataset_config": "name",
    "eval_dataset_split": "split",
    "eval_data_files": "data_files",
}
"""Arguments of `load_dataset` by the setting for the data of the evaluation."""

_DATA_TYPES = (str, list, dict)
_CELL_MAGIC = re.compile(r"\s*%%(\w*)")
_PYTHON_MAGICS = ("capture", "time", "timeit", "prun")
"""Magic commands of IPython whose cell is Python code."""

_COMMAND = re.compile(r"(?m)^([ \t]*)(?:[%!?](?:.*\\\n)*.*|[A-Za-z_][\w.]*\?{1,2}[ \t]*$)")
"""Command of IPython or of the shell, or a line that asks for help, `?name` or `name?`."""

_ASSIGNED_COMMAND = re.compile(r"(?m)^([ \t]*[A-Za-z_][\w., ]*=)[ \t]*[%!](?:.*\\\n)*.*")
"""Command whose output a variable receives, `files = !ls`."""

_JOIN_REMEDY = "join the parts of the training in one file: the model, the adapter and the trainer"
_INIT_STEP = Step("init", {"data": "DATA"}, "convert the file that trains, or write a recipe")
_OTHER_PURPOSES: tuple[tuple[set[str], str, Remedy], ...] = (
    (
        {"backward"},
        "it trains in a loop of its own",
        Step("init", {"data": "DATA"}, "write a recipe"),
    ),
    (
        {"merge_and_unload"},
        "it merges an adapter",
        Step("merge", {"source": "RUN", "out": "OUT"}, "convert the script that trains, and then"),
    ),
    (
        {"generate", "chat"},
        "it generates answers",
        Step(
            "predict",
            {"run_or_model": "RUN", "images": ["IMAGE"], "prompt": "TEXT"},
            "convert the script that trains, and then",
        ),
    ),
    (
        {"dump", "to_csv", "to_json", "to_parquet", "save"},
        "it prepares data",
        Step("import", {"source": "DATA", "out": "OUT"}, "convert the script that trains, and"),
    ),
    (
        {"snapshot_download", "from_pretrained", "get_peft_model", "LoraConfig"},
        "it loads a model or an adapter",
        _JOIN_REMEDY,
    ),
)
"""Calls in scripts that are no training, what the script does, and what to do instead."""


@dataclass
class _ScriptSettings:
    """Settings of a script by name: values, defaults of the library, and other expressions."""

    values: dict[str, object] = field(default_factory=dict)
    defaults: dict[str, object] = field(default_factory=dict)
    unresolved: dict[str, str] = field(default_factory=dict)


def read_python_config(text: str, path: Path, options: Mapping[str, object]) -> ExternalConfig:
    """Build the configuration of a script that starts with `options`.

    Raises UserError for a script that does not train, or whose configuration is ambiguous.
    """
    text = _read_code(text, path)
    check_code_length(text, path)
    try:
        tree = _parse_code(text)
        script = Script(tree, options)
        arguments = list(script.iter_arguments(_list_calls()))
        code = read_script_code(script)
    except AmbiguousConfigError as error:
        remedy = "keep only the one that the training uses in a copy of the script"
        raise build_source_error(path, str(error), remedy) from error
    except (SyntaxError, ValueError, TypeError, LookupError, RecursionError, MemoryError) as error:
        raise _build_syntax_error(path, error) from error
    settings = _collect_arguments(script, arguments)
    used = {argument.callee for argument in arguments}
    used.update(script.get_base(name) for name in script.parsed.classes.values())
    _add_parsed_settings(script, settings, code)
    _add_code_settings(script, settings, code)
    _check_training(script, used, settings, path)
    values = settings.values
    values["model_name_or_path"] = _find_repository(script, str(values["model_name_or_path"]))
    notes = _take_notes(code, settings.unresolved)
    if "eval_dataset_name" in values:
        settings.unresolved.pop("eval_dataset", None)
    return ExternalConfig(
        _name_program(text, used),
        str(path),
        settings.defaults | values,
        code.environment,
        unresolved={key: one for key, one in settings.unresolved.items() if key not in values},
        notes=notes,
    )


def _parse_code(text: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # about escape sequences in the script
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            str(node.value)  # Raises ValueError for hexadecimal numbers that have no text.
    return tree


def _collect_arguments(script: Script, arguments: Sequence[ScriptArgument]) -> _ScriptSettings:
    """Return the arguments of the calls that the training uses; the first one of a name counts."""
    aliases = load_rules("TRL").aliases
    calls = _list_calls()
    settings = _ScriptSettings()
    for callee, name, value in arguments:
        key = aliases.get(name, name)
        settings.defaults = calls[callee] | settings.defaults
        if isinstance(value, ast.expr):
            value = script.get_untyped_option(value)
        if isinstance(value, ast.expr):
            if script.is_default_option(value):
                continue
            settings.unresolved.setdefault(key, ast.unparse(script.resolve(value)))
            for item, text in _list_items(script, value).items():
                settings.unresolved.setdefault(item, text)
        elif key:
            settings.values.setdefault(key, value)
    for name in script.parsed.classes.values():
        settings.defaults = calls.get(script.get_base(name), {}) | settings.defaults
    return settings


def _add_parsed_settings(script: Script, settings: _ScriptSettings, code: ScriptCode) -> None:
    """Add settings from the command line, and what the script assigns to them."""
    aliases = load_rules("TRL").aliases
    given: dict[str, object] = {}
    for name, value in script.iter_parsed_settings():
        given[aliases.get(name, name)] = value
    for name, value in script.iter_parsed_changes():
        if not isinstance(value, ast.expr):
            given[aliases.get(name, name)] = value
        elif not _is_ignored(name):
            text = "changed by the script, which is not executed: check it in the recipe"
            code.note(name, ast.unparse(value), text)
    settings.values = given | settings.values
    for key in given:
        settings.unresolved.pop(key, None)


def _add_code_settings(script: Script, settings: _ScriptSettings, code: ScriptCode) -> None:
    """Add settings of the code and of the evaluation, which arguments replace."""
    found: dict[str, object] = {}
    for key, value in code.values.items():
        if key not in settings.unresolved:
            found[key] = value
    settings.values = found | _read_eval_data(script) | settings.values
    for key, text in code.unresolved.items():
        if key not in settings.values:
            settings.unresolved[key] = text


def _list_items(script: Script, value: ast.expr) -> dict[str, str]:
    """Return the items of a dict that a call receives, by name."""
    node = script.resolve(value)
    aliases = load_rules("TRL").aliases
    try:
        items = read_items(node, script.get_constants(node))
    except ValueError:
        return {}
    texts: dict[str, str] = {}
    for name, item in items.items():
        text = str(item)
        if isinstance(item, ast.expr):
            text = ast.unparse(item)
        texts[aliases.get(name, name)] = text
    return texts


def _read_eval_data(script: Script) -> dict[str, object]:
    """Return the settings of a dataset that only the evaluation uses."""
    for call in script.calls:
        is_for_evaluation = call in script.used and call not in script.used_for_training
        if script.split_callee(call)[1] == "load_dataset" and is_for_evaluation:
            values = script.read_arguments(call)
            found: dict[str, object] = {}
            for key, name in _EVAL_DATA_SETTINGS.items():
                if isinstance(values.get(name), _DATA_TYPES):
                    found[key] = values[name]
            return found
    return {}


def _list_calls() -> dict[str, dict[str, object]]:
    """Return the calls whose arguments are settings, with defaults of their own."""
    settings = load_trainer_settings()
    known = settings["TRL"]
    calls: dict[str, dict[str, object]] = {}
    for name in known["calls_without_defaults"].split():
        calls[name] = {}
    calls |= known["calls"]
    for name in settings["method_classes"].split():
        calls |= {f"{name}Config": {"stage": name.lower()}, f"{name}Trainer": {}}
    return calls


def _read_code(text: str, path: Path) -> str:
    """Return the code of a script, or that of a notebook without its shell commands."""
    if path.suffix != ".ipynb":
        return text
    cells: list[str] = []
    try:
        for cell in parse_json(text)["cells"]:
            if cell["cell_type"] == "code":
                cells.append(_drop_commands("".join(cell["source"])))
    except (ValueError, TypeError, LookupError) as error:
        what = "cannot be read as Python: a notebook is an object with `cells`"
        raise build_source_error(path, what, "save it with Jupyter, or as a .py file") from error
    return "\n".join(cells)


def _drop_commands(cell: str) -> str:
    """Return the code of a notebook cell without commands of IPython and of the shell."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        _parse_code(cell)
        return cell
    magic = _CELL_MAGIC.match(cell)
    if magic is not None and magic[1] not in _PYTHON_MAGICS:
        return ""
    cell = _COMMAND.sub(r"\1pass", cell)
    return _ASSIGNED_COMMAND.sub(r"\1 None", cell)


def _build_syntax_error(path: Path, error: Exception) -> UserError:
    """Build the error for a file that is no Python code."""
    what = " ".join(str(error).split())[:200]
    remedy = "correct the file"
    if isinstance(error, SyntaxError):
        what = f"{error.msg}, line {error.lineno}"
        remedy = "correct this line in a copy of the file"
    if isinstance(error, IndentationError):
        remedy = "restore the indentation, which a copy from a web page may lose"
    if isinstance(error, RecursionError | MemoryError):
        what = "expressions are nested too deeply"
    return build_source_error(path, f"cannot be read as Python: {what}", remedy)


def _check_training(
    script: Script,
    used: set[str],
    settings: _ScriptSettings,
    path: Path,
) -> None:
    """Raise UserError for a script without a training or without a model."""
    calls = _list_calls()
    starts = [name for name in used if "stage" in calls.get(name, {}) or name.endswith("Arguments")]
    if not starts and not script.trainers:
        what = "sets no training arguments, such as TrainingArguments(...) or SFTConfig(...)"
        names = {script.split_callee(call)[1] for call in script.calls}
        for callees, purpose, remedy in _OTHER_PURPOSES:
            if callees & names:
                raise build_source_error(path, f"{what}: {purpose}", remedy)
        raise build_source_error(path, what, _INIT_STEP)
    if is_empty(settings.values.get("model_name_or_path")):
        model = settings.unresolved.get("model_name_or_path")
        if model:
            what = f"loads the model {model!r}, which is no constant"
            raise build_source_error(path, what, _START_REMEDY)
        is_started = bool(script.parsed.classes or script.parsed.own)
        start_remedy: Remedy = _JOIN_REMEDY
        if is_started:
            start_remedy = _START_REMEDY
        raise build_source_error(path, "names no model", start_remedy)


def _find_repository(script: Script, model: str) -> str:
    """Return the repository of a model that the script downloads, or the name itself.

    A folder that exists here remains.
    """
    path = model.removeprefix("./").rstrip("/")
    if os.path.exists(os.path.expanduser(model)):
        return model
    for hub, name, folder in script.iter_downloads():
        repository = name.partition("@")[0]
        is_folder = folder != "" and model.startswith(folder)
        if is_folder or model in (name, repository) or path.endswith(repository):
            if hub == "modelscope":
                return f"modelscope:{name}"
            return name
    return model


def _take_notes(code: ScriptCode, unresolved: dict[str, str]) -> tuple[ConversionNote, ...]:
    """Return the notes about code, without settings that they replace."""
    notes = list(code.notes)
    if any(note.key == "callbacks" for note in notes):
        unresolved.pop("callbacks", None)
    collator = unresolved.get("data_collator", "")
    if collator.partition("(")[0].rpartition(".")[2] in _PADDING_COLLATORS:
        del unresolved["data_collator"]
        text = "samples are packed, not padded"
        notes.append(ConversionNote("ignored", "data_collator", collator, text))
    return tuple(notes)


def _is_ignored(key: str) -> bool:
    """Return whether a setting has no effect on the recipe."""
    rule = load_rules("TRL").find(key)
    return rule is not None and rule.is_ignored


def _name_program(text: str, used: set[str]) -> SourceProgram:
    """Return the library whose trainer a script uses."""
    if re.search(r"(?m)^[ \t]*(?:from|import) unsloth\b", text):
        return "Unsloth"
    methods = load_trainer_settings()["method_classes"].split()
    classes = {f"{method}{end}" for method in methods for end in ("Config", "Trainer")}
    return "TRL" if used & classes else "Transformers"
