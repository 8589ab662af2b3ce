"""AdamW with split master weights: bit-identical to torch.optim.AdamW in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finesight.config import TrainSettings
from finesight.train.optim_states import break_bf16_ties
from finesight.train.optimizer import MasterWeightOptimizer

MATRIX, BIAS = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.bias"
SHAPES = {MATRIX: (40, 32), BIAS: (64,)}
LEARNING_RATE, DECAY = 1e-3, 0.1


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_master_weights_match_fp32_adamw(dtype: torch.dtype, micro: int) -> None:
    """Over many steps of sizes from far below to far above what the model's type can hold."""
    generator = torch.Generator().manual_seed(0)
    named = {
        name: nn.Parameter((torch.randn(shape, generator=generator) ** 3).to(dtype))
        for name, shape in SHAPES.items()
    }
    baseline = {name: nn.Parameter(p.detach().float()) for name, p in named.items()}
    settings = {"learning_rate": LEARNING_RATE, "weight_decay": DECAY, "max_grad_norm": None}
    masters = MasterWeightOptimizer(named, TrainSettings.model_validate(settings))
    reference = torch.optim.AdamW(
        [
            {"params": [baseline[MATRIX]], "weight_decay": DECAY},
            {"params": [baseline[BIAS]], "weight_decay": 0.0},
        ],
        foreach=False,
        fused=False,
    )
    for step in range(120):
        factor = 10.0 ** (step % 7 - 4)
        total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for number in range(micro):
            if number:
                masters.accumulate_gradients()
            drawn: dict[str, Tensor] = {
                name: torch.randn(shape, generator=generator).to(dtype)
                for name, shape in SHAPES.items()
            }
            torch.stack([(named[n] * g).sum() for n, g in drawn.items()]).sum().backward()
            for name, gradient in drawn.items():
                total[name] += gradient
        for name, gradient in total.items():
            baseline[name].grad = gradient
        for group in reference.param_groups:
            group["lr"] = LEARNING_RATE * factor
        reference.step()
        masters.step(factor, masters.grad_norm())
    for name, expected in baseline.items():
        assert torch.equal(masters.master_weights()[name], expected.detach()), name
        state = reference.state[expected]
        assert torch.equal(masters.optimizer_state()[f"exp_avg.{name}"], state["exp_avg"])
        assert torch.equal(masters.optimizer_state()[f"exp_avg_sq.{name}"], state["exp_avg_sq"])
        equal = break_bf16_ties(expected.detach()) if dtype == torch.bfloat16 else expected.detach()
        assert torch.equal(named[name].detach(), equal.to(dtype))
        assert torch.equal(masters.export_weights()[name].to(dtype), named[name].detach())


def test_memory_per_parameter() -> None:
    named = {MATRIX: nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))}
    for optimizer, moments in (("adamw", 8.0), ("adamw_8bit", 2 + 8 / 256)):
        given = {"learning_rate": LEARNING_RATE, "optimizer": optimizer}
        masters = MasterWeightOptimizer(named, TrainSettings.model_validate(given))
        wide = masters.param_groups[0].master_weights
        assert wide.residual_E is not None
        assert (wide.params_E.nbytes + wide.residual_E.nbytes) / 4096 == 4
        retained = sum(
            t.nbytes for name, t in masters.optimizer_state().items() if name != "num_steps"
        )
        assert retained / 4096 == moments
