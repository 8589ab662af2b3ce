"""What every renderer does, whoever makes the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from finesight.config import PictureRule
from finesight.data.jsonl import Located
from finesight.encode.borrowed import is_native
from finesight.encode.dialect import Box
from finesight.encode.encoded import Encoded, Outline, Span
from finesight.encode.render import Answer, Renderer
from finesight.encode.tokenizer import TextTokenizer
from finesight.hub import ModelFolder


class Rendering(Protocol):
    """From samples to tokens and pictures, and from generated ids to answers: `Renderer` says what
    each member means."""

    @property
    def rule(self) -> PictureRule: ...

    @property
    def system(self) -> str | None: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    @property
    def thinks(self) -> bool: ...

    def outline(self, located: Located) -> Outline: ...

    def encode(self, located: Located) -> Encoded: ...

    def unseen(self, located: Located) -> Encoded: ...

    def prompt_outline(self, located: Located) -> Outline: ...

    def with_patches(self, outline: Outline) -> Encoded: ...

    def answer(self, ids: Sequence[int]) -> Answer: ...

    def boxes(self, raw: str, spans: Sequence[Span], image: int = 0) -> list[Box]: ...


def renderer_of(
    folder: ModelFolder, picture: PictureRule | None = None, system: str | None = None
) -> Rendering:
    """The native renderer of the folder's family, or what transformers has for another one.

    Raises UserError for a family that neither knows.
    """
    if is_native(folder):
        return Renderer(folder, picture, system)
    # Imported here: it brings torch, which showing native samples does without.
    from finesight.encode.fallback import FallbackRenderer

    return FallbackRenderer(folder, picture, system)
