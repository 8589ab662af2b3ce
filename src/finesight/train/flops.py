"""The arithmetic of a step, counted from shapes, and how fast the device can do it.

Counted are the products a training step needs: forwards for everything, backwards to the inputs
where something before or beside them learns, backwards to the weights that learn. What is computed
a second time to save memory is not work done, and does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import nn

from finesight.encode.encoded import Grid
from finesight.encode.pack import contexts
from finesight.model.frozen import FrozenWeight
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import PARTS, TABLES, Part, part_of
from finesight.model.qwen2_5_vl import WindowedTower

LAYERS = ("model.layers.", "visual.blocks.")
"""How the names of parameters begin whose layers can be recomputed."""


class Sizes(Protocol):
    """What the arithmetic of a pack hangs on: tokens of each sequence, how many of them the
    beginning of all has, grids of its pictures, and how many tokens are predicted."""

    @property
    def lengths(self) -> Sequence[int]: ...

    @property
    def beginning(self) -> int: ...

    @property
    def grids(self) -> Sequence[Grid]: ...

    @property
    def supervised(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Operations:
    """Of a pack, by what they are for: the weights of each part (the head is the embeddings'), and
    attention of tokens and of patches, which has none."""

    weights: Mapping[Part, int]
    tokens: int
    patches: int

    @property
    def in_all(self) -> int:
        """All of them."""
        return sum(self.weights.values()) + self.tokens + self.patches


class Arithmetic:
    """Counts floating-point operations of training steps of one model."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._geometry = model.geometry
        self._windows = _windows_of(model)
        self._per_row = dict.fromkeys(PARTS, 0)
        # The head and the last MLP see only the tokens that predict learned ones.
        self._per_label = dict.fromkeys(PARTS, 0)
        last_mlp = f"model.layers.{model.geometry.language.depth - 1}.mlp."
        # Forwards through the layers that may be recomputed.
        self._layers = dict.fromkeys(PARTS, 0)
        learning: set[Part] = set()
        reached = False
        # In the order in which a sample passes the matrices: from the first that learns on, a
        # gradient has to come back to the input of each.
        for _, own in groupby(_weights(model), lambda weight: _layer_of(weight.name)):
            learns = False
            for weight in own:
                part = part_of(weight.name)
                learns = learns or (weight.learns and not weight.name.endswith(TABLES))
                if weight.learns:
                    learning.add(part)
                # The embedding is looked up, not multiplied; the head comes below.
                if weight.multiplies and part != "embeddings":
                    back = reached or ".adapter.b." in weight.name
                    operations = _passes(weight.learns, back) * weight.numbers
                    if weight.name.startswith(LAYERS):
                        self._layers[part] += weight.numbers
                    if weight.name.startswith(last_mlp):
                        self._per_label[part] += operations
                    else:
                        at_patches = int(operations * _share_at_patches(weight.name))
                        self._per_row["vision"] += at_patches
                        self._per_row[part] += operations - at_patches
            reached = reached or learns
        language = model.geometry.language
        head = model.model.embed_tokens if model.lm_head is None else model.lm_head
        trained = any(parameter.requires_grad for parameter in head.parameters())
        numbers = language.vocabulary * language.width
        self._per_label["embeddings"] += _passes(trained, back=True) * numbers
        self._seeing = 3 if "vision" in learning else 1
        self._speaking = 3 if learning else 1

    def of(self, batch: Sizes) -> float:
        """Operations of one forward and backward pass over a pack."""
        return float(self.by_part(batch).in_all)

    def by_part(self, batch: Sizes) -> Operations:
        """The same by what they are for."""
        patches = sum(t * h * w for t, h, w in batch.grids)
        rows: dict[Part, int] = {
            "vision": patches,
            "merger": patches // self._geometry.vision.merge**2,
            "language": sum(batch.lengths),
            "embeddings": 0,
        }
        of_part = {
            part: 2 * (rows[part] * self._per_row[part] + batch.supervised * self._per_label[part])
            for part in PARTS
        }
        return Operations(of_part, *self._attention(batch.lengths, batch.grids, batch.beginning))

    def again(self, batch: Sizes, share: float) -> float:
        """Operations of making the activations of this share of the layers a second time, of those
        that a gradient comes back through."""
        found = self.by_part(batch)
        patches = sum(t * h * w for t, h, w in batch.grids)
        language = 2 * sum(batch.lengths) * self._layers["language"] + found.tokens / 3
        vision = 2 * patches * self._layers["vision"] + found.patches / 3
        return share * (language * (self._speaking == 3) + vision * (self._seeing == 3))

    def products(self, batch: Sizes) -> int:
        """Those of the products with weights."""
        return sum(self.by_part(batch).weights.values())

    def attention(self, lengths: Sequence[int], grids: Sequence[Grid]) -> int:
        """Scores and values: 4 x queries x keys x width, half of it where causal, and twice as
        much again on the way back."""
        return sum(self._attention(lengths, grids))

    def _attention(
        self, lengths: Sequence[int], grids: Sequence[Grid], beginning: int = 0
    ) -> tuple[int, int]:
        """Of tokens, and of patches."""
        language, vision = self._geometry.language, self._geometry.vision
        inside, window = self._windows
        width = language.heads * language.head_width
        # The queries of the beginning are those of the first sequence alone.
        squares = sum(length**2 for length in contexts(lengths, beginning))
        squares -= beginning**2 * (len(lengths) - 1)
        causal = squares * 2 * width * language.depth
        whole = sum(t * (h * w) ** 2 for t, h, w in grids) * (vision.depth - inside)
        windowed = sum(t * h * w * min(window, h * w) for t, h, w in grids) * inside
        return causal * self._speaking, 4 * vision.width * (whole + windowed) * self._seeing


class Uncounted:
    """In its place where transformers computes: what happens there is not known shape by shape."""

    def of(self, batch: Sizes) -> float:
        """Nothing."""
        return 0.0


def _share_at_patches(name: str) -> float:
    """The share of a parameter outside of the tower's blocks that every patch meets, not only every
    feature: the resampler's keys and values are made of patches."""
    if name.startswith("visual.merger.attn_pool.kv_proj."):
        return 1.0
    return 2 / 3 if name == "visual.merger.attn_pool.attn.in_proj_weight" else 0.0


def _layer_of(name: str) -> str:
    """The layer that a parameter belongs to, together with its adapter."""
    return name.partition(".adapter.")[0] if ".adapter." in name else name.rpartition(".")[0]


class _Weight(NamedTuple):
    """`numbers` are those that a row meets: of its own experts, where experts are stacked."""

    name: str
    numbers: int
    multiplies: bool
    learns: bool


def _weights(model: VisionLanguageModel) -> Iterator[_Weight]:
    """Every parameter, and every weight in few bits under its parameter's name, in the model's
    order."""
    experts = model.geometry.language.experts
    for path, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            yield _Weight(path, module.numbers, multiplies=True, learns=False)
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            numbers = parameter.numel()
            if parameter.dim() == 3 and experts is not None:
                numbers = numbers // experts.number * experts.chosen
            table = isinstance(module, nn.Embedding) or name.endswith(TABLES)
            yield _Weight(name, numbers, parameter.dim() > 1 and not table, parameter.requires_grad)


def _passes(learns: bool, back: bool) -> int:
    """Forwards; to the input, if a gradient is wanted there; to the weight, if it learns."""
    return 1 + int(back) + int(learns)


def _windows_of(model: VisionLanguageModel) -> tuple[int, int]:
    """Blocks of the tower that attend within windows, and the patches of a window."""
    tower = model.visual
    if not isinstance(tower, WindowedTower):
        return 0, 0
    inside = tower.geometry.depth - len(tower.whole_frame)
    return inside, (tower.window * tower.geometry.merge) ** 2


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device: the limit in practice."""
    side, rounds = (8192, 8) if device.type == "cuda" else (768, 3)
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return float(2 * side**3 / best)
