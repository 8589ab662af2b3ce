"""Parameter audit: every changed bit, and errors for unexpected changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finesight.errors import UserError
from finesight.train.param_audit import (
    SAMPLE_SIZE,
    ParamAudit,
    check_param_changes,
    compute_checksums,
)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.ModuleDict({"blocks": nn.Linear(3, 5)})
        self.model = nn.ModuleDict({"layers": nn.Linear(3, 5), "norm": nn.LayerNorm(2)})
        self.to(dtype)


def watch(dtype: torch.dtype) -> tuple[Model, dict[str, torch.Tensor], ParamAudit]:
    model = Model(dtype)
    named = dict(model.named_parameters())
    masters = {n: p.detach().float() for n, p in named.items() if n.startswith("model.layers")}
    return model, masters, ParamAudit(model, masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_parts_change_and_frozen_parts_do_not(dtype: torch.dtype) -> None:
    _, masters, seen = watch(dtype)
    weight = masters["model.layers.weight"]
    before = weight.norm()
    weight.mul_(1.5)
    rows = seen.compute_changes({"model.layers.weight"})
    check_param_changes(rows)
    trained = next(row for row in rows if row.is_trained)
    assert (trained.part, trained.num_tensors, trained.num_params, trained.num_changed) == (
        "language",
        2,
        20,
        1,
    )
    start = (before**2 + masters["model.layers.bias"].norm() ** 2).sqrt()
    assert trained.relative_change == pytest.approx((0.5 * before / start).item(), rel=1e-5)
    assert {(row.part, row.num_changed) for row in rows if not row.is_trained} == {
        ("vision", 0),
        ("language", 0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_frozen_parameter_is_an_internal_error(dtype: torch.dtype) -> None:
    model, masters, seen = watch(dtype)
    masters["model.layers.weight"].add_(1)
    with torch.no_grad():
        bits = model.visual["blocks"].weight.view(
            torch.int32 if dtype == torch.float32 else torch.int16
        )
        bits[2, 1] ^= 1
    with pytest.raises(RuntimeError, match="1 of 2 frozen tensors of vision changed"):
        check_param_changes(seen.compute_changes(masters))


def test_unchanged_trained_part_is_explained() -> None:
    _, masters, seen = watch(torch.float32)
    with pytest.raises(UserError, match=r"training did not change the 2[\s\S]*learning_rate"):
        check_param_changes(seen.compute_changes(masters))


def test_part_changed_only_by_weight_decay_is_explained() -> None:
    _, masters, seen = watch(torch.float32)
    masters["model.layers.weight"].mul_(0.99)
    with pytest.raises(UserError, match=r"no gradient reached the 2 trainable tensors of language"):
        check_param_changes(seen.compute_changes({"model.norm.weight"}))


def test_change_outside_the_sample_is_detected() -> None:
    masters = {"model.embed_tokens.weight": torch.zeros(2 * SAMPLE_SIZE + 1)}
    seen = ParamAudit(nn.Module(), masters)
    masters["model.embed_tokens.weight"][1] = 1e-30
    (row,) = seen.compute_changes(masters)
    assert (row.num_changed, row.relative_change) == (1, 0.0)


def test_checksums_of_empty_dict() -> None:
    assert compute_checksums({}) == {}
