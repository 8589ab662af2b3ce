"""What the activations of a pack take: kept until the backward pass, and for a moment beside that.

Shapes: none are computed with; sizes are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from finesight.model.layers import PatchMerger, recomputed
from finesight.model.linear import GroupedLinear
from finesight.model.network import VisionLanguageModel
from finesight.model.qwen2_5_vl import WindowedTower, windows
from finesight.model.qwen3_vl import Merger
from finesight.model.qwen_language import QwenDecoder
from finesight.model.qwen_vl import Resampler, SquareTower
from finesight.model.tower import VisionTower
from finesight.plan.kept import (
    WIDE,
    Computing,
    Kept,
    learns,
    of_group,
    of_layer,
    of_norm,
    of_resampler,
)
from finesight.plan.load import Load
from finesight.train.loss import LOGITS_BYTES


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment of a pack: bytes of activations that are kept, of what an operation works with
    beside them, and of logits."""

    kept: int
    working: int = 0
    logits: int = 0

    @property
    def in_all(self) -> int:
        """All of them."""
        return self.kept + self.working + self.logits


class Activations:
    """Of one model as it is tuned; it needs no numbers, and may be on the meta device."""

    def __init__(self, model: VisionLanguageModel, computing: Computing, recompute: float) -> None:
        self._model, self._computing = model, computing
        visual, decoder = model.visual, model.model
        self._sees = visual.trains
        inside = {id(p) for part in (visual.blocks, *_mergers(visual)) for p in part.parameters()}
        reached = any(p.requires_grad for p in visual.parameters() if id(p) not in inside)
        self._blocks = _Stack.of(visual.blocks, reached, computing, recompute)
        self._merges = visual.trains or any(map(learns, _mergers(visual)))
        reached = self._merges or decoder.embed_tokens.weight.requires_grad
        self._layers = _Stack.of(decoder.layers, reached, computing, recompute)
        self._trains_head = any(p.requires_grad for p in _head(model))

    def moments(self, load: Load) -> Iterator[Moment]:
        """Those that may be the fullest."""
        computing = self._computing
        seen = self._tower(load) if load.patches else 0
        entering = load.tokens * self._model.geometry.language.width * computing.number
        if load.patches:
            working = self._seeing(load) + entering
            yield Moment(seen if self._sees else 0, working)
        labels = load.supervised
        places = self._places(load)
        layers = self._layers.kept(places)
        rotations = self._rotations(load)
        yield Moment(seen + sum(layers) + rotations, self._layers.going_forth(places))
        ends = labels * self._ends()
        kept = seen + sum(layers) + rotations + ends + self._head_gradient()
        yield Moment(kept, self._head_work(), self._logits(labels))
        # On the way back, what the layers after the first that is gone through kept is free again.
        before = seen + rotations + self._head_gradient()
        for number in self._layers.telling():
            working = self._layers.going_back(number, places)
            yield Moment(before + sum(layers[: number + 1]), working)
        if self._sees and load.patches:
            seats = self._seats(load)
            blocks = self._blocks.kept(seats)
            yield Moment(seen, self._blocks.going_forth(seats))
            for number in self._blocks.telling():
                working = self._blocks.going_back(number, seats)
                yield Moment(seen - sum(blocks[number + 1 :]), working)

    def kept(self, load: Load) -> int:
        """Bytes that a pack keeps for its backward pass, the gradients that the loss makes too."""
        seen = self._tower(load) if load.patches else 0
        layers = sum(self._layers.kept(self._places(load)))
        ends = load.supervised * self._ends() + self._head_gradient()
        return seen + layers + self._rotations(load) + ends

    def _ends(self) -> int:
        """For each label: the last norm's input, and the gradient that the loss gives it."""
        language, decoder = self._model.geometry.language, self._model.model
        width, reached = language.width, self._layers.leaves
        norm = of_norm(decoder.norm, width, reached, self._computing)
        wanted = reached or learns(decoder.norm)
        return norm + width * self._computing.number * wanted

    def _head_gradient(self) -> int:
        """Of a head that learns, the loss keeps the gradient (`train.loss`)."""
        return sum(p.numel() for p in _head(self._model)) * self._number_if(self._trains_head)

    def _head_work(self) -> int:
        """In fp32 while it is summed up, with the share of a chunk beside it. A head in few bits is
        made in full."""
        numbers = self._model.geometry.language.vocabulary * self._model.geometry.language.width
        head = self._model.lm_head
        few = head is not None and not isinstance(head.weight, nn.Parameter)
        summed = (WIDE + self._computing.number) * self._trains_head
        return numbers * (summed + self._number_if(few))

    def _number_if(self, wanted: bool) -> int:
        return self._computing.number if wanted else 0

    def _logits(self, labels: int) -> int:
        """Of a chunk, in fp32 and in the model's type (`train.loss`)."""
        vocabulary = self._model.geometry.language.vocabulary
        rows = min(labels, max(1, LOGITS_BYTES // (WIDE * vocabulary)))
        number = self._computing.number
        return rows * vocabulary * (WIDE + (number if number < WIDE else 0))

    def _rotations(self, load: Load) -> int:
        """Cosines and sines, and the places that tokens are sorted by, once for all layers."""
        computing, geometry = self._computing, self._model.geometry
        found = 0
        if self._layers.looks:
            wide = isinstance(self._model.model, QwenDecoder)
            number = WIDE if wide else computing.number
            found += 2 * load.tokens * geometry.language.head_width * number
            found += self._layers.sorting(load.lengths)
        return found

    def _places(self, load: Load) -> list[Place]:
        """Of the decoder's layers: the last one runs its MLP for the labels alone."""
        rows = [load.tokens] * (len(self._layers.layers) - 1) + [load.supervised]
        return [(load.lengths, number) for number in rows]

    def _seats(self, load: Load) -> list[Place]:
        """Of the tower's blocks."""
        tower = self._model.visual
        frames, patches = load.frames, load.patches
        if not isinstance(tower, WindowedTower):
            return [(frames, patches)] * len(tower.blocks)
        merge = tower.geometry.merge
        inside = tuple(
            int(squares) * merge**2
            for grid in load.grids
            for squares in windows(grid, merge, tower.window)[1]
        )
        whole = tower.whole_frame
        return [(frames if n in whole else inside, patches) for n in range(len(tower.blocks))]

    def _tower(self, load: Load) -> int:
        """What the tower and its mergers keep."""
        tower, computing = self._model.visual, self._computing
        number, found = computing.number, 0
        if self._sees:
            if learns(tower.patch_embed):
                found += load.patches * tower.geometry.patch_numbers * number
            if isinstance(tower, SquareTower):
                entering = of_norm(tower.ln_pre, tower.geometry.width, False, computing)
                found += load.patches * entering
            seats = self._seats(load)
            found += sum(self._blocks.kept(seats))
            if self._blocks.looks and self._rotates():
                found += 2 * load.patches * tower.geometry.head_width * WIDE
            for lengths in {tuple(lengths) for lengths, _ in seats}:
                found += self._blocks.sorting(lengths)
        for merger in _mergers(tower):
            found += self._merger(merger, load.patches)
        if self._merges:
            # Features go to their places among the tokens.
            features = load.patches // tower.geometry.merge**2 * tower.features
            found += features * tower.geometry.out_width * number
        return found

    def _rotates(self) -> bool:
        """The first Qwen-VL's positions are added."""
        return not isinstance(self._model.model, QwenDecoder)

    def _merger(self, merger: nn.Module, patches: int) -> int:
        """Rows of merged patches go through two products, with an activation between them."""
        geometry, computing = self._model.visual.geometry, self._computing
        reached = self._sees
        if isinstance(merger, Resampler):
            return of_resampler(merger, patches, reached, computing)
        features = patches // geometry.merge**2
        norm: nn.Module
        up: nn.Module
        down: nn.Module
        if isinstance(merger, Merger):
            norm, up, down = merger.norm, merger.linear_fc1, merger.linear_fc2
            rows = features * merger.merged_width // merger.normed_width
            width = merger.normed_width
        else:
            assert isinstance(merger, PatchMerger), f"what a {type(merger).__name__} keeps"
            norm, up, down = merger.ln_q, merger.mlp["0"], merger.mlp["2"]
            rows, width = patches, geometry.width
        assert isinstance(up, GroupedLinear), f"{type(up).__name__} in a merger"
        assert isinstance(down, GroupedLinear), f"{type(down).__name__} in a merger"
        inside = reached or learns(norm) or learns(up)
        activation = down.inputs * computing.number * inside
        found = rows * of_norm(norm, width, reached, computing)
        return found + features * (of_group(up, computing) + activation + of_group(down, computing))

    def _seeing(self, load: Load) -> int:
        """The widest moment of the tower on the way forward: patches as numbers, or an MLP with
        what it is added to."""
        geometry, number = self._model.visual.geometry, self._computing.number
        embedding = geometry.patch_numbers * (2 * WIDE + number)
        return load.patches * max(embedding, self._block())

    def _block(self) -> int:
        """Bytes of a patch in a block: its rows, and both ends of an activation."""
        width = self._model.visual.geometry.width
        return 2 * (width + self._blocks.inner) * self._computing.number

    def passing(self, load: Load) -> int:
        """Bytes that the blocks of a tower without a gradient make on the way."""
        blocks = len(self._blocks.layers)
        return 0 if self._sees else load.patches * blocks * self._block()


def _mergers(tower: VisionTower) -> list[nn.Module]:
    return [tower.merger, *tower.deepstack_merger_list]


def _head(model: VisionLanguageModel) -> list[nn.Parameter]:
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    return list(head.parameters())


@dataclass(frozen=True, slots=True)
class _Stack:
    """Layers one after the other, of which the first `again` are recomputed. A place is what a
    layer looks over, and how many rows its MLP has."""

    layers: tuple[Kept, ...]
    again: int
    computing: Computing

    @classmethod
    def of(
        cls, layers: Iterable[nn.Module], reached: bool, computing: Computing, recompute: float
    ) -> _Stack:
        """Their gradients begin where the first of them learns."""
        found: list[Kept] = []
        for layer in layers:
            found.append(of_layer(layer, reached, computing))
            reached = found[-1].leaves
        return cls(tuple(found), recomputed(recompute, len(found)), computing)

    @property
    def leaves(self) -> bool:
        """Whether a gradient comes to the last one's output."""
        return self.layers[-1].leaves

    @property
    def looks(self) -> bool:
        """Whether any keeps what its attention needs; recomputed ones hold the angles too."""
        return any(layer.look is not None for layer in self.layers)

    def sorting(self, lengths: Sequence[int]) -> int:
        """Bytes of the places that tokens are sorted by, which all layers share."""
        looks = (layer.look for layer in self.layers if layer.look is not None)
        return max((look.sorting(lengths, self.computing) for look in looks), default=0)

    @property
    def inner(self) -> int:
        """The widest product in numbers."""
        return max(layer.inner for layer in self.layers)

    def kept(self, places: Sequence[Place]) -> list[int]:
        """Bytes of each layer."""
        return [
            sum(lengths) * layer.entering
            if number < self.again
            else layer.of(lengths, rows, self.computing)
            for number, (layer, (lengths, rows)) in enumerate(zip(self.layers, places, strict=True))
        ]

    def telling(self) -> set[int]:
        """Layers whose way back may be the fullest moment: the first ones that it meets, and the
        first that is made again."""
        last = len(self.layers) - 1
        return {last, max(0, last - 1), max(0, self.again - 1)}

    def going_forth(self, places: Sequence[Place]) -> int:
        """Bytes that the attention of the last layer works with on the way forward, when all but
        what comes after it is kept."""
        if self.again == len(self.layers):
            # Made again on the way back, beside a gradient.
            return 0
        lengths, rows = places[-1]
        return max(0, self.layers[-1].going_forth(lengths, rows, self.computing))

    def going_back(self, number: int, places: Sequence[Place]) -> int:
        """Bytes that the backward pass of a layer works with, less what it has freed by then."""
        layer, (lengths, rows) = self.layers[number], places[number]
        working = layer.going_back(lengths, rows, self.computing)
        if number < self.again:
            again = layer.going_forth(lengths, rows, self.computing)
            working = layer.of(lengths, rows, self.computing) + max(working, again)
        return max(0, working)


Place = tuple[Sequence[int], int]
