"""What the activations of a pack take: kept until the backward pass, and for a moment beside that.

Shapes: none are computed with; sizes are counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from finesight.model.layers import VisionBlock
from finesight.model.network import VisionLanguageModel
from finesight.model.qwen2_5_vl import WindowedTower
from finesight.model.qwen_language import QwenDecoder
from finesight.model.qwen_vl import Block, SquareTower
from finesight.model.tower import VisionTower
from finesight.plan.gradients import Come
from finesight.plan.kept import WIDE, Computing, Place, learns, of_norm
from finesight.plan.load import Load
from finesight.plan.merger import of_merger, turned_in
from finesight.plan.mlp import entering, passing, widest
from finesight.plan.recorded import Recording, recording
from finesight.plan.stack import Stack
from finesight.train.loss import LOGITS_BYTES


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment of a pack: bytes of activations that are kept, of what an operation works with
    beside them, of logits, and of gradients that have come and wait for the step."""

    kept: int
    working: int = 0
    logits: int = 0
    gradients: int = 0

    @property
    def in_all(self) -> int:
        """All of them."""
        return self.kept + self.working + self.logits + self.gradients


class Activations:
    """Of one model as it is tuned; it needs no numbers, and may be on the meta device."""

    def __init__(self, model: VisionLanguageModel, computing: Computing, recompute: float) -> None:
        self._model, self._computing, self._recompute = model, computing, recompute
        visual, decoder = model.visual, model.model
        self._sees = visual.trains
        inside = {id(p) for part in (visual.blocks, *_mergers(visual)) for p in part.parameters()}
        reached = any(p.requires_grad for p in visual.parameters() if id(p) not in inside)
        self._blocks = Stack.of(visual.blocks, reached, computing, recompute)
        self._merges = visual.trains or any(map(learns, _mergers(visual)))
        reached = self._merges or decoder.embed_tokens.weight.requires_grad
        self._layers = Stack.of(decoder.layers, reached, computing, recompute)
        self._trains_head = any(p.requires_grad for p in _head(model))

    @property
    def stays(self) -> int:
        """Bytes that the ways back need beside the weights, from the first pack on."""
        tower = self._model.visual
        merged = sum(turned_in(merger, self._sees) for merger in _mergers(tower))
        return self._layers.stays + self._blocks.stays + merged

    def recording(self, load: Load) -> Recording | None:
        """That which a run learns from this pack by, if any."""
        return recording(self._model, self._computing, self._recompute, load)

    def seen(self, load: Load) -> int:
        """What is kept of pictures while the decoder goes forth and back."""
        return (self._tower(load) if load.patches else 0) + self.features(load)

    def looking(self, load: Load) -> Moment:
        """The tower's fullest moment on the way forward, as far as it learns with what it keeps."""
        return Moment(self._tower(load) if self._sees else 0, self._seeing(load))

    def of_tower(self, load: Load, come: Come) -> Iterator[Moment]:
        """Those of the tower that may be the fullest."""
        if not load.patches:
            return
        yield self.looking(load)
        if self._sees:
            seats, seen = self._seats(load), self._tower(load)
            yield Moment(seen, self._blocks.going_forth(len(seats) - 1, seats))
            yield from self._tower_back(load, seen, come)

    def come(self, summed: Collection[int] = ()) -> Come:
        """The gradients that have come, but for those that a sum takes at once, of the parameters
        of these ids."""
        return Come.of(self._model, summed)

    def moments(self, load: Load, come: Come) -> Iterator[Moment]:
        """Those that may be the fullest."""
        if load.patches:
            looking, entering = self.looking(load), load.tokens * self._width
            yield replace(looking, working=looking.working + entering)
        before = self.seen(load)
        yield from self._forth(load, before)
        yield from self._back(load, before, come)
        yield from self.of_tower(load, come)
        # Rows of the table are summed up in one as large, where the head's gradient waits.
        table = self._number_if(self._learning_table) * _numbers([self._model.model.embed_tokens])
        yield Moment(self._waiting(load), table, gradients=come.at_table)

    def _forth(self, load: Load, before: int) -> Iterator[Moment]:
        """The decoder forwards, and the loss."""
        labels, places = load.supervised, self._places(load)
        layers, rotations = self._layers.kept(places), self._rotations(load)
        for number in self._layers.leading():
            working = self._layers.going_forth(number, places)
            yield Moment(before + rotations + sum(layers[: number + 1]), working)
        ends = labels * (self._ends() + self._width)
        kept = before + rotations + sum(layers) + ends
        yield Moment(kept, self._head_work(labels), self._logits(labels))

    def _back(self, load: Load, before: int, come: Come) -> Iterator[Moment]:
        """The decoder backwards: what the layers after the one that is gone through kept is free
        again, and their gradients have come."""
        places = self._places(load)
        layers = self._layers.kept(places)
        before += self._rotations(load) + self._waiting(load)
        for number in self._layers.telling():
            working = self._layers.going_back(number, places)
            kept = before + sum(layers[: number + 1])
            yield Moment(kept, working, gradients=come.at_layer[number])

    def _tower_back(self, load: Load, seen: int, come: Come) -> Iterator[Moment]:
        """The tower backwards, while the gradient of the embedded tokens waits."""
        seats = self._seats(load)
        blocks, waiting = self._blocks.kept(seats), self._waiting(load)
        waiting += load.tokens * self._width * self._learning_table
        for number in self._blocks.telling():
            working = self._blocks.going_back(number, seats)
            kept = seen - sum(blocks[number + 1 :]) + waiting
            yield Moment(kept, working, gradients=come.at_block[number])

    def kept(self, load: Load) -> int:
        """Bytes that a pack keeps for its backward pass, the gradients that the loss makes too."""
        seen = self._tower(load) if load.patches else 0
        layers = sum(self._layers.kept(self._places(load)))
        ends = load.supervised * self._ends() + self._of_head(load.supervised)
        return seen + layers + self._rotations(load) + ends

    @property
    def _width(self) -> int:
        """Bytes of a token's hidden state."""
        return self._model.geometry.language.width * self._computing.number

    @property
    def _learning_table(self) -> bool:
        return self._model.model.embed_tokens.weight.requires_grad

    def _waiting(self, load: Load) -> int:
        """What is there until the end of the way back: hidden states that the loss was made of, and
        the gradient of a head that is the table, too."""
        tied = self._model.lm_head is None
        return load.supervised * self._width + self._head_gradient() * tied

    def features(self, load: Load) -> int:
        """Of pictures, on a card, where nothing is learned from how they are made: those that learn
        are counted with the tower."""
        tower = self._model.visual
        if self._merges or not self._computing.cuda:
            return 0
        places = load.patches // tower.geometry.merge**2
        return places * tower.features * tower.geometry.out_width * self._computing.number

    def _ends(self) -> int:
        """For each label: the last norm's input, and the gradient that the loss gives it."""
        language, decoder = self._model.geometry.language, self._model.model
        norm = of_norm(decoder.norm, language.width, self._layers.leaves, self._computing)
        return norm + self._width * (self._layers.leaves or learns(decoder.norm))

    def _head_gradient(self) -> int:
        """Of a head that learns."""
        return sum(p.numel() for p in _head(self._model)) * self._number_if(self._trains_head)

    def _of_head(self, labels: int) -> int:
        """What the loss keeps for the way back (`train.loss`): the gradient by all logits and the
        hidden states, or that by the head, where logits come in chunks."""
        if labels > self._rows:
            return self._head_gradient()
        row = self._model.geometry.language.vocabulary * self._computing.number + self._width
        return labels * row * self._trains_head

    def _head_work(self, labels: int) -> int:
        """The gradient by the head: in fp32 while it is summed up, with the share of a chunk beside
        it. A head in few bits is made in full."""
        numbers = self._model.geometry.language.vocabulary * self._model.geometry.language.width
        head = self._model.lm_head
        few = head is not None and not isinstance(head.weight, nn.Parameter)
        summed = (WIDE * (labels > self._rows) + self._computing.number) * self._trains_head
        return numbers * (summed + self._number_if(few))

    def _number_if(self, wanted: bool) -> int:
        return self._computing.number if wanted else 0

    @property
    def _rows(self) -> int:
        """Of a chunk of logits."""
        return max(1, LOGITS_BYTES // (WIDE * self._model.geometry.language.vocabulary))

    def _logits(self, labels: int) -> int:
        """Of a chunk, in the model's type, and without a kernel in fp32, too (`train.loss`)."""
        vocabulary, number = self._model.geometry.language.vocabulary, self._computing.number
        rows = min(labels, self._rows)
        if self._computing.kernels:
            return rows * vocabulary * number
        return rows * vocabulary * (WIDE + (number if number < WIDE else 0))

    def _rotations(self, load: Load) -> int:
        """Cosines and sines, and the places that tokens are sorted by, once for all layers."""
        computing, geometry = self._computing, self._model.geometry
        found = 0
        if self._layers.looks:
            wide = isinstance(self._model.model, QwenDecoder)
            number = WIDE if wide else computing.number
            found += 2 * load.tokens * geometry.language.head_width * number
            found += self._layers.sorting(load.contexts, computing)
        return found

    def _places(self, load: Load) -> list[Place]:
        """Of the decoder's layers: the last one runs its MLP for the labels alone."""
        rows = [load.tokens] * (len(self._layers.layers) - 1) + [load.supervised]
        return [Place(load.contexts, load.tokens, number) for number in rows]

    def _seats(self, load: Load) -> list[Place]:
        """Of the tower's blocks."""
        patches = load.patches
        divided = self._model.visual.divided(load.grids)
        return [Place(lengths, patches, patches) for lengths in divided]

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
            for lengths in {tuple(seat.contexts) for seat in seats}:
                found += self._blocks.sorting(lengths, computing)
        for merger in _mergers(tower):
            found += of_merger(merger, tower.geometry, load.patches, self._sees, computing)
        if self._merges:
            # Features go to their places among the tokens.
            features = load.patches // tower.geometry.merge**2 * tower.features
            found += features * tower.geometry.out_width * number
        return found

    def _rotates(self) -> bool:
        """The first Qwen-VL's positions are added."""
        return not isinstance(self._model.model, QwenDecoder)

    def _seeing(self, load: Load) -> int:
        """The widest moment of the tower on the way forward: patches as numbers, or a block, with
        the angles that all blocks turn by."""
        tower, computing = self._model.visual, self._computing
        geometry = tower.geometry
        width = geometry.width * computing.number
        # Beside the stream, an attention with its norm and joint product, of which FP8 takes no
        # less (half a norm, and half of what goes into its last product), or an MLP with its norm,
        # beside which some blocks hold what attention gave.
        beside = width * (not isinstance(tower, SquareTower))
        inside = (
            beside + entering(mlp, computing) + passing(mlp, geometry.width, computing)
            for mlp in self._mlps()
        )
        row = self._streams() * width + max(6 * width, *inside)
        if self._rotates():
            row += 2 * geometry.head_width * WIDE
        return load.patches * max(self._embedding(load), row)

    def _streams(self) -> int:
        """The most that a block holds of the stream's rows, with what goes on to mergers: the sum,
        and both of its terms as they came in, if there are two."""
        merged, depth = self._model.visual.deepstack, len(self._model.visual.blocks)
        held = [sum(before < block for before in merged) for block in range(depth)]
        came = [1] + [2 * (block - 1 not in merged) for block in range(1, depth)]
        return 1 + max(map(sum, zip(held, came, strict=True)))

    def _embedding(self, load: Load) -> int:
        """Bytes of a patch on its way into the tower: as the pack holds it, all of its frames, and
        what is made of these."""
        tower, number = self._model.visual, self._computing.number
        geometry, whole = tower.geometry, tower.geometry.patch_numbers
        one = load.numbers(geometry)
        # Windows are put together while patches are bytes.
        bytes_ = one * isinstance(tower, WindowedTower)
        return bytes_ + (one + whole + geometry.width) * number

    def _mlps(self) -> Iterator[nn.Module]:
        """Of the tower's blocks."""
        for block in self._model.visual.blocks:
            assert isinstance(block, VisionBlock | Block), f"a block of {type(block).__name__}"
            yield block.mlp

    def passing(self, load: Load) -> int:
        """Bytes that the blocks of a tower without a gradient make on the way: the rows of each and
        both ends of its activation."""
        if self._sees:
            return 0
        width, number = self._model.visual.geometry.width, self._computing.number
        rows = sum(width + widest(mlp) for mlp in self._mlps())
        return load.patches * 2 * rows * number


def _mergers(tower: VisionTower) -> list[nn.Module]:
    return [tower.merger, *tower.deepstack_merger_list]


def _numbers(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _head(model: VisionLanguageModel) -> list[nn.Parameter]:
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    return list(head.parameters())
