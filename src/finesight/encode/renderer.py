"""Interface of renderers, and the function that creates the renderer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from finesight.config import ImageRule
from finesight.data.jsonl import LocatedSample
from finesight.encode.family import is_native
from finesight.encode.family_base import PredictedBox
from finesight.encode.native_renderer import DecodedCompletion, NativeRenderer
from finesight.encode.tokenized_sample import EncodedSample, TokenizedSample, VisualSpan
from finesight.encode.tokenizer import TextTokenizer
from finesight.model_folder import ModelFolder


class Renderer(Protocol):
    """Converts samples to tokens and image inputs, and completions to answers.

    See `NativeRenderer` for the members.
    """

    @property
    def image_rule(self) -> ImageRule: ...

    @property
    def system_prompt(self) -> str | None: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    @property
    def has_reasoning(self) -> bool: ...

    def tokenize(self, located_sample: LocatedSample) -> TokenizedSample: ...

    def encode(self, located_sample: LocatedSample) -> EncodedSample: ...

    def encode_without_patches(self, located_sample: LocatedSample) -> EncodedSample: ...

    def tokenize_prompt(self, located_sample: LocatedSample) -> TokenizedSample: ...

    def load_patches(self, tokenized: TokenizedSample) -> EncodedSample: ...

    def decode_completion(self, ids: Sequence[int]) -> DecodedCompletion: ...

    def parse_boxes(
        self, raw_text: str, spans: Sequence[VisualSpan], image_index: int = 0
    ) -> list[PredictedBox]: ...


def build_renderer(
    folder: ModelFolder, image_rule: ImageRule | None = None, system_prompt: str | None = None
) -> Renderer:
    """Create the native renderer of a model family, or else the transformers renderer.

    Args:
        image_rule: Image rule of the recipe; None for the default of the model.
        system_prompt: System prompt of the recipe; None for the default of the model.
    """
    if is_native(folder):
        return NativeRenderer(folder, image_rule, system_prompt)
    # Lazy import: it imports torch, which native rendering does not need.
    from finesight.encode.hf_renderer import HfRenderer

    return HfRenderer(folder, image_rule, system_prompt)
