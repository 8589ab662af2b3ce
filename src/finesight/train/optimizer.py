"""AdamW or Muon over fp32 masters: gradients of all micro-batches are summed, and stepped, in fp32.

Shapes: E numbers of a group of parameters, laid end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finesight.config import Train
from finesight.errors import UserError
from finesight.model.parts import PARTS, TABLES, Part, part_of
from finesight.train.eight_bit import BLOCK, AdamW8bit
from finesight.train.muon import Matrix, Muon

_ALIGNED = 64
"""Numbers between possible starts of a parameter, so that each stays aligned to 128 bytes."""


@dataclass(frozen=True)
class Piece:
    """Where one parameter lies in its group."""

    name: str
    parameter: nn.Parameter
    place: slice

    def of(self, flat_E: Tensor) -> Tensor:
        """This parameter's part of a tensor of its group, in its own shape."""
        return flat_E[self.place].view(self.parameter.shape)

    @property
    def rows(self) -> Sequence[int]:
        """Of each matrix, where nothing else is said: a stack of experts has one for each."""
        *number, rows, _ = self.parameter.shape
        return (rows,) * math.prod(number)

    def matrices(self, rows: Sequence[int]) -> Iterator[Matrix]:
        """The parameter's matrices, stacked with so many rows each."""
        columns, start = self.parameter.shape[-1], self.place.start
        found = f"{rows} rows of {columns} in {self.parameter.shape}"
        assert sum(rows) * columns == self.parameter.numel(), found
        for number in rows:
            yield Matrix(slice(start, start + number * columns), number, columns)
            start += number * columns


class Group:
    """Parameters of one part that share learning rate and weight decay.

    `master_E` holds their fp32 values end to end, `narrow_E` those that the model computes with
    (the same tensor when the model is fp32), `grad_E` the sum of the gradients so far. Parameters
    begin at multiples of `aligned` numbers. `own` steps a group of matrices where the recipe chose
    another optimiser than torch's AdamW.
    """

    own: Muon | AdamW8bit | None = None

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
        self.narrow_E = torch.zeros(end, dtype=first.dtype, device=first.device)
        for piece in self.pieces:
            piece.of(self.narrow_E).copy_(piece.parameter.detach())
            piece.parameter.data = piece.of(self.narrow_E)
        same = first.dtype == torch.float32
        self.master_E = nn.Parameter(
            self.narrow_E if same else self.narrow_E.float(), requires_grad=True
        )
        self.grad_E = torch.zeros(end, dtype=torch.float32, device=first.device)
        self.master_E.grad = self.grad_E
        for piece in self.pieces:
            self._collect(piece)

    def _collect(self, piece: Piece) -> None:
        register: Callable[..., object] = piece.parameter.register_post_accumulate_grad_hook
        sum_of_grads = piece.of(self.grad_E)

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None, f"{piece.name} was visited without a gradient"
            sum_of_grads.add_(parameter.grad)
            parameter.grad = None

        register(collect)

    @property
    def multiplies(self) -> bool:
        """Whether its parameters are matrices, or stacks of them, that multiply."""
        return all(_multiplies(piece.name, piece.parameter) for piece in self.pieces)

    def use_muon(self, stacked: Mapping[str, Sequence[int]]) -> None:
        """Let Muon step the group."""
        matrices = (
            matrix
            for piece in self.pieces
            for matrix in piece.matrices(stacked.get(piece.name, piece.rows))
        )
        self.own = Muon(self.master_E.detach(), self.grad_E, matrices)

    def use_eight_bits(self, betas: tuple[float, float]) -> None:
        """Keep the moments of AdamW in eight bits."""
        self.own = AdamW8bit(self.master_E.detach(), self.grad_E, betas)

    def publish(self) -> None:
        """Give the model the masters' values, rounded to its own type."""
        if self.narrow_E.dtype != torch.float32:
            self.narrow_E.copy_(self.master_E.detach())


class Masters:
    """The parameters that learn, their gradients and their optimiser's moments, all in fp32.

    From here on the model's parameters are views into one tensor a group, and a micro-batch's
    gradients move into the masters' sums as soon as autograd has made them.
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
            if train.optimizer == "muon" and group.multiplies:
                group.use_muon(stacked or {})
            if train.optimizer == "adamw8bit" and group.multiplies:
                group.use_eight_bits(train.betas)
        self.adamw = _adamw([group for group in self.groups if group.own is None], train)
        self.clip = train.clip

    def norm(self) -> Tensor:
        """Euclidean norm of all gradients, a scalar on the device."""
        norms = [torch.linalg.vector_norm(group.grad_E) for group in self.groups]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    def step(self, factor: float, norm: Tensor, grad_scale: float = 1.0) -> None:
        """One step at `factor` times the groups' learning rates; then the gradients are zero.

        `norm` is what `norm()` returned; the gradients are still multiplied by `grad_scale`
        (fp16), and are clipped to the recipe's norm once they are not. Waits for nothing.
        """
        shrink = torch.full_like(norm, 1 / grad_scale)
        if self.clip is not None:
            # The small number keeps a norm of zero from dividing.
            shrink = shrink * (self.clip / (norm / grad_scale + 1e-6)).clamp(max=1.0)
        for group in self.groups:
            group.grad_E.mul_(shrink)
            if group.own is not None:
                group.own.step(group.rate * factor, group.decay)
        if self.adamw is not None:
            for settings in self.adamw.param_groups:
                settings["lr"] = settings["rate"] * factor
            self.adamw.step()
        for group in self.groups:
            group.publish()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Drop what the micro-batches since the last step have summed up."""
        for group in self.groups:
            group.grad_E.zero_()
            for piece in group.pieces:
                # One that a backward pass which broke off has left behind.
                piece.parameter.grad = None

    def rates(self, factor: float) -> dict[str, float]:
        """Learning rate of each part that learns, at `factor` of the schedule."""
        return {group.part: group.rate * factor for group in self.groups}

    def values(self) -> dict[str, Tensor]:
        """The fp32 value of every parameter that learns, by native name; views, not copies."""
        return {
            piece.name: piece.of(group.master_E.detach())
            for group in self.groups
            for piece in group.pieces
        }

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state as tensors: `first.NAME`, under AdamW `second.NAME` too, in eight
        bits with `first_scale.NAME` and `second_scale.NAME`; and `steps`, a count."""
        return {"steps": self._steps.detach().clone().cpu()} | {
            f"{order}.{piece.name}": moment
            for group in self.groups
            for piece in group.pieces
            for order, moment in self._moments_of(group, piece).items()
        }

    def reached(self) -> set[str]:
        """Names of the parameters that a gradient other than zero has ever come to."""
        seen: dict[str, Tensor] = {}
        for group in self.groups:
            for piece in group.pieces:
                *_, last = self._moments_of(group, piece).values()
                seen[piece.name] = last.any()
        flags = torch.stack(list(seen.values())).tolist()
        return {name for name, flag in zip(seen, flags, strict=True) if flag}

    @property
    def _steps(self) -> Tensor:
        """AdamW's own count; Muon needs none."""
        for group in self.groups:
            if group.own is None:
                return self._state_of(group)["step"]
            if isinstance(group.own, AdamW8bit):
                return torch.tensor(float(group.own.taken))
        return torch.tensor(0.0)

    def _state_of(self, group: Group) -> dict[str, Tensor]:
        """AdamW's state of a group, from its first step on or before it."""
        assert self.adamw is not None, f"AdamW steps nothing, not even {group.pieces[0].name}"
        state: dict[str, Tensor] = self.adamw.state[group.master_E]
        if not state:
            # What AdamW would start from at its first step.
            device = group.master_E.device if group.master_E.is_cuda else None
            state["step"] = torch.tensor(0.0, device=device)
            state["exp_avg"] = torch.zeros_like(group.master_E)
            state["exp_avg_sq"] = torch.zeros_like(group.master_E)
        return state

    def _moments_of(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        """Of one parameter, views. The last is zero as long as every gradient was: squares never
        cancel each other."""
        if isinstance(group.own, Muon):
            return {"first": piece.of(group.own.momentum_E)}
        if isinstance(group.own, AdamW8bit):
            return group.own.moments(piece.place)
        state = self._state_of(group)
        return {"first": piece.of(state["exp_avg"]), "second": piece.of(state["exp_avg_sq"])}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Continue from what `values` and `moments` returned; the names must be the same."""
        own = self.values()
        differing = sorted(set(own) ^ set(values))
        assert not differing, f"{len(differing)} parameters differ, the first is {differing[0]}"
        for group in self.groups:
            if group.own is None:
                self._state_of(group)["step"].copy_(moments["steps"])
            if isinstance(group.own, AdamW8bit):
                group.own.taken = int(moments["steps"])
            for piece in group.pieces:
                piece.of(group.master_E.detach()).copy_(values[piece.name])
                for order, moment in self._moments_of(group, piece).items():
                    moment.copy_(moments[f"{order}.{piece.name}"])
            group.publish()


def _adamw(groups: Sequence[Group], train: Train) -> torch.optim.AdamW | None:
    """The optimiser of these groups, each with its full rate beside the one of the step."""
    settings = [
        {
            "params": [group.master_E],
            "lr": group.rate,
            "rate": group.rate,
            "weight_decay": group.decay,
        }
        for group in groups
    ]
    if not settings:
        return None
    return torch.optim.AdamW(settings, betas=train.betas, fused=groups[0].master_E.is_cuda)


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

    def accept(self, norm: float, step: int) -> bool:
        """Whether the step with this gradient norm may be taken; adapts the scale.

        Raises UserError for a gradient that is not finite and for which scaling is not to blame.
        """
        if math.isfinite(norm):
            self.calm += 1
            if self.active and self.calm >= self.CALM:
                self.value, self.calm = self.value * 2, 0
            return True
        if not self.active or self.value <= self.LOWEST:
            raise not_finite(norm, "gradient norm", step)
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
