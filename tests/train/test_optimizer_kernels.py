"""Optimizer kernels on a GPU compared with the CPU implementation."""

import pytest
import torch
from torch import Tensor, nn

from finesight.model.kernels.adamw import BLOCK_SIZE
from finesight.train.optim_states import SplitBf16Master
from finesight.train.optimizer import AdamW, GradientAccumulator, ParamSlice

pytestmark = pytest.mark.gpu
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(5000 * 16, 256, 4096), (5003, 77)]
"""Numbers of parameters: of which threads read several at once, and of which they cannot."""


class OptimizerSetup:
    def __init__(
        self, sizes: tuple[int, ...], dtype: torch.dtype, eight_bits: bool, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pieces, end = [], 0
        for number, size in enumerate(sizes):
            values = torch.randn(size, generator=generator).to(device, dtype)
            self.pieces.append(
                ParamSlice(str(number), nn.Parameter(values), slice(end, end + size))
            )
            end += -(-size // BLOCK_SIZE) * BLOCK_SIZE
        narrow_E = torch.zeros(end, dtype=dtype, device=device)
        for piece in self.pieces:
            piece.view(narrow_E).copy_(piece.parameter.detach())
        self.masters = SplitBf16Master(narrow_E)
        self.gradients = GradientAccumulator(self.pieces, end)
        self.grad_scale = torch.tensor(0.37, device=device)
        self.adamw = AdamW(self.masters, self.gradients, (0.9, 0.999), eight_bits)

    def receive(self, number: int, gradient: Tensor) -> None:
        parameter = self.pieces[number].parameter
        parameter.grad = gradient.to(parameter)

    def step(self, may_synchronize: bool = True) -> None:
        torch.cuda.set_sync_debug_mode("default" if may_synchronize else "error")
        try:
            self.gradients.per_parameter()
            self.adamw.step(self.grad_scale, 1e-2, 0.1)
            self.gradients.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def read_state(self) -> tuple[Tensor, Tensor, Tensor]:
        location = slice(0, len(self.masters))
        retained = (self.masters, self.adamw.exp_avg, self.adamw.exp_avg_sq)
        return tuple(part.read(location).cpu() for part in retained)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gpu_step_matches_cpu(sizes, dtype, eight_bits):
    """One and several micro-batches, with parameters without gradients and without waits."""
    sides = [OptimizerSetup(sizes, dtype, eight_bits, device) for device in ("cpu", "cuda")]
    assert sides[1].gradients.tiles is not None
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for micro in range(1 + step % 2 * 2):
            for side in sides:
                if micro:
                    side.gradients.accumulate()
            for number, size in enumerate(sizes):
                if number != 1 or step >= 2:
                    drawn = torch.randn(size, generator=generator) ** 3
                    for side in sides:
                        side.receive(number, drawn)
        for side in sides:
            side.step(may_synchronize=step == 0)
        for found, expected in zip(*(side.read_state() for side in sides), strict=True):
            off = (found - expected).abs()
            if not eight_bits:
                assert float(off.max()) < 1e-6 * float(expected.abs().max())
            else:
                # A number in the middle between two levels goes to one or the other.
                assert float((off > 1e-6 * expected.abs().max()).float().mean()) < 5e-3
                assert float(off.norm() / expected.norm()) < 5e-3


def test_unaligned_gradient_is_read():
    sides = [OptimizerSetup((4096,), torch.bfloat16, False, device) for device in ("cpu", "cuda")]
    for side in sides:
        wide = torch.arange(4099.0).to(side.masters.params_E)
        side.pieces[0].parameter.grad = wide[3:]
        side.step()
    for found, expected in zip(*(side.read_state() for side in sides), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
