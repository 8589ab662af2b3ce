"""The most memory that a run takes, part by part: counted from shapes, nothing is computed.

Two things make a peak. What stays: weights, masters, gradients, moments. And what comes and goes
within a pack (`plan.activations`), or within the optimiser's step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from finesight.config import Train
from finesight.model.lora import stacked
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import trainable
from finesight.plan.activations import Activations, Moment
from finesight.plan.kept import WIDE, Computing
from finesight.plan.load import Load
from finesight.train.adamw import MOST as STEPPED
from finesight.train.gradients import LARGE
from finesight.train.held import Kind
from finesight.train.moments import BLOCK
from finesight.train.muon import MOST as TURNED
from finesight.train.optimizer import Group, Masters
from finesight.train.recorded import MOST_KINDS

STEPPED_BYTES = 20
"""Bytes of a number while AdamW steps it without a kernel (`train.adamw`)."""

LIBRARIES = 70 << 20
"""Bytes that cuBLAS takes from torch's own memory on a card of compute capability 9.0 to work in
(torch: `CUBLAS_WORKSPACE_CONFIG`), smaller tensors beside."""

CONTEXT = 600_000_000
"""Bytes of a card that CUDA takes for itself, its libraries and kernels, before any tensor: no
figure of a run's has them. An assumption, to be measured on each kind of card."""

PROCESS = 900_000_000
"""Bytes of a process on a CPU beside its tensors: torch, and what memory allocators and oneDNN hold
back, which grows over a run's first hundreds of steps (2.3 GB in all after 200 steps of the
quickstart, where 16 steps take 1.4)."""

FULL = 0.9
"""The share of a card's memory that a plan fills: the rest is for gaps between tensors."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Bytes that stay from the first step to the last, and `stepping`, what the optimiser's step
    works with for a moment. `masters` are what fp32 masters take beside the weights; `numbers`
    learn.

    Sums of gradients are there `always`, or, for `sums`, where a step has several packs. `taken`
    are ids of parameters whose gradients go into their sums as soon as they come, with one pack in
    a step and with several.
    """

    numbers: int
    weights: int
    masters: int
    always: int
    sums: int
    moments: int
    stepping: int
    taken: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())


@dataclass(frozen=True, slots=True)
class Peak:
    """The fullest moment, in bytes. No run's own figure counts `outside`, which is CUDA's own, nor
    `recordings`: memory that is set aside for these, and counted only while they are made."""

    weights: int
    masters: int
    gradients: int
    moments: int
    activations: int
    working: int
    logits: int
    inputs: int
    libraries: int
    recordings: int
    outside: int

    @property
    def allocated(self) -> int:
        """What a run says of itself (`memory_gb` of metrics.jsonl)."""
        return self.in_all - self.outside - self.recordings

    @property
    def in_all(self) -> int:
        """Everything."""
        return sum(asdict(self).values())


def standing(model: VisionLanguageModel, train: Train, computing: Computing) -> Standing:
    """Of a model on the meta device, tuned already; its parameters become views of groups, as a
    run's do."""
    learning = trainable(model)
    # The groups that the optimiser would make, without its moments.
    groups = Masters(
        learning, train.model_copy(update={"optimizer": "adamw"}), stacked(model)
    ).groups
    tensors = [*model.parameters(), *model.buffers()]
    numbers = sum(len(group.masters) for group in groups)
    always = [group for group in groups if _sums_always(group, train)]
    summed = sum(len(group.masters) for group in always)
    rests = [group.masters.rest_E for group in groups]
    return Standing(
        numbers=numbers,
        weights=sum(tensor.nbytes for tensor in tensors),
        masters=sum(rest_E.nbytes for rest_E in rests if rest_E is not None),
        always=WIDE * summed,
        sums=WIDE * (numbers - summed),
        moments=sum(_moments(group, train) for group in groups),
        stepping=max(_stepping(group, train, computing) for group in groups),
        taken=(_taken(always), _taken(groups)),
    )


def _taken(groups: Iterable[Group]) -> frozenset[int]:
    pieces = (piece for group in groups for piece in group.pieces)
    return frozenset(id(p.parameter) for p in pieces if p.parameter.numel() >= LARGE)


def _sums_always(group: Group, train: Train) -> bool:
    """Whether one pack's gradients are summed, too."""
    return group.multiplies and train.optimizer == "muon"


def _moments(group: Group, train: Train) -> int:
    numbers = len(group.masters)
    if group.multiplies and train.optimizer == "muon":
        return WIDE * numbers
    if group.multiplies and train.optimizer == "adamw8bit":
        return 2 * (numbers + WIDE * numbers // BLOCK)
    return 2 * WIDE * numbers


def _stepping(group: Group, train: Train, computing: Computing) -> int:
    """AdamW's kernel needs nothing."""
    numbers = len(group.masters)
    if group.multiplies and train.optimizer == "muon":
        return 3 * WIDE * min(numbers, TURNED)
    return 0 if computing.cuda else STEPPED_BYTES * min(numbers, STEPPED)


def peak_of(
    stays: Standing,
    activations: Activations,
    loads: Iterable[Load],
    computing: Computing,
    patch_bytes: int,
    *,
    several: bool,
    recorded: bool = True,
) -> Peak:
    """The fullest moment over these packs, of which a step has `several` or one; `patch_bytes` are
    those of a patch on its way to the tower. `recorded`: such as can be recorded are."""
    come = activations.come(stays.taken[several])
    fullest, inputs = Moment(kept=0, working=stays.stepping, gradients=come.at_end), 0
    recordings = _Recordings(activations, stays.taken[True])
    for load in loads:
        brought = load.patches * patch_bytes + load.tokens * 40
        of_recording = recordings.moments(load) if recorded else []
        for moment in of_recording or activations.moments(load, come):
            if moment.in_all + brought > fullest.in_all + inputs:
                fullest, inputs = moment, brought
    return Peak(
        weights=stays.weights + activations.stays,
        masters=stays.masters,
        gradients=fullest.gradients
        + recordings.gradients
        + stays.always
        + (stays.sums if several else 0),
        moments=stays.moments,
        activations=fullest.kept,
        working=fullest.working,
        logits=fullest.logits,
        inputs=inputs + sum(recordings.rooms.values()),
        libraries=(LIBRARIES if computing.cuda else PROCESS) * (2 if recordings.rooms else 1),
        recordings=recordings.pool,
        outside=CONTEXT if computing.cuda else 0,
    )


class _Recordings:
    """Of packs: `rooms` by kind, the `gradients` that recordings leave theirs in, those of `large`
    parameters as soon as they come, and their own memory (`pool`), which nothing else may use: no
    figure of what is allocated has it."""

    def __init__(self, activations: Activations, large: frozenset[int]) -> None:
        self._activations = activations
        self._all, self._come = activations.come(), activations.come(large)
        self.rooms: dict[Kind, int] = {}
        self.gradients = self.pool = 0

    def moments(self, load: Load) -> list[Moment]:
        """Of a pack that is recorded, while it is; of another none."""
        found = self._activations.recording(load)
        if found is None or (found.kind not in self.rooms and len(self.rooms) == MOST_KINDS):
            return []
        self.rooms[found.kind] = found.room
        self.gradients = self._all.at_end
        within = [*self._activations.moments(found.load, self._come)]
        self.pool = max(self.pool, *(moment.in_all for moment in within))
        if found.kind.sight is not None:
            return within
        seen = self._activations.seen(load)
        there = [replace(moment, kept=moment.kept + seen) for moment in within]
        return [*there, *self._activations.of_tower(load, self._come)]
