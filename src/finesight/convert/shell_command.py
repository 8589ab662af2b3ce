"""Find the training command of a shell script, with its launcher and options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from finesight.convert.external_config import (
    CONVERTED_VARIABLES,
    UNKNOWN_COUNT,
    SourceProgram,
    load_rules,
    map_objective_methods,
)
from finesight.convert.launcher_config import flatten_accelerate_config, name_accelerate_settings
from finesight.convert.shell_script import (
    LITERAL_DOLLAR,
    ShellState,
    UnresolvedCommandError,
    parse_assignment,
    split_commands,
)
from finesight.convert.source_file import (
    build_source_error,
    check_code_length,
    find_file,
    load_settings_file,
    read_source,
)
from finesight.errors import Remedy, Step, UserError
from finesight.settings.recipe import invert_groups, load_trainer_settings

_PROGRAMS: dict[str, SourceProgram] = {
    **{"swift": "ms-swift", "megatron": "ms-swift", "trl": "TRL"},
    **{"llamafactory-cli": "LLaMA-Factory", "lmf": "LLaMA-Factory"},
}
_SCRIPTS: dict[str, SourceProgram] = {
    r"(?:.*/)?swift[./]cli[./](sft|rlhf)(?:\.py)?": "ms-swift",
    r"(?:.*/)?(?:src/train(?:_bash)?|llamafactory/launcher)\.py()": "LLaMA-Factory",
    r"(?:.*/)?src/train(?:ing)?/train_?(\w*)\.py": "Qwen-VL-Series-Finetune",
    r"(?:.*/)?finetune\.py()": "Qwen-VL",
}
"""Programs that start as a Python script, by a pattern with the training method.

Those of TRL are in `_get_trl_pattern`.
"""

_COMMAND_PREFIXES = ("env", "nohup", "exec", "time", "sudo")
_DECLARATIONS = ("export", "declare", "typeset", "readonly")
_STATE_BUILTINS = (*_DECLARATIONS, "unset")
_SHELLS = ("bash", "sh", "zsh")
_SOURCE_BUILTINS = ("source", ".")
_FILE_OPTIONS = ("--rcfile", "--init-file")
_MAX_NESTED_SCRIPTS = 8
_PEER_OPTION = re.compile(r"--(?:node|machine|master|main|rdzv)[_-]\w+[ =]\S*")
"""Option of a launcher for the rank or address of a node."""

_POSITIONAL = re.compile(r"\$(?:[\d@*#]|\{[\d@*])")
"""Argument of a script."""


class TrainingCommand(NamedTuple):
    """Training command of a shell script.

    Attributes:
        program: Program that trains, None for a Python script of the user.
        name: Method of the training, empty if the command does not name it.
        launcher: Words before the program or the Python script.
        arguments: Words after it.
        environment: Environment variables of the command.
        origin: Shell script that contains the command.
        script: Name of the Python script, empty if the command starts none.
    """

    program: SourceProgram | None
    name: str
    launcher: list[str]
    arguments: list[str]
    environment: dict[str, str]
    origin: Path
    script: str


@dataclass
class _Search:
    """First training command, the number of all, and reasons why other commands are none."""

    training: TrainingCommand | None = None
    num_trainings: int = 0
    others: list[tuple[str, Remedy]] = field(default_factory=list)
    num_scripts: int = 0


def find_training_command(text: str, path: Path) -> TrainingCommand:
    """Find the only training command of a shell script and its nested scripts.

    Raises UserError if there is not exactly one, or if only a shell knows its words.
    """
    search = _Search()
    _search_script(text, path, ShellState(), search)
    remedy: Remedy = _build_init_step()
    if search.num_trainings > 1:
        what = f"contains {search.num_trainings} training commands"
        raise build_source_error(path, what, remedy)
    training = search.training
    if training is None:
        what = "contains no command of ms-swift, LLaMA-Factory or TRL"
        if search.others:
            what, remedy = search.others[0]
        raise build_source_error(path, what, remedy)
    _check_resolved(training)
    arguments = [word.replace(LITERAL_DOLLAR, "$") for word in training.arguments]
    return training._replace(arguments=arguments)


def _search_script(text: str, path: Path, state: ShellState, search: _Search) -> None:
    """Add the training commands of a script, with its variables and exported ones."""
    check_code_length(text, path)
    try:
        for command, is_conditional in split_commands(text, state):
            words, assigned = _split_assignments(command)
            is_builtin = command[0] in _STATE_BUILTINS
            if is_conditional and command[0] == "shift":
                state.set_arguments(None)
            elif is_conditional and (is_builtin or not words):
                state.forget(command)
            elif command[0] in _DECLARATIONS:
                state.declare(command)
            elif not words:
                state.variables |= assigned
            elif words[0] == "shift":
                state.shift(words[1:])
            elif words[0] == "unset" and "-f" not in words:
                state.unset(words[1:])
            elif words[0].startswith("--"):
                remedy = "end the preceding line with a backslash, or remove this line"
                raise build_source_error(path, f"{words[0]} is not a part of a command", remedy)
            elif not _search_nested_script(words, path, state, assigned, search):
                _add_command(words, path, state, assigned, search)
    except UnresolvedCommandError as error:
        raise _build_unresolved_error(path, str(error)) from error
    except ValueError as error:
        raise build_source_error(path, "has an unclosed quotation mark", "close it") from error


def _split_assignments(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split the assignments and prefixes at the start of a command from the others words."""
    words = list(command)
    assigned: dict[str, str] = {}
    while words:
        assignment = parse_assignment(words[0])
        if assignment is not None:
            name, value = assignment
            assigned[name] = value
        elif words[0] not in _COMMAND_PREFIXES:
            break
        words.pop(0)
    return words, assigned


class _NestedScript(NamedTuple):
    """Script that a command starts: its file or, after the option `-c`, its text."""

    source: str
    arguments: list[str]
    is_text: bool


def _find_nested_script(words: Sequence[str]) -> _NestedScript | None:
    """Return the script that a command starts, None if it starts none."""
    if words[0].endswith(".sh"):
        return _NestedScript(words[0], list(words[1:]), is_text=False)
    shell = _find_shell(words)
    if shell is None:
        return None
    index = shell + 1
    is_text = False
    while index < len(words) and words[index].startswith(("-", "+")):
        option = words[index]
        index += 1
        if option in ("-", "--"):
            break
        if option in _FILE_OPTIONS:
            index += 1
        elif not option.startswith("--"):
            is_text |= option.startswith("-") and "c" in option
            index += option.lower().count("o")  # names of further options, such as pipefail
    if index >= len(words):
        return None
    arguments = list(words[index + 1 :])
    if is_text:
        arguments = arguments[1:]  # The first one is `$0`.
    return _NestedScript(words[index], arguments, is_text)


def _find_shell(words: Sequence[str]) -> int | None:
    """Return the index of the shell that a command starts, None if it starts none.

    A launcher may precede the shell, but no training, whose arguments may have the same text.
    """
    if words[0] in _SOURCE_BUILTINS:
        return 0
    for index, word in enumerate(words):
        if word.endswith(".py"):
            return None
        if word.rpartition("/")[2] in _SHELLS:
            if index < _find_program(words)[2]:
                return index
            return None
    return None


def _search_nested_script(
    words: Sequence[str],
    path: Path,
    state: ShellState,
    assigned: dict[str, str],
    search: _Search,
) -> bool:
    """Search the shell script that a command starts. Returns whether it starts one."""
    script = _find_nested_script(words)
    if script is None:
        return False
    search.num_scripts += 1
    if search.num_scripts > _MAX_NESTED_SCRIPTS:
        raise build_source_error(path, "starts too many scripts", "convert the last of them")
    if script.is_text:
        nested = state.start_shell(assigned)
        nested.set_arguments(script.arguments)
        _search_script(script.source.replace(LITERAL_DOLLAR, "$"), path, nested, search)
        return True
    file = find_file(script.source, path)
    if file is None:
        what = f"starts {script.source}, which does not exist here"
        remedy = "run the command in the folder in which this script starts, or convert that file"
        search.others.append((what, remedy))
    elif words[0] in _SOURCE_BUILTINS:
        _search_sourced_file(file, script.arguments, state, assigned, search)
    else:
        nested = state.start_shell(assigned)
        nested.set_arguments(script.arguments)
        _search_script(read_source(file), file, nested, search)
    return True


def _search_sourced_file(
    file: Path,
    arguments: list[str],
    state: ShellState,
    assigned: dict[str, str],
    search: _Search,
) -> None:
    """Search a script in the same shell, whose arguments it replaces until its end."""
    previous = state.arguments
    state.export(assigned)
    if arguments:
        state.set_arguments(arguments)
    _search_script(read_source(file), file, state, search)
    if arguments:
        state.set_arguments(previous)


def _add_command(
    words: Sequence[str],
    path: Path,
    state: ShellState,
    assigned: dict[str, str],
    search: _Search,
) -> None:
    """Add a command to the training commands, or the reason why it is none."""
    known = load_trainer_settings()["commands"]
    program, name, index = _find_program(words)
    scripts = [word for word in words if word.endswith(".py")]
    script = scripts[0] if scripts else ""
    if program == "Qwen-VL" and not _is_qwen_vl_script(script, path):
        program = None
    if program is None and script:
        index = words.index(script) + 1
    if program is not None and name in known:
        search.others.append((f"{program}'s {name}: {known[name]}", _build_init_step()))
    elif program is not None or (script and _starts_training(script, words[index:], path)):
        search.num_trainings += 1
        if search.training is None:
            environment = state.get_environment() | assigned
            launcher = list(words[:index])
            arguments = list(words[index:])
            search.training = TrainingCommand(
                program, name, launcher, arguments, environment, path, script
            )
    elif script:
        what = f"starts {script}, which is not a script of a known program"
        search.others.append((what, _build_init_step()))


def _build_init_step() -> Step:
    purpose = "convert a copy with one training command, or write a recipe"
    return Step("init", {"data": "DATA"}, purpose)


def _is_qwen_vl_script(name: str, origin: Path) -> bool:
    """Return whether finetune.py is that of the Qwen-VL project, not another one here."""
    file = find_file(name, origin)
    return file is None or "fix_vit" in read_source(file)


def _starts_training(name: str, arguments: Sequence[str], origin: Path) -> bool:
    """Return whether a Python script trains, by its text or its options."""
    file = find_file(name, origin)
    if file is not None:
        return re.search(r"Trainer\b", read_source(file)) is not None
    options = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments}
    return "model_name_or_path" in options and len(options & load_rules("TRL").converted) > 1


def _check_resolved(training: TrainingCommand) -> None:
    """Raise UserError if a word of the command is known only to a shell."""
    environment, arguments = training.environment, training.arguments
    values = [environment[name] for name in environment.keys() & CONVERTED_VARIABLES]
    launcher = _PEER_OPTION.sub("", " ".join(training.launcher)).split()
    used: list[str] = []
    for previous, word in zip(["", *arguments], arguments, strict=False):
        if not _is_ignored(training.program, (previous, word)):
            used += [previous, word]
    for value in (*launcher, *used, *values):
        if "$" in value or "`" in value:
            raise _build_unresolved_error(training.origin, value)


def _is_ignored(program: SourceProgram | None, words: Sequence[str]) -> bool:
    """Return whether an option in these words has no effect on the recipe."""
    rules = load_rules(program or "TRL")
    for word in words:
        rule = rules.find(word.partition("=")[0].lstrip("-").replace("-", "_"))
        if rule is not None and rule.is_ignored:
            return True
    return False


def _build_unresolved_error(path: Path, text: str) -> UserError:
    what = f"the training command depends on {text!r}, and finesight does not execute scripts"
    remedy = (
        "save the resolved command, with values in place of variables and loops, in another .sh"
        " file, and convert that file"
    )
    if _POSITIONAL.search(text):
        remedy = (
            f"save the command that starts this script with its arguments, bash {path} ARGUMENTS,"
            " in another .sh file, and convert that file; or save the resolved command there"
        )
    return build_source_error(path, what, remedy)


def _get_trl_pattern() -> str:
    """Return the pattern of the scripts of TRL, which are named after the training method."""
    methods = "|".join(load_trainer_settings()["scripts"].split())
    return rf"(?:.*/)?({methods})(?:_vlm\w*)?\.py"


def _find_program(words: Sequence[str]) -> tuple[SourceProgram | None, str, int]:
    """Find the training program in a shell command, its subcommand, and its first argument."""
    settings = load_trainer_settings()
    objectives = invert_groups(settings["objectives"])
    names = {
        "train",
        "rlhf",
        "reward",
        *map_objective_methods(),
        *settings["commands"],
        *objectives,
    }
    for index, word in enumerate(words):
        basename = word.rpartition("/")[2]
        following = words[index + 1 : index + 2]
        name = following[0].replace("_", "-") if following else ""
        if basename == "megatron":
            name = f"megatron {name}"
        if basename in _PROGRAMS and name in names:
            return _PROGRAMS[basename], name, index + 2
        for pattern, program in (*_SCRIPTS.items(), (_get_trl_pattern(), "TRL")):
            if match := re.fullmatch(pattern, word):
                return program, match[1], index + 1
    return None, "", len(words)


def parse_options(words: Sequence[str]) -> dict[str, object]:
    """Parse the options of a command, `--name value ...` or `--name=value`.

    An option without a value becomes "true", one with several values a list. Of repeated options,
    the last one wins. Words before the first option have the key `arguments without an option`.
    """
    settings: dict[str, object] = {}
    name = ""
    values: list[str] = []
    for word in (*words, "--"):
        if not re.match(r"--?[A-Za-z]|--$", word):
            values.append(word)
            continue
        if name or values:
            key = name or "arguments without an option"
            settings[key] = values[0] if len(values) == 1 else values or "true"
        name, separator, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        values = [value] if separator else []
    return settings


class Launcher(NamedTuple):
    """Environment variables with the number of processes, and settings of accelerate."""

    environment: dict[str, str]
    settings: dict[str, object]


def read_launcher(words: Sequence[str], origin: Path) -> Launcher:
    """Read the options of torchrun, deepspeed or accelerate, and the file that they name."""
    names = {word.rpartition("/")[2] for word in words}
    is_torchrun = bool(names & {"torchrun", "torch.distributed.run", "torch.distributed.launch"})
    is_accelerate = "accelerate" in names
    if not is_torchrun and not is_accelerate and "deepspeed" not in names:
        return Launcher({}, {})
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    default = "1" if is_torchrun else UNKNOWN_COUNT
    count_options = ("--nproc_per_node", "--num_gpus", "--num_processes")
    parser.add_argument(*count_options, dest="count", default=default)
    parser.add_argument("--nnodes", "--num_nodes", default="1")
    parser.add_argument("--config_file", "--accelerate_config", dest="file", default="")
    try:
        options, _ = parser.parse_known_args([_use_underscores(word) for word in words])
    except argparse.ArgumentError:
        return Launcher({"NPROC_PER_NODE": UNKNOWN_COUNT}, {})
    settings: dict[str, object] = {}
    if options.file:
        settings = _load_accelerate_config(options.file, origin)
    if is_accelerate:
        settings |= _select_accelerate_options(words)
    environment = {"NPROC_PER_NODE": str(settings.get("num_processes") or UNKNOWN_COUNT)}
    if options.count.isdecimal() and options.nnodes.isdecimal():
        environment = {"NPROC_PER_NODE": options.count, "NNODES": options.nnodes}
    return Launcher(environment, settings)


def _use_underscores(word: str) -> str:
    """Return an option with underscores in its name, which launchers also accept with hyphens."""
    if not word.startswith("--"):
        return word
    name, separator, value = word.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{separator}{value}"


def _load_accelerate_config(name: str, origin: Path) -> dict[str, object]:
    """Load a configuration of accelerate, or what its name states."""
    file = find_file(name, origin)
    if file is None:
        return name_accelerate_settings(name)
    return flatten_accelerate_config(load_settings_file(file))


def _select_accelerate_options(words: Sequence[str]) -> dict[str, object]:
    """Return the options of `accelerate launch` for its configuration.

    `trl` forwards options of accelerate among its own.
    """
    known = load_rules("accelerate")
    selected: dict[str, object] = {}
    for name, value in parse_options(words).items():
        is_known = name in known.converted or known.find(name) is not None
        if is_known and name not in ("num_processes", "config_file"):
            # The last option also has the name of the script.
            selected[name] = value[0] if isinstance(value, list) else value
    return selected
