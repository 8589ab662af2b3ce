"""Load the configuration of a training with another program from a file or script."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from finesight.bounded_files import load_yaml, parse_json, read_text
from finesight.convert.external_config import (
    OBJECTIVES,
    ExternalConfig,
    SourceProgram,
    load_rules,
)
from finesight.convert.python_script import AmbiguousConfigError, Script, evaluate_constant
from finesight.errors import Remedy, Step, UserError, suggest_similar_path
from finesight.recipe import invert_groups, load_trainer_settings

UNKNOWN_COUNT = "unknown"
"""Value of NPROC_PER_NODE if a launcher determines the number of processes at run time."""

CONVERTED_VARIABLES = {
    "MAX_PIXELS",
    "MIN_PIXELS",
    "IMAGE_MAX_TOKEN_NUM",
    "IMAGE_MIN_TOKEN_NUM",
    "USE_HF",
    "NPROC_PER_NODE",
    "NNODES",
    "CUDA_VISIBLE_DEVICES",
    "USE_MODELSCOPE_HUB",
}
"""Environment variables that the converters read; others are only reported."""

_EXPECTED = (
    "a configuration of ms-swift, LLaMA-Factory or TRL in YAML or JSON, a shell script with their"
    " command, or a Python script or notebook of TRL or Unsloth"
)
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_MS_SWIFT_KEYS = {"dataset", "tuner_type", "train_type", "sft_type", "swift_version", "ENV"}
"""Settings that, together with a model, identify a configuration of ms-swift."""

_TRL_KEYS = {"dataset_name", "datasets", "use_peft", "lora_r", "lora_target_modules"}
_LLAMA_FACTORY_KEYS = {"stage", "finetuning_type", "template", "dataset"}

_PROGRAMS: dict[str, SourceProgram] = {
    **{"swift": "ms-swift", "megatron": "ms-swift", "trl": "TRL"},
    **{"llamafactory-cli": "LLaMA-Factory", "lmf": "LLaMA-Factory"},
}
_SCRIPTS: dict[str, SourceProgram] = {
    r"(?:.*/)?swift[./]cli[./](sft|rlhf)(?:\.py)?": "ms-swift",
    r"(?:.*/)?(?:src/train(?:_bash)?|llamafactory/launcher)\.py()": "LLaMA-Factory",
    r"(?:.*/)?src/train(?:ing)?/train_?(\w*)\.py": "Qwen-VL-Series-Finetune",
    r"(?:.*/)?(sft|dpo|grpo|kto|gkd|distillation|orpo|reward)(?:_vlm\w*)?\.py": "TRL",
}
"""Programs that start as a Python script, by a pattern with the training method."""
_PEER_OPTION = re.compile(r"--(?:node|machine|master|main|rdzv)[_-]\w+[ =]\S*")
"""Option of a launcher for the rank or address of a node."""

_LITERAL_DOLLAR = "\0"
"""Replaces a dollar sign that starts no variable, in single quotes or after a backslash."""

_COMMAND_PREFIXES = (
    "env",
    "nohup",
    "exec",
    "time",
    "sudo",
    "export",
    "declare",
    "readonly",
    "-x",
    "-r",
    "-a",
)
_CONTROL_KEYWORDS = ("if", "for", "while", "until", "case", "function")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_ARRAY_START = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_ARRAY_ITEMS = re.compile(r"[$\x01]\{(\w+)\[@\]\}")
_ARITHMETIC = re.compile(r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)")
_SUBSTITUTION = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)")
_PROTECTED = str.maketrans("() \t\n", "\2\3\4\4\4")
_UNPROTECTED = str.maketrans("\2\3\4", "() ")
"""Characters of an arithmetic expression that must not end its word."""

_VARIABLE = re.compile(
    r"[$\x01](?:([A-Za-z_]\w*)|\{(\w+)(?::?[-=]([^}$]*))?\}|\x02\x02(.*?)\x03\x03(?!\x03))"
)
"""`$NAME`, `${NAME:-default}` or arithmetic; a dollar sign in double quotes is \1."""

_QUOTED_OR_SKIPPED = re.compile(
    r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)#[^\n]*|(?<!\S)[\d&]*[<>]+&?[ \t]*[^\s;|&]+""",
    re.DOTALL,
)
"""Quoted text and escaped characters, which remain, or comments and redirections."""


def load_external_config(path: Path) -> ExternalConfig:
    """Load a training configuration from YAML, JSON, or a shell script, which is not executed.

    Raises UserError for an unreadable file and for one without a training configuration.
    """
    if path.suffix in (".py", ".ipynb"):
        return _config_from_python(_read_text(path), path)
    if path.suffix not in _CONFIG_SUFFIXES:
        return _config_from_script(_read_text(path), path)
    content = _parse_content(path)
    if isinstance(content.get("data"), dict) and "model" in content and "output_dir" in content:
        step = Step("train", {"recipe": str(path)})
        raise _build_error(path, "is a finesight recipe already", step)
    if "model_name_or_path" in content:
        is_trl = content.keys() & _TRL_KEYS and not content.keys() & _LLAMA_FACTORY_KEYS
        return _build_config("TRL" if is_trl else "LLaMA-Factory", content, path, {})
    if content.keys() & {"model", "model_id_or_path"} and content.keys() & _MS_SWIFT_KEYS:
        return _build_config("ms-swift", content, path, {})
    what = f"is not a known configuration: {', '.join(list(content)[:6])}"
    raise _build_error(path, what, "use the file that started the training")


def _build_error(path: Path, what: str, remedy: Remedy) -> UserError:
    return UserError(what, where=str(path), expected=_EXPECTED, remedy=remedy)


def _read_text(path: Path) -> str:
    remedy = "use a UTF-8 file of at most 4 MB"
    remedy = remedy if path.exists() else str(suggest_similar_path(path))
    text = read_text(path, expected=_EXPECTED, remedy=remedy, max_bytes=4_000_000)
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


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
    file_environment = values.pop("env" if program == "TRL" else "ENV", None)
    if isinstance(file_environment, dict):
        # Variables set outside take precedence.
        environment = {str(k): str(v) for k, v in file_environment.items()} | environment
    is_recorded = program == "ms-swift" and "swift_version" in values
    return ExternalConfig(program, str(path), values, environment, is_recorded)


def _config_from_python(text: str, path: Path) -> ExternalConfig:
    """Build the configuration from the constant arguments of a Python script or notebook."""
    try:
        if path.suffix == ".ipynb":
            cells = [cell for cell in parse_json(text)["cells"] if cell["cell_type"] == "code"]
            lines = "\n".join("".join(cell["source"]) for cell in cells)
            text = re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", lines)
        known = load_trainer_settings()["TRL"]
        calls = {key: {} for key in known["calls_without_defaults"].split()} | known["calls"]
        for name in known["method_classes"].split():
            calls |= {f"{name}Config": {"stage": name.lower()}, f"{name}Trainer": {}}
        arguments = list(Script(ast.parse(text)).iter_arguments(calls))
    except AmbiguousConfigError as error:
        remedy = "keep only the one that the training uses in a copy of the script"
        raise _build_error(path, str(error), remedy) from error
    except (SyntaxError, ValueError, TypeError, LookupError, RecursionError, MemoryError) as error:
        what = f"cannot be read as Python: {' '.join(str(error).split())[:200]}"
        raise _build_error(path, what, "correct the file") from error
    values: dict[str, object] = {}
    defaults: dict[str, object] = {}
    unresolved: dict[str, str] = {}
    for callee, name, value in arguments:
        key = load_rules("TRL").aliases.get(name, name)
        defaults = calls[callee] | defaults
        if isinstance(value, ast.expr):
            unresolved.setdefault(key, ast.unparse(value))
        elif key:
            values.setdefault(key, value)
    started = any("stage" in calls[one] or one.endswith("Arguments") for one, *_ in arguments)
    if not started or "model_name_or_path" not in values:
        model = unresolved.get("model_name_or_path")
        what = f"loads the model {model!r}, which is no constant" if model else "names no model"
        if not started:
            what = "sets no training arguments of TRL, such as SFTConfig(...)"
        remedy = "write the values into a copy of the script, or use the file that starts it"
        raise _build_error(path, what, remedy)
    is_unsloth = re.search(r"(?m)^\s*(?:from|import) unsloth\b", text)
    unresolved = {key: text for key, text in unresolved.items() if key not in values}
    program: SourceProgram = "Unsloth" if is_unsloth else "TRL"
    return ExternalConfig(program, str(path), defaults | values, {}, unresolved=unresolved)


def _config_from_script(text: str, path: Path) -> ExternalConfig:
    """Build the configuration from the only training command of a script."""
    trainings, others = [], list[str]()
    exported, variables = dict[str, str](), dict[str, str]()
    known = load_trainer_settings()
    for command in _split_commands(text, path, variables):
        words, assigned = list(command), dict[str, str]()
        while words and (words[0] in _COMMAND_PREFIXES or _ASSIGNMENT.fullmatch(words[0])):
            if match := _ASSIGNMENT.fullmatch(words.pop(0)):
                assigned[match[1]] = match[2]
        if not words:
            variables |= assigned
        if command[0] in ("export", "declare"):
            exported |= assigned
        if words and words[0].startswith("--"):
            remedy = "end the preceding line with a backslash, or remove this line"
            raise _build_error(path, f"{words[0]} is not a part of a command", remedy)
        program, name, index = _find_program(words)
        python = next((word for word in words if word.endswith(".py")), None)
        if program is not None and name not in known["commands"]:
            trainings.append((program, name, words[:index], words[index:], exported | assigned))
        elif program is not None:
            others.append(f"{program}'s {name}: {known['commands'][name]}")
        elif python is not None:
            others.append(f"starts {python}, which is not a script of a known program")
    if len(trainings) != 1:
        what = [*others, "contains no command of ms-swift, LLaMA-Factory or TRL"][0]
        what = f"contains {len(trainings)} training commands" if trainings else what
        purpose = "convert a copy with one training command, or write a recipe"
        raise _build_error(path, what, Step("init", {"data": "DATA"}, purpose))
    ((program, name, launcher, arguments, environment),) = trainings
    values = [environment[name] for name in environment.keys() & CONVERTED_VARIABLES]
    pairs = zip(["", *arguments], arguments, strict=False)
    used = [word for pair in pairs for word in pair[1:] if not _is_ignored(program, pair)]
    for value in (*_PEER_OPTION.sub("", " ".join(launcher)).split(), *used, *values):
        if "$" in value or "`" in value:
            raise _build_unresolved_error(path, value)
    arguments = [word.replace(_LITERAL_DOLLAR, "$") for word in arguments]
    # `trl` forwards the options of accelerate.
    words = ["accelerate", *arguments] if "trl" in launcher else launcher
    environment |= _read_launcher(words, path)
    content: dict[str, object] = {}
    if arguments and arguments[0].endswith(_CONFIG_SUFFIXES):
        content = _parse_config_file(arguments.pop(0), path)
        # LLaMA-Factory accepts name=value after a file.
        while arguments and "=" in arguments[0] and arguments[0][0] != "-":
            key, _, value = arguments.pop(0).partition("=")
            content[key] = value
    options = _parse_options(arguments)
    if program == "TRL" and "config" in options:
        content = _parse_config_file(str(options.pop("config")), path)
    content |= options
    if program == "ms-swift" and name == "rlhf":
        content.setdefault("rlhf_type", "dpo")
    elif name not in ("", "sft", "train"):
        content = {"stage": name, **content}
    return _build_config(program, content, path, environment)


def _is_ignored(program: SourceProgram, words: Sequence[str]) -> bool:
    """Return whether an option in these words has no effect on the recipe, such as a run name."""
    names = (word.partition("=")[0].lstrip("-").replace("-", "_") for word in words)
    return any(rule.is_ignored for rule in map(load_rules(program).find, names) if rule)


def _parse_config_file(name: str, script: Path) -> dict[str, object]:
    return _parse_content(Path(name) if Path(name).exists() else script.parent / name)


def _split_commands(text: str, path: Path, variables: dict[str, str]) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell script.

    `variables` are the values of variables, which the caller may complete after each command.

    Raises UserError for conditions, loops, here-documents and unclosed quotation marks.
    """
    text = _ARITHMETIC.sub(lambda match: match[0].translate(_PROTECTED), text)
    text = _SUBSTITUTION.sub("$...", text.replace("\\$", _LITERAL_DOLLAR))
    text = _QUOTED_OR_SKIPPED.sub(
        lambda match: (match[1] or "").replace(
            "$", "\1" if match[0].startswith('"') else _LITERAL_DOLLAR
        ),
        text,
    ).replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n;|&()<>")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    try:
        words = [*lexer, "\n"]
    except ValueError as error:
        raise _build_error(path, "has an unclosed quotation mark", "close it") from error
    command: list[str] = []
    arrays: dict[str, list[str]] = {}
    array: list[str] | None = None
    for word in words:
        start = _ARRAY_START.fullmatch(command[-1]) if command and word[0] == "(" else None
        if start is not None:
            command.pop()
            array = arrays[start[1]] = [*arrays.get(start[1], [])] if start[2] else []
        if (match := _ARRAY_ITEMS.fullmatch(word)) and match[1] in arrays:
            (command if array is None else array).extend(arrays[match[1]])
        elif array is not None:
            is_item = not set(word) <= set("\n;|&()<>")
            array += _expand_variables(word, variables) if is_item else []
            array = None if not is_item and ")" in word else array
        elif not set(word) <= set("\n;|&()<>{}"):
            command += _expand_variables(word, variables)
        elif command:
            if command[0] in _CONTROL_KEYWORDS:
                raise _build_unresolved_error(path, f"{command[0]} ...")
            yield command
            command = []


def _expand_variables(word: str, variables: dict[str, str]) -> list[str]:
    """Replace known variables and arithmetic in a word; an unquoted value may be several words."""
    numbers = {name: int(value) for name, value in variables.items() if value.isdecimal()}

    def replace(match: re.Match[str]) -> str:
        if match[4] is None:
            if match[3] is not None and match[0][: -len(match[3]) - 1].endswith("="):
                variables.setdefault(match[2], match[3])
            return variables.get(match[1] or match[2], match[0] if match[3] is None else match[3])
        expression = re.sub(r"[${}]", "", match[4].translate(_UNPROTECTED)).replace("/", "//")
        try:
            tree = ast.parse(expression.strip(), mode="eval")
            return str(evaluate_constant(tree.body, numbers))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return match[0]

    expanded = _VARIABLE.sub(replace, word).replace("\1", "$")
    is_split = "$" in word and not _ASSIGNMENT.fullmatch(word)
    words = expanded.split() if is_split else [expanded]
    return [word.translate(_UNPROTECTED) for word in words]


def _build_unresolved_error(path: Path, text: str) -> UserError:
    what = f"the training command depends on {text!r}, and finesight does not execute scripts"
    remedy = (
        "save the resolved command, with values in place of variables and loops, in another .sh"
        " file, and convert that file"
    )
    return _build_error(path, what, remedy)


def _find_program(words: Sequence[str]) -> tuple[SourceProgram | None, str, int]:
    """Find the training program in a shell command, its subcommand, and its first argument."""
    settings = load_trainer_settings()
    objectives = invert_groups(settings["objectives"])
    names = {"train", "rlhf", "reward", *OBJECTIVES, *settings["commands"], *objectives}
    for index, word in enumerate(words):
        basename, following = word.rpartition("/")[2], words[index + 1 : index + 2]
        name = following[0].replace("_", "-") if following else ""
        name = f"megatron {name}" if basename == "megatron" else name
        if basename in _PROGRAMS and name in names:
            return _PROGRAMS[basename], name, index + 2
        for pattern, program in _SCRIPTS.items():
            if match := re.fullmatch(pattern, word):
                return program, match[1], index + 1
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


def _read_launcher(words: Sequence[str], path: Path) -> dict[str, str]:
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
    parser.add_argument("--config_file", "--accelerate_config", dest="file", default="")
    try:
        options, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        return {"NPROC_PER_NODE": UNKNOWN_COUNT}
    is_known = options.count.isdecimal() and options.nnodes.isdecimal()
    counts = {"NPROC_PER_NODE": options.count, "NNODES": options.nnodes}
    file = _read_accelerate_config(options.file, path) if options.file else {}
    return file | counts if is_known else {"NPROC_PER_NODE": UNKNOWN_COUNT} | file


def _read_accelerate_config(name: str, script: Path) -> dict[str, str]:
    """Return `accelerate_config`, the parallelism in this file or its name, and NPROC_PER_NODE."""
    content: dict[str, object] = {}
    with suppress(UserError):  # It is on the machine of the training, or built into TRL.
        content = _parse_config_file(name, script)
    mode = content.get("deepspeed_config") or content.get("distributed_type") or name
    count = content.get("num_processes") or UNKNOWN_COUNT  # of all machines
    return {"accelerate_config": str(mode), "NPROC_PER_NODE": str(count)}
