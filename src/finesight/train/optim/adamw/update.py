"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).

A group is updated by a fused kernel on a GPU with Triton, and otherwise in chunks. A step reads and
writes 26 bytes per bf16 parameter, or 14 bytes with 8-bit moments.

Shapes: E flat elements of a parameter group, M elements of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finesight.components import NoSettings
from finesight.settings.config import TrainSettings
from finesight.train.master_weight_optimizer import Optimizer, ParamGroup
from finesight.train.optim.adamw.kernels import ADAM_EPS, adamw_step

MAX_CHUNK_ELEMENTS = 1 << 20
"""Elements per chunk of the AdamW step without Triton."""

STEP_BYTES_PER_ELEMENT = 20
"""Temporary bytes per element of a chunk."""


class AdamW(Optimizer[NoSettings]):
    """AdamW optimizer for the master weights of one parameter group.

    The step count is a scalar tensor on the device, because only the device knows whether a step
    with a non-finite gradient was skipped.
    """

    eager_traffic = 60
    kernel_traffic = 28
    """Bytes of memory traffic of a step per element, without and with the kernel."""

    def __init__(self, group: ParamGroup, settings: NoSettings, train: TrainSettings) -> None:
        super().__init__(group, settings, train)
        num_elements = len(self.master_weights)
        device = self.gradients.device
        self._betas = train.betas
        self.exp_avg = self.create_moment(num_elements, device, signed=True)
        self.exp_avg_sq = self.create_moment(num_elements, device, signed=False)
        self._num_steps = torch.zeros((), dtype=torch.float64, device=device)
        self._next_num_steps = self._num_steps.clone()

    def create_moment(self, num_elements: int, device: torch.device, signed: bool) -> OptimState:
        """Create a moment of the group, initially zero; the first one is signed."""
        return OptimState(num_elements, device)

    @property
    def num_steps(self) -> int:
        """Number of applied optimizer steps, without skipped ones.

        Reading it synchronizes with the device.
        """
        return int(self._num_steps)

    @num_steps.setter
    def num_steps(self, number: int) -> None:
        self._num_steps.fill_(number)

    @torch.no_grad()
    def step(self, grad_factor: Tensor, lr: float, weight_decay: float) -> None:
        """Update the master weights; see `Optimizer.step`.

        A skipped step is not counted. With the Triton kernel, the host does not synchronize with
        the device.
        """
        decay_factor = 1 - lr * weight_decay
        tiles = self.gradients.tiles
        master = self.master_weights
        gradients = self.gradients.per_parameter()
        if tiles is not None:
            adamw_step(
                tiles,
                gradients,
                (master.params_E, master.residual_E),
                [
                    (self.exp_avg.values_E, self.exp_avg.scale_B),
                    (self.exp_avg_sq.values_E, self.exp_avg_sq.scale_B),
                ],
                grad_factor,
                (self._num_steps, self._next_num_steps),
                lr,
                decay_factor,
                self._betas,
            )
            # The kernel has written the new count to the second tensor.
            self._num_steps, self._next_num_steps = self._next_num_steps, self._num_steps
            return
        if not grad_factor.isfinite():
            return
        self.num_steps += 1
        beta_1, beta_2 = self._betas
        step_size = lr / (1 - beta_1**self.num_steps)
        bias_correction2_sqrt = float((1 - beta_2**self.num_steps) ** 0.5)
        for start in range(0, len(master), MAX_CHUNK_ELEMENTS):
            flat_slice = slice(start, min(start + MAX_CHUNK_ELEMENTS, len(master)))
            grad_M = self.gradients.read_slice(flat_slice).mul_(grad_factor)
            exp_avg_M = self.exp_avg.read(flat_slice).lerp_(grad_M, 1 - beta_1)
            exp_avg_sq_M = self.exp_avg_sq.read(flat_slice).mul_(beta_2)
            exp_avg_sq_M.addcmul_(grad_M, grad_M, value=1 - beta_2)
            self.exp_avg.write(exp_avg_M, flat_slice)
            self.exp_avg_sq.write(exp_avg_sq_M, flat_slice)
            # The update uses the moments before rounding.
            denom_M = exp_avg_sq_M.sqrt().div_(bias_correction2_sqrt).add_(ADAM_EPS)
            master_M = master.read(flat_slice).mul_(decay_factor)
            master.write(master_M.addcdiv_(exp_avg_M, denom_M, value=-step_size), flat_slice)

    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return views of the moments; the second moment is last, because squares cannot cancel."""
        tensors: dict[str, Tensor] = {}
        for name, moment in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for suffix, tensor in moment.state_tensors(flat_slice, shape).items():
                tensors[f"{name}{suffix}"] = tensor
        return tensors

    def workspace_bytes(self, is_cuda: bool) -> int:
        """Return the temporary bytes of a step; 0 for the kernel."""
        if is_cuda:
            return 0
        return STEP_BYTES_PER_ELEMENT * min(len(self.master_weights), MAX_CHUNK_ELEMENTS)

    def traffic_bytes(self, is_cuda: bool) -> int:
        """Return the bytes of memory traffic of a step."""
        traffic = self.kernel_traffic if is_cuda else self.eager_traffic
        return traffic * len(self.master_weights)


class OptimState:
    """AdamW moment (first or second) of a parameter group in fp32, initially zero.

    Attributes:
        values_E: Flat values.
        scale_B: Scales of the blocks; None in fp32.
    """

    values_E: Tensor
    scale_B: Tensor | None = None

    def __init__(self, num_elements: int, device: torch.device) -> None:
        self.values_E = torch.zeros(num_elements, dtype=torch.float32, device=device)

    def read(self, flat_slice: slice) -> Tensor:
        """Return a slice of the moment in fp32 [M]; call `write` after changing it."""
        return self.values_E[flat_slice]

    def write(self, values_M: Tensor, flat_slice: slice) -> None:
        """Store a slice of the moment that `read` returned and the caller changed."""

    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return views of the moment of one parameter for a checkpoint, by key suffix."""
        return {"": self.values_E[flat_slice].view(shape)}
