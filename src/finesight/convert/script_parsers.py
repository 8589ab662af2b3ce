"""Arguments that a Python script parses from its command line, with their defaults."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

_DATACLASS_PARSERS = ("HfArgumentParser", "TrlParser", "H4ArgumentParser")
_DATACLASS_METHODS = (
    "parse_args_into_dataclasses",
    "parse_args_and_config",
    "parse_dict",
    "parse_json_file",
    "parse_yaml_file",
)
_ARGPARSE_METHODS = ("parse_args", "parse_known_args")
_TYPES: Mapping[str, Callable[[str], object]] = {"int": int, "float": float}
_MAX_RESULTS = 20
"""Number of variables with parsed arguments; each has all of them as its attributes."""

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
    """

    constants: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    own: dict[str, object] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)


def read_parsed_arguments(
    tree: ast.Module, options: Mapping[str, object], evaluate: Evaluate
) -> ParsedArguments:
    """Return the arguments of a script that starts with `options`."""
    nodes = list(ast.walk(tree))
    parsed = ParsedArguments()
    defined = _read_argparse_arguments(nodes, options, evaluate, parsed)
    rest = {name: value for name, value in options.items() if name not in defined}
    parsed.settings = dict(rest)
    passed = _find_passed(nodes)
    class_names = _list_dataclasses(nodes)
    fields = {name: _read_fields(name, nodes, evaluate) for name in class_names}
    used: set[str] = set()
    for names, call in islice(_iter_results(nodes), _MAX_RESULTS):
        if _get_callee(call) in _ARGPARSE_METHODS:
            for holder in (names[0], *passed.get(names[0], ())):
                for name, value in parsed.own.items():
                    parsed.constants[f"{holder}.{name}"] = value
        else:
            for name, class_name in zip(names, class_names, strict=False):
                used.add(class_name)
                for holder in (name, *passed.get(name, ())):
                    parsed.classes[holder] = class_name
    for class_name in fields:
        if class_name in used:
            for name, value in fields[class_name].items():
                if value is not None:
                    parsed.settings.setdefault(name, value)
    for holder, class_name in parsed.classes.items():
        # A field without a default, and each setting of a class of a library.
        for name, value in (fields[class_name] | rest).items():
            parsed.constants[f"{holder}.{name}"] = value
    return parsed


def _read_argparse_arguments(
    nodes: Sequence[ast.AST],
    options: Mapping[str, object],
    evaluate: Evaluate,
    parsed: ParsedArguments,
) -> set[str]:
    """Set the arguments of argparse that have a value, and return the options of all."""
    defined: set[str] = set()
    for call in nodes:
        if not isinstance(call, ast.Call) or _get_callee(call) != "add_argument":
            continue
        flags: list[str] = []
        for item in call.args:
            if isinstance(item, ast.Constant):
                flags.append(str(item.value))
        if not flags:
            continue
        keywords = {item.arg: item.value for item in call.keywords}
        names = [_normalize_option(flag) for flag in flags]
        defined.update(names)
        long_flags = [flag for flag in flags if flag.startswith("--")]
        target = _normalize_option([*long_flags, *flags][0])
        destination = keywords.get("dest")
        if isinstance(destination, ast.Constant):
            target = str(destination.value)
        action = ""
        if "action" in keywords:
            action = ast.unparse(keywords["action"]).strip("'")
        given = options.keys() & set(names)
        if given:
            value = options[given.pop()]
            parsed.own[target] = _convert_option(value, keywords.get("type"), action)
        elif "default" in keywords:
            with suppress(ValueError):
                parsed.own[target] = evaluate(keywords["default"])
        elif action in ("store_true", "store_false"):
            parsed.own[target] = action == "store_false"
    return defined


def _normalize_option(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _convert_option(value: object, kind: ast.expr | None, action: str) -> object:
    """Convert the text of an option to its type."""
    if action in ("store_true", "store_false"):
        return action == "store_true"
    name = "" if kind is None else ast.unparse(kind)
    if name not in _TYPES:
        return value
    convert = _TYPES[name]
    with suppress(ValueError):
        if isinstance(value, list):
            return [convert(str(item)) for item in value]
        return convert(str(value))
    return value


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


def _read_fields(name: str, nodes: Sequence[ast.AST], evaluate: Evaluate) -> dict[str, object]:
    """Return the defaults of the fields of a dataclass and its bases, or None."""
    classes: dict[str, ast.ClassDef] = {}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            classes.setdefault(node.name, node)
    fields: dict[str, object] = {}
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


def _read_own_fields(node: ast.ClassDef, evaluate: Evaluate) -> dict[str, object]:
    fields: dict[str, object] = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign):
            target = statement.target
        else:
            continue
        name = ast.unparse(target)
        fields[name] = None
        if statement.value is not None:
            with suppress(ValueError):
                fields[name] = evaluate(_get_default(statement.value))
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
