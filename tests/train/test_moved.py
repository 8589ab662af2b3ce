"""What moved is looked at: every bit of it, and errors when it is not what was asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finesight.errors import UserError
from finesight.train.moved import SAMPLE, Watch, check_moved, checksums


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.ModuleDict({"blocks": nn.Linear(3, 5)})
        self.model = nn.ModuleDict({"layers": nn.Linear(3, 5), "norm": nn.LayerNorm(2)})
        self.to(dtype)


def watch(dtype: torch.dtype) -> tuple[Model, dict[str, torch.Tensor], Watch]:
    model = Model(dtype)
    named = dict(model.named_parameters())
    masters = {n: p.detach().float() for n, p in named.items() if n.startswith("model.layers")}
    return model, masters, Watch(model, masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_parts_move_and_frozen_ones_stay(dtype: torch.dtype) -> None:
    _, masters, seen = watch(dtype)
    weight = masters["model.layers.weight"]
    before = weight.norm()
    weight.mul_(1.5)
    rows = seen.changes({"model.layers.weight"})
    check_moved(rows)
    trained = next(row for row in rows if row.trained)
    assert (trained.part, trained.tensors, trained.numbers, trained.changed) == (
        "language",
        2,
        20,
        1,
    )
    start = (before**2 + masters["model.layers.bias"].norm() ** 2).sqrt()
    assert trained.relative == pytest.approx((0.5 * before / start).item(), rel=1e-5)
    assert {(row.part, row.changed) for row in rows if not row.trained} == {
        ("vision", 0),
        ("language", 0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_of_a_frozen_part_is_our_fault(dtype: torch.dtype) -> None:
    model, masters, seen = watch(dtype)
    masters["model.layers.weight"].add_(1)
    with torch.no_grad():
        bits = model.visual["blocks"].weight.view(
            torch.int32 if dtype == torch.float32 else torch.int16
        )
        bits[2, 1] ^= 1
    with pytest.raises(RuntimeError, match="1 of 2 frozen tensors of vision changed"):
        check_moved(seen.changes(masters))


def test_a_trained_part_that_stayed_is_explained() -> None:
    _, masters, seen = watch(torch.float32)
    with pytest.raises(UserError, match=r"nothing has changed in the 2[\s\S]*learning_rate"):
        check_moved(seen.changes(masters))


def test_a_part_that_only_decayed_is_explained() -> None:
    _, masters, seen = watch(torch.float32)
    masters["model.layers.weight"].mul_(0.99)
    with pytest.raises(UserError, match=r"no gradient came to the 2 tensors of language"):
        check_moved(seen.changes({"model.norm.weight"}))


def test_a_single_change_outside_of_the_sample_counts_as_moved() -> None:
    masters = {"model.embed_tokens.weight": torch.zeros(2 * SAMPLE + 1)}
    seen = Watch(nn.Module(), masters)
    masters["model.embed_tokens.weight"][1] = 1e-30
    (row,) = seen.changes(masters)
    assert (row.changed, row.relative) == (1, 0.0)


def test_checksums_of_nothing() -> None:
    assert checksums({}) == {}
