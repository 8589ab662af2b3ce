"""Model families as components: their classes elsewhere, exports and files, and their registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from finesight.components import Component, ComponentRegistry

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ExportKind = Literal["serving", "gguf", "quantize"]
"""Kind of an export: commands of vLLM and SGLang, GGUF files, or 4-bit weights."""

CountReader = Callable[[str, int], int]
"""Function from keys of config.json, joined by dots, and a default to an integer of at least 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerModels:
    """Models of a family in configurations of other trainers, which `convert` reads.

    Attributes:
        names: Model types and chat templates that stand for the family.
        pattern: Regular expression for names of models in lower case, with - for _ and spaces.
        token_size: Side of the image area of one token in pixels; 0 for a fixed image size.
        min_pixels: Smallest image.
        max_length: Longest sample, if no setting limits it.
        vision: Last name components of the linear layers of the vision encoder.
        merger: Those of the merger.
        language: Those of the language model.
        required_key: Key of config.json that a text model of the same type lacks; empty for none.

    Raises:
        TypeError: Texts are not in a tuple, or a size is no integer.
        ValueError: The pattern fits every model.
        re.error: The pattern is invalid.
    """

    names: tuple[str, ...]
    pattern: str
    token_size: int
    min_pixels: int
    max_length: int
    vision: tuple[str, ...]
    merger: tuple[str, ...]
    language: tuple[str, ...]
    required_key: str = ""

    def __post_init__(self) -> None:
        for texts in (self.names, self.vision, self.merger, self.language):
            if not isinstance(texts, tuple) or not all(isinstance(one, str) for one in texts):
                raise TypeError(f"{texts!r:.60} is no tuple of texts")
        for size in (self.token_size, self.min_pixels, self.max_length):
            if not isinstance(size, int):
                raise TypeError(f"{size!r:.60} is no integer")
        if re.search(self.pattern, "") is not None:
            raise ValueError(f"the pattern {self.pattern!r:.60} fits every model")


@dataclass(frozen=True, kw_only=True)
class FamilyComponent(Component[Any]):
    """Light half of a model family, whose name is `model_type` in config.json.

    The defaults are those of a family without native code. Heavy halves are imported by their
    dotted paths: the renderer is part of `finesight.encode`, the architecture of `finesight.model`.

    Attributes:
        renderer: Function from a `ModelFolder` to its `ModelFamily`, as `package.module:function`.
        architecture: The `Architecture`, as `package.module:NAME`. Plug-ins for finesight 0.1.0
            have an entry point for it instead.
        hf_class: Class of the model in transformers, vLLM and SGLang, for `architectures` in
            config.json of merged models; empty to keep that of the base.
        processor_classes: Classes of transformers in preprocessor_config.json of merged models;
            empty to keep the file of the base.
        exports: Kinds of exports that other programs support.
        has_experts: Whether the layers have experts, whose adapters vLLM does not apply.
        serves_v4_adapters: Whether vLLM reads adapters with the names of transformers 4.
        reasoning_parser: Parser of vLLM and SGLang that separates the reasoning from the answer.
        tokenizer_file: Name of the file that the tokenizer is loaded from: tokenizer.json, or a
            file of tiktoken.
        has_chat_template: Whether published models have a chat template.
        has_common_preprocessor: Whether all models have PREPROCESSOR_DEFAULTS, so that the file may
            be missing.
        read_image_settings: Function that returns the preprocessor settings of config.json; None if
            they are in the preprocessor file.
        trainer_models: Models of the family in other trainers; None if `convert` rejects them.
        depends_on_length: Whether the logits of a token depend on the length of its sample in
            evaluation mode. Objectives that compare likelihoods do not support that.
    """

    renderer: str = ""
    architecture: str = ""
    hf_class: str = ""
    processor_classes: Mapping[str, str] = field(default_factory=dict)
    exports: tuple[ExportKind, ...] = ()
    has_experts: bool = False
    serves_v4_adapters: bool = False
    reasoning_parser: str = ""
    tokenizer_file: str = "tokenizer.json"
    has_chat_template: bool = True
    has_common_preprocessor: bool = False
    read_image_settings: Callable[[CountReader], dict[str, Any]] | None = None
    trainer_models: TrainerModels | None = None
    depends_on_length: bool = False

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the family; None if they can."""
        problem = Component.find_problem(self)
        if problem is not None:
            return problem
        if not self.renderer:
            return "it has no renderer"
        if self.implementation:
            return "it has an implementation instead of a renderer and an architecture"
        if self.has_section:
            return "it has settings, but recipes have none for families"
        unknown = sorted({*self.exports} - {*get_args(ExportKind)})
        if unknown:
            return f"exports contains {unknown[0]!r:.60}"
        if "serving" in self.exports and not self.hf_class:
            return "exports contains 'serving', but hf_class is empty"
        if self.tokenizer_file != "tokenizer.json" and not self.needs_tiktoken:
            return f"tokenizer_file is {self.tokenizer_file!r:.60}"
        if self.read_image_settings is not None and not callable(self.read_image_settings):
            return f"read_image_settings is {self.read_image_settings!r:.60}, no function"
        if not isinstance(self.trainer_models, TrainerModels | None):
            return f"trainer_models is {self.trainer_models!r:.60}, no TrainerModels"
        return None

    @property
    def needs_tiktoken(self) -> bool:
        """Return whether the tokenizer is one of tiktoken."""
        return self.tokenizer_file.endswith(".tiktoken")


class FamilyRegistry(ComponentRegistry[FamilyComponent]):
    """Families by `model_type`. Entry points of plug-ins may be functions, as in version 0.1.0."""

    def adapt(self, entry: EntryPoint, item: Any) -> Any:
        """Return the component of a function from a model folder to its family."""
        if isinstance(item, FamilyComponent | type) or not callable(item):
            return item
        return FamilyComponent(
            kind="families",
            name=entry.name,
            title=entry.name,
            renderer=f"{entry.module}:{entry.attr}",
        )

    def find_problem(self, name: str, item: Any) -> str | None:
        """Return why an object is no family; None if it is one."""
        if isinstance(item, type):
            return f"{item!r:.80} does not implement FamilyComponent"
        return super().find_problem(name, item)

    def describe(self, name: str) -> FamilyComponent:
        """Return the component of a family; one with defaults for a family without native code."""
        component = self.get(name)
        if component is None:
            return FamilyComponent(kind="families", name=name, title=name)
        return component

    def list_exported(self, kind: ExportKind) -> list[str]:
        """List the families that have a kind of export. Imports the plug-ins."""
        return [one.name for one in self.list_available() if kind in one.exports]

    def load_half(self, name: str, target: str, interface: Any) -> Any:
        """Import a heavy half of a family.

        Args:
            target: Its dotted path.
            interface: Class of which it is an instance.

        Raises:
            UserError: The heavy half of a plug-in cannot be imported, or is another object.
        """

        def find_problem(item: Any) -> str | None:
            if isinstance(item, interface):
                return None
            return f"{item!r:.80} does not implement {interface.__name__}"

        return self.load_object(name, target, interface, find_problem)


FAMILIES = FamilyRegistry("families", FamilyComponent, "finesight.families")
"""Native model families by `model_type` of config.json."""
