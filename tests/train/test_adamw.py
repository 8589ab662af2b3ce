"""AdamW over masters in two halves: torch's own AdamW over plain fp32 masters, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finesight.config import Train
from finesight.train.optimizer import Masters
from finesight.train.wide import rounded_alike

MATRIX, BIAS = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.bias"
SHAPES = {MATRIX: (40, 32), BIAS: (64,)}
RATE, DECAY = 1e-3, 0.1


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masters_move_as_plain_fp32_ones(dtype: torch.dtype, micro: int) -> None:
    """Over many steps of sizes from far below to far above what the model's type can hold."""
    generator = torch.Generator().manual_seed(0)
    named = {
        name: nn.Parameter((torch.randn(shape, generator=generator) ** 3).to(dtype))
        for name, shape in SHAPES.items()
    }
    plain = {name: nn.Parameter(p.detach().float()) for name, p in named.items()}
    settings = {"learning_rate": RATE, "weight_decay": DECAY, "clip": None}
    masters = Masters(named, Train.model_validate(settings))
    reference = torch.optim.AdamW(
        [
            {"params": [plain[MATRIX]], "weight_decay": DECAY},
            {"params": [plain[BIAS]], "weight_decay": 0.0},
        ],
        foreach=False,
        fused=False,
    )
    for step in range(120):
        factor = 10.0 ** (step % 7 - 4)
        total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for number in range(micro):
            if number:
                masters.add_up()
            drawn: dict[str, Tensor] = {
                name: torch.randn(shape, generator=generator).to(dtype)
                for name, shape in SHAPES.items()
            }
            torch.stack([(named[n] * g).sum() for n, g in drawn.items()]).sum().backward()
            for name, gradient in drawn.items():
                total[name] += gradient
        for name, gradient in total.items():
            plain[name].grad = gradient
        for group in reference.param_groups:
            group["lr"] = RATE * factor
        reference.step()
        masters.step(factor, masters.norm())
    for name, expected in plain.items():
        assert torch.equal(masters.values()[name], expected.detach()), name
        state = reference.state[expected]
        assert torch.equal(masters.moments()[f"first.{name}"], state["exp_avg"])
        assert torch.equal(masters.moments()[f"second.{name}"], state["exp_avg_sq"])
        alike = rounded_alike(expected.detach()) if dtype == torch.bfloat16 else expected.detach()
        assert torch.equal(named[name].detach(), alike.to(dtype))
        assert torch.equal(masters.published()[name].to(dtype), named[name].detach())


def test_bytes_for_each_number_are_as_told() -> None:
    named = {MATRIX: nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))}
    for optimizer, moments in (("adamw", 8.0), ("adamw8bit", 2 + 8 / 256)):
        given = {"learning_rate": RATE, "optimizer": optimizer}
        masters = Masters(named, Train.model_validate(given))
        wide = masters.groups[0].masters
        assert wide.rest_E is not None
        assert (wide.narrow_E.nbytes + wide.rest_E.nbytes) / 4096 == 4
        kept = sum(t.nbytes for name, t in masters.moments().items() if name != "steps")
        assert kept / 4096 == moments
