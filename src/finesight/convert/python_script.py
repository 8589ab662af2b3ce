"""Read the constant arguments of a training from the syntax tree of a Python script."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
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
_MODEL_CLASSES = ("Model", "ForConditionalGeneration", "ForImageTextToText", "ForCausalLM")
_POSITIONAL = {"from_pretrained": ("model",), "load_dataset": ("path", "name")}


def evaluate_constant(node: ast.expr, names: Mapping[str, object]) -> object:
    """Evaluate a literal, arithmetic of numbers, or a name or attribute with a known value.

    Raises ValueError for every other expression: scripts are never executed.
    """
    if isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in names or name in _DTYPES:
            return names.get(name, name)
    if isinstance(node, ast.List | ast.Tuple):
        return [evaluate_constant(item, names) for item in node.elts]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        operands = [evaluate_constant(side, names) for side in (node.left, node.right)]
        if all(isinstance(operand, int | float) for operand in operands):
            with suppress(ArithmeticError):
                return _OPERATORS[type(node.op)](*operands)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ValueError(ast.unparse(node)) from error


def read_constants(tree: ast.Module) -> dict[str, object]:
    """Return the variables and fields of classes that are assigned once, to a constant."""
    nodes = list(ast.walk(tree))
    num_assigned = Counter(node.arg for node in nodes if isinstance(node, ast.arg))
    num_assigned.update(
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    constants: dict[str, object] = {}
    for node in sorted(
        (node for node in nodes if isinstance(node, ast.Assign | ast.AnnAssign)),
        key=lambda node: node.lineno,
    ):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and num_assigned[target.id] == 1 and node.value is not None:
            with suppress(ValueError):
                constants[target.id] = evaluate_constant(node.value, constants)
    return constants


def iter_arguments(
    tree: ast.Module, callees: Collection[str]
) -> Iterator[tuple[str, str, ast.expr]]:
    """Yield callee, name and expression of the arguments of known calls, in the order of lines.

    Each call starts with an item without a name. `from_pretrained` of a processor has only limits
    of pixels.
    """
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        receiver, _, callee = ast.unparse(call.func).rpartition(".")
        if callee not in callees:
            continue
        yield callee, "", call.func
        keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        positional = dict(zip(_POSITIONAL.get(callee, ()), call.args, strict=False))
        is_model = receiver.endswith(_MODEL_CLASSES) and not receiver.endswith("PeftModel")
        for name, value in (positional | keywords).items():
            if callee != "from_pretrained" or is_model or name.endswith("_pixels"):
                yield callee, name, value
