"""Find the parts of a Python script that its training uses.

Scripts also contain configurations for inference, checks and other models. A part is used if the
arguments of a trainer depend on it.
"""

from __future__ import annotations

import ast
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Scope = ast.Module | ast.FunctionDef | ast.ClassDef


_MAX_STEPS = 2_000_000
"""Number of dependencies after which the search ends; a script of a training has 10,000."""


class _BoundName(NamedTuple):
    """Name that a node assigns or changes, with the expressions of the value.

    From `line` on, the name has the value. `replaces` is False if the former value remains a part.
    """

    name: str
    line: int
    sources: tuple[ast.AST, ...]
    replaces: bool


class ScriptUsage:
    """Dependencies between the names of a script."""

    def __init__(self, tree: ast.Module, dead_nodes: Iterable[ast.AST] = ()) -> None:
        """Collect the names of a script, except those in `dead_nodes`, which never run."""
        self.scopes: dict[ast.AST, Scope] = {}
        self._module = tree
        self._dead = set(dead_nodes)
        self._bindings: dict[tuple[Scope, str], list[_BoundName]] = defaultdict(list)
        self._outer_scopes: dict[Scope, Scope] = {}
        self._calls: dict[str, list[ast.Call]] = defaultdict(list)
        self._collect(tree)
        for found in self._bindings.values():
            found.sort(key=lambda binding: binding.line)

    def find_used(self, roots: Iterable[ast.AST]) -> set[ast.AST]:
        """Return the nodes on which the roots depend, with the roots themselves."""
        used: set[ast.AST] = set()
        waiting = list(roots)
        num_steps = 0
        while waiting:
            num_steps += 1
            node = waiting.pop()
            if node in used or node in self._dead:
                continue
            used.add(node)
            waiting += ast.iter_child_nodes(node)
            waiting += self._find_sources(node)
            if num_steps > _MAX_STEPS:
                raise ValueError("too many dependencies between its names")
        return used

    def _collect(self, tree: ast.Module) -> None:
        """Add the scopes, bindings and calls of all nodes."""
        waiting: list[tuple[ast.AST, Scope, bool]] = [(tree, tree, True)]
        while waiting:
            node, scope, is_certain = waiting.pop()
            if node in self._dead:
                continue
            self.scopes[node] = scope
            if isinstance(node, ast.Call):
                self._calls[ast.unparse(node.func).rpartition(".")[2]].append(node)
            for bound in _iter_bound_names(node):
                # Attributes belong to objects, which several functions may share.
                owner = self._module if "." in bound.name else scope
                replaces = bound.replaces and is_certain
                self._bindings[owner, bound.name].append(bound._replace(replaces=replaces))
            inner = scope
            is_inner_certain = is_certain and not _may_be_skipped(node)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                inner = node
                is_inner_certain = True
                self._outer_scopes[node] = scope
            waiting += [(one, inner, is_inner_certain) for one in ast.iter_child_nodes(node)]

    def _find_sources(self, node: ast.AST) -> Sequence[ast.AST]:
        """Return the expressions and statements that determine a name or attribute."""
        if isinstance(node, ast.Attribute):
            return self._find_attribute_sources(node)
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
            return []
        scope: Scope | None = self.scopes[node]
        line: float = node.lineno
        while scope is not None:
            found = self._bindings.get((scope, node.id), [])
            if found:
                return _select_sources(found, line)
            if isinstance(scope, ast.FunctionDef) and node.id in _list_parameters(scope):
                return self._list_passed(scope)
            # When a function runs, the names of the outer scopes have their last values.
            scope = self._outer_scopes.get(scope)
            line = float("inf")
        return []

    def _find_attribute_sources(self, node: ast.Attribute) -> Sequence[ast.AST]:
        """Return the values that statements assign to an attribute, or the method of `self`."""
        found = self._bindings.get((self._module, ast.unparse(node)), [])
        scope: Scope | None = self.scopes[node]
        if not found and isinstance(node.value, ast.Name) and node.value.id == "self":
            while scope is not None and not isinstance(scope, ast.ClassDef):
                scope = self._outer_scopes.get(scope)
            if scope is not None:
                found = self._bindings.get((scope, node.attr), [])
        return [source for bound in found for source in bound.sources]

    def _list_passed(self, function: ast.FunctionDef) -> list[ast.AST]:
        """Return the arguments that the calls of a function, or of its class, pass."""
        name = function.name
        outer = self._outer_scopes[function]
        if name == "__init__" and isinstance(outer, ast.ClassDef):
            name = outer.name
        passed: list[ast.AST] = []
        for call in self._calls.get(name, []):
            passed += call.args
            passed += [keyword.value for keyword in call.keywords]
        return passed


def _select_sources(bindings: Sequence[_BoundName], line: float) -> list[ast.AST]:
    """Return the sources of the values that a name may have on a line.

    These are the last value that certainly replaces the former ones, and later changes.
    """
    sources: list[ast.AST] = []
    end = bisect_left(bindings, line, key=lambda bound: bound.line)
    # A loop may use a value of its former iteration, which a later line sets.
    for index in reversed(range(end or len(bindings))):
        sources += bindings[index].sources
        if bindings[index].replaces:
            break
    return sources


def _may_be_skipped(node: ast.AST) -> bool:
    """Return whether the statements inside a node may not run."""
    if isinstance(node, ast.If):
        return "__main__" not in ast.unparse(node.test)
    return isinstance(node, ast.For | ast.While | ast.Try | ast.Match | ast.ExceptHandler)


def _list_parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _iter_bound_names(node: ast.AST) -> Iterator[_BoundName]:
    """Yield the names that a node assigns, defines or changes."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            is_split = isinstance(target, ast.Tuple | ast.List)
            source = node.value if is_split else node
            yield from _iter_targets(target, source, _end_line(node))
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield from _iter_targets(node.target, node, _end_line(node))
    elif isinstance(node, ast.AugAssign):
        name = ast.unparse(node.target)
        yield _BoundName(name, _end_line(node), (node.value,), replaces=False)
    elif isinstance(node, ast.For):
        yield from _iter_targets(node.target, node.iter, _end_line(node.iter) - 1)
    elif isinstance(node, ast.With):
        for item in node.items:
            if item.optional_vars is not None:
                line = _end_line(item.context_expr) - 1
                yield from _iter_targets(item.optional_vars, item.context_expr, line)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield _BoundName(node.name, node.lineno, (node,), replaces=True)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        changed = node.value.func
        while isinstance(changed, ast.Attribute | ast.Subscript):
            changed = changed.value
        if isinstance(changed, ast.Name) and changed is not node.value.func:
            yield _BoundName(changed.id, _end_line(node), (node.value,), replaces=False)


def _iter_targets(target: ast.expr, value: ast.AST, line: int) -> Iterator[_BoundName]:
    """Yield the names in the target of an assignment, with their values."""
    if isinstance(target, ast.Tuple | ast.List):
        values: Sequence[ast.AST] = [value] * len(target.elts)
        if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(values):
            values = value.elts
        for part, part_value in zip(target.elts, values, strict=True):
            yield from _iter_targets(part, part_value, line)
    elif isinstance(target, ast.Subscript):
        base = target.value
        if isinstance(base, ast.Name | ast.Attribute):
            yield _BoundName(ast.unparse(base), line, (value,), replaces=False)
    elif isinstance(target, ast.Name | ast.Attribute):
        yield _BoundName(ast.unparse(target), line, (value,), replaces=True)


def _end_line(node: ast.stmt | ast.expr) -> int:
    return node.end_lineno or node.lineno
