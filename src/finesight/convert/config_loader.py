"""Load the configuration of an ms-swift or LLaMA-Factory training from a file or shell script."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import yaml

from finesight.bounded_files import parse_json
from finesight.bounded_yaml import load_yaml
from finesight.convert import llama_factory_rules, ms_swift_rules
from finesight.convert.external_config import ExternalConfig, SourceProgram
from finesight.convert.setting_rules import ConversionNote
from finesight.convert.shell_parser import (
    CONTROL_KEYWORDS,
    POSITIONAL_KEY,
    SCRIPT_ARGUMENTS,
    UNRESOLVED,
    ShellCommand,
    parse_commands,
    parse_options,
)
from finesight.errors import UserError, suggest_similar_path

MAX_CONFIG_BYTES = 4_000_000
"""Maximum size of a configuration file in bytes."""

_EXPECTED = (
    "YAML or JSON of LLaMA-Factory, a shell script with `swift sft` or `llamafactory-cli"
    " train`, YAML of ms-swift, or args.json of an ms-swift run"
)
_DEFAULTS: dict[SourceProgram, Mapping[str, object]] = {
    "ms-swift": ms_swift_rules.DEFAULTS,
    "LLaMA-Factory": llama_factory_rules.DEFAULTS,
}
_ALIASES: dict[SourceProgram, Mapping[str, str]] = {
    "ms-swift": ms_swift_rules.ALIASES,
    "LLaMA-Factory": llama_factory_rules.ALIASES,
}
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
_PROGRAM_BY_COMMAND: dict[str, SourceProgram] = {
    "swift": "ms-swift",
    "llamafactory-cli": "LLaMA-Factory",
    "lmf": "LLaMA-Factory",
}


def load_external_config(path: Path) -> ExternalConfig:
    """Load a training configuration of ms-swift or LLaMA-Factory.

    YAML and JSON files contain the settings. In any other file, a shell script is assumed, whose
    training command is parsed but not executed.

    Raises UserError for an unreadable file and for one without a training configuration.
    """
    text = _read_text(path)
    if path.suffix in (".yaml", ".yml", ".json"):
        return _config_from_content(_parse_content(text, path), path, {})
    return _config_from_script(text, path)


def _read_text(path: Path) -> str:
    try:
        if not path.exists():
            raise UserError(
                "file does not exist",
                where=str(path),
                expected=_EXPECTED,
                remedy=suggest_similar_path(path),
            )
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(
                "is not a configuration file",
                where=str(path),
                expected=f"{_EXPECTED}, up to {MAX_CONFIG_BYTES / 1e6:g} MB",
                remedy="use the configuration file itself",
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8 text",
            where=str(path),
            expected=_EXPECTED,
            remedy="save the file as UTF-8",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read: {error}",
            where=str(path),
            expected=_EXPECTED,
            remedy="check the path and its permissions",
        ) from error


def _parse_content(text: str, path: Path) -> dict[str, object]:
    try:
        content = parse_json(text) if path.suffix == ".json" else load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"cannot be read: {line}",
            where=str(path),
            expected=_EXPECTED,
            remedy="correct the file",
        ) from error
    if not isinstance(content, dict) or not content:
        raise _build_unknown_error(path, "has no named settings")
    return {str(key): value for key, value in content.items()}


def _build_unknown_error(path: Path, what: str) -> UserError:
    return UserError(
        what,
        where=str(path),
        expected=_EXPECTED,
        remedy="use the file that started the training",
    )


def _config_from_content(
    content: dict[str, object], path: Path, environment: Mapping[str, str]
) -> ExternalConfig:
    """Build the configuration from the settings of a file.

    The program is detected by its name of the model setting: `model_name_or_path` in LLaMA-Factory,
    `model` or `model_id_or_path` in ms-swift.
    """
    if isinstance(content.get("data"), dict) and "model" in content and "output_dir" in content:
        raise UserError(
            "is a finesight recipe already",
            where=str(path),
            expected=_EXPECTED,
            remedy=f"finesight train {path}",
        )
    if "model_name_or_path" in content:
        return _build_config("LLaMA-Factory", content, path, environment)
    if any(name in content for name in ("model", "model_id_or_path")) and any(
        name in content for name in ms_swift_rules.IDENTIFYING_KEYS
    ):
        return _build_config("ms-swift", content, path, environment)
    raise _build_unknown_error(
        path, f"is not a known configuration: {', '.join(list(content)[:6])}"
    )


def _build_config(
    program: SourceProgram,
    content: Mapping[str, object],
    path: Path,
    environment: Mapping[str, str],
) -> ExternalConfig:
    aliases = _ALIASES[program]
    values = {aliases.get(key, key): value for key, value in content.items()}
    if program == "ms-swift" and isinstance(environment_values := values.pop("ENV", None), dict):
        # Variables set outside take precedence.
        environment = {str(k): str(v) for k, v in environment_values.items()} | dict(environment)
    is_recorded = program == "ms-swift" and "swift_version" in values
    return ExternalConfig(program, str(path), values, _DEFAULTS[program], environment, is_recorded)


def _config_from_script(text: str, path: Path) -> ExternalConfig:
    config: ExternalConfig | None = None
    other_commands: list[str] = []
    notes: list[ConversionNote] = []
    for command in parse_commands(text, str(path)):
        if command.words[0] in CONTROL_KEYWORDS:
            message = "conditions and loops are not evaluated: check these values"
            notes.append(
                ConversionNote("unknown", command.words[0], " ".join(command.words[1:]), message)
            )
        if command.words[0].startswith("--"):
            message = "not a part of the command: the previous line does not end with a backslash"
            first, *rest = command.words
            notes.append(ConversionNote("unknown", first, " ".join(rest), message))
        program, name, index = _find_program(command.words)
        if program is None:
            continue
        if config is None and name in _TRAINING_COMMANDS:
            config = _config_from_command(program, command, index, path)
        else:
            other_commands.append(
                f"{program}'s {name}: {_OTHER_COMMANDS.get(name, 'another training')}"
            )
    if config is not None:
        message = "only the first training was converted"
        notes += [
            ConversionNote("unknown", "also in the file", other, message)
            for other in other_commands
        ]
        return dataclasses.replace(config, extra_notes=tuple(notes))
    if other_commands:
        raise UserError(
            other_commands[0],
            where=str(path),
            expected="supervised fine-tuning: `swift sft` or `llamafactory-cli train`",
            remedy="use the script of such a training",
        )
    raise _build_unknown_error(path, "contains no command of ms-swift or LLaMA-Factory")


def _find_program(words: tuple[str, ...]) -> tuple[SourceProgram | None, str, int]:
    """Find the call of ms-swift or LLaMA-Factory in the words of a shell command.

    Returns the program, its subcommand such as `sft`, and the index of the first argument. The
    program is None if the command calls neither.
    """
    for index, word in enumerate(words):
        basename, rest = word.rpartition("/")[2], words[index + 1 :]
        name = rest[0].replace("_", "-") if rest else ""
        if basename == "megatron" and name in (*_TRAINING_COMMANDS, *_OTHER_COMMANDS):
            return "ms-swift", f"megatron {name}", len(words)
        if basename in _PROGRAM_BY_COMMAND and name in (*_TRAINING_COMMANDS, *_OTHER_COMMANDS):
            return _PROGRAM_BY_COMMAND[basename], name, index + 2
        if word == "swift.cli.sft" or word.endswith("swift/cli/sft.py"):
            return "ms-swift", "sft", index + 1
        if word.endswith(("src/train.py", "llamafactory/launcher.py")):
            return "LLaMA-Factory", "train", index + 1
    return None, "", len(words)


def _config_from_command(
    program: SourceProgram, command: ShellCommand, index: int, path: Path
) -> ExternalConfig:
    """Build the configuration from the words of a training command in a shell script.

    Options override the configuration file that the command names. `index` is that of the first
    argument in `command.words`.
    """
    rest = tuple(word for word in command.words[index:] if word not in SCRIPT_ARGUMENTS)
    content: dict[str, object] = {}
    if rest and rest[0].endswith((".yaml", ".yml", ".json")):
        config_path = Path(rest[0])
        existing_path = config_path if config_path.exists() else path.parent / config_path
        content = _parse_content(_read_text(existing_path), existing_path)
        rest = rest[1:]
        # LLaMA-Factory accepts name=value after a file.
        assignments = [word.partition("=") for word in rest if "=" in word and word[0] != "-"]
        content |= {name: value for name, separator, value in assignments if separator}
        rest = tuple(word for word in rest if "=" not in word or word[0] == "-")
    content |= parse_options(rest)
    if not content:
        raise _build_unknown_error(path, f"the command of {program} has no settings")
    if any(word in SCRIPT_ARGUMENTS for word in command.words[index:]):
        content.setdefault(POSITIONAL_KEY, SCRIPT_ARGUMENTS[0])
    launcher_variables = _read_launcher(command.words[:index])
    return _build_config(program, content, path, {**command.environment, **launcher_variables})


def _read_launcher(words: tuple[str, ...]) -> dict[str, str]:
    """Read the number of processes from a torchrun, deepspeed or accelerate command.

    Returns NPROC_PER_NODE and NNODES, the environment variables that both programs use for it, or
    an empty dict without a launcher.
    """
    basenames = [word.rpartition("/")[2] for word in words]
    launcher_options = {key: _first_value(value) for key, value in parse_options(words).items()}
    if "torchrun" in basenames or any(name.startswith("torch.distributed.") for name in basenames):
        procs_per_node, num_nodes = (
            launcher_options.get("nproc_per_node", "1"),
            launcher_options.get("nnodes", "1"),
        )
    elif "deepspeed" in basenames:
        _, _, included = launcher_options.get("include", "").partition(":")
        is_single_node = included and "@" not in included
        procs_per_node = (
            str(len(included.split(",")))
            if is_single_node
            else launcher_options.get("num_gpus", UNRESOLVED)
        )
        num_nodes = launcher_options.get("num_nodes", "1")
    elif "accelerate" in basenames:
        # Total of all nodes.
        procs_per_node, num_nodes = launcher_options.get("num_processes", UNRESOLVED), "1"
    else:
        return {}
    counts = {"NPROC_PER_NODE": procs_per_node, "NNODES": num_nodes}
    return {name: count if count.isdecimal() else UNRESOLVED for name, count in counts.items()}


def _first_value(value: object) -> str:
    return str(value[0] if isinstance(value, list) else value)
