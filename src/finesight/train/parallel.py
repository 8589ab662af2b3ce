"""How several processes share one model: each has the whole of it, or its layers lie in parts with
all of them and are put together while they compute (Zhao et al. 2023, arXiv:2304.11277).

`ddp` keeps everything whole and adds up gradients. `zero2` keeps a part of the fp32 weights, the
gradients and the moments with each process, `fsdp` of the weights that compute, too (stages 2 and 3
of Rajbhandari et al. 2020, arXiv:1910.02054), `fsdp_offload` in the CPU's memory. All are torch's
`fully_shard`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from finesight.config import Recipe
from finesight.encode.pack import PackedBatch
from finesight.errors import UserError
from finesight.model.any_family import AnyModel
from finesight.model.fallback import FallbackModel
from finesight.model.parts import trainable
from finesight.train.optimizer import Masters
from finesight.train.ranks import Ranks


class Parallel(Protocol):
    """What a step asks of it. All processes have to call the same methods in the same order."""

    sharded: bool
    """Whether no process has all of the model."""

    numbers: int
    """All that learn, wherever they lie."""

    learning: Mapping[str, nn.Parameter]
    """What this process steps, by native name: all that learns, or its own rows of it."""

    def passable(self, packed: PackedBatch) -> PackedBatch:
        """The pack, such that all processes put the same layers together for theirs."""
        ...

    def joined(self, masters: Masters) -> Tensor:
        """Let the gradients of all processes, added up, stand in the place of this one's. Returns
        the Euclidean norm of all of them, a scalar on the device."""
        ...

    def moved(self) -> None:
        """The masters have taken a step: let the model compute with that."""
        ...

    def forget(self) -> None:
        """Drop the gradients of a step that was not taken."""
        ...

    def own(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of what a checkpoint holds whole, this process's rows; names may say more than one of a
        parameter, behind a full stop."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within the block, the model is whole in every process, and may be asked by one alone."""
        ...


class Replicated:
    """Every process has all of the model."""

    sharded = False

    def __init__(self, model: AnyModel, ranks: Ranks) -> None:
        self.learning: Mapping[str, nn.Parameter] = trainable(model)
        self.numbers = sum(parameter.numel() for parameter in self.learning.values())
        self._ranks = ranks

    def passable(self, packed: PackedBatch) -> PackedBatch:
        """As it is."""
        return packed

    def joined(self, masters: Masters) -> Tensor:
        """Gradients are added up in fp32 (Li et al. 2020, arXiv:2006.15704, without overlap)."""
        if not self._ranks.alone:
            masters.join(self._ranks.add)
        return masters.norm()

    def moved(self) -> None:
        """The model computes with the masters' own upper halves."""

    def forget(self) -> None:
        """They are the masters'."""

    def own(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All of it."""
        return tensors

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As it always is."""
        yield


def share_model(recipe: Recipe, model: AnyModel, dtype: torch.dtype, ranks: Ranks) -> Parallel:
    """The model, from here on shared as the recipe says. Raises UserError for what cannot lie in
    parts."""
    how = recipe.train.parallel
    if how == "ddp" or ranks.alone:
        return Replicated(model, ranks)
    if isinstance(model, FallbackModel):
        _refuse(how, "this family, which transformers computes")
    if how == "fsdp_offload" and model.model.embed_tokens.weight.device.type == "cpu":
        _refuse(how, "a model that a CPU computes")
    if recipe.train.optimizer != "adamw":
        _refuse(how, f"what train.optimizer={recipe.train.optimizer} keeps")
    # What it is made of takes torch a second to import, which most runs have no use for.
    from finesight.train.sharded import Sharded

    return Sharded(model, dtype, how)


def _refuse(how: str, what: str) -> NoReturn:
    raise UserError(
        f"train.parallel={how} does not share out {what}",
        where="train.parallel",
        expected="a family with code of its own, and AdamW",
        remedy="set train.parallel=ddp: every process then has the whole model",
    )
