"""Operations: their parameters, read from the signature of a function, and their outcomes.

Operations are imported when they are needed.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast

from finesight.errors import (
    Step,
    UserError,
    escape_unprintable,
    format_count,
    set_step_format,
)
from finesight.operations.first_guesses import OptionGuess, find_option, suggest_value
from finesight.plugins import PluginKind, Registry

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

StrPath = str | Path
"""Name or path of a file, run or model; `~` stands for the home folder."""

OUTCOME_VARIABLE = "FINESIGHT_OUTCOME"
"""Environment variable with the file for the next steps or the error of a command."""

Kind = Literal["flag", "choice", "integer", "number", "path", "text"]
PathKind = Literal["any", "file", "folder", "existing file", "existing folder", "name", "server"]
"""Kind of the values of a parameter, and of a path."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """Parameter of an operation, given in the `Annotated` type of its argument.

    `list_parameters` completes the name and kind, and the values that the argument itself states.

    Attributes:
        help: Description of an argument that several operations have. The docstring of an operation
            describes the others.
        option: Name of the option if it differs from that of the argument, such as `--map`, or
            `--thinking/--no-thinking`.
        metavar: Placeholder of a value in the help.
        is_positional: Whether the command takes it without the name of an option, as it does a
            required parameter without an option of another name.
        path: Kind of a path. All but the existing ones may be missing. `name` may be a name on a
            hub instead, and `server` also the address of a server.
        parse: Converts the words of the command line to the value. Python code may give either.
        minimum: Smallest accepted number, None for any.
        maximum: Greatest accepted number, None for any.
        default: Default value, or `inspect.Parameter.empty` for a required parameter. It is given
            here in a group of options, a `TypedDict` that `**` unpacks.
        plugins: Kind of the plug-ins that the help lists.
        kind: Kind of a value, or of each of several.
        is_multiple: Whether several values are accepted.
        is_optional: Whether None is accepted.
        other_types: Names of the types of objects that Python code may give instead.
    """

    help: str = ""
    option: str = ""
    metavar: str = ""
    is_positional: bool = False
    path: PathKind = "any"
    parse: Callable[[Any], Any] | None = None
    minimum: float | None = None
    maximum: float | None = None
    default: Any = None
    plugins: PluginKind | None = None
    name: str = ""
    kind: Kind = "text"
    choices: tuple[str, ...] = ()
    is_multiple: bool = False
    is_optional: bool = False
    other_types: frozenset[str] = frozenset()

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def format_words(self, value: object) -> list[str]:
        """Return the words of the command line that give the parameter a value."""
        if value is None or value == self.default:
            return []
        if self.kind == "flag":
            options = self.option.split("/")
            return [options[0]] if value else [options[1]]
        if isinstance(value, Mapping):
            texts = [f"{key}={item}" for key, item in value.items()]
        elif isinstance(value, list | tuple):
            texts = [*map(str, value)]
        else:
            texts = [str(value)]
        if self.is_positional:
            return texts
        words = []
        for text in texts:
            words += [self.option, text]
        return words

    def convert(self, value: Any) -> Any:
        """Convert an argument of Python code to the type of the parameter.

        Raises UserError for a value of another type, for an unknown choice, and for a number out of
        bounds.
        """
        names = {one.__name__ for one in type(value).__mro__}
        is_other = names & self.other_types or (value is None and self.is_optional)
        if self.kind == "flag" or is_other or isinstance(value, Mapping):
            return value
        words: Any
        if not self.is_multiple:
            words = self._convert_item(value)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            words = [self._convert_item(item) for item in value]
        else:
            words = [self._convert_item(value)]
        if self.parse is None:
            return words
        return self.parse(words)

    def _convert_item(self, value: Any) -> Any:
        if self.kind == "path":
            return Path(os.path.expanduser(to_name(value, self.name)))
        if self.kind == "text":
            return to_name(value, self.name)
        if self.choices:
            self._require_choice(value)
            return value
        expected = self._find_expected_number(value)
        if expected:
            raise _build_value_error(self.name, value, expected)
        return value

    def _require_choice(self, value: Any) -> None:
        """Raise UserError for an unknown choice."""
        if value in self.choices:
            return
        expected = f"one of {', '.join(self.choices)}"
        similar = suggest_value(self.name, value, self.choices)
        if similar:
            raise _build_value_error(self.name, value, expected, f"use {similar!r}")
        raise _build_value_error(self.name, value, expected)

    def _find_expected_number(self, value: Any) -> str:
        """Return what a number should be; empty for a valid number."""
        if self.kind == "integer":
            if not isinstance(value, int):
                return "an integer"
        elif not isinstance(value, int | float):
            return "a number"
        if self.minimum is not None and value < self.minimum:
            return f"a number of at least {self.minimum:.10g}"
        if self.maximum is not None and value > self.maximum:
            return f"a number of at most {self.maximum:.10g}"
        return ""


def to_path(value: StrPath | None) -> Path | None:
    """Convert a name to a path; None stays None."""
    if value is None:
        return None
    return Path(value)


def to_name(value: object, where: str = "") -> str:
    """Convert the name of a file, run, model or metric to text.

    Raises UserError for objects of other types, such as functions.
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise UserError(
        f"a {type(value).__name__} instead of a name",
        where=where,
        expected="a str or a Path",
        remedy="pass a name or path; functions and data in memory are arguments of methods, such as"
        " finesight.load(RUN).evaluate",
    )


def require_extra(
    command: str, extra: str = "web", packages: Sequence[str] = ("starlette", "uvicorn")
) -> None:
    """Raise UserError if packages of an extra that an operation needs are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} cannot be imported",
            where=command,
            expected=f"the extra {extra}",
            remedy=f"pip install 'finesight[{extra}]'",
        )


def check_counts(**counts: int | None) -> None:
    """Raise UserError if one of the named counts is below 1; None is valid."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise _build_value_error(name, count, "an integer of at least 1")


def _build_value_error(
    name: str, value: object, expected: str, remedy: str = "correct or remove it"
) -> UserError:
    return UserError(f"{name} is {value!r}", where=name, expected=expected, remedy=remedy)


def list_words(step: Step) -> list[str]:
    """Return the words of the command line of a step after the program."""
    from finesight.operations import find_operation, is_installed

    if not is_installed(step.operation):
        # The names of its options are unknown.
        return [*step.operation.split(), *map(str, step.arguments.values())]
    parameters = list_parameters(find_operation(step.operation))
    known = [one for one in parameters if one.name in step.arguments]
    assert len(known) == len(step.arguments), f"{step.operation} lacks {step.arguments}"
    known.sort(key=lambda one: not one.is_positional)
    words = step.operation.split()
    for one in known:
        words += one.format_words(step.arguments[one.name])
    return words


def format_step(step: Step, program: str = "finesight") -> str:
    """Format the command line of a step, without its purpose."""
    return shlex.join([program, *list_words(step)])


set_step_format(format_step)


def format_command(step: Step) -> str:
    """Format the command line of a step for the shell in which this process was started.

    A program that the shell would not find, such as .venv/bin/finesight, keeps its path.
    """
    program = "finesight"
    started = os.path.abspath(sys.argv[0])
    if os.path.basename(started) == program and shutil.which(program) != started:
        relative = os.path.relpath(started)
        program = os.path.join(".", relative)
        if relative.startswith(os.pardir):
            program = started
    return format_step(step, program)


def format_call(step: Step) -> str:
    """Format the call of a step in Python, or its command if Python has no function for it."""
    from finesight.operations import find_operation, is_installed

    if not is_installed(step.operation):
        return format_step(step)
    operation = find_operation(step.operation)
    if operation.__module__.startswith(("finesight.app.", "finesight.cli.")):
        return format_step(step)
    # Paths are text, which needs no import.
    plain = json.loads(json.dumps(dict(step.arguments), default=str))
    arguments = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    return f"finesight.api.{operation.__name__}({arguments})"


EXIT_SKIPPED = 4
"""Exit code of a command that has skipped unreadable input, and answered the rest."""


class SkippedInputs:
    """Unreadable inputs of a command, which are skipped and named at its end.

    Args:
        noun: Name of an input, such as "question".
    """

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._errors: list[UserError] = []

    def add(self, error: UserError) -> None:
        """Note the error of an input."""
        self._errors.append(error)

    def require_others(self, num_read: int) -> None:
        """Raise the first error if no input could be read."""
        if self._errors and not num_read:
            raise self._errors[0]

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        if self._errors:
            return EXIT_SKIPPED
        return 0

    def describe(self) -> list[str]:
        """Return a line for each skipped input, and their number."""
        if not self._errors:
            return []
        # The other lines, expected value and remedy, would make a list of many inputs too long.
        lines = [f"skipped: {str(error).splitlines()[0]}" for error in self._errors]
        return [*lines, f"{format_count(len(lines), self._noun)} skipped"]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """Outcome of an operation.

    Attributes:
        value: Result, as the Python function returns it.
        lines: Result as text.
        data: Result as JSON data. Records of a list are printed one per line.
        next_steps: Proposed next operations.
        exit_code: Exit code of the command.
        notes: Texts that follow the result on standard error.
    """

    value: Result
    lines: Sequence[str] = ()
    data: object = None
    next_steps: Sequence[Step] = ()
    exit_code: int = 0
    notes: Sequence[str] = ()


KINDS: Mapping[type, Kind] = {
    bool: "flag",
    int: "integer",
    float: "number",
    Path: "path",
    str: "text",
}


@lru_cache
def list_parameters(operation: Callable[..., object]) -> Sequence[Parameter]:
    """Return the parameters of an operation that have a description, in their order."""
    signature = inspect.signature(operation).parameters
    annotations = {name: parameter.annotation for name, parameter in signature.items()}
    # Without the type of the result, which type checkers alone import.
    bare = types.SimpleNamespace(__annotations__=annotations)
    names = inspect.unwrap(operation).__globals__
    hints = typing.get_type_hints(bare, globalns=names, include_extras=True)
    descriptions = read_descriptions(operation)
    parameters: list[Parameter] = []
    for name, parameter in signature.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            parameters += _list_group(hints[name])
        elif text := descriptions.get(name, "") or _find_info(hints[name]).help:
            parameters.append(_read_parameter(name, text, hints[name], parameter.default))
    return parameters


def _list_group(hint: Any) -> Sequence[Parameter]:
    """Return the parameters of a group of options: a `TypedDict`, or `Annotated` by them."""
    if hasattr(hint, "__metadata__"):
        (group,) = hint.__metadata__
        return cast(Sequence[Parameter], group)
    (group,) = typing.get_args(hint)
    parameters: list[Parameter] = []
    for option, one in typing.get_type_hints(group, include_extras=True).items():
        info = _find_info(one)
        parameters.append(_read_parameter(option, info.help, one, info.default))
    return parameters


def read_descriptions(operation: Callable[..., object]) -> dict[str, str]:
    """Return the descriptions of parameters in the section `Args` of a docstring."""
    docstring = f"{inspect.getdoc(operation)}\n"
    assert docstring.count("\nArgs:\n") < 2, f"{operation} has two sections of parameters"
    section = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    descriptions: dict[str, str] = {}
    for line in section.splitlines():
        name, separator, text = line.strip().partition(": ")
        if separator and line.startswith("    ") and not line.startswith("     "):
            descriptions[name] = text
        elif descriptions:
            descriptions[[*descriptions][-1]] += f" {line.strip()}"
    return descriptions


def _find_info(hint: Any) -> Parameter:
    metadata = getattr(hint, "__metadata__", ())
    return next((item for item in metadata if isinstance(item, Parameter)), Parameter())


def _read_parameter(name: str, text: str, hint: Any, default: Any) -> Parameter:
    info = _find_info(hint)
    if info.plugins and (names := Registry(info.plugins, object, {}).plugin_names):
        text += f" Plug-ins: {', '.join(names)}."
    # `Annotated` has its type as the origin, as has no other hint of a parameter.
    if hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    alternatives = _list_alternatives(hint)
    is_optional = type(None) in alternatives
    container = _find_container(alternatives)
    if container is not None:
        alternatives = _list_alternatives(typing.get_args(container)[0])
    if info.path == "name":
        alternatives.discard(Path)
    choices = info.choices
    others: set[type] = set()
    for one in alternatives:
        origin = typing.get_origin(one)
        if origin is Literal:
            choices = choices or typing.get_args(one)
        elif one not in KINDS and one is not type(None):
            others.add(origin or one)
    is_required = default is inspect.Parameter.empty
    return replace(
        info,
        name=name,
        help=text,
        option=info.option or f"--{name.replace('_', '-')}",
        is_positional=info.is_positional or (is_required and not info.option),
        kind="choice" if choices else _find_kind(alternatives),
        choices=choices,
        is_multiple=container is not None,
        is_optional=is_optional,
        default=default,
        other_types=frozenset(one.__name__ for one in others),
    )


def _list_alternatives(hint: Any) -> set[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set(typing.get_args(hint))
    return {hint}


def _find_container(alternatives: set[Any]) -> Any:
    """Return the type of several values; None if the parameter has one value."""
    # A value that may also be a path or text is one value.
    if alternatives & KINDS.keys():
        return None
    for one in alternatives:
        # A mapping has several values KEY=VALUE on the command line.
        if typing.get_origin(one) in (list, Sequence, Mapping):
            return one
    return None


def _find_kind(alternatives: set[Any]) -> Kind:
    for type_, kind in KINDS.items():
        if type_ in alternatives:
            return kind
    return "text"


def _reject_unknown_arguments(
    operation: Callable[..., object], arguments: Mapping[str, object]
) -> None:
    """Raise TypeError with a proposal for an argument that an operation does not have."""
    parameters = list_parameters(operation)
    known = {one.name: one for one in parameters}
    signature = inspect.signature(operation).parameters
    for name, value in arguments.items():
        if name in known or name in signature:
            continue
        hint = _suggest_argument(operation, name, value, parameters)
        raise TypeError(
            f"{operation.__name__}() got an unexpected keyword argument {name!r}: {hint}"
        )


_NUMBERS: dict[Kind, type[int | float]] = {"integer": int, "number": float}


def _suggest_argument(
    operation: Callable[..., object], name: str, value: object, parameters: Sequence[Parameter]
) -> str:
    """Return the proposal for an unknown argument: the right one, or the list of all."""
    from finesight.settings.recipe import suggest_override

    known = {one.name: one for one in parameters}
    options: dict[str, str] = {}
    arguments: set[str] = set()
    for one in parameters:
        if one.is_positional:
            arguments.add(one.name)
        else:
            options |= dict.fromkeys(one.option.split("/"), one.name)
    text = str(value)
    option = f"--{name.replace('_', '-')}"
    guess = find_option(_find_command(operation), option, text, options, arguments)
    if "overrides" in arguments and (guess is None or guess.kind == "option"):
        setting = suggest_override(name, shlex.quote(text)) or ""
        if setting.startswith("use "):
            return f"use overrides=[{setting.removeprefix('use ')!r}]"
    match guess:
        case OptionGuess("option", (found, *given)):
            right = value
            if text and given not in ([], [text]):
                to_value = _NUMBERS.get(known[options[found]].kind, str)
                right = to_value(given[0])
            return f"use {options[found]}={right!r}"
        case OptionGuess("argument", (found, _)):
            return f"use {found}={value!r}"
        case OptionGuess("setting", (found,)):
            return f"use overrides=[{found!r}]"
        case OptionGuess("nothing" | "command"):
            return guess.format(f"{name}={value!r}")
    return f"it has {', '.join(one.name for one in parameters)}"


def _find_command(operation: Callable[..., object]) -> str:
    """Return the name of the command of an operation; empty if it has none."""
    from finesight.operations import OPERATIONS

    target = f"{operation.__module__.removeprefix('finesight.')}:{operation.__name__}"
    command = ""
    for group in OPERATIONS.values():
        for name, one_target in group.items():
            if one_target == target:
                command = name
    return command


def as_function(operation: Callable[Arguments, Outcome[Result]]) -> Callable[Arguments, Result]:
    """Return the Python function of an operation, which checks its arguments.

    It returns the result alone, and prints the notes on standard error. Its docstring describes the
    parameters.
    """

    @wraps(operation)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        _reject_unknown_arguments(operation, kwargs)
        bound = inspect.signature(operation).bind(*args, **kwargs)
        groups = [bound.arguments]
        for one in bound.signature.parameters.values():
            if one.kind is one.VAR_KEYWORD and one.name in bound.arguments:
                groups.append(bound.arguments[one.name])
        for parameter in list_parameters(operation):
            for values in groups:
                if parameter.name in values:
                    values[parameter.name] = parameter.convert(values[parameter.name])
        try:
            outcome = operation(*bound.args, **bound.kwargs)
        except UserError as error:
            if isinstance(error.remedy, Step):
                error.remedy = error.remedy.format(format_call)
            raise
        for note in outcome.notes:
            print(escape_unprintable(note), file=sys.stderr)
        return outcome.value

    call.__module__ = "finesight.api"  # where the documentation looks for it
    return call
