"""Read the arguments of a training from the syntax tree of a Python script."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from finesight.convert.python_values import (
    evaluate_condition,
    evaluate_constant,
    merge_items,
    read_items,
)
from finesight.convert.script_parsers import read_parsed_arguments
from finesight.convert.script_usage import ScriptUsage

_MODEL_CLASS = re.compile(r"(?:.*\.)?\w*(?:[Mm]odel|For[A-Z])\w*")
_ADAPTER_CLASS = re.compile(r"(?:.*\.)?(?:Auto)?PeftModel\w*")
_TRAINER_ARGUMENTS = ("model", "args", "data_collator", "train_dataset", "eval_dataset")
_POSITIONAL = {
    "from_pretrained": ("model",),
    "load_dataset": ("path", "name"),
    "GKDTrainer": ("model", "teacher_model", "args", "data_collator", "train_dataset"),
    "DistillationTrainer": ("model", "teacher_model", "args", "data_collator", "train_dataset"),
}
_PART_CONFIGS = ("LoraConfig", "BitsAndBytesConfig")
_CONFIG_ENDS = ("Config", "Arguments")
_CONSUMER_ENDS = ("Trainer", "get_peft_model", "from_pretrained")
"""Ends of the names of calls that make a configuration, and of those that receive one."""

_LOADING_ARGUMENTS = (
    "model",
    "pretrained_model_name_or_path",
    "use_fast",
    "trust_remote_code",
    "padding_side",
    "local_files_only",
    "cache_dir",
    "revision",
    "token",
    "subfolder",
    "model_max_length",
)
"""Arguments that load a processor, without an effect on its inputs."""

_REPOSITORY_ARGUMENTS = ("id", "model_id", "repo_id", "model", "pretrained_model_name_or_path")
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


class ScriptArgument(NamedTuple):
    """Argument of a call. A value that is no constant is an expression."""

    callee: str
    name: str
    value: object


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
            fields = merge_items(_iter_assigned(statement.body), constants)
        else:
            name, node = next(_iter_assigned([statement]), ("", None))
            if node is None or counts[name] != 1 or not name.isidentifier():
                continue
            value = merge_items([(name, node)], constants)[name]
            if isinstance(value, ast.expr):
                with suppress(ValueError):
                    value = read_items(node, constants)
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
    """Calls in a Python script, with the constants that each of them can use.

    Attributes:
        nodes: All nodes of the script.
        calls: Calls that may run, in the order of their lines.
        trainers: Calls that create a trainer which trains.
        used: Nodes on which the arguments of the trainers depend.
        used_for_training: The same without those that only the evaluation uses.
        function_names: Names of the functions of the script.
        parsed: Arguments from the command line.
        received: Names whose values are converted, or that decide about dead code and are in it.
    """

    def __init__(self, tree: ast.Module, options: Mapping[str, object]) -> None:
        """Find the constants of the module and of each function, and the parts in use.

        `options` are those of the command that starts the script.
        """
        self._module = tree
        self._counts = _count_assignments(tree)
        self.nodes = list(ast.walk(tree))
        self._class_names: dict[ast.AST, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.ClassDef):
                self._class_names |= {
                    one: node.name for one in node.body if getattr(one, "name", "") == "__init__"
                }
        self._num_parameters = Counter(one.arg for one in self.nodes if isinstance(one, ast.arg))
        self._callers: dict[str, list[ast.Call]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                self._callers.setdefault(node.func.id, []).append(node)
        functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef)]
        self._scopes: dict[ast.AST, ast.Module | ast.FunctionDef] = dict.fromkeys(self.nodes, tree)
        for function in functions:
            self._scopes |= dict.fromkeys(ast.walk(function), function)
        known = _read_constants(tree.body, {}, self._counts)
        self.parsed = read_parsed_arguments(tree, options, partial(evaluate_constant, names=known))
        for name, value in self.parsed.constants.items():
            if not self._counts[name]:
                known[name] = value
        self._constants: dict[ast.AST, dict[str, object]] = {tree: known}
        self._read_functions(functions, options)
        self.function_names = {function.name for function in functions}
        self.received: set[str] = set()
        self._dead_nodes = self._find_dead_nodes()
        self._bases = self._find_bases()
        calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        calls = [call for call in calls if call not in self._dead_nodes]
        self.calls = sorted(calls, key=lambda call: call.lineno)
        for node in self._dead_nodes:
            self.mark_received(node)
        self.trainers = self._find_trainers()
        usage = ScriptUsage(tree, self._dead_nodes)
        self.used = usage.find_used(self.trainers)
        arguments = [one for call in self.trainers for one in self._list_training_arguments(call)]
        self.used_for_training = usage.find_used(arguments)

    def iter_arguments(self, callees: Collection[str]) -> Iterator[ScriptArgument]:
        """Yield the arguments of known calls that the training uses, in the order of lines.

        Each call starts with an item without a name. `from_pretrained` of a processor has only
        arguments that change its inputs. Of several calls, the first counts; of several
        configurations of a kind, the one that a trainer or model receives.

        Raises AmbiguousConfigError if it cannot be determined.
        """
        kinds: dict[str, list[ast.Call]] = {}
        for call in self.calls:
            if kind := self._find_kind(call, callees):
                kinds.setdefault(kind, []).append(call)
        selected = {call: kind for kind in kinds for call in self._select_calls(kind, kinds[kind])}
        teachers = self._find_teachers()
        seen: set[str] = set()
        for call in self.calls:
            kind = selected.get(call, "")
            callee = self.split_callee(call)[1]
            values = self.read_arguments(call)
            if not kind:
                continue
            if kind == "model" and self._find_name(call) in teachers:
                yield ScriptArgument(callee, "teacher_model", values.get("model"))
                continue
            if kind == "adapter":
                adapter = values.get("model_id", values.get("adapter"))
                yield ScriptArgument("get_peft_model", "adapter_name_or_path", adapter)
                continue
            if kind == "processor":
                values = {key: one for key, one in values.items() if key not in _LOADING_ARGUMENTS}
            is_config = callee.endswith(_CONFIG_ENDS)
            if values and kind in seen:
                continue
            # A tokenizer and a processor have arguments of their own.
            if values and not is_config and kind != "processor":
                seen.add(kind)
            if callee.endswith("Trainer") and callee not in callees:
                callee = "Trainer"
            self.mark_received(call)
            yield ScriptArgument(callee, "", None)
            if kind == "trainer" and not isinstance(values.get("model"), str):
                values.pop("model", None)  # The call that creates the model names it.
            for name, value in (values | self._read_changes(call, is_config)).items():
                yield ScriptArgument(callee, name, value)

    def mark_received(self, node: ast.AST) -> None:
        """Add the names inside a node to those whose values are converted or not used."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute):
                self.received.add(inner.attr)
            elif isinstance(inner, ast.Name):
                self.received.add(inner.id)

    def split_callee(self, call: ast.Call) -> tuple[str, str]:
        """Return the receiver of a call, and its function or the base of its class."""
        receiver, _, callee = ast.unparse(call.func).rpartition(".")
        return receiver, self._bases.get(callee, callee)

    def read_arguments(self, call: ast.Call) -> dict[str, object]:
        """Return the arguments of a call by name; those without a constant are expressions."""
        receiver, callee = self.split_callee(call)
        names: tuple[str, ...] = ()
        if callee.endswith("Trainer"):
            names = _TRAINER_ARGUMENTS
        elif callee.endswith(_CONFIG_ENDS) and callee not in _PART_CONFIGS:
            names = ("output_dir",)
        names = _POSITIONAL.get(callee, names)
        if callee == "from_pretrained" and _ADAPTER_CLASS.fullmatch(receiver):
            names = ("model", "adapter")
        positional = zip(names, call.args, strict=False)
        keywords = [(keyword.arg, keyword.value) for keyword in call.keywords]
        return merge_items([*positional, *keywords], self.get_constants(call))

    def get_constants(self, node: ast.AST) -> Mapping[str, object]:
        """Return the constants in the scope of a node."""
        return self._constants[self._scopes[node]]

    def get_base(self, name: str) -> str:
        """Return the library class from which a class is derived, or its name."""
        return self._bases.get(name, name)

    def iter_parsed_settings(self) -> Iterator[tuple[str, object]]:
        """Yield settings from the command line that no call receives as an argument."""
        for name, value in (self.parsed.own | self.parsed.settings).items():
            is_used = name in self.parsed.own and name in self.received
            is_empty = value is None or value is False or value == ""
            if not is_used and not is_empty:
                yield name, value

    def iter_parsed_changes(self) -> Iterator[tuple[str, object]]:
        """Yield the values that the script assigns to training arguments from the command line."""
        scopes = {self._scopes[call] for call in self.trainers} or {self._module}
        for holder, class_name in self.parsed.classes.items():
            for scope in scopes:
                if self.get_base(class_name).endswith(_CONFIG_ENDS):
                    yield from self.read_changes_of(holder, scope).items()

    def iter_downloads(self) -> Iterator[tuple[str, str, str]]:
        """Yield hub, repository and folder of the models that the script downloads."""
        modules: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.ImportFrom):
                modules |= {one.asname or one.name: node.module or "" for one in node.names}
        for call in self.calls:
            receiver, callee = self.split_callee(call)
            is_model = self._find_kind(call, ("from_pretrained",)) == "model"
            if callee != "snapshot_download" and not is_model:
                continue
            module = modules.get(receiver or callee, receiver)
            hub = "modelscope" if module.startswith("modelscope") else "hf"
            values = merge_items(zip(["id"], call.args, strict=False), self.get_constants(call))
            values |= self.read_arguments(call)
            name = next((values[key] for key in _REPOSITORY_ARGUMENTS if key in values), None)
            if isinstance(name, str) and not name.startswith((".", "/", "~")):
                folder = values.get("local_dir")
                yield hub, name, folder if isinstance(folder, str) else ""

    def is_for_training(self, node: ast.AST) -> bool:
        """Return whether the training uses a node; without a trainer, everything counts."""
        if self.trainers:
            return node in self.used_for_training
        return node not in self._dead_nodes

    def is_own_code(self, node: ast.FunctionDef | ast.ClassDef) -> bool:
        """Return whether a definition is code, not fields of arguments or the main function."""
        inner = list(ast.walk(node))
        functions = [one for one in inner if isinstance(one, ast.FunctionDef)]
        is_data = all(function.name == "__post_init__" for function in functions)
        calls = [one for one in inner if isinstance(one, ast.Call)]
        is_parser = any(self.split_callee(call)[1] == "add_argument" for call in calls)
        return not is_data and not is_parser and not any(call in self.trainers for call in calls)

    def list_callbacks(self) -> list[ast.expr]:
        """Return the expressions of the callbacks of trainers."""
        found: list[ast.expr] = []
        names = {self._find_name(call) for call in self.trainers}
        for call in self.calls:
            is_added = isinstance(call.func, ast.Attribute) and call.func.attr == "add_callback"
            if is_added and ast.unparse(call.func).rpartition(".")[0] in names:
                found += call.args
        for call in self.trainers:
            for keyword in call.keywords:
                if keyword.arg == "callbacks":
                    value = self.resolve(keyword.value)
                    found += value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
        return [self.resolve(node) for node in found]

    def iter_attribute_changes(self) -> Iterator[tuple[str, ast.expr]]:
        """Yield dotted name and value of the attributes that statements assign."""
        for node in self.nodes:
            if isinstance(node, ast.Assign) and node not in self._dead_nodes:
                for target in node.targets:
                    if isinstance(target, ast.Attribute):
                        yield ast.unparse(target), node.value

    def iter_items_set(self, name: str) -> Iterator[tuple[str, ast.expr]]:
        """Yield the items that statements set in a dict, such as os.environ."""
        for node in self.nodes:
            if node in self._dead_nodes:
                continue
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                target = node.targets[0]
                if ast.unparse(target.value) == name and isinstance(target.slice, ast.Constant):
                    yield str(target.slice.value), node.value
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{name}.setdefault":
                key, *values = node.args
                if isinstance(key, ast.Constant) and values:
                    yield str(key.value), values[0]

    def iter_model_changes(self) -> Iterator[ast.stmt]:
        """Yield statements that change a model or processor, or which parameters are trained."""
        names = self._list_models()
        scopes = {self._module, *(self._scopes[call] for call in self.trainers)}
        for node in self.nodes:
            if not isinstance(node, ast.stmt) or node in self._dead_nodes:
                continue
            if self._scopes[node] not in scopes and not self.is_for_training(node):
                continue
            changed = ""
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                changed = ast.unparse(node.targets[0])
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                changed = ast.unparse(node.value.func)
            elif isinstance(node, ast.For) and "requires_grad" in ast.unparse(node):
                changed = ast.unparse(node.iter)
            if any(changed.startswith(f"{name}.") for name in names):
                yield node

    def _list_models(self) -> set[str]:
        """Return the variables that hold a model, an adapter, a tokenizer or a processor."""
        names: set[str] = set()
        for node in self.nodes:
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            callee = self.split_callee(node.value)[1]
            kind = self._find_kind(node.value, ("from_pretrained",))
            is_loaded = kind in ("model", "adapter", "processor")
            if is_loaded or callee in ("get_peft_model", "prepare_model_for_kbit_training"):
                target = node.targets[0]
                parts = target.elts if isinstance(target, ast.Tuple) else [target]
                names.update(ast.unparse(part) for part in parts)
        return names

    def resolve(self, node: ast.expr) -> ast.expr:
        """Return the expression that a variable holds, or the expression itself."""
        if isinstance(node, ast.Name):
            statements = [one for one in self.nodes if isinstance(one, ast.stmt)]
            assigned = [value for name, value in _iter_assigned(statements) if name == node.id]
            if assigned:
                return assigned[-1]
        return node

    def _read_functions(
        self, functions: Sequence[ast.FunctionDef], options: Mapping[str, object]
    ) -> None:
        """Set the constants of functions; all can use the attributes that `__init__` sets."""
        known = self._constants[self._module]
        attributes: dict[str, object] = {}
        for function in sorted(functions, key=lambda one: one.name != "__init__"):
            parameters = self._read_parameters(function, options)
            names = known | attributes | parameters
            self._constants[function] = _read_constants(function.body, names, self._counts)
            if function.name != "__init__":
                continue
            for name, node in _iter_assigned(function.body):
                if name.startswith("self.") and self._counts[name] == 1:
                    with suppress(ValueError):
                        attributes[name] = evaluate_constant(node, self._constants[function])

    def _read_parameters(
        self, function: ast.FunctionDef, options: Mapping[str, object]
    ) -> dict[str, object]:
        """Return the parameters of a function that have one value: an option, or their default."""
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        nodes: dict[str, ast.expr] = {}
        if arguments.defaults:
            named = positional[-len(arguments.defaults) :]
            nodes = {one.arg: node for one, node in zip(named, arguments.defaults, strict=True)}
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            if default is not None:
                nodes[argument.arg] = default
        # A function that the script calls once has the values of this call.
        name = self._class_names.get(function, function.name)
        positional = positional[name != function.name :]  # without self
        callers = self._callers.get(name, [])
        for call in callers:
            names = [one.arg for one in positional]
            passed = dict(zip(names, call.args, strict=False))
            passed |= {one.arg: one.value for one in call.keywords if one.arg}
            nodes |= passed
            if len(callers) > 1:
                for name in passed:
                    nodes.pop(name, None)
        found: dict[str, object] = {}
        for name, node in nodes.items():
            if self._counts[name] != self._num_parameters[name]:
                continue  # A statement assigns it.
            with suppress(ValueError):
                found[name] = evaluate_constant(node, self._constants[self._module])
            if name in options and not callers:
                found[name] = options[name]
        return found

    def _find_dead_nodes(self) -> set[ast.AST]:
        """Return the nodes of branches that never run, by constants and defaults of arguments."""
        dead: set[ast.AST] = set()
        for node in self.nodes:
            if not isinstance(node, ast.If):
                continue
            condition = evaluate_condition(node.test, self.get_constants(node))
            if condition is None:
                continue
            self.mark_received(node.test)
            for statement in node.orelse if condition else node.body:
                dead.update(ast.walk(statement))
        return dead

    def _find_bases(self) -> dict[str, str]:
        """Return the library class of each derived class of the script."""
        bases: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.ClassDef) and node.bases:
                name = ast.unparse(node.bases[0]).rpartition(".")[2]
                if name.endswith(("Trainer", *_CONFIG_ENDS)):
                    bases[node.name] = bases.get(name, name)
        return bases

    def _find_trainers(self) -> list[ast.Call]:
        """Return the calls that create trainers: those that train, or all if none is known to."""
        trainers = [call for call in self.calls if self.split_callee(call)[1].endswith("Trainer")]
        started: set[str] = set()
        for call in self.calls:
            if isinstance(call.func, ast.Attribute) and call.func.attr == "train":
                started.add(ast.unparse(call.func.value))
        training = [
            call for call in trainers if {self._find_name(call), ast.unparse(call)} & started
        ]
        return training or trainers

    def _list_training_arguments(self, call: ast.Call) -> list[ast.expr]:
        """Return the arguments of a trainer, except the data of the evaluation."""
        found = [call.func, *(one.value for one in call.keywords if one.arg != "eval_dataset")]
        names = _POSITIONAL.get(self.split_callee(call)[1], _TRAINER_ARGUMENTS)
        for name, value in zip_longest(names, call.args):
            if value is not None and name != "eval_dataset":
                found.append(value)
        return found

    def _find_kind(self, call: ast.Call, callees: Collection[str]) -> str:
        """Return the kind of a call, empty if it sets nothing."""
        receiver, callee = self.split_callee(call)
        if callee.endswith("Trainer"):
            return "trainer"
        if callee not in callees:
            return ""
        if callee == "from_pretrained":
            if _ADAPTER_CLASS.fullmatch(receiver):
                return "adapter"
            if _MODEL_CLASS.fullmatch(receiver):
                return "model"
            return "" if receiver.endswith("Config") else "processor"
        if callee.endswith(_CONFIG_ENDS) and callee not in _PART_CONFIGS:
            return "training arguments"
        return callee

    def _select_calls(self, kind: str, calls: list[ast.Call]) -> list[ast.Call]:
        """Return the calls of a kind that the training uses, or all.

        Raises AmbiguousConfigError for several configurations.
        """
        if kind == "trainer":
            return self.trainers
        found = [call for call in calls if call in self.used_for_training]
        if kind == "adapter":  # Scripts load adapters for inference, too.
            return found
        if not found and not (kind == "LoraConfig" and self._loads_adapter()):
            found = calls
        if kind not in (*_PART_CONFIGS, "training arguments"):
            return found
        found = [*self._find_replaced(found, calls), *found]
        if len(found) < 2:
            return found
        consumed = self._find_consumed(found)
        if len(consumed) != 1:
            lines = ", ".join(str(call.lineno) for call in found)
            text = f"has several {kind}, in lines {lines}, of which not exactly one is used"
            raise AmbiguousConfigError(text)
        return consumed

    def _loads_adapter(self) -> bool:
        """Return whether the training continues an adapter, which has a configuration."""
        found = [call for call in self.calls if call in self.used_for_training]
        return any(self._find_kind(call, ("from_pretrained",)) == "adapter" for call in found)

    def _find_replaced(
        self, selected: Sequence[ast.Call], calls: Sequence[ast.Call]
    ) -> list[ast.Call]:
        """Return the calls whose variable a selected call on a later line replaces."""
        found: list[ast.Call] = []
        for later in selected:
            name = self._find_name(later)
            for call in calls:
                is_before = self._scopes[call] is self._scopes[later] and call.lineno < later.lineno
                if is_before and name and self._find_name(call) == name and call not in selected:
                    found.append(call)
        return found

    def _find_consumed(self, configs: Sequence[ast.Call]) -> list[ast.Call]:
        """Return the configurations that a trainer or model receives, not those of inference."""
        used: set[object] = set()
        for call in self.calls:
            receiver, callee = self.split_callee(call)
            if not callee.endswith(_CONSUMER_ENDS) or _ADAPTER_CLASS.fullmatch(receiver):
                continue
            for value in (*call.args, *self.read_arguments(call).values()):
                if isinstance(value, ast.expr):
                    used.add(value)
                if isinstance(value, ast.Name):
                    used.add(value.id)
        found: list[ast.Call] = []
        for call in configs:
            is_inference = self.read_arguments(call).get("inference_mode") is True
            if {call, self._find_name(call)} & used and not is_inference:
                found.append(call)
        return found

    def _find_teachers(self) -> set[str]:
        """Return the names of the teacher models of trainers."""
        teachers = [self.read_arguments(call).get("teacher_model") for call in self.trainers]
        return {node.id for node in teachers if isinstance(node, ast.Name)}

    def _find_name(self, call: ast.Call) -> str:
        """Return the variable that holds the result of a call, empty if there is none."""
        assigned = _iter_assigned(node for node in self.nodes if isinstance(node, ast.stmt))
        return next((name for name, value in assigned if value is call), "")

    def _read_changes(self, call: ast.Call, is_config: bool) -> dict[str, object]:
        """Return the values that are assigned to attributes of a configuration after its call."""
        name = self._find_name(call)
        if not is_config or not name:
            return {}
        return self.read_changes_of(name, self._scopes[call])

    def read_changes_of(self, name: str, scope: ast.Module | ast.FunctionDef) -> dict[str, object]:
        """Return the values that are assigned to the attributes of a variable."""
        prefix = f"{name}."
        direct = set(_iter_statements(scope.body))
        changes: dict[str, object] = {}
        for setter in self.calls:
            if ast.unparse(setter.func) == "setattr" and len(setter.args) == 3:
                owner, field, _ = map(ast.unparse, setter.args)
                if owner == name:
                    changes[field.strip("'")] = setter
        for node in self.nodes:
            if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) or not node.value:
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in map(ast.unparse, targets):
                if not target.startswith(prefix):
                    continue
                field = target.removeprefix(prefix)
                is_direct = node in direct and not isinstance(node, ast.AugAssign)
                is_direct &= not isinstance(changes.get(field), ast.expr)
                known = self._constants[scope]
                value = merge_items([(field, node.value)], known)[field]
                changes[field] = value if is_direct else node.value
        return changes
