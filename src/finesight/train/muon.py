"""Muon optimizer of weight matrices.

Muon (Jordan et al. 2024) orthogonalizes the momentum of matrices, because the few dominant
directions of a gradient hide rare ones.

Shapes: E flat elements of a parameter group, N matrices of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.fused_ops import has_tensor_cores
from finesight.train.optim_states import SplitBf16Master


class MatrixSlice(NamedTuple):
    """Elements of a matrix in the flat buffer of its parameter group, and its shape."""

    flat_slice: slice
    num_rows: int
    num_columns: int


MOMENTUM = 0.95
NUM_NS_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the Newton-Schulz polynomial, which maps singular values to about one."""

ADAMW_RMS = 0.2
"""Root mean square of a Muon update, chosen to match a typical AdamW update.

Both optimizers then work with similar learning rates (Liu et al. 2025, Muon is Scalable for LLM
Training, section 2.2).
"""


MAX_STACK_ELEMENTS = 1 << 26
"""Maximum number of elements of matrices that are orthogonalized in one batch; limits memory."""

MAX_MUON_CHUNK_ELEMENTS = 1 << 24
"""Maximum number of master weight elements that are updated at once; limits memory."""

MAX_GRAPH_ELEMENTS = 1 << 24
"""Maximum number of elements of a group whose update is captured as a CUDA graph.

Updates of small groups are launch-bound on the CPU. The graph holds the temporary memory of one
update.
"""


class Muon:
    """Muon optimizer for the matrices of one parameter group, with the momentum `momentum_E`.

    The length of an update depends only on the direction of the momentum, not on the gradient norm.

    Args:
        master_weights: fp32 master weights of the group.
        grad_E: Flat gradient buffer of the group.
        matrices: Locations and shapes of the matrices.
    """

    def __init__(
        self, master_weights: SplitBf16Master, grad_E: Tensor, matrices: Iterable[MatrixSlice]
    ) -> None:
        self.momentum_E = torch.zeros_like(grad_E)
        self._master_weights, self._grad_E = master_weights, grad_E
        slices_by_shape: dict[tuple[int, int], list[slice]] = {}
        for flat_slice, rows, columns in matrices:
            slices_by_shape.setdefault((rows, columns), []).append(flat_slice)
        # Create the views once: a hundred matrices are slow to view in every step.
        self.stacks: list[list[Tensor]] = []
        for shape, flat_slices in slices_by_shape.items():
            views = [grad_E[flat_slice].view(shape) for flat_slice in flat_slices]
            stack_size = max(1, MAX_STACK_ELEMENTS // (shape[0] * shape[1]))
            self.stacks += [views[n : n + stack_size] for n in range(0, len(views), stack_size)]
        # Static input of the CUDA graph.
        self._lerp_weight = torch.zeros((), device=grad_E.device)
        self.is_warmed_up = False
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, grad_factor: Tensor) -> None:
        """Update the master weights by the orthogonalized Nesterov momentum.

        A step whose `grad_factor` is NaN is skipped. The gradient buffer is overwritten. The host
        synchronizes with the device only to capture the CUDA graph of a small group.

        Args:
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
            grad_factor: Scalar on the device that multiplies all gradients, for clipping and
                unscaling.
        """
        is_nonfinite = grad_factor.isnan()
        self._grad_E.mul_(grad_factor).masked_fill_(is_nonfinite, 0.0)
        self._lerp_weight.fill_(1 - MOMENTUM).masked_fill_(is_nonfinite, 0.0)
        self._orthogonalize()
        decay_factor = torch.where(is_nonfinite, 1.0, 1 - lr * weight_decay)
        step_size = torch.where(is_nonfinite, 0.0, -lr)
        for start in range(0, len(self._master_weights), MAX_MUON_CHUNK_ELEMENTS):
            flat_slice = slice(start, start + MAX_MUON_CHUNK_ELEMENTS)
            master_N = self._master_weights.read(flat_slice).mul_(decay_factor)
            self._master_weights.write(
                master_N.addcmul_(self._grad_E[flat_slice], step_size), flat_slice
            )

    def _orthogonalize(self) -> None:
        """Compute the updates, as a CUDA graph for small groups on a GPU.

        The first call runs eagerly, and the second one captures the graph.
        """
        if (
            not self._grad_E.is_cuda
            or self._grad_E.numel() > MAX_GRAPH_ELEMENTS
            or not self.is_warmed_up
        ):
            self.is_warmed_up = True
            self._compute_updates()
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # Another thread may pin memory during the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._compute_updates()
            self.graph = graph
        self.graph.replay()

    def _compute_updates(self) -> None:
        """Replace the gradients in the buffer by the updates for a learning rate of one."""
        self.momentum_E.lerp_(self._grad_E, self._lerp_weight)
        self._grad_E.lerp_(self.momentum_E, MOMENTUM)
        for stack in self.stacks:
            update_NRC = newton_schulz(torch.stack(stack))
            update_NRC.mul_(ADAMW_RMS * max(update_NRC.shape[1:]) ** 0.5)
            torch._foreach_copy_(stack, update_NRC.unbind())


def newton_schulz(x_NRC: Tensor) -> Tensor:
    """Approximate the orthogonal factor U V^T of each matrix U S V^T by Newton-Schulz iteration.

    Singular values above a hundredth of the matrix norm are mapped to between 0.6 and 1.3. Zero
    matrices stay zero. The computation uses bf16 on GPUs with bf16 tensor cores.

    Returns:
        fp32 matrices [N, R, C].
    """
    is_wide = x_NRC.shape[1] <= x_NRC.shape[2]
    y = x_NRC if is_wide else x_NRC.mT
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-12)
    y = y.bfloat16() if has_tensor_cores(torch.bfloat16, y.device) else y
    for _ in range(NUM_NS_STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), y, beta=_A)
    return (y if is_wide else y.mT).float()
