"""Storage of fp32 master weights and of AdamW moments, and the Muon optimizer of matrices.

A bf16 parameter is the upper half of the bits of an fp32 value, rounded to nearest. The residual is
the lower half. Together they restore the fp32 value exactly: the highest bit of the residual
encodes whether the upper half was rounded up. Moments are stored in fp32, or block-wise quantized
to 8 bits (Dettmers et al. 2022, arXiv:2110.02861).

Muon (Jordan et al. 2024) orthogonalizes the momentum of matrices, because the few dominant
directions of a gradient hide rare ones.

Shapes: E flat elements of a parameter group, N elements of a slice, M elements of a slice of
complete blocks, B = E / 256 blocks of N = 256 elements. Muon: N matrices of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from finesight.model.cuda_graph_cache import CudaGraphCache
from finesight.model.fused_ops import has_tensor_cores
from finesight.model.kernels.adamw import BLOCK_SIZE


class SplitBf16Master:
    """fp32 master weights of a parameter group, split into model parameters and a residual.

    Halfway values round away from zero, because rounding to even could not be inverted.

    Attributes:
        params_E: Flat model parameters.
        residual_E: Lower half of the fp32 bits for bf16 parameters, the full fp32 values for fp16,
            and None for fp32.
    """

    def __init__(self, params_E: Tensor) -> None:
        self.params_E = params_E
        self.residual_E: Tensor | None = None
        if params_E.dtype == torch.bfloat16:
            self.residual_E = torch.zeros_like(params_E, dtype=torch.int16)
        elif params_E.dtype != torch.float32:
            self.residual_E = params_E.float()

    def __len__(self) -> int:
        return len(self.params_E)

    def read(self, flat_slice: slice) -> Tensor:
        """Return a slice of the fp32 values [N]; pass it to `write` after changing it.

        The slice may be a view or a copy of the storage.
        """
        params_N = self.params_E[flat_slice]
        if self.residual_E is None:
            return params_N
        residual_N = self.residual_E[flat_slice]
        if residual_N.dtype == torch.int16:
            return merge_fp32(params_N, residual_N)
        return residual_N

    def write(self, master_N: Tensor, flat_slice: slice) -> None:
        """Store a slice of fp32 values that `read` returned and the caller changed."""
        if self.residual_E is None:
            return
        params_N = self.params_E[flat_slice]
        residual_N = self.residual_E[flat_slice]
        if residual_N.dtype == torch.int16:
            split_fp32(master_N, params_N, residual_N)
        else:
            params_N.copy_(master_N)

    def load(self, master_N: Tensor, flat_slice: slice) -> None:
        """Overwrite a slice with fp32 values from any tensor, such as those of a checkpoint."""
        own_N = self.read(flat_slice)
        own_N.copy_(master_N)
        self.write(own_N, flat_slice)


def merge_fp32(params_N: Tensor, residual_N: Tensor) -> Tensor:
    """Restore fp32 values from bf16 values and residuals; the inverse of `split_fp32`."""
    bits_N = params_N.view(torch.int16).int().bitwise_left_shift_(16)
    return bits_N.add_(residual_N).view(torch.float32)


def split_fp32(master_N: Tensor, params_N: Tensor, residual_N: Tensor) -> None:
    """Split fp32 values into bf16 values, rounded to nearest, and 16-bit residuals.

    Args:
        master_N: fp32 values.
        params_N: Output for the bf16 values.
        residual_N: Output for the lower half of the bits, as int16.
    """
    bits_N = master_N.view(torch.int32)
    residual_N.copy_(bits_N)
    # Integer addition of the bits carries into the exponent.
    upper_N = bits_N.add(1 << 15).bitwise_right_shift_(16)
    params_N.view(torch.int16).copy_(upper_N)


def break_bf16_ties(values: Tensor) -> Tensor:
    """Increase the magnitude of fp32 values halfway between two bf16 values by their last bit.

    Round-half-to-even, the rounding of PyTorch, then gives the same bf16 values as `split_fp32`.
    """
    bits = values.view(torch.int32)
    is_tie = bits.bitwise_and(0xFFFF).eq_(1 << 15)
    return bits.add(is_tie).view(torch.float32)


NUM_DECADES = 7
"""Number of powers of ten below one that the 8-bit levels cover."""


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


class OptimState8bit(OptimState):
    """AdamW moment of a parameter group in 8 bits, with one scale per block.

    The scale of a block is its largest magnitude. Each byte selects one of 256 levels between zero
    and the scale, or between minus and plus the scale if `signed`.
    """

    scale_B: Tensor

    def __init__(self, num_elements: int, device: torch.device, signed: bool) -> None:
        assert num_elements % BLOCK_SIZE == 0, (
            f"{num_elements} elements are not a multiple of the block size"
        )
        self.signed = signed
        levels = create_dynamic_map(signed)
        self._levels = levels.to(device)
        self._boundaries = (self._levels[1:] + self._levels[:-1]) / 2
        if not signed:
            # Non-zero values never round to zero, because the update divides by them.
            self._boundaries[0] = 0.0
        zero = int((levels == 0).nonzero())
        self.values_E = torch.full((num_elements,), zero, dtype=torch.uint8, device=device)
        self.scale_B = torch.zeros(num_elements // BLOCK_SIZE, device=device)

    def read(self, flat_slice: slice) -> Tensor:
        """Dequantize a slice of complete blocks to fp32 [M]."""
        values_M = self._levels.index_select(0, self.values_E[flat_slice].int())
        values_M.view(-1, BLOCK_SIZE).mul_(self.scale_B[_block_slice(flat_slice), None])
        return values_M

    def write(self, values_M: Tensor, flat_slice: slice) -> None:
        """Quantize a slice of complete blocks to the nearest levels."""
        values_BN = values_M.view(-1, BLOCK_SIZE)
        scale_B1 = values_BN.abs().amax(1, keepdim=True)
        # Avoid division by the scale of a zero block.
        scaled_BN = values_BN / scale_B1.clamp(min=torch.finfo(torch.float32).tiny)
        codes_BN = torch.bucketize(scaled_BN, self._boundaries, out_int32=True)
        self.values_E[flat_slice].view(-1, BLOCK_SIZE).copy_(codes_BN)
        self.scale_B[_block_slice(flat_slice)].copy_(scale_B1.squeeze(1))

    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return views of the 8-bit codes and scales of one parameter's blocks, by key suffix."""
        blocks = _block_slice(flat_slice)
        codes = self.values_E[blocks.start * BLOCK_SIZE : blocks.stop * BLOCK_SIZE]
        return {"": codes, "_scale": self.scale_B[blocks]}


def _block_slice(flat_slice: slice) -> slice:
    """Return the slice of the blocks that contain a slice of elements."""
    return slice(flat_slice.start // BLOCK_SIZE, -(-flat_slice.stop // BLOCK_SIZE))


@lru_cache
def create_dynamic_map(signed: bool) -> Tensor:
    """Create the 256 ascending levels of dynamic tree quantization (section 1.3 of the paper).

    Each power of ten below one has two times as many evenly spaced levels as the next smaller one.
    Zero and one are levels as well.
    """
    levels: list[Tensor] = [torch.zeros(1), torch.ones(1)]
    for decade in range(NUM_DECADES):
        num_levels = 2**decade
        if not signed:
            num_levels *= 2
        edges = torch.linspace(0.1, 1.0, num_levels + 1)
        midpoints = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade + 1 - NUM_DECADES)
        levels.append(midpoints)
        if signed:
            levels.append(-midpoints)
    return torch.cat(levels).sort().values


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
        read_gradient: Function that accumulates the gradients of the group in a flat tensor [E],
            which is the same in every call.
        matrices: Views of the matrices in this tensor.
    """

    num_steps = 0
    """Not counted: the update has no bias correction."""

    def __init__(
        self,
        master_weights: SplitBf16Master,
        read_gradient: Callable[[], Tensor],
        matrices: Iterable[Tensor],
    ) -> None:
        grad_E = read_gradient()
        self._read_gradient = read_gradient
        self.momentum_E = torch.zeros_like(grad_E)
        self._master_weights = master_weights
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
        self._read_gradient()
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
        for start in range(0, len(self._master_weights), MAX_MUON_CHUNK_ELEMENTS):
            flat_slice = slice(start, start + MAX_MUON_CHUNK_ELEMENTS)
            master_N = self._master_weights.read(flat_slice).mul_(decay_factor)
            master_N.addcmul_(self._grad_E[flat_slice], step_size)
            self._master_weights.write(master_N, flat_slice)

    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return a view of the momentum of one parameter."""
        return {"momentum": self.momentum_E[flat_slice].view(shape)}

    def workspace_bytes(self, is_cuda: bool) -> int:
        """Return the temporary bytes of a step: three copies of the largest stack."""
        return 3 * torch.float32.itemsize * min(len(self._master_weights), MAX_STACK_ELEMENTS)

    def traffic_bytes(self, is_cuda: bool) -> int:
        """Return the bytes of memory traffic of a step, 80 per element."""
        return 80 * len(self._master_weights)

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
