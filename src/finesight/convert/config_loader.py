"""Load the configuration of an ms-swift or LLaMA-Factory training from a file or shell script."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from finesight.bounded_files import load_yaml, parse_json
from finesight.convert.external_config import (
    ConversionNote,
    ExternalConfig,
    SourceProgram,
    load_rules,
)
from finesight.errors import UserError, suggest_similar_path

MAX_CONFIG_BYTES = 4_000_000
"""Maximum size of a configuration file in bytes."""

UNKNOWN_COUNT = "unknown"
"""Value of NPROC_PER_NODE if a launcher determines the number of processes at run time."""

CONVERTED_VARIABLES = {
    *("MAX_PIXELS", "MIN_PIXELS", "IMAGE_MAX_TOKEN_NUM", "IMAGE_MIN_TOKEN_NUM", "USE_HF"),
    *("NPROC_PER_NODE", "NNODES", "CUDA_VISIBLE_DEVICES", "USE_MODELSCOPE_HUB"),
}
"""Environment variables that the converters read; others are only reported."""

_EXPECTED = (
    "YAML or JSON of LLaMA-Factory, a shell script with `swift sft` or `llamafactory-cli"
    " train`, YAML of ms-swift, or args.json of an ms-swift run"
)
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_MS_SWIFT_KEYS = (
    *("dataset", "tuner_type", "train_type", "sft_type", "swift_version", "freeze_vit", "ENV"),
)
"""Settings that, together with a model, identify a configuration of ms-swift."""

_OTHER_COMMANDS = {
    "megatron sft": "training with Megatron, which has other settings",
    "rlhf": "preference and reinforcement learning (DPO, GRPO, PPO, KTO, ...)",
    "pt": "pretraining on plain text",
    "sample": "sampling",
    "rollout": "reinforcement learning",
    "infer": "inference, in finesight `finesight predict`",
    "deploy": "serving, in finesight `finesight serve`",
    "app": "chat UI, in finesight `finesight web`",
    "web-ui": "chat UI, in finesight `finesight web`",
    "eval": "evaluation, in finesight `finesight eval`",
    "export": "merging and export, in finesight `finesight merge`",
    "merge-lora": "merging, in finesight `finesight merge`",
    "chat": "chat, in finesight `finesight chat`",
    "webchat": "chat UI, in finesight `finesight web`",
    "api": "serving, in finesight `finesight serve`",
}
"""Commands of ms-swift and LLaMA-Factory that are no supervised fine-tuning, for messages."""

_TRAINING_COMMANDS = ("sft", "train")
_PROGRAMS: dict[str, SourceProgram] = {
    "swift": "ms-swift",
    "llamafactory-cli": "LLaMA-Factory",
    "lmf": "LLaMA-Factory",
}
_COMMAND_PREFIXES = ("env", "nohup", "exec", "time", "sudo", "export", "declare", "-x")
_CONTROL_KEYWORDS = ("if", "for", "while", "until", "case", "function")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_SUBSTITUTION = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)")
_QUOTED_OR_SKIPPED = re.compile(
    r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)#[^\n]*|(?<!\S)[\d&]*[<>]+&?[ \t]*[^\s;|&]+""",
    re.DOTALL,
)
"""Quoted text and escaped characters, which remain, or comments and redirections."""


def load_external_config(path: Path) -> ExternalConfig:
    """Load a training configuration from YAML, JSON, or a shell script, which is not executed.

    Raises UserError for an unreadable file and for one without a training configuration.
    """
    if path.suffix in _CONFIG_SUFFIXES:
        return _config_from_content(_parse_content(path), path)
    return _config_from_script(_read_text(path), path)


def _build_error(path: Path, what: str, remedy: str) -> UserError:
    return UserError(what, where=str(path), expected=_EXPECTED, remedy=remedy)


def _read_text(path: Path) -> str:
    try:
        if not path.exists():
            raise _build_error(path, "file does not exist", suggest_similar_path(path))
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            limit = f"a configuration file of at most {MAX_CONFIG_BYTES / 1e6:g} MB"
            raise _build_error(path, "is not a configuration file", f"use {limit}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8 text"
        raise _build_error(path, what, "save the file as UTF-8") from error
    except (OSError, ValueError) as error:
        what = f"cannot be read: {error}"
        raise _build_error(path, what, "check the path and its permissions") from error


def _parse_content(path: Path) -> dict[str, object]:
    text = _read_text(path)
    try:
        content = parse_json(text) if path.suffix == ".json" else load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        what = f"cannot be read: {' '.join(str(error).split())}"
        raise _build_error(path, what, "correct the file") from error
    if not isinstance(content, dict) or not content:
        remedy = "use the file that started the training"
        raise _build_error(path, "has no named settings", remedy)
    return {str(key): value for key, value in content.items()}


def _config_from_content(content: dict[str, object], path: Path) -> ExternalConfig:
    """Build the configuration from a file, detecting its program by the name of the model."""
    if isinstance(content.get("data"), dict) and "model" in content and "output_dir" in content:
        raise _build_error(path, "is a finesight recipe already", f"finesight train {path}")
    if "model_name_or_path" in content:
        return _build_config("LLaMA-Factory", content, path, {})
    if content.keys() & {"model", "model_id_or_path"} and content.keys() & {*_MS_SWIFT_KEYS}:
        return _build_config("ms-swift", content, path, {})
    what = f"is not a known configuration: {', '.join(list(content)[:6])}"
    raise _build_error(path, what, "use the file that started the training")


def _build_config(
    program: SourceProgram,
    content: Mapping[str, object],
    path: Path,
    environment: Mapping[str, str],
) -> ExternalConfig:
    aliases = load_rules(program).aliases
    values = {aliases.get(key, key): value for key, value in content.items()}
    if program == "ms-swift" and isinstance(file_environment := values.pop("ENV", None), dict):
        # Variables set outside take precedence.
        environment = {str(k): str(v) for k, v in file_environment.items()} | dict(environment)
    is_recorded = program == "ms-swift" and "swift_version" in values
    return ExternalConfig(program, str(path), values, environment, is_recorded)


def _config_from_script(text: str, path: Path) -> ExternalConfig:
    config: ExternalConfig | None = None
    notes: list[ConversionNote] = []
    other_commands: list[str] = []
    exported: dict[str, str] = {}
    for command in _split_commands(text, path):
        words, assigned = list(command), dict[str, str]()
        while words and (words[0] in _COMMAND_PREFIXES or _ASSIGNMENT.fullmatch(words[0])):
            if match := _ASSIGNMENT.fullmatch(words.pop(0)):
                assigned[match[1]] = match[2]
        if command[0] in ("export", "declare"):
            exported |= assigned
        if words and words[0].startswith("--"):
            message = "not a part of the command: the previous line does not end with a backslash"
            notes.append(ConversionNote("unknown", words[0], " ".join(words[1:]), message))
        program, name, index = _find_program(words)
        if program is None:
            continue
        if config is not None or name not in _TRAINING_COMMANDS:
            kind = _OTHER_COMMANDS.get(name, "another training")
            other_commands.append(f"{program}'s {name}: {kind}")
            continue
        environment = exported | assigned
        _require_resolved(words, environment, path)
        environment |= _read_launcher(words[:index])
        config = _config_from_command(program, words[index:], environment, path)
    if config is not None:
        message = "only the first training was converted"
        notes += [
            ConversionNote("unknown", "also in the file", other, message)
            for other in other_commands
        ]
        return dataclasses.replace(config, extra_notes=tuple(notes))
    what = "contains no command of ms-swift or LLaMA-Factory"
    remedy = "use the script of a supervised fine-tuning"
    raise _build_error(path, other_commands[0] if other_commands else what, remedy)


def _split_commands(text: str, path: Path) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell script.

    Raises UserError for conditions, loops, here-documents and unclosed quotation marks.
    """
    text = _SUBSTITUTION.sub("$...", text)
    text = _QUOTED_OR_SKIPPED.sub(lambda match: match[1] or "", text).replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n;|&()<>")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    try:
        words = [*lexer, "\n"]
    except ValueError as error:
        remedy = "close the quotation mark"
        raise _build_error(path, "has an unclosed quotation mark", remedy) from error
    command: list[str] = []
    for word in words:
        if not set(word) <= set("\n;|&()<>{}"):
            command.append(word)
        elif command:
            if command[0] in _CONTROL_KEYWORDS:
                raise _build_unresolved_error(path, f"{command[0]} ...")
            yield command
            command = []


def _require_resolved(words: Sequence[str], environment: Mapping[str, str], path: Path) -> None:
    """Raise UserError if the values of a command are known only when its script runs."""
    values = [environment[name] for name in environment.keys() & CONVERTED_VARIABLES]
    for value in (*words, *values):
        if "$" in value or "`" in value:
            raise _build_unresolved_error(path, value)


def _build_unresolved_error(path: Path, text: str) -> UserError:
    return UserError(
        f"the training command depends on {text!r}, and finesight does not execute scripts",
        where=str(path),
        expected="a command without variables, command substitutions, conditions and loops",
        remedy="print the resolved command (bash -x), and save it in a file ending in .sh",
    )


def _find_program(words: Sequence[str]) -> tuple[SourceProgram | None, str, int]:
    """Find the training program in a shell command, its subcommand, and its first argument."""
    for index, word in enumerate(words):
        basename, following = word.rpartition("/")[2], words[index + 1 : index + 2]
        name = following[0].replace("_", "-") if following else ""
        if name in (*_TRAINING_COMMANDS, *_OTHER_COMMANDS):
            if basename == "megatron":
                return "ms-swift", f"megatron {name}", len(words)
            if basename in _PROGRAMS:
                return _PROGRAMS[basename], name, index + 2
        if word == "swift.cli.sft" or word.endswith("swift/cli/sft.py"):
            return "ms-swift", "sft", index + 1
        if word.endswith(("src/train.py", "llamafactory/launcher.py")):
            return "LLaMA-Factory", "train", index + 1
    return None, "", len(words)


def _config_from_command(
    program: SourceProgram, arguments: list[str], environment: Mapping[str, str], path: Path
) -> ExternalConfig:
    """Build the configuration from a file that the command names, and options that override it."""
    content: dict[str, object] = {}
    if arguments and arguments[0].endswith(_CONFIG_SUFFIXES):
        config_path = Path(arguments.pop(0))
        exists = os.path.exists(config_path)
        content = _parse_content(config_path if exists else path.parent / config_path)
        # LLaMA-Factory accepts name=value after a file.
        while arguments and "=" in arguments[0] and arguments[0][0] != "-":
            name, _, value = arguments.pop(0).partition("=")
            content[name] = value
    content |= _parse_options(arguments)
    if not content:
        remedy = "use the file that started the training"
        raise _build_error(path, f"the command of {program} has no settings", remedy)
    return _build_config(program, content, path, environment)


def _parse_options(words: Sequence[str]) -> dict[str, object]:
    """Parse the options of a command, `--name value ...` or `--name=value`.

    An option without a value becomes "true", one with several values a list. Of repeated options,
    the last one wins. Words before the first option have the key `arguments without an option`.
    """
    settings: dict[str, object] = {}
    name, values = "", list[str]()
    for word in (*words, "--"):
        if not re.match(r"--?[A-Za-z]|--$", word):
            values.append(word)
            continue
        if name or values:
            key = name or "arguments without an option"
            settings[key] = values[0] if len(values) == 1 else values or "true"
        name, separator, value = word.lstrip("-").partition("=")
        name, values = name.replace("-", "_"), [value] if separator else []
    return settings


def _read_launcher(words: Sequence[str]) -> dict[str, str]:
    """Return NPROC_PER_NODE and NNODES as set by torchrun, deepspeed or accelerate."""
    basenames = [word.rpartition("/")[2] for word in words]
    is_torchrun = any(re.match(r"torchrun$|torch\.distributed\.", name) for name in basenames)
    if not is_torchrun and not {"deepspeed", "accelerate"} & {*basenames}:
        return {}
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--nproc_per_node", "--nproc-per-node", default="1")
    parser.add_argument("--nnodes", "--num_nodes", default="1")
    parser.add_argument("--num_gpus", "--num_processes", default=UNKNOWN_COUNT)
    parser.add_argument("--include", default="")
    try:
        options, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        return {"NPROC_PER_NODE": UNKNOWN_COUNT}
    num_processes = options.nproc_per_node if is_torchrun else options.num_gpus
    if options.include and "@" not in options.include:
        num_processes = str(len(options.include.partition(":")[2].split(",")))
    if not num_processes.isdecimal() or not options.nnodes.isdecimal():
        return {"NPROC_PER_NODE": UNKNOWN_COUNT}
    return {"NPROC_PER_NODE": num_processes, "NNODES": options.nnodes}
