"""Read the arguments of a training from the syntax tree of a Python script."""

from __future__ import annotations

import ast
import re
from collections import ChainMap, Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
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
from finesight.convert.script_parsers import convert_option, read_parsed_arguments
from finesight.convert.script_usage import ScriptUsage

_MODEL_CLASS = re.compile(r"[Mm]odel|For[A-Z]")
_ADAPTER_CLASS = re.compile(r"(?:Auto)?PeftModel")
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
_MAIN_REVISIONS = ("main", "master")
"""Names of the newest revision on Hugging Face and on ModelScope."""

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


_MAX_LINES = 8
"""Number of lines that a message names."""

_MAX_FIELDS = 100
"""Number of fields of a class that its instances have as constants."""


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


def _is_model_class(receiver: str) -> bool:
    name = receiver.rpartition(".")[2]
    return name.isidentifier() and _MODEL_CLASS.search(name) is not None


def _is_adapter_class(receiver: str) -> bool:
    return _ADAPTER_CLASS.match(receiver.rpartition(".")[2]) is not None


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


_Assignment = ast.Assign | ast.AnnAssign | ast.AugAssign
Constants = MutableMapping[str, object]


class _ConstantReader:
    """Reads the constants that statements assign, the only time in the script.

    Fields of classes and of their instances have dotted names. Values of dicts may be expressions.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.counts = _count_assignments(tree)
        self._fields: dict[str, list[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names = [name for name, _ in _iter_assigned(node.body)]
                self._fields[node.name] = names[:_MAX_FIELDS]

    def read(self, body: Sequence[ast.stmt], *known: Constants) -> Constants:
        """Return the constants of a body, and `known` ones; the first value of a name counts."""
        # All functions share the constants of the module: a copy for each takes much memory.
        constants = ChainMap[str, object]({}, *known)
        for statement in _iter_statements(body):
            if isinstance(statement, ast.ClassDef):
                fields = merge_items(_iter_assigned(statement.body), constants)
                self._add_fields(statement.name, fields, constants)
                continue
            name, node = next(_iter_assigned([statement]), ("", None))
            if node is None or self.counts[name] != 1 or not name.isidentifier():
                continue
            value = merge_items([(name, node)], constants)[name]
            if isinstance(value, ast.expr):
                with suppress(ValueError):
                    value = read_items(node, constants)
            if not isinstance(value, ast.expr):
                constants[name] = value
            elif isinstance(node, ast.Call) and not node.args and not node.keywords:
                fields = self._read_instance(ast.unparse(node.func), constants)
                self._add_fields(name, fields, constants)
        return constants

    def _read_instance(self, class_name: str, constants: Mapping[str, object]) -> dict[str, object]:
        """Return the fields of an instance of a class that no method sets."""
        fields: dict[str, object] = {}
        for field in self._fields.get(class_name, ()):
            key = f"{class_name}.{field}"
            if key in constants and not self.counts[f"self.{field}"]:
                fields[field] = constants[key]
        return fields

    def _add_fields(self, name: str, fields: Mapping[str, object], constants: Constants) -> None:
        """Add fields of a class or instance with dotted names, unless statements change them."""
        for field, value in fields.items():
            is_fixed = self.counts[name] == 1 and not self.counts[f"{name}.{field}"]
            if is_fixed and not isinstance(value, ast.expr):
                constants[f"{name}.{field}"] = value


def _iter_assigned(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign):
            yield ast.unparse(node.targets[0]), node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield ast.unparse(node.target), node.value


def _list_items(node: ast.expr) -> list[ast.expr]:
    """Return the items of a list or tuple, or the expression itself."""
    if isinstance(node, ast.List | ast.Tuple):
        return node.elts
    return [node]


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
        self._reader = _ConstantReader(tree)
        self._counts = self._reader.counts
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
        self._result_names: dict[ast.expr, str] = {}
        self._last_values: dict[str, ast.expr] = {}
        self._changes: dict[str, list[tuple[str, _Assignment]]] = defaultdict(list)
        self._setters: dict[str, list[tuple[str, ast.Call]]] = defaultdict(list)
        self._index_assignments()
        functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef)]
        self._scopes: dict[ast.AST, ast.Module | ast.FunctionDef] = dict.fromkeys(self.nodes, tree)
        for function in functions:
            self._scopes |= dict.fromkeys(ast.walk(function), function)
        known = self._reader.read(tree.body)
        self.parsed = read_parsed_arguments(tree, options, partial(evaluate_constant, names=known))
        for name, value in self.parsed.constants.items():
            if not self._counts[name]:
                known[name] = value
        self._constants: dict[ast.AST, Constants] = {tree: known}
        self._untyped: dict[tuple[ast.AST, str], object] = {}
        self._read_functions(functions, options)
        self.function_names = {function.name for function in functions}
        self.received: set[str] = set()
        self._dead_nodes = self._find_dead_nodes()
        self._bases = self._find_bases()
        calls: list[ast.Call] = []
        for node in self.nodes:
            if isinstance(node, ast.Call) and node not in self._dead_nodes:
                calls.append(node)
        self.calls = sorted(calls, key=lambda call: call.lineno)
        for node in self._dead_nodes:
            self.mark_received(node)
        self.trainers = self._find_trainers()
        usage = ScriptUsage(tree, self._dead_nodes)
        self.used = usage.find_used(self.trainers)
        arguments: list[ast.expr] = []
        for call in self.trainers:
            arguments += self._list_training_arguments(call)
        self.used_for_training = usage.find_used(arguments)

    def _index_assignments(self) -> None:
        """Index variables by their values, and changes of attributes by the owner."""
        for node in self.nodes:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                for name, value in _iter_assigned([node]):
                    self._result_names.setdefault(value, name)
                    self._last_values[name] = value
            if isinstance(node, _Assignment) and node.value:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in map(ast.unparse, targets):
                    for owner in {target.partition(".")[0], target.rpartition(".")[0]}:
                        if target.startswith(f"{owner}."):
                            self._changes[owner].append((target[len(owner) + 1 :], node))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                self._index_setter(node)

    def _index_setter(self, call: ast.Call) -> None:
        if len(call.args) == 3:
            owner = ast.unparse(call.args[0])
            field = ast.unparse(call.args[1]).strip("'")
            self._setters[owner].append((field, call))

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
        selected: dict[ast.Call, str] = {}
        for kind, calls in kinds.items():
            for call in self._select_calls(kind, calls):
                selected[call] = kind
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
                for key in _LOADING_ARGUMENTS:
                    values.pop(key, None)
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
        if callee == "from_pretrained" and _is_adapter_class(receiver):
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

    def get_untyped_option(self, node: ast.expr) -> object:
        """Return the text of an option whose type only the script knows, or the node itself."""
        if isinstance(node, ast.Name):
            return self._untyped.get((self._scopes[node], node.id), node)
        if not isinstance(node, ast.Attribute):
            return node
        name = ast.unparse(node)
        if self._counts[name]:
            return node
        return self.parsed.untyped.get(name, node)

    def is_default_option(self, node: ast.expr) -> bool:
        """Return whether an expression is an option of a library that the command does not set."""
        if not isinstance(node, ast.Attribute):
            return False
        return ast.unparse(node.value) in self.parsed.classes

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
            given = [values[key] for key in _REPOSITORY_ARGUMENTS if key in values]
            name = given[0] if given else None
            if isinstance(name, str) and not name.startswith((".", "/", "~")):
                folder = values.get("local_dir", "")
                revision = values.get("revision")
                # That of a model is a setting of its own.
                is_other = not is_model and revision not in _MAIN_REVISIONS
                if isinstance(revision, str) and is_other:
                    name = f"{name}@{revision}"
                yield hub, name, str(folder)

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
                    found += _list_items(self.resolve(keyword.value))
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
                key = node.args[0] if len(node.args) == 2 else None
                if isinstance(key, ast.Constant):
                    yield str(key.value), node.args[1]

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
            parts = changed.split(".")
            if len(parts) > 1 and (parts[0] in names or ".".join(parts[:2]) in names):
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
                names.update(map(ast.unparse, _list_items(node.targets[0])))
        return names

    def resolve(self, node: ast.expr) -> ast.expr:
        """Return the expression that a variable holds, or the expression itself."""
        if isinstance(node, ast.Name):
            return self._last_values.get(node.id, node)
        return node

    def _read_functions(
        self, functions: Sequence[ast.FunctionDef], options: Mapping[str, object]
    ) -> None:
        """Set the constants of functions; all can use the attributes that `__init__` sets."""
        known = self._constants[self._module]
        attributes: dict[str, object] = {}
        for function in sorted(functions, key=lambda one: one.name != "__init__"):
            parameters = self._read_parameters(function, options)
            constants = self._reader.read(function.body, parameters, attributes, known)
            self._constants[function] = constants
            if function.name != "__init__":
                continue
            for name, node in _iter_assigned(function.body):
                if name.startswith("self.") and self._counts[name] == 1:
                    with suppress(ValueError):
                        attributes[name] = evaluate_constant(node, constants)

    def _read_parameters(
        self, function: ast.FunctionDef, options: Mapping[str, object]
    ) -> dict[str, object]:
        """Return the parameters of a function that have one value: an option, or their default.

        Options whose type only the script knows are kept apart.
        """
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        nodes: dict[str, ast.expr] = {}
        if arguments.defaults:
            named = positional[-len(arguments.defaults) :]
            nodes = {one.arg: node for one, node in zip(named, arguments.defaults, strict=True)}
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            if default is not None:
                nodes[argument.arg] = default
        types: dict[str, ast.expr | None] = {}
        for argument in (*positional, *arguments.kwonlyargs):
            types[argument.arg] = argument.annotation
        # A function that the script calls once has the values of this call.
        callee = self._class_names.get(function, function.name)
        names = [one.arg for one in positional]
        if callee != function.name:
            del names[:1]  # self
        callers = self._callers.get(callee, [])
        for call in callers:
            passed = dict(zip(names, call.args, strict=False))
            for keyword in call.keywords:
                if keyword.arg:
                    passed[keyword.arg] = keyword.value
            nodes |= passed
            if len(callers) > 1:
                for name in passed:
                    del nodes[name]
        found: dict[str, object] = {}
        for name, node in nodes.items():
            if self._counts[name] != self._num_parameters[name]:
                continue  # A statement assigns it.
            with suppress(ValueError):
                found[name] = evaluate_constant(node, self._constants[self._module])
            if name in options and not callers:
                value = found.pop(name, None)
                try:
                    found[name] = convert_option(options[name], types.get(name), value)
                except ValueError:
                    self._untyped[function, name] = options[name]
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
            skipped = node.body
            if condition:
                skipped = node.orelse
            for statement in skipped:
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
            if _is_adapter_class(receiver):
                return "adapter"
            if _is_model_class(receiver):
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
            lines = ", ".join(str(call.lineno) for call in found[:_MAX_LINES])
            if len(found) > _MAX_LINES:
                lines += ", ..."
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
        others: dict[tuple[ast.AST, str], list[ast.Call]] = defaultdict(list)
        for call in set(calls).difference(selected):
            if name := self._find_name(call):
                others[self._scopes[call], name].append(call)
        found: list[ast.Call] = []
        for later in selected:
            for call in others.get((self._scopes[later], self._find_name(later)), ()):
                if call.lineno < later.lineno:
                    found.append(call)
        return sorted(found, key=lambda call: call.lineno)

    def _find_consumed(self, configs: Sequence[ast.Call]) -> list[ast.Call]:
        """Return the configurations that a trainer or model receives, not those of inference."""
        used: set[object] = set()
        for call in self.calls:
            receiver, callee = self.split_callee(call)
            if not callee.endswith(_CONSUMER_ENDS) or _is_adapter_class(receiver):
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
        return self._result_names.get(call, "")

    def _read_changes(self, call: ast.Call, is_config: bool) -> dict[str, object]:
        """Return the values that are assigned to attributes of a configuration after its call."""
        name = self._find_name(call)
        if not is_config or not name:
            return {}
        return self.read_changes_of(name, self._scopes[call])

    def read_changes_of(self, name: str, scope: ast.Module | ast.FunctionDef) -> dict[str, object]:
        """Return the values that are assigned to the attributes of a variable."""
        direct = set(_iter_statements(scope.body))
        changes: dict[str, object] = {}
        for field, setter in self._setters.get(name, ()):
            if setter not in self._dead_nodes:
                changes[field] = setter
        for field, statement in self._changes.get(name, ()):
            if statement in self._dead_nodes:
                continue
            is_direct = statement in direct and not isinstance(statement, ast.AugAssign)
            is_direct &= not isinstance(changes.get(field), ast.expr)
            value = statement.value
            if value is None:
                continue
            changes[field] = value
            if is_direct:
                changes[field] = merge_items([(field, value)], self._constants[scope])[field]
        return changes
