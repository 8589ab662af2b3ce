"""Operations: their parameters, read from the signature of a function, and their outcomes.

Operations are imported when they are needed.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

Result = TypeVar("Result")

Kind = Literal["flag", "choice", "integer", "number", "path", "text"]
"""Kind of the values of a parameter."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """Description of a parameter of an operation, in the `Annotated` type of its argument.

    Attributes:
        help: Description, with the default if it depends on other values.
        option: Name of the option if it differs from that of the argument, such as `--map`, or
            `--thinking/--no-thinking`.
        metavar: Placeholder of a value in the help.
        is_positional: Whether the command takes it without the name of an option.
        path: Kind of an existing path. The others may be missing.
        parse: Converts the words of the command line to the value.
        minimum: Smallest accepted number, None for any.
        maximum: Greatest accepted number, None for any.
    """

    help: str
    option: str = ""
    metavar: str = ""
    is_positional: bool = False
    path: Literal["any", "file", "folder", "existing file", "existing folder"] = "any"
    parse: Callable[[Any], Any] | None = None
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class OperationParameter:
    """Parameter of an operation.

    Attributes:
        kind: Kind of a value, or of each of several.
        choices: Values of a choice.
        is_multiple: Whether several values are accepted.
        is_optional: Whether None is accepted.
        default: Default value, or `inspect.Parameter.empty` for a required parameter.
    """

    name: str
    info: Parameter
    kind: Kind
    choices: tuple[str, ...]
    is_multiple: bool
    is_optional: bool
    default: Any

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def option(self) -> str:
        """Name of the option, such as `--batch-size`."""
        return self.info.option or f"--{self.name.replace('_', '-')}"

    def format_words(self, value: object) -> list[str]:
        """Return the words of the command line that give the parameter a value."""
        if value is None or value == self.default:
            return []
        if self.kind == "flag":
            return [self.option.split("/")[0 if value else 1]]
        if isinstance(value, Mapping):
            texts = [f"{key}={item}" for key, item in value.items()]
        else:
            texts = [*map(str, value)] if isinstance(value, list | tuple) else [str(value)]
        if self.info.is_positional:
            return texts
        return [word for text in texts for word in (self.option, text)]


@dataclass(frozen=True, slots=True)
class Step:
    """An operation with its arguments, proposed as the next one."""

    operation: str
    arguments: Mapping[str, object]

    @property
    def words(self) -> list[str]:
        """Words of its command line after the program."""
        from finesight.operations import find_operation

        parameters = list_parameters(find_operation(self.operation).load())
        known = [one for one in parameters if one.name in self.arguments]
        assert len(known) == len(self.arguments), f"{self.operation} lacks {self.arguments}"
        # Options follow the positional arguments.
        known.sort(key=lambda one: not one.info.is_positional)
        words = [word for one in known for word in one.format_words(self.arguments[one.name])]
        return [*self.operation.split(), *words]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """Outcome of an operation.

    Attributes:
        value: Result, as the Python function returns it.
        lines: Result as text.
        data: Result as JSON data. Records of a list are printed one per line.
        next_steps: Proposed next operations.
        exit_code: Exit code of the command.
    """

    value: Result
    lines: Sequence[str] = ()
    data: object = None
    next_steps: Sequence[Step] = ()
    exit_code: int = 0


JSON_HELP = "Print the result as one JSON object"


@dataclass(frozen=True, slots=True)
class Operation:
    """Entry of an operation.

    Attributes:
        target: Module and function, as MODULE:FUNCTION.
        summary: Short description.
        json_help: Start of the description of `--json`; empty for an operation that runs until it
            is stopped, and has no result.
    """

    target: str
    summary: str
    json_help: str = JSON_HELP

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, function = self.target.partition(":")
        operation: Callable[..., Any] = getattr(import_module(module), function)
        return operation


KINDS: Mapping[type, Kind] = {
    bool: "flag",
    int: "integer",
    float: "number",
    Path: "path",
    str: "text",
}


@lru_cache
def list_parameters(operation: Callable[..., object]) -> Sequence[OperationParameter]:
    """Return the parameters of an operation that have a description, in their order."""
    signature = inspect.signature(operation).parameters
    # The return type may be imported for type checkers only.
    annotations = {name: parameter.annotation for name, parameter in signature.items()}
    hints = typing.get_type_hints(
        types.SimpleNamespace(__annotations__=annotations),
        globalns=inspect.unwrap(operation).__globals__,
        include_extras=True,
    )
    parameters = []
    for name, parameter in signature.items():
        metadata = getattr(hints[name], "__metadata__", ())
        if infos := [item for item in metadata if isinstance(item, Parameter)]:
            parameters.append(_read_parameter(name, infos[0], hints[name], parameter.default))
    return parameters


def _read_parameter(name: str, info: Parameter, hint: Any, default: Any) -> OperationParameter:
    alternatives = {*_list_alternatives(hint.__origin__)}
    is_optional = type(None) in alternatives
    kinds = alternatives - {type(None)}
    containers = [one for one in kinds if typing.get_origin(one) in (list, dict)]
    choices: tuple[str, ...] = ()
    if containers:
        kinds = {typing.get_args(containers[0])[0]}
    literals = [one for one in kinds if typing.get_origin(one) is Literal]
    if literals:
        choices = typing.get_args(literals[0])
    known = [kind for type_, kind in KINDS.items() if type_ in kinds]
    return OperationParameter(
        name=name,
        info=info,
        kind="choice" if choices else known[0] if known else "text",
        choices=choices,
        is_multiple=bool(containers),
        is_optional=is_optional,
        default=default,
    )


def _list_alternatives(hint: Any) -> Sequence[Any]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)
