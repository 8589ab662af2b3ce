"""Worker half of an environment: it runs the class of the user in the process of an episode.

The template process loads the class. Each episode is a process that is forked from it, with one
instance of the class.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from finesight.environment_components import ENVIRONMENTS
from finesight.errors import UserError
from finesight.evaluate.custom_metric import execute_file
from finesight.evaluate.score_function import build_function_error, read_score
from finesight.files.worker_pool import JobOutput
from finesight.vision.image_processing import convert_to_rgb, load_image

MAX_RESULT_CHARS = 100_000
"""Maximum number of characters of the result of a tool."""

MAX_RESULT_IMAGES = 16
"""Maximum number of images in the result of a tool."""

MAX_RESULT_PIXELS = 1 << 24
"""Maximum number of pixels of all images in the result of a tool."""

MAX_RESULT_BLOCKS = 64
"""Maximum number of texts and images in the result of a tool."""

_VALUE_KEYWORDS = ("default", "const", "enum", "examples")
"""Keywords of JSON schema whose values are those of the user, not schemas."""

RESERVED_METHODS = ("reset", "get_reward")

_EXPECTED = "a class with reset(...), typed methods with docstrings, and optionally get_reward()"
_EXPECTED_RESULT = (
    f"text of at most {MAX_RESULT_CHARS} characters, an image, or a list of at most"
    f" {MAX_RESULT_BLOCKS} of both, with {MAX_RESULT_IMAGES} images of {MAX_RESULT_PIXELS} pixels"
    " together"
)

_SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Examples?|Notes?):")
_ARGUMENT = re.compile(r" *\*{0,2}(\w+)(?: \([^)]*\))?: *(.*)")


@dataclass(frozen=True)
class EnvironmentTool:
    """A public method of an environment that the model may call."""

    name: str
    method: Callable[..., Any]

    @cached_property
    def arguments(self) -> type[BaseModel]:
        """Model of the arguments, which checks a call and gives its JSON schema."""
        _, descriptions = parse_docstring(self.method.__doc__ or "")
        _, *parameters = inspect.signature(self.method, eval_str=True).parameters.values()
        # Aliases, because names such as `schema` cannot be those of fields.
        fields: dict[str, Any] = {}
        for number, parameter in enumerate(parameters):
            if parameter.annotation is parameter.empty:
                raise TypeError(f"the argument {parameter.name} has no type")
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                raise TypeError(f"the argument {parameter.name} has no name in calls")
            default = ... if parameter.default is parameter.empty else parameter.default
            description = descriptions.get(parameter.name)
            info = Field(default, alias=parameter.name, description=description)
            fields[f"argument_{number}"] = parameter.annotation, info
        return create_model("Arguments", __config__=ConfigDict(extra="forbid"), **fields)

    @cached_property
    def definition(self) -> dict[str, Any]:
        """Definition of the tool as in the OpenAI API."""
        description, _ = parse_docstring(self.method.__doc__ or "")
        if not description:
            raise TypeError("no docstring, which the model reads")
        parameters = _simplify_schema(self.arguments.model_json_schema())
        del parameters["additionalProperties"]
        parameters.setdefault("properties", {})
        function = {"name": self.name, "description": description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass
class WorkerState:
    """Class of an environment, and its instance in the process of an episode."""

    where: str
    environment_class: type[Any]
    tools: Mapping[str, EnvironmentTool]
    instance: Any = field(default=None)


def load_environment(name: str) -> WorkerState:
    """Load the class of an environment in the template process.

    Args:
        name: `FILE.py:CLASS`, or the name of a component.

    Raises:
        UserError: The file fails, or a method is no tool.
    """
    file, _, class_name = name.rpartition(":")
    if file:
        try:
            found = execute_file(Path(file)).get(class_name)
        except UserError as error:
            error.expected = _EXPECTED
            raise
    else:
        file = name
        target = ENVIRONMENTS[name].implementation
        found = ENVIRONMENTS.load_object(name, target, type, lambda item: None)
    if not isinstance(found, type) or not inspect.isfunction(getattr(found, "reset", None)):
        raise UserError(
            f"no class {class_name or name!r} with the method reset",
            where=file,
            expected=_EXPECTED,
            remedy=f"define it in the file: class {class_name or name}",
        )
    tools: dict[str, EnvironmentTool] = {}
    for method_name, method in inspect.getmembers(found, inspect.isfunction):
        if method_name.startswith("_") or method_name in RESERVED_METHODS:
            continue
        tool = EnvironmentTool(method_name, method)
        try:
            _check_method(found, method_name)
            # Computed once, before the processes are forked. A default of nan raises ValueError.
            json.dumps(tool.definition, allow_nan=False)
        except Exception as error:  # of the types and defaults of the user
            raise UserError(
                f"the method {method_name} is no tool: {error}",
                where=file,
                expected="a type of each argument, and a docstring with the section Args",
                remedy="complete the method, or start its name with an underscore",
            ) from error
        tools[method_name] = tool
    if not tools:
        raise UserError(
            f"the class {found.__name__} has no tool",
            where=file,
            expected=_EXPECTED,
            remedy="add a public method, which the model can call",
        )
    return WorkerState(file, found, tools)


def _check_method(environment_class: type, name: str) -> None:
    """Raise TypeError for a method that cannot be called as a tool."""
    method = inspect.getattr_static(environment_class, name)
    if isinstance(method, staticmethod):
        raise TypeError("it is static, but tools have self")
    if inspect.iscoroutinefunction(method):
        raise TypeError("it is a coroutine, but tools return their result")


def describe(state: WorkerState) -> JobOutput:
    """Return the definitions of the tools, and whether the class gives a reward."""
    tools = [tool.definition for tool in state.tools.values()]
    has_reward = hasattr(state.environment_class, "get_reward")
    return JobOutput({"tools": tools, "has_reward": has_reward})


def reset(state: WorkerState, row: Mapping[str, Any], images: Sequence[Path]) -> JobOutput:
    """Create the instance of an episode, and pass the values that its `reset` has as arguments."""
    values = dict(row)
    parameters = inspect.signature(state.environment_class.reset).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if takes_all or "images" in parameters:
        values["images"] = [load_image(path) for path in images]
    if not takes_all:
        values = {name: value for name, value in values.items() if name in parameters}
    elif "seed" not in parameters:
        # Environments of TRL may pass all values on, as those of the sample.
        values.pop("seed", None)
    state.instance = _call(state, state.environment_class, {}, "in its constructor")
    text = _call(state, state.instance.reset, values, "in reset")
    if text is not None:
        raise UserError(
            f"reset returned a {type(text).__name__}",
            where=state.where,
            expected="None",
            remedy="write the text into the questions of the samples",
        )
    return JobOutput()


def call_tool(state: WorkerState, name: str, arguments: Mapping[str, Any]) -> JobOutput:
    """Call a tool. The value has a text or None for each block, the arrays are its images.

    Wrong arguments are a mistake of the model: the value is its description, a text.
    """
    tool = state.tools[name]
    try:
        checked = tool.arguments.model_validate(arguments)
    except ValidationError as error:
        problems = []
        for one in error.errors(include_url=False, include_input=False):
            location = ".".join(map(str, one["loc"]))
            problems.append(f"{location}: {one['msg']}")
        return JobOutput("; ".join(problems))
    method = getattr(state.instance, name)
    values = {}
    for field_name, info in tool.arguments.model_fields.items():
        values[str(info.alias)] = getattr(checked, field_name)
    result = _call(state, method, values, f"in {name}")
    return read_result(result, f"{state.where}, {name}")


def get_reward(state: WorkerState) -> JobOutput:
    """Return the reward of the episode; None without one."""
    method = getattr(state.instance, "get_reward", None)
    if method is None:
        return JobOutput()
    value = _call(state, method, {}, "in get_reward")
    if value is None:
        return JobOutput()
    return JobOutput(read_score(value, "the reward", "of an episode", state.where))


def read_result(result: object, where: str) -> JobOutput:
    """Return the blocks of the result of a tool: texts, and images as arrays [H, W, 3].

    Raises:
        UserError: The result is another object, or exceeds a limit.
    """
    blocks = result if isinstance(result, list) else [result]
    texts: list[str | None] = []
    images: list[Image.Image] = []
    problem = ""
    if len(blocks) > MAX_RESULT_BLOCKS:
        problem = f"a result of {len(blocks)} texts and images"
        blocks = []
    for block in blocks:
        value = block
        if isinstance(block, dict) and block.get("type") in ("text", "image"):
            value = block.get(block["type"])
        if isinstance(value, str):
            # Lone surrogates, for example of undecodable bytes, have no tokens.
            texts.append(value.encode("utf-8", "replace").decode())
        elif isinstance(value, Image.Image):
            texts.append(None)
            images.append(value)
        else:
            problem = f"a result with an object of type {type(value).__name__}"
    num_chars = sum(len(text or "") for text in texts)
    num_pixels = sum(image.width * image.height for image in images)
    if num_chars > MAX_RESULT_CHARS:
        problem = f"a result of {num_chars} characters"
    if len(images) > MAX_RESULT_IMAGES or num_pixels > MAX_RESULT_PIXELS:
        problem = f"a result of {len(images)} images with {num_pixels} pixels"
    if any(min(image.size) < 1 for image in images):
        problem = "a result with an image without pixels"
    if problem:
        raise UserError(
            problem,
            where=where,
            expected=_EXPECTED_RESULT,
            remedy="return text or images within these limits",
        )
    try:
        arrays = [np.asarray(convert_to_rgb(image)) for image in images]
    except Exception as error:  # of a file that is read only now
        raise build_function_error(error, where, "while its image was read") from error
    return JobOutput(texts, arrays)


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description and those of the arguments in a Google docstring."""
    description: list[str] = []
    arguments: dict[str, str] = {}
    section = ""
    name = ""
    indentation = 0
    for line in inspect.cleandoc(text).splitlines():
        heading = _SECTION.fullmatch(line)
        if heading is not None:
            section = heading[1]
            indentation = 0
        elif not section:
            description.append(line)
        elif section in ("Args", "Arguments") and line.strip():
            own_indentation = len(line) - len(line.lstrip())
            argument = _ARGUMENT.fullmatch(line)
            if argument is not None and own_indentation <= (indentation or own_indentation):
                indentation = own_indentation
                name = argument[1]
                arguments[name] = argument[2]
            elif name:
                arguments[name] = f"{arguments[name]} {line.strip()}"
    return "\n".join(description).strip(), arguments


def _simplify_schema(schema: Any) -> Any:
    """Return a JSON schema without the titles that pydantic adds, and with its type first."""
    if isinstance(schema, list):
        return [_simplify_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    simplified: dict[str, Any] = {}
    for name in sorted(schema, key=lambda name: name != "type"):
        value = schema[name]
        if name in ("properties", "$defs"):
            simplified[name] = {key: _simplify_schema(one) for key, one in value.items()}
        elif name in _VALUE_KEYWORDS:
            simplified[name] = value
        elif name != "title":
            simplified[name] = _simplify_schema(value)
    return simplified


def _call(
    state: WorkerState, function: Callable[..., Any], arguments: Mapping[str, Any], context: str
) -> Any:
    """Call code of the user; an exception becomes a UserError with its line."""
    try:
        return function(**arguments)
    except BaseException as error:  # The interrupt of the user does not reach this process.
        raise build_function_error(error, state.where, context) from error
