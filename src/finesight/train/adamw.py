"""AdamW over fp32 master weights (Loshchilov & Hutter 2019, arXiv:1711.05101).

One instance updates one parameter group. On a GPU with Triton, a fused kernel computes the step.
Otherwise, the step is computed in chunks of the flat parameters.

Bytes per trainable bf16 parameter:

- 2 for the parameter.
- 2 for the residual of the fp32 master weight.
- 2 for the gradient, from the backward pass to the optimizer step; 4 with several micro-batches.
- 8 for the fp32 moments, or 2.03 for 8-bit moments.

The total is 14 bytes with fp32 moments and 8.03 bytes with 8-bit moments. An optimizer step reads
and writes 26 or 14 bytes per parameter, plus 2 bytes for the gradient norm.

Shapes: E flat elements of a parameter group, M elements of a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finesight.model.quant.base import HAS_TRITON
from finesight.train.grad_accumulation import GradientAccumulator
from finesight.train.master_weights import SplitBf16Master
from finesight.train.optim_states import ADAM_EPS, AdamWHyperparams, OptimState, OptimState8bit

if HAS_TRITON:
    from finesight.train import optimizer_kernels

MAX_CHUNK_ELEMENTS = 1 << 20
"""Elements per chunk of the step without Triton; each element takes about 20 temporary bytes."""


class AdamW:
    """AdamW optimizer for the master weights of one parameter group.

    The step count is a scalar tensor on the device, because only the device knows whether a step
    with a non-finite gradient was skipped.
    """

    def __init__(
        self,
        master_weights: SplitBf16Master,
        gradients: GradientAccumulator,
        betas: tuple[float, float],
        use_8bit: bool = False,
    ) -> None:
        self._master_weights, self._gradients, self._betas = master_weights, gradients, betas
        num_elements, device = len(master_weights), master_weights.params_E.device
        self.exp_avg: OptimState
        self.exp_avg_sq: OptimState
        if use_8bit:
            self.exp_avg = OptimState8bit(num_elements, device, signed=True)
            self.exp_avg_sq = OptimState8bit(num_elements, device, signed=False)
        else:
            self.exp_avg, self.exp_avg_sq = (
                OptimState(num_elements, device),
                OptimState(num_elements, device),
            )
        self._num_steps = torch.zeros((), dtype=torch.float64, device=device)
        self._next_num_steps = self._num_steps.clone()

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
        """Update the master weights from the accumulated gradients.

        A step whose `grad_factor` is NaN is skipped and not counted. With the Triton kernel, the
        host does not synchronize with the device.

        Args:
            grad_factor: Scalar on the device that multiplies all gradients, for clipping and
                unscaling.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
        """
        hparams = AdamWHyperparams(lr, weight_decay, self._betas)
        tiles, states = self._gradients.tiles, (self.exp_avg, self.exp_avg_sq)
        gradients = self._gradients.per_parameter()
        if tiles is not None:
            step_counts = self._num_steps, self._next_num_steps
            optimizer_kernels.adamw_step(
                tiles, gradients, self._master_weights, states, grad_factor, step_counts, hparams
            )
            self._next_num_steps, self._num_steps = step_counts
            return
        if not grad_factor.isfinite():
            return
        self.num_steps += 1
        num_steps = self.num_steps
        for start in range(0, len(self._master_weights), MAX_CHUNK_ELEMENTS):
            self._step_chunk(
                slice(start, min(start + MAX_CHUNK_ELEMENTS, len(self._master_weights))),
                grad_factor,
                hparams,
                num_steps,
            )

    def _step_chunk(
        self, flat_slice: slice, grad_factor: Tensor, hparams: AdamWHyperparams, num_steps: int
    ) -> None:
        beta_1, beta_2 = hparams.betas
        grad_M = self._gradients.read_slice(flat_slice).mul_(grad_factor)
        exp_avg_M = self.exp_avg.read(flat_slice).lerp_(grad_M, 1 - beta_1)
        exp_avg_sq_M = self.exp_avg_sq.read(flat_slice).mul_(beta_2)
        exp_avg_sq_M.addcmul_(grad_M, grad_M, value=1 - beta_2)
        self.exp_avg.write(exp_avg_M, flat_slice)
        self.exp_avg_sq.write(exp_avg_sq_M, flat_slice)
        # The update uses the moments before rounding.
        denom_M = exp_avg_sq_M.sqrt().div_(hparams.bias_correction2_sqrt(num_steps)).add_(ADAM_EPS)
        master_M = self._master_weights.read(flat_slice).mul_(hparams.decay_factor)
        self._master_weights.write(
            master_M.addcdiv_(exp_avg_M, denom_M, value=-hparams.step_size(num_steps)), flat_slice
        )

    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return views of the AdamW moments of one parameter, for saving and loading checkpoints.

        The last tensor belongs to the second moment. It stays zero until the parameter receives a
        non-zero gradient, because a sum of squares cannot cancel.

        Args:
            flat_slice: Elements of the parameter in its group.
            shape: Shape of the parameter.
        """
        return {
            f"{name}{suffix}": tensor
            for name, state in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq))
            for suffix, tensor in state.state_tensors(flat_slice, shape).items()
        }
