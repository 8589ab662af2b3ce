"""Pictures and questions made on the spot, and generation the slow way to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart
from finesight.encode.encoded import Encoded
from finesight.encode.pack import pack
from finesight.model.attention import PackedAttention, Segments
from finesight.model.network import VisionLanguageModel


def noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A PNG of coloured noise: every patch differs from every other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ask(name: str, folder: Path, *content: str, answer: str | BoxPart | None = None) -> Located:
    """A sample from file names (ending in .png) and texts in order, and its answer."""
    parts = tuple(
        ImagePart(image=piece) if piece.endswith(".png") else TextPart(text=piece)
        for piece in content
    )
    messages = [Message(role="user", content=parts)]
    if answer is not None:
        part = TextPart(text=answer) if isinstance(answer, str) else answer
        messages.append(Message(role="assistant", content=(part,)))
    return Located(Sample(id=name, messages=tuple(messages)), folder)


def mixed_questions(folder: Path) -> list[Located]:
    """Questions of different lengths about no, one and two pictures of several sizes."""
    sizes = {"a.png": (84, 56), "b.png": (56, 140), "c.png": (112, 112)}
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        noise(folder / name, width, height, seed)
    return [
        ask("one", folder, "a.png", "What is in the picture?"),
        ask("text", folder, "Why?"),
        ask("two", folder, "b.png", "and then", "c.png", "which is larger?"),
        ask("tall", folder, "b.png", "Read it."),
        ask("again", folder, "c.png", "Where is the text? Answer with a box, please, and say why."),
        ask("words", folder, "Tell me about the weather in three lines of plain text."),
    ]


@torch.no_grad()
def generate_uncached(
    model: VisionLanguageModel, prompt: Encoded, steps: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens and the logits [V] behind each, the whole sequence run anew for each token."""
    tokens: list[int] = []
    logits: list[torch.Tensor] = []
    for _ in range(steps):
        batch = pack([_continued(prompt, tokens)]).to(model.head_weight.device)
        segments = Segments(batch.lengths, batch.bounds_S1, max(batch.lengths))
        h_TD = model.read(batch, PackedAttention(segments))
        logits.append(model.logits(model.normed(h_TD[-1:]))[0])
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits


def _continued(prompt: Encoded, tokens: Sequence[int]) -> Encoded:
    """The prompt with answer tokens after it: text, each one position on in all three rows."""
    outline = prompt.outline
    following = outline.positions_3T.max() + 1 + np.arange(len(tokens), dtype=np.int32)
    extended = replace(
        outline,
        ids_T=np.concatenate([outline.ids_T, np.array(tokens, dtype=np.int32)]),
        learned_T=np.concatenate([outline.learned_T, np.zeros(len(tokens), dtype=bool)]),
        positions_3T=np.concatenate([outline.positions_3T, np.tile(following, (3, 1))], axis=1),
    )
    return replace(prompt, outline=extended)
