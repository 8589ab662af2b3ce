"""Arguments that a Python script parses from its command line, with their defaults."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

_DATACLASS_PARSERS = ("HfArgumentParser", "TrlParser", "H4ArgumentParser")
_DATACLASS_METHODS = (
    "parse_args_into_dataclasses",
    "parse_args_and_config",
    "parse_dict",
    "parse_json_file",
    "parse_yaml_file",
)
_ARGPARSE_METHODS = ("parse_args", "parse_known_args")
_STORED_FLAGS = ("store_true", "store_false")
_TRUE_WORDS = ("true", "yes", "t", "y", "1")
_FALSE_WORDS = ("false", "no", "f", "n", "0")
"""Values of a flag that HfArgumentParser accepts, in any case."""

_CONTAINERS = ("Optional", "list", "List")
_MAX_RESULTS = 20
"""Number of variables with parsed arguments, and of the parameters that receive one of them."""

_MAX_HOLDERS = 40
"""Number of these variables and parameters together; each has all arguments as its attributes."""

Evaluate = Callable[[ast.expr], object]
"""Evaluates an expression of the module. Raises ValueError if it is no constant."""


@dataclass
class ParsedArguments:
    """Arguments of a script.

    Attributes:
        constants: Values by their names in the script, such as `args.lr`.
        settings: Values by name that a training reads by itself: fields of dataclasses, and options
            that no parser of the script defines.
        own: Values by name of a parser of argparse, which only the script reads.
        classes: Dataclasses of the parser, by the variable that holds their instance.
        untyped: Texts by the same names as `constants`, whose types only the script knows, so that
            no condition on them is known.
    """

    constants: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    own: dict[str, object] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    untyped: dict[str, object] = field(default_factory=dict)


class _Field(NamedTuple):
    """Field of a dataclass: its default, None without a constant one, and its annotation."""

    default: object = None
    annotation: ast.expr | None = None


class _Argument(NamedTuple):
    """Argument of argparse.

    Attributes:
        options: Names of its options on the command line.
        negations: Those of them that set False.
        name: Name of its attribute.
        action: What an option does with its value, empty if it stores it.
        keywords: Further arguments of the call that adds it, by name.
    """

    options: set[str]
    negations: set[str]
    name: str
    action: str
    keywords: Mapping[str | None, ast.expr]


def _parse_number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _parse_flag(text: str) -> bool:
    word = text.lower()
    if word not in (*_TRUE_WORDS, *_FALSE_WORDS):
        raise ValueError(f"{text} is no flag")
    return word in _TRUE_WORDS


_Converter = Callable[[str], object]
_FIELD_TYPES: Mapping[str, _Converter] = {
    "bool": _parse_flag,
    "int": _parse_number,
    "float": float,
    "str": str,
}
_ARGPARSE_TYPES: Mapping[str, _Converter] = {
    "bool": bool,  # "False" is true in the script, too.
    "int": int,
    "float": float,
    "str": str,
    "Path": str,
    "pathlib.Path": str,
}


def read_parsed_arguments(
    tree: ast.Module, options: Mapping[str, object], evaluate: Evaluate
) -> ParsedArguments:
    """Return the arguments of a script that starts with `options`."""
    nodes = list(ast.walk(tree))
    parsed = ParsedArguments()
    defined, untyped = _read_argparse_arguments(nodes, options, evaluate, parsed)
    rest = {name: value for name, value in options.items() if name not in defined}
    class_names = _list_dataclasses(nodes)
    holders = _find_holders(nodes, class_names, parsed)
    for holder in holders:
        for name, value in parsed.own.items():
            if name in untyped:
                parsed.untyped[f"{holder}.{name}"] = value
            else:
                parsed.constants[f"{holder}.{name}"] = value
    fields: dict[str, dict[str, _Field]] = {}
    for class_name in class_names:
        if class_name in parsed.classes.values():
            fields[class_name] = _read_fields(class_name, nodes, evaluate)
            _replace_negations(fields[class_name], rest)
    parsed.settings = dict(rest)
    for own in fields.values():
        for name, one in own.items():
            if one.default is not None:
                parsed.settings.setdefault(name, one.default)
    for holder, class_name in parsed.classes.items():
        _add_fields(holder, fields[class_name], rest, parsed)
    return parsed


def _find_holders(
    nodes: Sequence[ast.AST], class_names: Sequence[str], parsed: ParsedArguments
) -> list[str]:
    """Return the variables and parameters that hold the arguments of argparse.

    Those that hold an instance of a dataclass are set in `parsed`.
    """
    passed = _find_passed(nodes)
    own: list[str] = []
    for names, call in islice(_iter_results(nodes), _MAX_RESULTS):
        if _get_callee(call) in _ARGPARSE_METHODS:
            own += [names[0], *sorted(passed.get(names[0], ()))[:_MAX_RESULTS]]
            continue
        for name, class_name in zip(names, class_names, strict=False):
            for holder in (name, *sorted(passed.get(name, ()))[:_MAX_RESULTS]):
                if len(parsed.classes) < _MAX_HOLDERS:
                    parsed.classes[holder] = class_name
    return own[:_MAX_HOLDERS]


def _replace_negations(fields: Mapping[str, _Field], options: dict[str, object]) -> None:
    """Replace options `--no_name`, which the parser adds for each flag that is True by default."""
    for name, one in fields.items():
        negation = f"no_{name}"
        if one.default is True and negation in options and negation not in fields:
            del options[negation]
            options[name] = "false"


def _add_fields(
    holder: str,
    fields: Mapping[str, _Field],
    options: Mapping[str, object],
    parsed: ParsedArguments,
) -> None:
    """Add the fields of an instance of a dataclass, and options, which a library may define."""
    for name, one in fields.items():
        if name not in options:
            parsed.constants[f"{holder}.{name}"] = one.default
    for name, value in options.items():
        one = fields.get(name, _Field())
        key = f"{holder}.{name}"
        try:
            parsed.constants[key] = convert_option(value, one.annotation, one.default)
        except ValueError:
            parsed.untyped[key] = value


def _read_argparse_arguments(
    nodes: Sequence[ast.AST],
    options: Mapping[str, object],
    evaluate: Evaluate,
    parsed: ParsedArguments,
) -> tuple[set[str], set[str]]:
    """Set the arguments of argparse that have a value.

    Returns the options of all, and the names of those with a type that only the script knows.
    """
    defined: set[str] = set()
    untyped: set[str] = set()
    for call in nodes:
        if not isinstance(call, ast.Call) or _get_callee(call) != "add_argument":
            continue
        argument = _read_argument(call)
        if not argument.options:
            continue
        defined |= argument.options
        given = sorted(options.keys() & argument.options)
        try:
            if given:
                value = options[given[0]]
                parsed.own[argument.name] = value
                is_negated = given[0] in argument.negations
                parsed.own[argument.name] = _convert_argument(value, argument, is_negated)
            else:
                _set_default(argument, evaluate, parsed)
        except ValueError:
            untyped.add(argument.name)
    return defined, untyped


def _read_argument(call: ast.Call) -> _Argument:
    """Read the options and keywords of a call of `add_argument`."""
    flags: list[str] = []
    for item in call.args:
        if isinstance(item, ast.Constant):
            flags.append(str(item.value))
    keywords = {item.arg: item.value for item in call.keywords}
    action = ""
    if "action" in keywords:
        action = ast.unparse(keywords["action"]).strip("'").rpartition(".")[2]
    long_flags = [flag for flag in flags if flag.startswith("--")]
    name = ""
    if flags:
        name = _normalize_option([*long_flags, *flags][0])
    destination = keywords.get("dest")
    if isinstance(destination, ast.Constant):
        name = str(destination.value)
    negations: set[str] = set()
    if action == "BooleanOptionalAction":
        negations.update(f"no_{_normalize_option(flag)}" for flag in long_flags)
    options = {*map(_normalize_option, flags), *negations}
    return _Argument(options, negations, name, action, keywords)


def _set_default(argument: _Argument, evaluate: Evaluate, parsed: ParsedArguments) -> None:
    """Set the default of an argument, converted if it is a text.

    Raises ValueError if the type of the text is unknown.
    """
    if "default" not in argument.keywords:
        if argument.action in _STORED_FLAGS:
            parsed.own[argument.name] = argument.action == "store_false"
        return
    try:
        default = evaluate(argument.keywords["default"])
    except ValueError:
        return
    parsed.own[argument.name] = default
    if isinstance(default, str) and "type" in argument.keywords:
        parsed.own[argument.name] = _convert_argument(default, argument)


def _normalize_option(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _convert_argument(value: object, argument: _Argument, is_negated: bool = False) -> object:
    """Convert the text of an option of argparse. Raises ValueError if its type is unknown."""
    if argument.action in _STORED_FLAGS:
        return argument.action == "store_true"
    if argument.action == "BooleanOptionalAction":
        return not is_negated
    kind = argument.keywords.get("type")
    if kind is None:
        return value
    name = ast.unparse(kind)
    if name not in _ARGPARSE_TYPES:
        raise ValueError(f"the type {name} is unknown")
    convert = _ARGPARSE_TYPES[name]
    if isinstance(value, list):
        return [convert(str(item)) for item in value]
    if not isinstance(value, str):
        return value
    return convert(value)


def convert_option(value: object, annotation: ast.expr | None, default: object) -> object:
    """Convert the text of an option to the type of its annotation, else to that of its default.

    Raises ValueError for another type, and if the text of an unknown type may be no text.
    """
    if isinstance(value, list):
        return [convert_option(item, annotation, None) for item in value]
    if not isinstance(value, str):
        return value
    name = _name_type(annotation)
    if name not in _FIELD_TYPES and default is not None:
        name = type(default).__name__
    if name in _FIELD_TYPES:
        return _FIELD_TYPES[name](value)
    if not _is_plain_text(value):
        raise ValueError(f"{value} may be a number or a flag")
    return value


def _is_plain_text(text: str) -> bool:
    """Return whether a text is neither a number nor a flag."""
    if text.lower() in (*_TRUE_WORDS, *_FALSE_WORDS):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def _name_type(annotation: ast.expr | None) -> str:
    """Return the type in an annotation, that of the items of `list[...]` or `Optional[...]`."""
    if annotation is None:
        return ""
    name = ast.unparse(annotation).strip("'").replace("typing.", "")
    for container in _CONTAINERS:
        name = name.removeprefix("None | ").removesuffix(" | None")
        if name.startswith(f"{container}[") and name.endswith("]"):
            name = name.removeprefix(f"{container}[").removesuffix("]")
    return name


def _iter_results(nodes: Sequence[ast.AST]) -> Iterator[tuple[list[str], ast.Call]]:
    """Yield the variables that receive parsed arguments, with the call that parses them."""
    for node in nodes:
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        names: Sequence[ast.expr] = [target]
        if isinstance(target, ast.Tuple | ast.List):
            names = target.elts
        value = node.value
        if isinstance(value, ast.Subscript):  # parse_args_into_dataclasses()[0]
            value = value.value
        if not isinstance(value, ast.Call) or not names:
            continue
        if _get_callee(value) in (*_ARGPARSE_METHODS, *_DATACLASS_METHODS):
            yield [ast.unparse(name) for name in names], value


def _find_passed(nodes: Sequence[ast.AST]) -> dict[str, set[str]]:
    """Return the parameters of functions of the script that receive each variable."""
    functions: dict[str, list[str]] = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = [argument.arg for argument in node.args.args]
    passed: dict[str, set[str]] = {}
    for call in nodes:
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
            continue
        parameters = functions.get(_get_callee(call), [])
        pairs = list(zip(parameters, call.args, strict=False))
        for keyword in call.keywords:
            if keyword.arg in parameters:
                pairs.append((keyword.arg, keyword.value))
        for parameter, value in pairs:
            if isinstance(value, ast.Name | ast.Attribute):
                passed.setdefault(ast.unparse(value), set()).add(parameter)
    return passed


def _list_dataclasses(nodes: Sequence[ast.AST]) -> list[str]:
    """Return the names of the dataclasses that the parser of the script receives."""
    for call in nodes:
        if not isinstance(call, ast.Call) or _get_callee(call) not in _DATACLASS_PARSERS:
            continue
        given = [*call.args, *(one.value for one in call.keywords if one.arg == "dataclass_types")]
        if not given:
            return []
        names: list[str] = []
        for item in _resolve_tuple(given[0], nodes):
            names.append(ast.unparse(item).rpartition(".")[2])
        return names[:_MAX_RESULTS]
    return []


def _resolve_tuple(node: ast.expr, nodes: Sequence[ast.AST]) -> Sequence[ast.expr]:
    """Return the items of a tuple, which a variable may hold, or the expression itself."""
    if isinstance(node, ast.Name):
        values = _list_values(node.id, nodes)
        node = values[0] if values else node
    if isinstance(node, ast.Tuple | ast.List):
        return node.elts
    return [node]


def _list_values(name: str, nodes: Sequence[ast.AST]) -> list[ast.expr]:
    """Return the expressions that statements assign to a variable."""
    values: list[ast.expr] = []
    for statement in nodes:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            values.append(statement.value)
    return values


def _read_fields(name: str, nodes: Sequence[ast.AST], evaluate: Evaluate) -> dict[str, _Field]:
    """Return the fields of a dataclass and its bases."""
    classes: dict[str, ast.ClassDef] = {}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            classes.setdefault(node.name, node)
    fields: dict[str, _Field] = {}
    # A class may have the name of its base, transformers.TrainingArguments.
    waiting = [name]
    while waiting:
        found = classes.pop(waiting.pop().rpartition(".")[2], None)
        if found is None:
            continue
        for field_name, value in _read_own_fields(found, evaluate).items():
            fields.setdefault(field_name, value)  # A class replaces fields of its bases.
        waiting += [ast.unparse(base) for base in found.bases]
    return fields


def _read_own_fields(node: ast.ClassDef, evaluate: Evaluate) -> dict[str, _Field]:
    fields: dict[str, _Field] = {}
    for statement in node.body:
        annotation: ast.expr | None = None
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign):
            target = statement.target
            annotation = statement.annotation
        else:
            continue
        default: object = None
        if statement.value is not None:
            with suppress(ValueError):
                default = evaluate(_get_default(statement.value))
        fields[ast.unparse(target)] = _Field(default, annotation)
    return fields


def _get_default(node: ast.expr) -> ast.expr:
    """Return the expression of the default in `field(...)`, or the node itself."""
    if not isinstance(node, ast.Call) or _get_callee(node) != "field":
        return node
    for keyword in node.keywords:
        if keyword.arg == "default":
            return keyword.value
        if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Lambda):
            return keyword.value.body
    return ast.Constant(None)


def _get_callee(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]
