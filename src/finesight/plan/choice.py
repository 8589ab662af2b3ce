"""Which settings make a run fit, and quick: micro-budget, recomputation, few bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from finesight.config import Quantisable
from finesight.encode.pack import together, worth
from finesight.plan.activations import Activations
from finesight.plan.load import Load, packed
from finesight.plan.memory import FULL, Peak, peak_of
from finesight.plan.model import Sized
from finesight.plan.seconds import StepTime
from finesight.train.held import Kind
from finesight.train.recorded import MOST_KINDS
from finesight.train.survey import Glance

SENSIBLE = 4096
"""Tokens of a pack that keep a card busy: with fewer, starting kernels takes longer than them."""

GRAIN = 256
"""Steps in which budgets are tried."""

TIMED = 40
"""Steps whose packs are timed; a run's others are like them."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan may choose, in the recipe's own terms; `recompute` as a share of the layers."""

    pack_tokens: int
    recompute: float
    nf4: tuple[Quantisable, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run with these settings takes: its fullest moment, the mean of its steps, with
    features of pictures known too (`seen_s`, None where the tower learns), packs of a step."""

    setting: Setting
    peak: Peak
    step: StepTime
    seen_s: float | None
    packs: float
    room: int

    @property
    def fits(self) -> bool:
        """Whether everything is within what a plan fills of the memory."""
        return self.peak.in_all <= self.room


class Steps:
    """The steps of a run, packed under any budget; all samples begin with so many tokens that are
    the same."""

    def __init__(self, steps: Sequence[Sequence[Glance]], beginning: int = 0) -> None:
        self._steps = steps
        self._beginning = beginning
        self._fullest: dict[int, list[Load]] = {}
        self._several: dict[int, bool] = {}

    @property
    def longest(self) -> int:
        """Needed tokens of the longest sample."""
        return max(sample.needed for step in self._steps for sample in step)

    @property
    def widest(self) -> int:
        """The budget with which every step is one pack."""
        steps = ([sample.needed for sample in step] for step in self._steps)
        return max(together(step, worth(self._beginning, step)) for step in steps)

    def fullest(self, budget: int) -> list[Load]:
        """Packs that may take the most memory: the first of each kind that a run may record, the
        largest by each size, and by all together."""
        if budget not in self._fullest:
            packs = [packed(step, budget, self._beginning) for step in self._steps]
            loads = [load for step in packs for load in step]
            self._fullest[budget] = [*_kinds(loads), *_largest(loads)]
            self._several[budget] = any(len(step) > 1 for step in packs)
        return self._fullest[budget]

    def several(self, budget: int) -> bool:
        """Whether a step has more than one pack."""
        self.fullest(budget)
        return self._several[budget]

    def timed(self, budget: int) -> list[list[Load]]:
        """Steps for timing."""
        every = math.ceil(len(self._steps) / TIMED)
        return [packed(step, budget, self._beginning) for step in self._steps[::every]]


def _kinds(loads: Sequence[Load]) -> list[Load]:
    found: dict[Kind, Load] = {}
    for load in loads:
        found.setdefault(
            Kind.around(load.lengths, load.beginning, load.patches, load.supervised), load
        )
        if len(found) == MOST_KINDS:
            break
    return list(found.values())


def _largest(loads: Sequence[Load]) -> Iterator[Load]:
    sizes: tuple[Callable[[Load], float], ...] = (
        lambda load: load.tokens,
        lambda load: load.patches,
        lambda load: load.supervised,
        lambda load: sum(length**2 for length in load.contexts),
    )
    most = [max(map(size, loads)) or 1 for size in sizes]

    def together(load: Load) -> float:
        return sum(size(load) / top for size, top in zip(sizes, most, strict=True))

    found = {max(range(len(loads)), key=lambda n: size(loads[n])) for size in (*sizes, together)}
    for number in sorted(found):
        yield loads[number]


class Chooser:
    """Estimates settings for one target, and looks for the best that fits.

    `sized` gives the model with these parts in four bits.
    """

    def __init__(
        self,
        sized: Callable[[tuple[Quantisable, ...]], Sized],
        steps: Steps,
        memory: int,
        few: Sequence[tuple[Quantisable, ...]],
        grows: bool,
    ) -> None:
        """`few` are the choices of parts in four bits, from the recipe's own; `grows`: larger packs
        are quicker, as they are on a card."""
        self._sized, self._steps, self._few, self._grows = sized, steps, few, grows
        self._room = round(memory * FULL)

    def estimate(self, setting: Setting) -> Estimate:
        """What that takes."""
        sized = self._sized(setting.nf4)
        loads = self._steps.timed(setting.pack_tokens)
        peak = self._peak(setting)
        recorded = peak.recordings > 0

        def timed(step: Sequence[Load], seen: bool = False) -> StepTime:
            return sized.clock.step(step, setting.recompute, seen=seen, recorded=recorded)

        times = [timed(step) for step in loads]
        mean = replace(
            times[0],
            products=fmean(time.products for time in times),
            moved=fmean(time.moved for time in times),
            host=fmean(time.host for time in times),
            optimiser=fmean(time.optimiser for time in times),
            reading=fmean(time.reading for time in times),
        )
        seen = None
        if sized.tower_is_frozen:
            seen = fmean(timed(step, seen=True).in_all for step in loads)
        packs = fmean(len(step) for step in loads)
        return Estimate(setting, peak, mean, seen, packs, self._room)

    def _peak(self, setting: Setting) -> Peak:
        """With recordings where there is room for them: a run that has none goes without."""
        with_them = self._peak_of(setting, recorded=True)
        if with_them.in_all <= self._room:
            return with_them
        return self._peak_of(setting, recorded=False)

    def _peak_of(self, setting: Setting, *, recorded: bool) -> Peak:
        sized = self._sized(setting.nf4)
        activations = Activations(sized.model, sized.computing, setting.recompute)
        loads = self._steps.fullest(setting.pack_tokens)
        several = self._steps.several(setting.pack_tokens)
        sizes = sized.computing, sized.patch_bytes
        return peak_of(sized.stays, activations, loads, *sizes, several=several, recorded=recorded)

    def _fits(self, setting: Setting) -> bool:
        return self._peak_of(setting, recorded=False).in_all <= self._room

    def best(self, written: Setting) -> Setting:
        """Nothing recomputed where packs of a sensible size fit; else as few layers as that takes;
        else all, in the largest packs that fit; else the same with more in four bits. Where nothing
        fits, what takes the least; where nothing is gained, what is `written`."""
        found = self._best(written)
        widest = self._steps.widest
        same = written.nf4 == found.nf4 and written.recompute <= found.recompute
        as_large = min(written.pack_tokens, widest) >= min(found.pack_tokens, widest)
        return written if same and as_large and self._fits(written) else found

    def _best(self, written: Setting) -> Setting:
        least = self._steps.longest
        sensible = max(least, min(SENSIBLE, self._steps.widest))
        if not self._grows:
            sensible = max(least, min(written.pack_tokens, self._steps.widest))
        for nf4 in self._few:
            share = self._least_share(sensible, nf4)
            if share is not None:
                return self._largest_budget(Setting(sensible, share, nf4))
            smallest = Setting(least, 1.0, nf4)
            if self._fits(smallest):
                return self._largest_budget(smallest)
        return Setting(least, 1.0, self._few[-1])

    def _least_share(self, budget: int, nf4: tuple[Quantisable, ...]) -> float | None:
        """The smallest share of layers to recompute with which that budget fits."""
        depth = self._sized(nf4).depth
        if not self._fits(Setting(budget, 1.0, nf4)):
            return None
        low, high = 0, depth
        while low < high:
            middle = (low + high) // 2
            if self._fits(Setting(budget, _share(middle, depth), nf4)):
                high = middle
            else:
                low = middle + 1
        return _share(low, depth)

    def _largest_budget(self, setting: Setting) -> Setting:
        """The same with the largest packs that fit, or that there are."""
        if not self._grows:
            low, high = setting.pack_tokens, setting.pack_tokens
        else:
            low, high = setting.pack_tokens, self._steps.widest
        while high - low > GRAIN:
            middle = (low + high) // 2
            if self._fits(replace(setting, pack_tokens=middle)):
                low = middle
            else:
                high = middle
        if self._fits(replace(setting, pack_tokens=high)):
            low = high
        return replace(setting, pack_tokens=self._rounded(low, setting))

    def _rounded(self, budget: int, setting: Setting) -> int:
        """A rounder number that does the same: upwards where no pack grows by it."""
        above = math.ceil(budget / GRAIN) * GRAIN
        if budget >= self._steps.widest or self._fits(replace(setting, pack_tokens=above)):
            return above
        return max(setting.pack_tokens, budget // GRAIN * GRAIN)


def _share(layers: int, depth: int) -> float:
    """As a recipe writes it."""
    return min(1.0, math.ceil(100 * layers / depth) / 100)
