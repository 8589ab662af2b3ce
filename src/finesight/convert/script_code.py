"""Read settings in the code of a training script, and report other code."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from finesight.convert.external_config import ConversionNote, load_rules
from finesight.convert.python_script import Script
from finesight.convert.python_values import merge_items
from finesight.errors import shorten
from finesight.tracker_components import TRACKERS

_IMAGE_KEYS = ("resized_height", "resized_width", "min_pixels", "max_pixels")
"""Keys of an image in a chat message, which qwen_vl_utils reads."""

_LENGTH_NAME = re.compile(
    "(?i)(?:model_)?max_?(?:seq(?:uence)?_?|token_?|input_?|text_?)?len(?:gth)?|cutoff_len(?:gth)?"
)
_RESIZE_NAME = re.compile("(?i)(?!.*(?:embed|token|bbox)).*(?:resize|thumbnail|crop).*")
_FILE_LOADERS = (
    "from_json",
    "from_csv",
    "from_parquet",
    "load_from_disk",
    "read_json",
    "read_csv",
    "read_parquet",
    "read_excel",
)
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xlsx")
_TRACKER_TEXT = "set `track` in the recipe: [{{kind: {kind}, project: {project}}}]"
_EARLY_STOPPING_TEXT = "set eval.patience together with eval.metric and eval.every"
_CALLBACK_TEXT = "code of the script, which is not executed; finesight has no callbacks"

_HARMLESS_CHANGES = {
    "enable_input_require_grads",
    "gradient_checkpointing_enable",
    "train",
    "eval",
    "to",
    "cuda",
    "print_trainable_parameters",
    "save_pretrained",
    "push_to_hub",
    "tie_weights",
    "bfloat16",
    "for_training",
    "for_inference",
    "use_cache",
    "is_parallelizable",
    "model_parallel",
    "padding_side",
    "pad_token",
    "pad_token_id",
    "generate",
    "min_pixels",
    "max_pixels",
}
"""Methods and attributes of models and processors that do not change the training, or are read."""

_CHANGE_TEXTS = {
    "requires_grad": (
        "is not applied: set tune.vision, tune.merger and tune.language; whole parts are trained"
        " or frozen"
    ),
    "chat_template": "finesight uses the chat template of the family",
}
_CHANGE_TEXT = "changes the model or its processor in code, which is not executed"
_FUNCTION_TEXT = "not executed: finesight builds the inputs from imported samples and the recipe"
_TRAINER_TEXT = "not executed: the training loop is that of finesight, the loss that of the recipe"


@dataclass
class ScriptCode:
    """Settings in the code of a script, by name, notes, and environment variables."""

    values: dict[str, object] = field(default_factory=dict)
    unresolved: dict[str, str] = field(default_factory=dict)
    notes: list[ConversionNote] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def note(self, key: str, value: str, text: str) -> None:
        """Add a note about code whose effect differs in finesight."""
        self.notes.append(ConversionNote("differs", key, shorten(value, 100), text))


def read_script_code(script: Script) -> ScriptCode:
    """Read the code that prepares samples and models of a training."""
    code = ScriptCode()
    nodes = [node for node in script.nodes if script.is_for_training(node)]
    _read_image_settings(script, nodes, code)
    _read_resizing(script, nodes, code)
    _read_lengths(script, nodes, code)
    _read_prompts(script, nodes, code)
    _read_data_files(script, code)
    _report_trackers(script, code)
    _report_resumed_checkpoint(script, code)
    _report_changes(script, code)
    _report_functions(script, nodes, code)
    _read_environment(script, code)
    return code


def _iter_pairs(script: Script, node: ast.AST) -> Iterator[tuple[str, object]]:
    """Yield the items of a dict, or the keyword arguments of a call."""
    pairs: list[tuple[str | None, ast.expr]] = []
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                pairs.append((key.value, value))
    elif isinstance(node, ast.Call):
        pairs += [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
    yield from merge_items(pairs, script.get_constants(node)).items()


def _read_image_settings(script: Script, nodes: Sequence[ast.AST], code: ScriptCode) -> None:
    """Set image sizes of chat messages, and limits of a processor."""
    found: dict[str, list[object]] = {}
    for node in nodes:
        if isinstance(node, ast.Call) and script.split_callee(node)[1] == "from_pretrained":
            continue  # Arguments of a processor are read with the others.
        for name, value in _iter_pairs(script, node):
            if name in _IMAGE_KEYS:
                script.mark_received(node)
                found.setdefault(name, []).append(value)
    for name, node in script.iter_attribute_changes():
        last = name.rpartition(".")[2]
        if last in ("min_pixels", "max_pixels"):
            value = merge_items([(last, node)], script.get_constants(node))[last]
            found.setdefault(last, []).append(value)
    for name, values in found.items():
        _set_unique(name, values, code, "image sizes differ in the code: set `image` in the recipe")


def _set_unique(name: str, values: Sequence[object], code: ScriptCode, text: str) -> None:
    """Set a value of the code, or note that several values differ."""
    constants = [value for value in values if not isinstance(value, ast.expr)]
    expressions = [value for value in values if isinstance(value, ast.expr)]
    distinct = {str(value): value for value in constants}
    if len(distinct) == 1:
        code.values[name] = constants[0]
    elif distinct:
        code.note(name, ", ".join(distinct), text)
    elif expressions:
        code.unresolved[name] = ast.unparse(expressions[0])


def _read_resizing(script: Script, nodes: Sequence[ast.AST], code: ScriptCode) -> None:
    """Set the size to which the code resizes images, and report other resizing."""
    own_names = script.function_names
    for call in nodes:
        if not isinstance(call, ast.Call):
            continue
        callee = ast.unparse(call.func).rpartition(".")[2]
        if not _RESIZE_NAME.fullmatch(callee) or callee in own_names:
            continue
        source = f"line {call.lineno}: {ast.unparse(call)}"
        size = _find_size(script, call)
        has_size = "resized_height" in code.values or "longest_side" in code.values
        if size is None or has_size or callee not in ("resize", "thumbnail", "Resize"):
            text = "is not applied: set image.height and image.width, or image.longest_side"
            code.note(callee, source, text)
            continue
        script.mark_received(call)
        if callee == "thumbnail":
            code.values["longest_side"] = max(size)
            text = "image.longest_side in the recipe, which also enlarges smaller images"
            code.note(callee, source, text)
        else:
            width, height = size
            if callee == "Resize":  # of torchvision: height, width
                height, width = size
            code.values |= {"resized_height": height, "resized_width": width}
            code.note(callee, source, "image.height and image.width in the recipe")


def _find_size(script: Script, call: ast.Call) -> tuple[int, int] | None:
    """Return two constant sides in the arguments of a call, else None."""
    constants = merge_items(enumerate(call.args), script.get_constants(call))
    keywords = dict(_iter_pairs(script, call))
    for value in (*constants.values(), keywords.get("size"), keywords.get("dsize")):
        if not isinstance(value, list | tuple) or len(value) != 2:
            continue
        first, second = value
        if isinstance(first, int) and isinstance(second, int) and min(first, second) > 0:
            return first, second
    return None


def _read_lengths(script: Script, nodes: Sequence[ast.AST], code: ScriptCode) -> None:
    """Set the number of tokens at which the code truncates samples."""
    lengths: list[object] = []
    for node in nodes:
        callee = script.split_callee(node)[1] if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            value = merge_items([(name, node.value)], script.get_constants(node))[name]
            if _LENGTH_NAME.fullmatch(name):
                lengths.append(value)
        elif isinstance(node, ast.Call) and not callee.endswith(("Config", "Arguments")):
            for key, given in _iter_pairs(script, node):
                if _LENGTH_NAME.fullmatch(key):
                    script.mark_received(node)
                    lengths.append(given)
    lengths = [length for length in lengths if isinstance(length, int)]
    _set_unique("max_length", lengths, code, "lengths differ in the code: set data.max_length")


def _read_prompts(script: Script, nodes: Sequence[ast.AST], code: ScriptCode) -> None:
    """Set the question and the system prompt that the code writes into every sample."""
    prompts: list[object] = []
    system_prompts: list[object] = []
    for node in nodes:
        if not isinstance(node, ast.Dict):
            continue
        items = dict(_iter_pairs(script, node))
        text = items.get("text")
        if items.get("type") == "text" and isinstance(text, str):
            prompts.append(text)
        content = items.get("content")
        if items.get("role") == "system":
            if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
                content = content[0].get("text")
                prompts = [prompt for prompt in prompts if prompt != content]
            system_prompts.append(content)
    system_prompts = [text for text in system_prompts if isinstance(text, str)]
    prompts = [text for text in prompts if text not in system_prompts]
    _set_unique("prompt", prompts, code, "prompts of the code: import the data with one each")
    _set_unique("system_prompt", system_prompts, code, "set data.system_prompt to one of them")


def _read_data_files(script: Script, code: ScriptCode) -> None:
    """Set the files of the training and of the evaluation that the code loads."""
    read: list[str] = []
    written: set[str] = set()
    for call in script.calls:
        callee = ast.unparse(call.func).rpartition(".")[2]
        positional = zip(["path", "mode"], call.args, strict=False)
        values = merge_items(positional, script.get_constants(call)) | dict(
            _iter_pairs(script, call)
        )
        given = values.get("path", values.get("path_or_paths", values.get("dataset_name")))
        name = given if isinstance(given, str) else ""
        is_hub = ast.unparse(call.func).endswith("MsDataset.load")
        if callee == "open" and name.endswith(_DATA_SUFFIXES):
            if "w" in str(values.get("mode", "r")):
                written.add(name)
            else:
                read.append(name)
            continue
        if not name or not (is_hub or callee in _FILE_LOADERS):
            continue
        if is_hub:
            name = _format_address(name, values)
        if call in script.used_for_training:
            code.values.setdefault("dataset_name", name)
        elif call in script.used:
            code.values.setdefault("eval_dataset_name", name)
    _report_further_data(script, code)
    name = str(code.values.get("dataset_name", ""))
    others = [file for file in read if file not in written]
    is_missing = name == "" or (name in written and not os.path.exists(name))
    if is_missing and others:
        code.values["dataset_name"] = others[0]
        text = "if the script selects rows, select the same ones by --rows or --eval-last"
        code.note("dataset", others[0], text)


def _report_further_data(script: Script, code: ScriptCode) -> None:
    """Report the datasets of a training after the first one; `load_dataset` precedes files."""
    sources: list[str] = []
    for loaders in (("load_dataset",), _FILE_LOADERS):
        for call in script.calls:
            is_loader = script.split_callee(call)[1] in loaders
            if is_loader and call in script.used_for_training and not _loads_eval_data(call):
                sources.append(ast.unparse(call))
    text = "if the training uses it, import it too, and list it in data.train"
    for source in list(dict.fromkeys(sources))[1:]:
        code.note("dataset", source, text)


def _loads_eval_data(call: ast.Call) -> bool:
    """Return whether a call loads the files of a setting for the evaluation.

    A dict of both datasets makes the training depend on this call, too.
    """
    aliases = load_rules("TRL").aliases
    for node in ast.walk(call):
        if isinstance(node, ast.Attribute) and "eval_" in aliases.get(node.attr, node.attr):
            return True
    return False


def _format_address(name: str, values: dict[str, object]) -> str:
    """Return the address of a dataset on ModelScope, with its subset and split."""
    subset = values.get("subset_name")
    split = values.get("split") or "train"
    if isinstance(subset, str) and subset != "default":
        return f"modelscope:{name}:{subset}/{split}"
    return f"modelscope:{name}" if split == "train" else f"modelscope:{name}:{split}"


def _report_trackers(script: Script, code: ScriptCode) -> None:
    """Report callbacks of the trainers, and trackers that the script starts."""
    for node in script.list_callbacks():
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ast.unparse(node)
        code.note("callbacks", ast.unparse(node), _describe_callback(script, node, name))
    for call in script.calls:
        module, _, function = ast.unparse(call.func).rpartition(".")
        if function == "init" and TRACKERS.is_built_in(module):
            code.note(f"{module}.init", "", _describe_callback(script, call, module))


def _describe_callback(script: Script, node: ast.expr, name: str) -> str:
    """Return the recipe setting with the effect of a callback or tracker."""
    lower = name.lower()
    values = dict(_iter_pairs(script, node))
    project = values.get("project")
    if not isinstance(project, str):
        project = "NAME"
    for tracker in TRACKERS.list_built_in():
        if tracker.name in lower:
            return _TRACKER_TEXT.format(kind=tracker.name, project=project)
    if "earlystopping" in lower:
        return _EARLY_STOPPING_TEXT
    return _CALLBACK_TEXT


def _report_resumed_checkpoint(script: Script, code: ScriptCode) -> None:
    """Report a checkpoint from which the script continues."""
    for call in script.calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "train":
            for name, value in _iter_pairs(script, call):
                if name == "resume_from_checkpoint" and isinstance(value, ast.expr):
                    code.unresolved[name] = ast.unparse(script.resolve(value))
                elif name == "resume_from_checkpoint":
                    code.values[name] = value


def _report_changes(script: Script, code: ScriptCode) -> None:
    """Report statements that change the model, its processor or which parameters are trained."""
    for node in script.iter_model_changes():
        source = ast.unparse(node).partition("\n")[0].rstrip(":")
        path = source.partition("(")[0].partition(" = ")[0]
        last = path.rpartition(".")[2]
        if last.removesuffix("_") in _HARMLESS_CHANGES:
            continue
        texts = [text for word, text in _CHANGE_TEXTS.items() if word in ast.unparse(node)]
        code.note(f"line {node.lineno}", source, texts[0] if texts else _CHANGE_TEXT)


def _report_functions(script: Script, nodes: Collection[ast.AST], code: ScriptCode) -> None:
    """Report the functions and classes that prepare samples or train."""
    inner: set[ast.AST] = set()
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node in inner:
            continue
        inner.update(ast.walk(node))
        if script.is_own_code(node):
            is_trainer = script.get_base(node.name).endswith("Trainer")
            text = _TRAINER_TEXT if is_trainer else _FUNCTION_TEXT
            code.note(node.name, f"(lines {node.lineno} to {node.end_lineno})", text)


def _read_environment(script: Script, code: ScriptCode) -> None:
    """Set the environment variables that the script sets."""
    for name, node in script.iter_items_set("os.environ"):
        value = merge_items([(name, node)], script.get_constants(node))[name]
        if not isinstance(value, ast.expr):
            code.environment[name] = str(value)
