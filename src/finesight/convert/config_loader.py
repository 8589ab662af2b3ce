"""Load the configuration of an ms-swift or LLaMA-Factory training from a file or shell script."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from finesight.bounded_files import load_yaml, parse_json, read_text
from finesight.convert.external_config import ExternalConfig, SourceProgram, load_rules
from finesight.errors import UserError, suggest_similar_path
from finesight.recipe import load_trainer_settings

UNKNOWN_COUNT = "unknown"
"""Value of NPROC_PER_NODE if a launcher determines the number of processes at run time."""

CONVERTED_VARIABLES = {
    *("MAX_PIXELS", "MIN_PIXELS", "IMAGE_MAX_TOKEN_NUM", "IMAGE_MIN_TOKEN_NUM", "USE_HF"),
    *("NPROC_PER_NODE", "NNODES", "CUDA_VISIBLE_DEVICES", "USE_MODELSCOPE_HUB"),
}
"""Environment variables that the converters read; others are only reported."""

_EXPECTED = "YAML, JSON, or a shell script with `swift sft` or `llamafactory-cli train`"
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_MS_SWIFT_KEYS = {"dataset", "tuner_type", "train_type", "sft_type", "swift_version", "ENV"}
"""Settings that, together with a model, identify a configuration of ms-swift."""

_PROGRAMS: dict[str, SourceProgram] = {
    **{"swift": "ms-swift", "megatron": "ms-swift"},
    **{"llamafactory-cli": "LLaMA-Factory", "lmf": "LLaMA-Factory"},
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
    if path.suffix not in _CONFIG_SUFFIXES:
        return _config_from_script(_read_text(path), path)
    content = _parse_content(path)
    if isinstance(content.get("data"), dict) and "model" in content and "output_dir" in content:
        raise _build_error(
            path, "is a finesight recipe already", f"finesight train {shlex.quote(str(path))}"
        )
    if "model_name_or_path" in content:
        return _build_config("LLaMA-Factory", content, path, {})
    if content.keys() & {"model", "model_id_or_path"} and content.keys() & _MS_SWIFT_KEYS:
        return _build_config("ms-swift", content, path, {})
    what = f"is not a known configuration: {', '.join(list(content)[:6])}"
    raise _build_error(path, what, "use the file that started the training")


def _build_error(path: Path, what: str, remedy: str) -> UserError:
    return UserError(what, where=str(path), expected=_EXPECTED, remedy=remedy)


def _read_text(path: Path) -> str:
    remedy = suggest_similar_path(path) if not path.exists() else "use a UTF-8 file of at most 4 MB"
    text = read_text(path, expected=_EXPECTED, remedy=remedy, max_bytes=4_000_000)
    return text.removeprefix("\ufeff")


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


def _build_config(
    program: SourceProgram, content: dict[str, object], path: Path, environment: dict[str, str]
) -> ExternalConfig:
    aliases = load_rules(program).aliases
    values = {aliases.get(key, key): value for key, value in content.items()}
    if program == "ms-swift" and isinstance(file_environment := values.pop("ENV", None), dict):
        # Variables set outside take precedence.
        environment = {str(k): str(v) for k, v in file_environment.items()} | environment
    is_recorded = program == "ms-swift" and "swift_version" in values
    return ExternalConfig(program, str(path), values, environment, is_recorded)


def _config_from_script(text: str, path: Path) -> ExternalConfig:
    """Build the configuration from the only training command of a script."""
    trainings, others, exported = [], list[str](), dict[str, str]()
    for command in _split_commands(text, path):
        words, assigned = list(command), dict[str, str]()
        while words and (words[0] in _COMMAND_PREFIXES or _ASSIGNMENT.fullmatch(words[0])):
            if match := _ASSIGNMENT.fullmatch(words.pop(0)):
                assigned[match[1]] = match[2]
        if command[0] in ("export", "declare"):
            exported |= assigned
        if words and words[0].startswith("--"):
            remedy = "end the preceding line with a backslash, or remove this line"
            raise _build_error(path, f"{words[0]} is not a part of a command", remedy)
        program, name, index = _find_program(words)
        if program is not None and name in ("sft", "train"):
            trainings.append((program, words[:index], words[index:], exported | assigned))
        elif program is not None:
            others.append(f"{program}'s {name}: {load_trainer_settings()['commands'][name]}")
    if len(trainings) != 1:
        what = "contains no command of ms-swift or LLaMA-Factory"
        what = f"contains {len(trainings)} training commands" if trainings else [*others, what][0]
        raise _build_error(path, what, "use a script with one supervised fine-tuning")
    ((program, launcher, arguments, environment),) = trainings
    values = [environment[name] for name in environment.keys() & CONVERTED_VARIABLES]
    for value in (*launcher, *arguments, *values):
        if "$" in value or "`" in value:
            raise _build_unresolved_error(path, value)
    environment |= _read_launcher(launcher)
    content: dict[str, object] = {}
    if arguments and arguments[0].endswith(_CONFIG_SUFFIXES):
        config_path = Path(arguments.pop(0))
        content = _parse_content(config_path if config_path.exists() else path.parent / config_path)
        # LLaMA-Factory accepts name=value after a file.
        while arguments and "=" in arguments[0] and arguments[0][0] != "-":
            key, _, value = arguments.pop(0).partition("=")
            content[key] = value
    content |= _parse_options(arguments)
    return _build_config(program, content, path, environment)


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
        raise _build_error(path, "has an unclosed quotation mark", "close it") from error
    command: list[str] = []
    for word in words:
        if not set(word) <= set("\n;|&()<>{}"):
            command.append(word)
        elif command:
            if command[0] in _CONTROL_KEYWORDS:
                raise _build_unresolved_error(path, f"{command[0]} ...")
            yield command
            command = []


def _build_unresolved_error(path: Path, text: str) -> UserError:
    what = f"the training command depends on {text!r}, and finesight does not execute scripts"
    remedy = (
        "save the resolved command, with values in place of variables and loops, in another .sh"
        " file; `bash -x` prints it as it runs"
    )
    return _build_error(path, what, remedy)


def _find_program(words: Sequence[str]) -> tuple[SourceProgram | None, str, int]:
    """Find the training program in a shell command, its subcommand, and its first argument."""
    names = {"sft", "train", *load_trainer_settings()["commands"]}
    for index, word in enumerate(words):
        basename, following = word.rpartition("/")[2], words[index + 1 : index + 2]
        name = following[0].replace("_", "-") if following else ""
        name = f"megatron {name}" if basename == "megatron" else name
        if basename in _PROGRAMS and name in names:
            return _PROGRAMS[basename], name, index + 2
        if word == "swift.cli.sft" or word.endswith("swift/cli/sft.py"):
            return "ms-swift", "sft", index + 1
        if word.endswith(("src/train.py", "llamafactory/launcher.py")):
            return "LLaMA-Factory", "train", index + 1
    return None, "", len(words)


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
    names = {word.rpartition("/")[2] for word in words}
    is_torchrun = bool(names & {"torchrun", "torch.distributed.run", "torch.distributed.launch"})
    if not is_torchrun and not names & {"deepspeed", "accelerate"}:
        return {}
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    default = "1" if is_torchrun else UNKNOWN_COUNT
    count_options = ("--nproc_per_node", "--nproc-per-node", "--num_gpus", "--num_processes")
    parser.add_argument(*count_options, dest="count", default=default)
    parser.add_argument("--nnodes", "--num_nodes", default="1")
    try:
        options, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        return {"NPROC_PER_NODE": UNKNOWN_COUNT}
    is_known = options.count.isdecimal() and options.nnodes.isdecimal()
    counts = {"NPROC_PER_NODE": options.count, "NNODES": options.nnodes}
    return counts if is_known else {"NPROC_PER_NODE": UNKNOWN_COUNT}
