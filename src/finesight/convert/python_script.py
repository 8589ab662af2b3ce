"""Read the constant arguments of a training from the syntax tree of a Python script."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_DTYPES = ("bfloat16", "float16", "float32")
_MODEL_CLASS = re.compile(r"(?:.*\.)?(?!PeftModel)\w*(?:Model|For[A-Z])\w*")
_POSITIONAL = {
    "from_pretrained": ("model",),
    "load_dataset": ("path", "name"),
    "GKDTrainer": ("model", "teacher_model"),
    "DistillationTrainer": ("model", "teacher_model"),
}
_PART_CONFIGS = ("LoraConfig", "BitsAndBytesConfig")
_CONFIG_ENDS = ("Config", "Arguments")
_CONSUMER_ENDS = ("Trainer", "get_peft_model", "from_pretrained")
"""Ends of the names of calls that make a configuration, and of those that receive one."""

_CHANGING_METHODS = (
    "update",
    "pop",
    "popitem",
    "clear",
    "setdefault",
    "append",
    "extend",
    "insert",
)


class AmbiguousConfigError(Exception):
    """A script with several configurations of a kind, and not one that is used."""


def evaluate_constant(node: ast.expr, names: Mapping[str, object]) -> object:
    """Evaluate a literal, arithmetic of numbers, or a name or attribute with a known value.

    Raises ValueError for every other expression: scripts are never executed.
    """
    if isinstance(node, ast.Name | ast.Attribute):
        name = ast.unparse(node)
        if name in names and not _has_expressions(names[name]):
            return names[name]
        if name.removeprefix("torch.") in _DTYPES:
            return name.removeprefix("torch.")
    if isinstance(node, ast.List | ast.Tuple):
        return [evaluate_constant(item, names) for item in node.elts]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        operands = [evaluate_constant(side, names) for side in (node.left, node.right)]
        if all(isinstance(operand, int | float) for operand in operands):
            with suppress(ArithmeticError):
                return _OPERATORS[type(node.op)](*operands)
    with suppress(ValueError):
        if not _has_expressions(items := _read_items(node, names)):
            return items
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ValueError(ast.unparse(node)) from error


def _has_expressions(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, ast.expr) for item in value.values())


def _read_items(node: ast.expr, names: Mapping[str, object]) -> dict[str, object]:
    """Return the items of a dict, `dict(...)` or `a | b`; other values remain expressions."""
    if isinstance(node, ast.Name | ast.Attribute):
        known = names.get(ast.unparse(node))
        if isinstance(known, dict):
            return known
    if isinstance(node, ast.Dict):
        keys = [key and evaluate_constant(key, names) for key in node.keys]
        if all(key is None or isinstance(key, str) for key in keys):
            return _merge_items(zip(keys, node.values, strict=True), names)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
        merged = [(None, value) for value in node.args]
        return _merge_items([*merged, *((item.arg, item.value) for item in node.keywords)], names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _merge_items([(None, node.left), (None, node.right)], names)
    raise ValueError(ast.unparse(node))


def _merge_items(
    pairs: Iterable[tuple[Any, ast.expr]], names: Mapping[str, object]
) -> dict[str, object]:
    """Return values by name; of `**expression` without known items, the expression."""
    items: dict[str, object] = {}
    for name, node in pairs:
        try:
            items |= _read_items(node, names) if name is None else {}
            if name is not None:
                items[name] = evaluate_constant(node, names)
        except ValueError:
            items[name or f"**{ast.unparse(node)}"] = node
    return items


def _iter_statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that always run if the body runs."""
    for statement in body:
        if isinstance(statement, ast.With) or (
            isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)
        ):
            yield from _iter_statements(statement.body)
        else:
            yield statement


def _count_assignments(tree: ast.Module) -> Counter[str]:
    """Count the assignments to each name and attribute, and changes of the value of each."""
    counts: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            changed = node.value if isinstance(node, ast.Subscript) else node
            counts[ast.unparse(changed)] += 1
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            counts[ast.unparse(node.func.value)] += node.func.attr in _CHANGING_METHODS
        elif isinstance(node, ast.arg):
            counts[node.arg] += 1
        for name in {getattr(node, "name", None), getattr(node, "asname", None)} - {None}:
            counts[str(name)] += 1
    return counts


def _read_constants(
    body: Sequence[ast.stmt], known: Mapping[str, object], counts: Mapping[str, int]
) -> dict[str, object]:
    """Return known constants and those that the statements assign, the only time in the script.

    Fields of classes and of their instances have dotted names. Values of dicts may be expressions.
    """
    constants = dict(known)
    for statement in _iter_statements(body):
        fields: dict[str, object] = {}
        if isinstance(statement, ast.ClassDef):
            name = statement.name
            fields = _merge_items(_iter_assigned(statement.body), constants)
        else:
            name, node = next(_iter_assigned([statement]), ("", None))
            if node is None or counts[name] != 1 or not name.isidentifier():
                continue
            value = _merge_items([(name, node)], constants)[name]
            if isinstance(value, ast.expr):
                with suppress(ValueError):
                    value = _read_items(node, constants)
            if not isinstance(value, ast.expr):
                constants[name] = value
            elif isinstance(node, ast.Call) and not node.args and not node.keywords:
                prefix = f"{ast.unparse(node.func)}."
                fields = {
                    key.removeprefix(prefix): value
                    for key, value in constants.items()
                    if key.startswith(prefix) and not counts[key.replace(prefix, "self.")]
                }
        for field, value in fields.items():
            is_fixed = counts[name] == 1 and not counts[f"{name}.{field}"]
            if is_fixed and not isinstance(value, ast.expr):
                constants[f"{name}.{field}"] = value
    return constants


def _iter_assigned(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and target is not None:
            yield ast.unparse(target), node.value


class Script:
    """Calls in a Python script, with the constants that each of them can use."""

    def __init__(self, tree: ast.Module) -> None:
        """Find the constants of the module and of each function."""
        self._counts = _count_assignments(tree)
        self._nodes = list(ast.walk(tree))
        functions = [node for node in self._nodes if isinstance(node, ast.FunctionDef)]
        self._scopes: dict[ast.AST, ast.Module | ast.FunctionDef] = dict.fromkeys(self._nodes, tree)
        for function in functions:
            self._scopes |= dict.fromkeys(ast.walk(function), function)
        self._constants: dict[ast.AST, dict[str, object]] = {}
        self._constants[tree] = _read_constants(tree.body, {}, self._counts)
        for function in functions:
            known = self._constants[tree]
            self._constants[function] = _read_constants(function.body, known, self._counts)
        calls = [node for node in self._nodes if isinstance(node, ast.Call)]
        self._calls = sorted(calls, key=lambda call: call.lineno)

    def iter_arguments(self, callees: Collection[str]) -> Iterator[tuple[str, str, object]]:
        """Yield callee, name and value of the arguments of known calls, in the order of lines.

        Values without a constant are expressions. Each call starts with an item without a name.
        `from_pretrained` of a processor has only limits of pixels. Of several calls, the
        first counts; of several configurations of a kind, the one that a trainer or model receives.

        Raises AmbiguousConfigError if it cannot be determined.
        """
        configs, seen = self._select_configs(callees), set[tuple[str, bool]]()
        trainers = [(call, _split_callee(call)[1]) for call in self._calls]
        arguments = [self._read_arguments(*one) for one in trainers if one[1].endswith("Trainer")]
        teachers = [one.get("teacher_model") for one in arguments]
        teacher_names = {node.id for node in teachers if isinstance(node, ast.Name)}
        for call in self._calls:
            receiver, callee = _split_callee(call)
            is_config = callee.endswith(_CONFIG_ENDS)
            if callee not in callees or (is_config and call not in configs):
                continue
            is_model = _MODEL_CLASS.fullmatch(receiver) is not None
            values = self._read_arguments(call, callee) | self._read_changes(call, is_config)
            if callee == "from_pretrained" and not is_model:
                values = {key: value for key, value in values.items() if key.endswith("_pixels")}
            if is_model and self._find_name(call) in teacher_names:
                values = {"teacher_model": values.get("model")}
            elif values and not is_config and (callee, is_model) in seen:
                continue
            elif values:
                seen.add((callee, is_model))
            yield callee, "", None
            for name, value in values.items():
                yield callee, name, value

    def _read_arguments(self, call: ast.Call, callee: str = "") -> dict[str, object]:
        names = ("model",) if callee.endswith("Trainer") else ()
        if callee.endswith(_CONFIG_ENDS) and callee not in _PART_CONFIGS:
            names = ("output_dir",)
        positional = zip(_POSITIONAL.get(callee, names), call.args, strict=False)
        keywords = [(keyword.arg, keyword.value) for keyword in call.keywords]
        return _merge_items([*positional, *keywords], self._constants[self._scopes[call]])

    def _select_configs(self, callees: Collection[str]) -> list[ast.Call]:
        """Return the only configuration of each kind, or the only one that another call uses."""
        kinds: dict[str, list[ast.Call]] = {}
        used = set[object]()
        for call in self._calls:
            callee = _split_callee(call)[1]
            if callee in callees and callee.endswith(_CONFIG_ENDS):
                kind = callee if callee in _PART_CONFIGS else "training arguments"
                kinds.setdefault(kind, []).append(call)
            if callee.endswith(_CONSUMER_ENDS):
                values = [*call.args, *self._read_arguments(call).values()]
                nodes = [value for value in values if isinstance(value, ast.expr)]
                used.update(nodes, (node.id for node in nodes if isinstance(node, ast.Name)))
        selected = []
        for kind, calls in kinds.items():
            found = [call for call in calls if {call, self._find_name(call)} & used]
            found = calls if len(calls) == 1 else found
            if len(found) != 1:
                lines = ", ".join(str(call.lineno) for call in calls)
                text = f"has several {kind}, in lines {lines}, of which not exactly one is used"
                raise AmbiguousConfigError(text)
            selected += found
        return selected

    def _find_name(self, call: ast.Call) -> str:
        assigned = _iter_assigned(node for node in self._nodes if isinstance(node, ast.stmt))
        return next((name for name, value in assigned if value is call), "")

    def _read_changes(self, call: ast.Call, is_config: bool) -> dict[str, object]:
        """Return the values that are assigned to attributes of a configuration after its call."""
        prefix, scope = f"{self._find_name(call)}.", self._scopes[call]
        if not is_config or len(prefix) == 1:
            return {}
        direct = set(_iter_statements(scope.body))
        changes: dict[str, object] = {}
        for setter in self._calls:
            if ast.unparse(setter.func) == "setattr" and len(setter.args) == 3:
                owner, field, _ = map(ast.unparse, setter.args)
                changes |= {field.strip("'"): setter} if f"{owner}." == prefix else {}
        for node in self._nodes:
            if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) or not node.value:
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in map(ast.unparse, targets):
                if name.startswith(prefix):
                    field = name.removeprefix(prefix)
                    is_direct = node in direct and not isinstance(node, ast.AugAssign)
                    is_direct &= not isinstance(changes.get(field), ast.expr)
                    known = self._constants[scope]
                    value = _merge_items([(field, node.value)], known)[field]
                    changes[field] = value if is_direct else node.value
        return changes


def _split_callee(call: ast.Call) -> tuple[str, str]:
    receiver, _, callee = ast.unparse(call.func).rpartition(".")
    return receiver, callee
