"""Arguments that a Python script parses from its command line, with their defaults."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress

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
    fields: dict[str, dict[str, object]] = {}
    for names, call in _iter_results(nodes):
        method = _get_callee(call)
        if method in _ARGPARSE_METHODS:
            for holder in _find_holders(names[0], nodes):
                parsed.constants |= {f"{holder}.{key}": item for key, item in parsed.own.items()}
        for name, class_name in zip(names, _list_dataclasses(nodes), strict=False):
            if method not in _DATACLASS_METHODS:
                continue
            fields[class_name] = _read_fields(class_name, nodes, evaluate)
            parsed.classes |= dict.fromkeys(_find_holders(name, nodes), class_name)
    for values in fields.values():
        given = {name: value for name, value in values.items() if value is not None}
        parsed.settings = given | parsed.settings
    for holder, class_name in parsed.classes.items():
        # A field without a default, and each setting of a class of a library.
        values = fields[class_name] | rest
        parsed.constants |= {f"{holder}.{name}": value for name, value in values.items()}
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
        flags = [item.value for item in call.args if isinstance(item, ast.Constant)]
        names = [str(flag).lstrip("-").replace("-", "_") for flag in flags]
        if not names:
            continue
        keywords = {item.arg: item.value for item in call.keywords}
        is_long = [str(flag).startswith("--") for flag in flags]
        long_names = list(compress(names, is_long))
        target = [*long_names, *names][0]
        if isinstance(keywords.get("dest"), ast.Constant):
            target = str(ast.literal_eval(keywords["dest"]))
        defined.update(names)
        action = ast.unparse(keywords["action"]).strip("'") if "action" in keywords else ""
        given = [options[name] for name in names if name in options]
        if given:
            parsed.own[target] = _convert_option(given[0], keywords.get("type"), action)
        elif "default" in keywords:
            with suppress(ValueError):
                parsed.own[target] = evaluate(keywords["default"])
        elif action in ("store_true", "store_false"):
            parsed.own[target] = action == "store_false"
    return defined


def _convert_option(value: object, kind: ast.expr | None, action: str) -> object:
    """Convert the text of an option to its type."""
    if action in ("store_true", "store_false"):
        return action == "store_true"
    convert = _TYPES.get(ast.unparse(kind)) if kind is not None else None
    if convert is None:
        return value
    with suppress(ValueError):
        if isinstance(value, list):
            return [convert(str(item)) for item in value]
        return convert(str(value))
    return value


def _iter_results(nodes: Sequence[ast.AST]) -> Iterator[tuple[list[str], ast.Call]]:
    """Yield the variables that receive the results of a call, with the call."""
    for node in nodes:
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        names = [target]
        if isinstance(target, ast.Tuple | ast.List):
            names = target.elts
        value = node.value
        if isinstance(value, ast.Subscript):  # parse_args_into_dataclasses()[0]
            value = value.value
        if isinstance(value, ast.Call):
            yield [ast.unparse(name) for name in names], value


def _find_holders(name: str, nodes: Sequence[ast.AST]) -> set[str]:
    """Return a variable, and the parameters of functions of the script that receive it."""
    functions = {
        node.name: [argument.arg for argument in node.args.args]
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    }
    holders = {name}
    for call in nodes:
        if not isinstance(call, ast.Call) or _get_callee(call) not in functions:
            continue
        parameters = functions[_get_callee(call)]
        pairs = list(zip(parameters, call.args, strict=False))
        pairs += [(one.arg, one.value) for one in call.keywords if one.arg]
        for parameter, value in pairs:
            if ast.unparse(value) == name:
                holders.add(parameter)
    return holders


def _list_dataclasses(nodes: Sequence[ast.AST]) -> list[str]:
    """Return the names of the dataclasses that the parser of the script receives."""
    for call in nodes:
        if not isinstance(call, ast.Call) or _get_callee(call) not in _DATACLASS_PARSERS:
            continue
        given = [*call.args, *(one.value for one in call.keywords if one.arg == "dataclass_types")]
        if not given:
            return []
        classes = _resolve_tuple(given[0], nodes)
        return [ast.unparse(item).rpartition(".")[2] for item in classes]
    return []


def _resolve_tuple(node: ast.expr, nodes: Sequence[ast.AST]) -> Sequence[ast.expr]:
    """Return the items of a tuple, which a variable may hold, or the expression itself."""
    for statement in nodes:
        if isinstance(statement, ast.Assign) and isinstance(node, ast.Name):
            is_assigned = ast.unparse(statement.targets[0]) == node.id
            node = statement.value if is_assigned else node
    return node.elts if isinstance(node, ast.Tuple | ast.List) else [node]


def _read_fields(name: str, nodes: Sequence[ast.AST], evaluate: Evaluate) -> dict[str, object]:
    """Return the defaults of the fields of a dataclass, or None."""
    fields: dict[str, object] = {}
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]
    for node in classes[:1]:
        for base in node.bases:
            # A class may have the name of its base, transformers.TrainingArguments.
            if ast.unparse(base) != name and not ast.unparse(base).endswith(f".{name}"):
                fields |= _read_fields(ast.unparse(base), nodes, evaluate)
        for statement in node.body:
            if not isinstance(statement, ast.AnnAssign | ast.Assign):
                continue
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            field_name = ast.unparse(target)
            fields[field_name] = None
            if statement.value is not None:
                with suppress(ValueError):
                    fields[field_name] = evaluate(_get_default(statement.value))
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
