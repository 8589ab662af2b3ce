"""Audit of parameters: changes of trained and frozen parts, and what it explains."""

import pytest
import torch
from torch import nn

from finesight.errors import UserError
from finesight.train.finalize import check_param_changes
from finesight.train.param_audit import SAMPLE_SIZE, ParamAudit


def make_audit(dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor], ParamAudit]:
    torch.manual_seed(0)
    model = nn.Module()
    model.visual = nn.ModuleDict({"blocks": nn.Linear(3, 5)})
    model.model = nn.ModuleDict({"layers": nn.Linear(3, 5), "norm": nn.LayerNorm(2)})
    named = dict(model.to(dtype).named_parameters())
    masters = {n: p.detach().float() for n, p in named.items() if n.startswith("model.layers")}
    return model, masters, ParamAudit(model, masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_parts_change_and_frozen_parts_do_not(dtype):
    model, masters, audit = make_audit(dtype)
    weight = masters["model.layers.weight"]
    before = weight.norm()
    weight.mul_(1.5)
    rows = audit.compute_changes({"model.layers.weight"})
    check_param_changes(rows)
    (trained,) = (row for row in rows if row.is_trained)
    counts = trained.part, trained.num_tensors, trained.num_params, trained.num_changed
    assert counts == ("language", 2, 20, 1)
    start = (before**2 + masters["model.layers.bias"].norm() ** 2).sqrt()
    assert trained.relative_change == pytest.approx((0.5 * before / start).item(), rel=1e-5)
    frozen = {(row.part, row.num_changed) for row in rows if not row.is_trained}
    assert frozen == {("vision", 0), ("language", 0)}
    with torch.no_grad():
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        model.visual["blocks"].weight.view(bits)[2, 1] ^= 1
    with pytest.raises(RuntimeError, match="1 of 2 frozen tensors of vision changed"):
        check_param_changes(audit.compute_changes(masters))


def test_untrained_part_is_explained():
    _, masters, audit = make_audit(torch.float32)
    with pytest.raises(UserError, match=r"training did not change the 2[\s\S]*learning_rate"):
        check_param_changes(audit.compute_changes(masters))
    masters["model.layers.weight"].mul_(0.99)  # weight decay
    with pytest.raises(UserError, match=r"no gradient reached the 2 trainable tensors of language"):
        check_param_changes(audit.compute_changes({"model.norm.weight"}))


def test_change_outside_the_sample_is_detected():
    masters = {"model.embed_tokens.weight": torch.zeros(2 * SAMPLE_SIZE + 1)}
    audit = ParamAudit(nn.Module(), masters)
    masters["model.embed_tokens.weight"][1] = 1e-30
    (row,) = audit.compute_changes(masters)
    assert (row.num_changed, row.relative_change) == (1, 0.0)
