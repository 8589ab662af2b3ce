"""AdamW or Muon over fp32 masters: gradients of all micro-batches are summed, and stepped, in fp32.

Shapes: E numbers of a group of parameters, laid end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from finesight.config import Train
from finesight.errors import UserError
from finesight.model.parts import PARTS, TABLES, Part, part_of
from finesight.train.adamw import AdamW
from finesight.train.gradients import Gradients, Piece
from finesight.train.moments import BLOCK
from finesight.train.muon import Muon
from finesight.train.wide import Wide, rounded_alike

_ALIGNED = 64
"""Numbers between possible starts of a parameter, so that each stays aligned to 128 bytes."""


class Group:
    """Parameters of one part that share learning rate and weight decay.

    `masters` holds their fp32 values end to end and among them what the model computes with, of
    which the parameters are views. Parameters begin at multiples of `aligned` numbers. `steps` is
    how the group is stepped.
    """

    steps: Muon | AdamW

    def __init__(
        self,
        part: Part,
        decay: float,
        rate: float,
        named: Mapping[str, nn.Parameter],
        aligned: int = _ALIGNED,
    ) -> None:
        self.part, self.decay, self.rate = part, decay, rate
        self.pieces: list[Piece] = []
        end = 0
        for name, parameter in named.items():
            self.pieces.append(Piece(name, parameter, slice(end, end + parameter.numel())))
            end += -(-parameter.numel() // aligned) * aligned
        first = self.pieces[0].parameter
        kinds = {(p.dtype, p.device) for p in named.values()}
        assert len(kinds) == 1, f"parameters of {part} differ in type or device: {kinds}"
        narrow_E = torch.zeros(end, dtype=first.dtype, device=first.device)
        for piece in self.pieces:
            piece.of(narrow_E).copy_(piece.parameter.detach())
            piece.parameter.data = piece.of(narrow_E)
        self.masters = Wide(narrow_E)
        self.gradients = Gradients(self.pieces, end)

    @property
    def multiplies(self) -> bool:
        """Whether its parameters are matrices, or stacks of them, that multiply."""
        return all(_multiplies(piece.name, piece.parameter) for piece in self.pieces)

    def use(self, train: Train, stacked: Mapping[str, Sequence[int]]) -> None:
        """Let the recipe's optimiser step the group, or AdamW, where it is none of matrices."""
        if train.optimizer == "muon" and self.multiplies:
            matrices = (
                matrix
                for piece in self.pieces
                for matrix in piece.matrices(stacked.get(piece.name, piece.rows))
            )
            self.gradients.sum_always()
            self.steps = Muon(self.masters, self.gradients.whole(), matrices)
        else:
            eight_bits = train.optimizer == "adamw8bit" and self.multiplies
            self.steps = AdamW(self.masters, self.gradients, train.betas, eight_bits)

    def step(self, shrink: Tensor, factor: float) -> None:
        """One step of gradients times `shrink` at `factor` times the rate, void where that is NaN;
        the gradients are used up."""
        rate = self.rate * factor
        if isinstance(self.steps, Muon):
            self.gradients.whole()
            self.steps.step(rate, self.decay, shrink)
        else:
            self.steps.step(shrink, rate, self.decay)
        self.gradients.used_up()

    def stored(self, piece: Piece) -> dict[str, Tensor]:
        """What the optimiser remembers of a parameter, views; the last is zero as long as every
        gradient was."""
        if isinstance(self.steps, Muon):
            return {"first": piece.of(self.steps.momentum_E)}
        return self.steps.stored(piece.place, piece.parameter.shape)


class Values(Mapping[str, Tensor]):
    """fp32 values by native name, each made when asked for, where the masters are in two halves;
    views where they are not. `alike` ones become, rounded to nearest even, what the model computes
    with."""

    def __init__(self, groups: Sequence[Group], alike: bool) -> None:
        self._found = {piece.name: (group, piece) for group in groups for piece in group.pieces}
        self._alike = alike

    def __getitem__(self, name: str) -> Tensor:
        group, piece = self._found[name]
        wide_E = group.masters.of(piece.place)
        if self._alike and group.masters.narrow_E.dtype == torch.bfloat16:
            wide_E = rounded_alike(wide_E)
        return wide_E.view(piece.parameter.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class Masters:
    """The parameters that learn, their gradients and their optimiser's moments, all in fp32.

    From here on the model's parameters are views into one tensor a group. Between two micro-batches
    of a step, `add_up` has to be called.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        train: Train,
        stacked: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """`stacked` says of parameters that hold several matrices how many rows each one has."""
        self.groups = list(_groups(trainable, train))
        for group in self.groups:
            group.use(train, stacked or {})
        self.clip = train.clip
        self.numbers = sum(parameter.numel() for parameter in trainable.values())

    def add_up(self) -> None:
        """Make room for another micro-batch's gradients: those that have come are summed in
        fp32."""
        for group in self.groups:
            group.gradients.add_up()

    def sum_always(self) -> None:
        """Keep every gradient in sums of fp32, from the first micro-batch on; see `join`."""
        for group in self.groups:
            group.gradients.sum_always()

    def join(self, add: Callable[[Tensor], object]) -> None:
        """Let `add` put the sum of all processes' gradients in the place of this one's: the same
        tensors in the same order in each of them."""
        for group in self.groups:
            group.gradients.join(add)

    def norm(self) -> Tensor:
        """Euclidean norm of all gradients, a scalar on the device."""
        device = self.groups[0].gradients.device
        squares = [group.gradients.squares().to(device) for group in self.groups]
        return torch.stack(squares).sum().sqrt().float()

    def step(self, factor: float, norm: Tensor, grad_scale: float = 1.0) -> None:
        """One step at `factor` times the groups' learning rates; then the gradients are gone.

        `norm` is what `norm()` returned; the gradients are still multiplied by `grad_scale`
        (fp16), and are clipped to the recipe's norm once they are not. Where the norm is no finite
        number, the step is void: it changes nothing but uses the gradients up. Waits for nothing.
        """
        shrink = torch.full_like(norm, 1 / grad_scale).masked_fill_(~norm.isfinite(), math.nan)
        if self.clip is not None:
            # The small number keeps a norm of zero from dividing.
            shrink = shrink * (self.clip / (norm / grad_scale + 1e-6)).clamp(max=1.0)
        for group in self.groups:
            group.step(shrink.to(group.gradients.device), factor)

    def forget_gradients(self) -> None:
        """Drop what the micro-batches since the last step have brought, and what a backward pass
        that broke off has left behind."""
        for group in self.groups:
            group.gradients.forget()

    def rates(self, factor: float) -> dict[str, float]:
        """Learning rate of each part that learns, at `factor` of the schedule."""
        return {group.part: group.rate * factor for group in self.groups}

    def values(self) -> Values:
        """The fp32 value of every parameter that learns, by native name."""
        return Values(self.groups, alike=False)

    def published(self) -> Values:
        """As `values`, for a file whose readers round to nearest even: where a master lies in the
        middle between two numbers of bf16, its last bit leads to the one that was computed with."""
        return Values(self.groups, alike=True)

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state as tensors: `first.NAME`, under AdamW `second.NAME` too, in eight
        bits with `first_scale.NAME` and `second_scale.NAME`; and `steps`, a count of AdamW's."""
        taken = [group.steps.taken for group in self.groups if isinstance(group.steps, AdamW)]
        return {"steps": torch.tensor(float(taken[0] if taken else 0))} | {
            f"{order}.{piece.name}": moment
            for group in self.groups
            for piece in group.pieces
            for order, moment in group.stored(piece).items()
        }

    def reached(self) -> set[str]:
        """Names of the parameters that a gradient other than zero has ever come to."""
        seen: dict[str, Tensor] = {}
        for group in self.groups:
            for piece in group.pieces:
                *_, last = group.stored(piece).values()
                seen[piece.name] = last.any()
        flags = torch.stack(list(seen.values())).tolist()
        return {name for name, flag in zip(seen, flags, strict=True) if flag}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Continue from what `values` and `moments` returned; the names must be the same."""
        differing = sorted(set(self.values()) ^ set(values))
        assert not differing, f"{len(differing)} parameters differ, the first is {differing[0]}"
        for group in self.groups:
            if isinstance(group.steps, AdamW):
                group.steps.taken = int(moments["steps"])
            for piece in group.pieces:
                group.masters.load(values[piece.name].flatten(), piece.place)
                for order, moment in group.stored(piece).items():
                    moment.copy_(moments[f"{order}.{piece.name}"])


def _groups(trainable: Mapping[str, nn.Parameter], train: Train) -> Iterator[Group]:
    """By part, and within it matrices that multiply, tables, and vectors, which do not decay."""
    aligned = BLOCK if train.optimizer == "adamw8bit" else _ALIGNED
    rates = train.learning_rate
    by_part: dict[Part, float | None] = {
        "vision": rates.vision,
        "merger": rates.merger,
        "language": rates.language,
        "embeddings": rates.embeddings,
    }
    for part in PARTS:
        rate = by_part[part] if by_part[part] is not None else rates.default
        assert rate is not None, f"no learning rate for {part}"
        own = {name: p for name, p in trainable.items() if part_of(name) == part}
        matrices = {name: p for name, p in own.items() if _multiplies(name, p)}
        vectors = {name: p for name, p in own.items() if p.dim() <= 1}
        tables = {name: p for name, p in own.items() if name not in matrices | vectors}
        decays = train.weight_decay, train.weight_decay, 0.0
        for named, decay in zip((matrices, tables, vectors), decays, strict=True):
            if named:
                yield Group(part, decay, rate, named, aligned)


def _multiplies(name: str, parameter: nn.Parameter) -> bool:
    """So do matrices and stacks of them, but not what is added, nor the table of embeddings, of
    which a step moves few rows."""
    added = part_of(name) == "embeddings" or name.endswith(TABLES)
    return parameter.dim() in (2, 3) and not added


class LossScale:
    """Keeps fp16 gradients within range: halved when they overflow, doubled after a long calm.

    The loss is multiplied by `value` before the backward pass. Other precisions stay at 1.
    """

    START, LOWEST, CALM = 2.0**15, 1.0, 1000

    def __init__(self, active: bool) -> None:
        self.active = active
        self.value = self.START if active else 1.0
        self.calm = 0
        self.skipped = 0

    def accept(self, norm: float) -> bool:
        """Whether scaling is not to blame for a step with this gradient norm; adapts the scale, so
        that a step with the same samples may be possible."""
        if math.isfinite(norm):
            self.calm += 1
            if self.active and self.calm >= self.CALM:
                self.value, self.calm = self.value * 2, 0
            return True
        if not self.active or self.value <= self.LOWEST:
            return True
        self.value, self.calm, self.skipped = self.value / 2, 0, self.skipped + 1
        return False

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "calm": self.calm, "skipped": self.skipped}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what `state` returned."""
        self.value, self.calm = float(state["value"]), int(state["calm"])
        self.skipped = int(state["skipped"])


def not_finite(value: float, what: str, step: int) -> UserError:
    """The error that ends a run in which a loss or gradient is no number any more."""
    return UserError(
        f"the {what} of step {step} is {value}",
        where="training",
        expected="a finite number; nothing after the last checkpoint was kept",
        remedy="lower train.learning_rate, lengthen train.warmup, or use train.precision=bf16",
    )
