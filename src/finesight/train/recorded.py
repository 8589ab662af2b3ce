"""Small packs forwards and backwards, recorded as CUDA graphs: with few tokens a card computes its
kernels faster than a processor launches them.

A recording is of a kind of pack (`train.held`): sizes are rounded up to those of few kinds, and
what fills a pack up is a sequence of nothing after its own. A recording goes from the features of
pictures to the loss and back to them; where a tower learns, from the pictures themselves
(`train.sight`), or else its kernels are launched while the card is busy with what was recorded.

Shapes: M places of pictures, K features of each, D width, L tokens that predict a learned one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from finesight.encode.pack import PackedBatch
from finesight.infer.recorded import Recorded
from finesight.model.any_family import AnyModel
from finesight.model.attention import has_varlen
from finesight.model.language import DecoderLayer
from finesight.model.network import VisionLanguageModel
from finesight.model.tower import VisionTower
from finesight.train.held import MOST_TOKENS, MOST_WHERE_KNOWN, Held, Kind
from finesight.train.left import Left
from finesight.train.loss import label_loss
from finesight.train.pace import Pace
from finesight.train.sight import SightKind, sees, watches

MOST_WHERE_LATE = 16384
"""Of a pack where the card is through with all it has when the next one comes: on a slower host, or
with less left to compute. `plan` does not count these."""

LATE = 8
"""Packs in a row before which the card had nothing left to do: the first ones of a run are always
late, and one that comes after a checkpoint is."""

MOST_KINDS = 16
"""Recordings that are kept: each holds the features of a pack, twice where they learn, and some
hundred kilobytes for every thousand of its kernels."""

LAUNCHED = 3
"""Packs of a kind that are launched first: to record one takes as long as a few save."""

MOST_LEARNED = 4_000_000_000
"""Numbers that learn: recordings have room for their gradients, which stays from step to step."""


def learns_little(model: nn.Module) -> bool:
    """Whether so few numbers learn that room for their gradients may stay."""
    learned = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(parameter.numel() for parameter in learned) <= MOST_LEARNED


def pays(
    model: VisionLanguageModel, tokens: int, labels: int, recompute: float, most: int = MOST_TOKENS
) -> bool:
    """Whether a pack of so many is quicker as a recording, where one of `most` tokens is."""
    if recompute and not _all_fused(model):
        # What torch draws again cannot be recorded.
        return False
    return tokens <= most and labels > 0


def _all_fused(model: VisionLanguageModel) -> bool:
    layers = model.model.layers
    return all(isinstance(layer, DecoderLayer) and layer.fusible for layer in layers)


def _recordable(model: AnyModel, device: torch.device) -> bool:
    """Whether nothing in a pass waits for the device, and attention takes its segments' lengths
    from there: those of a recording are not the pack's."""
    if device.type != "cuda" or not isinstance(model, VisionLanguageModel) or not model.recordable:
        return False
    width, kind = model.geometry.language.head_width, model.model.embed_tokens.weight.dtype
    return has_varlen(torch.empty(1, 1, width, dtype=kind, device=device))


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """An event that happens when a card has done all it was given so far; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _half_free(device: torch.device) -> bool:
    free, whole = torch.cuda.mem_get_info(device)
    return 2 * free > whole


class Passes:
    """Packs forwards and backwards; the gradients are left with the parameters."""

    def __init__(
        self, model: AnyModel, learning: Sequence[nn.Parameter], *, alone: bool = True
    ) -> None:
        """`alone` says whether a pass waits for no other process."""
        self._model = model
        self._learning = list(learning)
        self._met: Counter[Kind] = Counter()
        self._held: dict[Kind, Held] = {}
        self._left = Left(self._learning)
        self._launched: torch.cuda.Event | None = None
        self._late = 0
        self._pace = Pace()
        of_tower = {id(p) for n, p in model.named_parameters() if n.startswith("visual.")}
        self._of_tower = frozenset(n for n, p in enumerate(self._learning) if id(p) in of_tower)
        device = self._learning[0].device
        self._watches = isinstance(model, VisionLanguageModel) and watches(model)
        records = alone and _recordable(model, device) and learns_little(model)
        self._recorded = Recorded(device) if records else None

    def learn(self, batch: PackedBatch, features_MKD: Tensor | None, share: Tensor) -> Tensor:
        """The loss of a pack on the device, times `share`."""
        if self._recorded is None or batch.share is not None:
            return self._launch(batch, features_MKD, share)
        self._look_back()
        most = self._most(known=features_MKD is not None)
        held = self._room(self._sighted(batch, features_MKD), batch, None, most)
        if held is None:
            features_MKD = self._seen(batch, features_MKD)
            held = self._room(Kind.of(batch), batch, features_MKD, most)
        if held is None:
            return self._launch(batch, features_MKD, share)
        held.lay(batch, features_MKD, share, self._tower)
        loss = self._replay(held)
        if loss is None:
            # Here, where the error is gone and with it what its frames held.
            self.forget()
            return self._launch(batch, features_MKD, share)
        self._left.hand_over(self._of_tower if held.sight is None else ())
        held.lead_back(features_MKD)
        return loss

    def _replay(self, held: Held) -> Tensor | None:
        """The loss by a recording; None where it fails. It wants memory of its own, of which there
        may be none left. Nothing was learned then: what is really wrong with the pack shows when it
        is launched."""
        assert self._recorded is not None, "recordings were given back"
        number = [*self._held].index(held.kind)
        timed = held.sight is None and self._recorded.has(number)
        try:
            with self._pace.replaying(held.kind.tokens) if timed else nullcontext():
                return self._recorded.run(number, lambda: self._forth_and_back(held)).clone()
        except RuntimeError as error:
            logging.getLogger(__name__).debug("packs are no longer recorded: %s", error)
            return None

    def rehearse(self, batch: PackedBatch) -> None:
        """Take a pack all ways that packs of its kind go, where kernels only compile."""
        share = torch.zeros((), device=batch.ids_T.device)
        self._launch(batch, None, share)
        if self._recorded is None:
            return
        seen = Kind.of(batch), self._seen(batch, None)
        for kind, features_MKD in ((self._sighted(batch, None), None), seen):
            if kind is None or not self._pays(kind, batch, features_MKD, MOST_TOKENS):
                continue
            held = Held.room(kind, batch, features_MKD, self._tower)
            held.lay(batch, features_MKD, share, self._tower)
            try:
                self._forth_and_back(held)
            finally:
                self._left.clear()
        # Launches that launch nothing say nothing of the host's pace.
        self._pace = Pace()

    def forget(self) -> bool:
        """Give all recordings and their memory back, and make none any more. Whether there was
        any."""
        held = bool(self._held)
        for parameter in self._learning:
            parameter.grad = None
        self._recorded = None
        self._left.clear()
        self._held.clear()
        return held

    @property
    def _tower(self) -> VisionTower:
        assert isinstance(self._model, VisionLanguageModel), "only native models are recorded"
        return self._model.visual

    def _sighted(self, batch: PackedBatch, features_MKD: Tensor | None) -> Kind | None:
        """The pack's kind with the tower in it; None of one that is recorded without, if at all."""
        model = self._model
        assert isinstance(model, VisionLanguageModel), "only native models are recorded"
        if features_MKD is not None or not self._watches:
            return None
        if not sees(len(batch.patches_ND), model.recompute):
            return None
        return Kind.of(batch, SightKind.of(batch, model.visual))

    def _room(
        self, kind: Kind | None, batch: PackedBatch, features_MKD: Tensor | None, most: int
    ) -> Held | None:
        """Where a recording of this kind reads the pack, if it has come several times."""
        if kind is None:
            return None
        if kind in self._held:
            return self._held[kind]
        if not self._pays(kind, batch, features_MKD, most):
            return None
        if wider := self._wider(kind):
            return wider
        self._met[kind] += 1
        if len(self._held) == MOST_KINDS:
            return None
        device, often = batch.ids_T.device, self._met[kind] > LAUNCHED
        if self._shares(kind, often) and _half_free(device):
            kind = kind.among([k for k, _ in self._met.most_common() if not self._served(k)])
        elif not often:
            return None
        elif len(batch.ids_T) > MOST_TOKENS and not _half_free(device):
            # What they save is less than what they hold would cost elsewhere.
            return None
        self._held[kind] = Held.room(kind, batch, features_MKD, self._tower)
        return self._held[kind]

    def _wider(self, kind: Kind) -> Held | None:
        """The smallest recording that takes packs of this kind, unless these are launched sooner
        than it is replayed."""
        fit = [held for held in self._held.values() if held.kind.takes(kind)]
        found = min(fit, key=lambda h: (h.kind.tokens, h.kind.longest, h.kind.labels), default=None)
        if found is None or self._pace.replays_sooner(found.kind.tokens) is False:
            return None
        return found

    def _shares(self, kind: Kind, often: bool) -> bool:
        """Whether a recording is made for packs of this kind and of others, where launches take
        longer than it would. The last places are for what comes often."""
        if kind.sight is not None:
            # Pictures of several packs are hardly ever as many.
            return False
        sooner = self._pace.replays_sooner(kind.most)
        if sooner is None:
            # One, to measure it.
            return self._is_late and all(kind.sight is not None for kind in self._held)
        return sooner and (often or 2 * len(self._held) < MOST_KINDS)

    def _served(self, kind: Kind) -> bool:
        return kind in self._held or any(held.takes(kind) for held in self._held)

    def _look_back(self) -> None:
        """Whether the card is through with the pack that was launched last."""
        if self._launched is not None:
            through = self._launched.query()  # type: ignore[no-untyped-call]
            self._late = self._late + 1 if through else 0
            self._launched = None

    def _seen(self, batch: PackedBatch, features_MKD: Tensor | None) -> Tensor | None:
        """The features of the pack's pictures, with what made them where that learns."""
        model = self._model
        assert isinstance(model, VisionLanguageModel), "only native models are recorded"
        if features_MKD is not None or not batch.grids:
            return features_MKD
        return model.see(batch.patches_ND, batch.grids)

    @property
    def _is_late(self) -> bool:
        """Whether the card had nothing left to do before each of the last packs."""
        return self._late >= LATE

    def _most(self, *, known: bool) -> int:
        """Tokens of the largest pack that is recorded."""
        if self._is_late:
            return MOST_WHERE_LATE
        return MOST_WHERE_KNOWN if known else MOST_TOKENS

    def _pays(self, kind: Kind, batch: PackedBatch, features_MKD: Tensor | None, most: int) -> bool:
        model = self._model
        assert isinstance(model, VisionLanguageModel), "only native models are recorded"
        seen = features_MKD is not None and features_MKD.requires_grad
        if not (kind.sight or seen or any(p.requires_grad for p in model.model.parameters())):
            # Texts, where only the tower learns.
            return False
        return pays(model, len(batch.ids_T), len(batch.target_L), model.recompute, most)

    def _launch(self, batch: PackedBatch, features_MKD: Tensor | None, share: Tensor) -> Tensor:
        start = time.perf_counter()
        h_LD = self._model(batch, features_MKD)
        loss = label_loss(h_LD, self._model.head_weight, batch.target_L, share)
        if loss.requires_grad:  # not of texts, where only the tower learns
            loss.backward()  # type: ignore[no-untyped-call]
            self._pace.launched(time.perf_counter() - start)
        if self._recorded is not None:
            self._launched = _mark(loss.device)
        return loss.detach()

    def _forth_and_back(self, held: Held) -> Tensor:
        """As `_launch`, but what it makes lies where a recording can leave it."""
        model = self._model
        assert isinstance(model, VisionLanguageModel), "only native models are recorded"
        sight = held.sight
        features_MKD = held.features_MKD if sight is None else sight.features(model.visual)
        h_LD = model(held.batch, features_MKD, held.seed_1)
        loss = label_loss(h_LD, model.head_weight, held.batch.target_L, held.share)
        self._left.go_back(loss, held.learned)
        return loss.detach()
