"""Muon (Jordan et al. 2024): steps along the orthogonalized momentum of matrices.

The few dominant directions of a gradient hide rare ones. Orthogonalization gives all the same
length.

Shapes: E flat elements of a parameter group, N matrices of R rows and C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finesight.components import NoSettings
from finesight.model.cuda_graph_cache import CudaGraphCache
from finesight.model.fused_ops import has_tensor_cores
from finesight.settings.config import TrainSettings
from finesight.train.master_weight_optimizer import Optimizer, ParamGroup

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

MAX_CHUNK_ELEMENTS = 1 << 24
"""Maximum number of master weight elements that are updated at once; limits memory."""

MAX_GRAPH_ELEMENTS = 1 << 24
"""Maximum number of elements of a group whose update is captured as a CUDA graph.

Updates of small groups are launch-bound on the CPU. The graph holds the temporary memory of one
update.
"""


class Muon(Optimizer[NoSettings]):
    """Muon optimizer for the matrices of one parameter group, with the momentum `momentum_E`.

    The length of an update depends only on the direction of the momentum, not on the gradient norm.
    """

    def __init__(self, group: ParamGroup, settings: NoSettings, train: TrainSettings) -> None:
        super().__init__(group, settings, train)
        self.gradients.use_flat_buffer()
        grad_E = self.gradients.flat_gradient()
        matrices: list[Tensor] = []
        for param_slice in group.param_slices:
            matrices += param_slice.split_matrices(grad_E)
        self.momentum_E = torch.zeros_like(grad_E)
        self._grad_E = grad_E
        views_by_shape: dict[torch.Size, list[Tensor]] = {}
        for view in matrices:
            views_by_shape.setdefault(view.shape, []).append(view)
        # Store the views: a hundred matrices are slow to view in every step.
        self.stacks: list[list[Tensor]] = []
        for shape, views in views_by_shape.items():
            stack_size = max(1, MAX_STACK_ELEMENTS // shape.numel())
            for start in range(0, len(views), stack_size):
                self.stacks.append(views[start : start + stack_size])
        # Static input of the CUDA graph.
        self._lerp_weight = torch.zeros((), device=grad_E.device)
        self.graphs: CudaGraphCache | None = None
        if grad_E.is_cuda and grad_E.numel() <= MAX_GRAPH_ELEMENTS:
            self.graphs = CudaGraphCache(grad_E.device)

    @torch.no_grad()
    def step(self, grad_factor: Tensor, lr: float, weight_decay: float) -> None:
        """Update the master weights by the orthogonalized Nesterov momentum.

        The gradient buffer is overwritten. The first step of a small group runs eagerly, and the
        second one captures its CUDA graph. The host synchronizes with the device only for that.
        """
        self.gradients.flat_gradient()
        is_nonfinite = grad_factor.isnan()
        self._grad_E.mul_(grad_factor).masked_fill_(is_nonfinite, 0.0)
        self._lerp_weight.fill_(1 - MOMENTUM).masked_fill_(is_nonfinite, 0.0)
        if self.graphs is None:
            self._compute_updates()
        else:
            if not self.graphs.contains(0):
                # A capture cannot allocate memory that PyTorch has cached.
                torch.cuda.empty_cache()
            self.graphs.run(0, self._compute_updates)
        decay_factor = torch.where(is_nonfinite, 1.0, 1 - lr * weight_decay)
        step_size = torch.where(is_nonfinite, 0.0, -lr)
        for start in range(0, len(self.master_weights), MAX_CHUNK_ELEMENTS):
            flat_slice = slice(start, start + MAX_CHUNK_ELEMENTS)
            master_N = self.master_weights.read(flat_slice).mul_(decay_factor)
            master_N.addcmul_(self._grad_E[flat_slice], step_size)
            self.master_weights.write(master_N, flat_slice)

    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return a view of the momentum of one parameter."""
        return {"momentum": self.momentum_E[flat_slice].view(shape)}

    def workspace_bytes(self, is_cuda: bool) -> int:
        """Return the temporary bytes of a step: three copies of the largest stack."""
        return 3 * torch.float32.itemsize * min(len(self.master_weights), MAX_STACK_ELEMENTS)

    def traffic_bytes(self, is_cuda: bool) -> int:
        """Return the bytes of memory traffic of a step, 80 per element."""
        return 80 * len(self.master_weights)

    def _compute_updates(self) -> Tensor:
        """Replace the gradients in the buffer by the updates for a learning rate of one."""
        self.momentum_E.lerp_(self._grad_E, self._lerp_weight)
        self._grad_E.lerp_(self.momentum_E, MOMENTUM)
        for stack in self.stacks:
            update_NRC = newton_schulz(torch.stack(stack))
            update_NRC.mul_(ADAMW_RMS * max(update_NRC.shape[1:]) ** 0.5)
            torch._foreach_copy_(stack, update_NRC.unbind())
        return self._grad_E


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
    if has_tensor_cores(torch.bfloat16, y.device):
        y = y.bfloat16()
    for _ in range(NUM_NS_STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), y, beta=_A)
    if not is_wide:
        y = y.mT
    return y.float()
