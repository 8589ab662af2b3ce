"""Gradient accumulation and mixed-precision optimizers with fp32 master weights.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) updates a group with a fused kernel on a GPU with
Triton, and otherwise in chunks. Its bytes per trainable bf16 parameter are:

- 2 for the parameter.
- 2 for the residual of the fp32 master weight.
- 2 for the gradient, from the backward pass to the optimizer step; 4 with several micro-batches.
- 8 for the fp32 moments, or 2.03 for 8-bit moments.

An optimizer step reads and writes 26 bytes per parameter, or 14 bytes with 8-bit moments, plus 2
bytes for the gradient norm. A single micro-batch uses `parameter.grad` directly; several are
accumulated in fp32.

Shapes: E flat elements of a parameter group, M or N elements of a slice.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from finesight.config import TrainSettings
from finesight.errors import UserError, format_count
from finesight.host_memory import keep_out_of_forks
from finesight.model.kernels import adamw
from finesight.model.kernels.adamw import ADAM_EPS, BLOCK_SIZE
from finesight.model.kernels.runtime import HAS_TRITON
from finesight.model.trainable import (
    CONV_SUFFIX,
    EMBEDDING_SUFFIXES,
    MODEL_PARTS,
    ModelPart,
    get_part,
)
from finesight.setting_types import StepsOrFraction
from finesight.train.optim_states import (
    Muon,
    OptimState,
    OptimState8bit,
    SplitBf16Master,
    break_bf16_ties,
)

LARGE_PARAM_ELEMENTS = 1 << 20
"""Number of elements from which a parameter's gradient is accumulated by an autograd hook.

CUDA graphs write the gradients of these parameters to static buffers (`train.graph_buffers`).
"""


@dataclass(frozen=True)
class ParamSlice:
    """Parameter and its location in the flat buffer of its parameter group."""

    name: str
    parameter: nn.Parameter
    flat_slice: slice

    def view(self, flat_E: Tensor) -> Tensor:
        """Return the view of a flat group tensor [E] that belongs to this parameter."""
        return flat_E[self.flat_slice].view(self.parameter.shape)


class GradientAccumulator:
    """Gradient accumulator of one parameter group.

    The gradients of the first micro-batch stay in `parameter.grad` in the dtype of the parameter.
    `accumulate` adds them to fp32 sums before each further micro-batch. The sum of a parameter is
    allocated on first use and then retained. Once it exists, an autograd hook adds the gradient of
    a large parameter as soon as it is computed, so the gradients of all large parameters never
    exist in addition to their sums.

    Args:
        length: Number of elements of the flat buffers of the group, including padding.
    """

    def __init__(self, param_slices: Sequence[ParamSlice], length: int) -> None:
        self.param_slices = param_slices
        self.device = param_slices[0].parameter.device
        self._length = length
        self._flat_E: Tensor | None = None
        self.sums: list[Tensor | None] = [None] * len(param_slices)
        # Sums stay allocated. While this is False, they have gradients of an earlier step.
        self._has_sum = [False] * len(param_slices)
        self._small_indices: list[int] = []
        flat_slices: list[slice] = []
        small_slices: list[slice] = []
        for index, param_slice in enumerate(param_slices):
            flat_slices.append(param_slice.flat_slice)
            if param_slice.parameter.numel() < LARGE_PARAM_ELEMENTS:
                self._small_indices.append(index)
                small_slices.append(param_slice.flat_slice)
            else:
                self._register_hook(index)
        self.tiles: adamw.ParamTiles | None = None
        self._small_tiles: adamw.ParamTiles | None = None
        if HAS_TRITON and self.device.type == "cuda":
            self.tiles = adamw.ParamTiles(flat_slices, self.device)
            if small_slices:
                self._small_tiles = adamw.ParamTiles(small_slices, self.device)

    def _register_hook(self, index: int) -> None:
        parameter = self.param_slices[index].parameter
        register: Callable[..., object] = parameter.register_post_accumulate_grad_hook
        # A weak reference: the garbage collector cannot see hooks of a parameter.
        accumulator_ref = weakref.ref(self)

        def accumulate_hook(parameter: Tensor) -> None:
            accumulator = accumulator_ref()
            if accumulator is not None and accumulator.sums[index] is not None:
                accumulator._accumulate_one(index)

        register(accumulate_hook)

    def _accumulate_one(self, index: int) -> None:
        parameter = self.param_slices[index].parameter
        sum_ = self._get_sum(index)
        assert parameter.grad is not None, f"no gradient for {self.param_slices[index].name}"
        if self._has_sum[index]:
            sum_.add_(parameter.grad)
        else:
            sum_.copy_(parameter.grad)
        self._has_sum[index] = True
        parameter.grad = None

    def _get_sum(self, index: int) -> Tensor:
        sum_ = self.sums[index]
        if sum_ is None:
            parameter = self.param_slices[index].parameter
            sum_ = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            self.sums[index] = sum_
        return sum_

    @property
    def flat_sums(self) -> Tensor | None:
        """Flat tensor of the fp32 sums; None before `use_flat_buffer`."""
        return self._flat_E

    def use_flat_buffer(self) -> None:
        """Store the fp32 gradient sums in one flat tensor, even for one micro-batch.

        `flat_gradient` and `all_reduce` require it.
        """
        if self._flat_E is not None:
            return
        self._flat_E = torch.zeros(self._length, dtype=torch.float32, device=self.device)
        self.sums = [param_slice.view(self._flat_E) for param_slice in self.param_slices]

    @torch.no_grad()
    def flat_gradient(self) -> Tensor:
        """Return the accumulated gradients of the group as a flat fp32 tensor [E].

        Parameters without a gradient contain zeros. Every call returns the same tensor, and the
        caller may overwrite it.
        """
        assert self._flat_E is not None, f"{len(self.param_slices)} sums are not in a flat buffer"
        self.accumulate()
        for sum_, has_sum in zip(self.sums, self._has_sum, strict=True):
            if sum_ is not None and not has_sum:
                sum_.zero_()
        return self._flat_E

    @torch.no_grad()
    def all_reduce(self, reduce_fn: Callable[[Tensor], object]) -> None:
        """Reduce the flat gradient of the group over all ranks; requires `use_flat_buffer`.

        Args:
            reduce_fn: Function that reduces a tensor over all ranks in-place.
        """
        reduce_fn(self.flat_gradient())
        self._has_sum = [True] * len(self.param_slices)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients in `parameter.grad` to the fp32 sums, and clear them.

        Call this between two micro-batches. Otherwise, autograd adds the next gradient in 16 bits.
        """
        small_grads = [self.param_slices[n].parameter.grad for n in self._small_indices]
        if self._small_tiles is not None and any(grad is not None for grad in small_grads):
            adamw.accumulate_gradients(
                self._small_tiles,
                small_grads,
                [self._get_sum(n) for n in self._small_indices],
                [self._has_sum[n] for n in self._small_indices],
            )
            for index, grad in zip(self._small_indices, small_grads, strict=True):
                self._has_sum[index] |= grad is not None
                self.param_slices[index].parameter.grad = None
        for index, param_slice in enumerate(self.param_slices):
            if param_slice.parameter.grad is not None:
                self._accumulate_one(index)

    def per_parameter(self) -> Sequence[Tensor | None]:
        """Return the gradient of each parameter; None for a parameter without a gradient."""
        if self._flat_E is None and not any(self._has_sum):
            return [param_slice.parameter.grad for param_slice in self.param_slices]
        self.accumulate()
        gradients: list[Tensor | None] = []
        for sum_, has_sum in zip(self.sums, self._has_sum, strict=True):
            gradients.append(sum_ if has_sum else None)
        return gradients

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of all gradients.

        The result is a scalar on the device, in fp32 or wider.
        """
        all_gradients = self.per_parameter()
        present = [gradient for gradient in all_gradients if gradient is not None]
        if not present:
            return torch.zeros((), device=self.device)
        if self.tiles is not None:
            return adamw.squared_norm(self.tiles, all_gradients)
        norm_dtype = torch.promote_types(present[0].dtype, torch.float32)
        norms = torch._foreach_norm(present, 2, norm_dtype)
        return torch.stack(norms).square_().sum()

    def read_slice(self, flat_slice: slice) -> Tensor:
        """Copy a slice of the group's flattened gradients to fp32.

        Parameters without a gradient contribute zeros. Returns a tensor of shape [N].
        """
        first = flat_slice.start
        end = flat_slice.stop
        flat_N = torch.zeros(end - first, dtype=torch.float32, device=self.device)
        for param_slice, gradient in zip(self.param_slices, self.per_parameter(), strict=True):
            param_range = param_slice.flat_slice
            start = max(param_range.start, first)
            stop = min(param_range.stop, end)
            if start < stop and gradient is not None:
                own_slice = slice(start - param_range.start, stop - param_range.start)
                flat_N[start - first : stop - first] = gradient.view(-1)[own_slice]
        return flat_N

    def zero_grad(self) -> None:
        """Clear the gradients after an optimizer step; the allocated sums are retained."""
        self._has_sum = [False] * len(self.param_slices)
        for param_slice in self.param_slices:
            param_slice.parameter.grad = None

    def release(self) -> None:
        """Clear the gradients of an aborted step and free the fp32 sums.

        A retry of the step then has the same memory available as the first attempt.
        """
        self.zero_grad()
        if self._flat_E is None:
            self.sums = [None] * len(self.param_slices)


class Optimizer(Protocol):
    """Optimizer of one parameter group. A plan creates it on the meta device."""

    num_steps: int
    """Number of applied steps; 0 if the update does not depend on it."""

    def step(self, grad_factor: Tensor, lr: float, weight_decay: float) -> None:
        """Update the master weights from the accumulated gradients.

        Args:
            grad_factor: Scalar on the device that multiplies all gradients, for clipping and
                unscaling; NaN skips the step.
        """
        ...

    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return views of the state of the parameter in a slice of the group, for checkpoints.

        The last tensor stays zero until the parameter receives a non-zero gradient.
        """
        ...

    def workspace_bytes(self, is_cuda: bool) -> int:
        """Return the temporary bytes of a step."""
        ...

    def traffic_bytes(self, is_cuda: bool) -> int:
        """Return the bytes of memory traffic of a step, with gradient norm and clipping."""
        ...


MAX_CHUNK_ELEMENTS = 1 << 20
"""Elements per chunk of the AdamW step without Triton."""

STEP_BYTES_PER_ELEMENT = 20
"""Temporary bytes per element of a chunk."""

ADAMW_TRAFFIC_BYTES = {False: {False: 60, True: 28}, True: {False: 270, True: 29}}
"""Bytes of memory traffic per element of an AdamW step, by use of 8-bit moments and of the kernel.

With 8-bit moments, the kernel moves 16 bytes, but takes as long as this value.
"""


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
        self._master_weights = master_weights
        self._gradients = gradients
        self._betas = betas
        self._use_8bit = use_8bit
        num_elements = len(master_weights)
        device = master_weights.params_E.device
        self.exp_avg: OptimState
        self.exp_avg_sq: OptimState
        if use_8bit:
            self.exp_avg = OptimState8bit(num_elements, device, signed=True)
            self.exp_avg_sq = OptimState8bit(num_elements, device, signed=False)
        else:
            self.exp_avg = OptimState(num_elements, device)
            self.exp_avg_sq = OptimState(num_elements, device)
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
        """Update the master weights; see `Optimizer.step`.

        A skipped step is not counted. With the Triton kernel, the host does not synchronize with
        the device.
        """
        decay_factor = 1 - lr * weight_decay
        tiles = self._gradients.tiles
        master = self._master_weights
        gradients = self._gradients.per_parameter()
        if tiles is not None:
            adamw.adamw_step(
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
            grad_M = self._gradients.read_slice(flat_slice).mul_(grad_factor)
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
        return STEP_BYTES_PER_ELEMENT * min(len(self._master_weights), MAX_CHUNK_ELEMENTS)

    def traffic_bytes(self, is_cuda: bool) -> int:
        """Return the bytes of memory traffic of a step."""
        return ADAMW_TRAFFIC_BYTES[self._use_8bit][is_cuda] * len(self._master_weights)


_ALIGNMENT = 64
"""Alignment of the parameters in a flat buffer, in elements; 128 bytes in bf16."""


class ParamGroup:
    """Parameters of one model part with the same learning rate and weight decay.

    The parameters become views of one flat tensor, which `master_weights` extends to fp32. Each
    parameter starts at a multiple of `alignment` elements.
    """

    optimizer: Optimizer

    def __init__(
        self,
        part: ModelPart,
        weight_decay: float,
        lr: float,
        named_params: Mapping[str, nn.Parameter],
        alignment: int = _ALIGNMENT,
    ) -> None:
        self.part = part
        self.weight_decay = weight_decay
        self.lr = lr
        self.param_slices: list[ParamSlice] = []
        end = 0
        for name, parameter in named_params.items():
            flat_slice = slice(end, end + parameter.numel())
            self.param_slices.append(ParamSlice(name, parameter, flat_slice))
            end += -(-parameter.numel() // alignment) * alignment
        first = self.param_slices[0].parameter
        dtypes_and_devices = {(p.dtype, p.device) for p in named_params.values()}
        assert len(dtypes_and_devices) == 1, (
            f"parameters of {part} differ in type or device: {dtypes_and_devices}"
        )
        params_E = torch.zeros(end, dtype=first.dtype, device=first.device)
        for param_slice in self.param_slices:
            param_slice.view(params_E).copy_(param_slice.parameter.detach())
            param_slice.parameter.data = param_slice.view(params_E)
        self.master_weights = SplitBf16Master(params_E)
        self.gradients = GradientAccumulator(self.param_slices, end)

    def create_optimizer(
        self, train: TrainSettings, stacked_rows: Mapping[str, Sequence[int]]
    ) -> None:
        """Create the optimizer of the group from the training settings.

        Muon and 8-bit moments apply to groups of weight matrices. Other groups use AdamW with fp32
        moments.

        Args:
            stacked_rows: Number of rows of each matrix in stacked parameters, by parameter name.
        """
        is_matmul = all(_is_matmul_weight(one.name, one.parameter) for one in self.param_slices)
        if train.optimizer == "muon" and is_matmul:
            self.gradients.use_flat_buffer()
            grad_E = self.gradients.flat_gradient()
            matrices: list[Tensor] = []
            for param_slice in self.param_slices:
                gradient = param_slice.view(grad_E)
                # Stacked MoE experts are several matrices.
                row_counts = stacked_rows.get(param_slice.name, (gradient.shape[-2],))
                num_copies = gradient.numel() // gradient.shape[-1] // sum(row_counts)
                matrices += torch.split(gradient.flatten(0, -2), [*row_counts] * num_copies)
            self.optimizer = Muon(self.master_weights, self.gradients.flat_gradient, matrices)
        else:
            use_8bit = train.optimizer == "adamw_8bit" and is_matmul
            self.optimizer = AdamW(self.master_weights, self.gradients, train.betas, use_8bit)

    def state_tensors(self, param_slice: ParamSlice) -> dict[str, Tensor]:
        """Return views of the optimizer state of one parameter, by state name."""
        return self.optimizer.state_tensors(param_slice.flat_slice, param_slice.parameter.shape)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer state, with the padding between parameters."""
        length = len(self.master_weights)
        state = self.optimizer.state_tensors(slice(0, length), torch.Size([length]))
        return sum(tensor.nbytes for tensor in state.values())


class LazyTensors(Mapping[str, Tensor]):
    """Mapping from names to tensors, which functions compute or read on each access."""

    def __init__(self, load_fns: Mapping[str, Callable[[], Tensor]]) -> None:
        self._load_fns = load_fns

    def __getitem__(self, name: str) -> Tensor:
        return self._load_fns[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._load_fns)

    def __len__(self) -> int:
        return len(self._load_fns)


class MasterWeightOptimizer:
    """Optimizer of all trainable parameters, with fp32 master weights.

    The parameters of each group become views of one flat tensor. Call `accumulate_gradients`
    between two micro-batches of a step.
    """

    def __init__(
        self,
        trainable_params: Mapping[str, nn.Parameter],
        train: TrainSettings,
        stacked_rows: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Create the parameter groups and their optimizers.

        Args:
            trainable_params: Trainable parameters by native name.
            stacked_rows: Number of rows of each matrix in stacked parameters, by parameter name.
        """
        self.param_groups = list(_build_param_groups(trainable_params, train))
        for group in self.param_groups:
            group.create_optimizer(train, stacked_rows or {})
        self.max_grad_norm = train.max_grad_norm
        self.num_params = sum(parameter.numel() for parameter in trainable_params.values())

    def use_flat_gradients(self) -> None:
        """Store the gradients of each group in one fp32 tensor, for all-reduce."""
        for group in self.param_groups:
            group.gradients.use_flat_buffer()

    def keep_out_of_forks(self) -> None:
        """Keep weights and states in CPU memory out of data loader workers, which are forks."""
        for group in self.param_groups:
            first = group.param_slices[0]
            # States of one parameter are views, so their storage is that of the whole group.
            states = group.optimizer.state_tensors(first.flat_slice, first.parameter.shape)
            master_weights = group.master_weights
            tensors = [
                master_weights.params_E,
                master_weights.residual_E,
                group.gradients.flat_sums,
            ]
            for tensor in (*tensors, *states.values()):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    keep_out_of_forks(self, storage.data_ptr(), storage.nbytes())

    def accumulate_gradients(self) -> None:
        """Add the gradients of a micro-batch to fp32 sums before the next micro-batch."""
        for group in self.param_groups:
            group.gradients.accumulate()

    def grad_norm(self) -> Tensor:
        """Return the Euclidean norm of all gradients, an fp32 scalar on the device."""
        device = self.param_groups[0].gradients.device
        squares = [group.gradients.squared_norm().to(device) for group in self.param_groups]
        return torch.stack(squares).sum().sqrt().float()

    def step(self, lr_factor: float, grad_norm: Tensor, loss_scale: float = 1.0) -> None:
        """Apply one optimizer step and clear the gradients, without synchronizing with the device.

        The device skips a step with a non-finite gradient norm.

        Args:
            lr_factor: Factor of the learning rate schedule.
            grad_norm: Result of `grad_norm`, before unscaling.
            loss_scale: Loss scale in fp16; the gradients are divided by it before clipping.
        """
        grad_factor = torch.full_like(grad_norm, 1 / loss_scale)
        grad_factor.masked_fill_(~grad_norm.isfinite(), math.nan)
        if self.max_grad_norm is not None:
            # The epsilon avoids division by zero.
            norm_ratio = self.max_grad_norm / (grad_norm / loss_scale + 1e-6)
            grad_factor = grad_factor * norm_ratio.clamp(max=1.0)
        for group in self.param_groups:
            factor = grad_factor.to(group.gradients.device)
            group.optimizer.step(factor, group.lr * lr_factor, group.weight_decay)
            group.gradients.zero_grad()

    def zero_grad(self) -> None:
        """Discard all gradients of an aborted step and free the fp32 sums."""
        for group in self.param_groups:
            group.gradients.release()

    def learning_rates(self, lr_factor: float) -> dict[str, float]:
        """Return the current learning rate of each trainable part."""
        return {group.part: group.lr * lr_factor for group in self.param_groups}

    def master_weights(self, break_ties: bool = False) -> LazyTensors:
        """Return the fp32 master weights by native name, which are computed on access.

        Args:
            break_ties: Whether the values round to the bf16 parameters under round-half-to-even,
                the rounding of PyTorch and other libraries. They differ in the last bit of values
                halfway between two bf16 values.
        """

        def read(group: ParamGroup, param_slice: ParamSlice) -> Tensor:
            weight_E = group.master_weights.read(param_slice.flat_slice)
            if break_ties and group.master_weights.params_E.dtype == torch.bfloat16:
                weight_E = break_bf16_ties(weight_E)
            return weight_E.view(param_slice.parameter.shape)

        read_fns: dict[str, Callable[[], Tensor]] = {}
        for group in self.param_groups:
            for param_slice in group.param_slices:
                read_fns[param_slice.name] = partial(read, group, param_slice)
        return LazyTensors(read_fns)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer state as tensors, for a checkpoint.

        Keys:

        - `num_steps`: step count of AdamW.
        - `exp_avg.NAME`, `exp_avg_sq.NAME`: AdamW moments.
        - `exp_avg_scale.NAME`, `exp_avg_sq_scale.NAME`: scales of 8-bit moments.
        - `momentum.NAME`: Muon momentum.
        """
        num_steps = max(group.optimizer.num_steps for group in self.param_groups)
        tensors = {"num_steps": torch.tensor(float(num_steps))}
        for group in self.param_groups:
            for param_slice in group.param_slices:
                for state_name, tensor in group.state_tensors(param_slice).items():
                    tensors[f"{state_name}.{param_slice.name}"] = tensor
        return tensors

    def params_with_grad(self) -> set[str]:
        """Return the names of the parameters that have ever received a non-zero gradient."""
        nonzero_flags: dict[str, Tensor] = {}
        for group in self.param_groups:
            for param_slice in group.param_slices:
                *_, last = group.state_tensors(param_slice).values()
                nonzero_flags[param_slice.name] = last.any()
        flags = torch.stack(list(nonzero_flags.values())).tolist()
        return {name for name, flag in zip(nonzero_flags, flags, strict=True) if flag}

    @torch.no_grad()
    def load_state(
        self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]
    ) -> None:
        """Restore master weights and optimizer state from a checkpoint.

        Args:
            weights: Tensors as returned by `master_weights`.
            optimizer_state: Tensors as returned by `optimizer_state`.
        """
        differing = sorted(set(self.master_weights()) ^ set(weights))
        assert not differing, f"{len(differing)} parameters differ, the first is {differing[0]}"
        for group in self.param_groups:
            group.optimizer.num_steps = int(optimizer_state["num_steps"])
            for param_slice in group.param_slices:
                # The weights may be read on access, so they have no name that keeps them.
                group.master_weights.load(
                    weights[param_slice.name].flatten(), param_slice.flat_slice
                )
                for state_name, tensor in group.state_tensors(param_slice).items():
                    tensor.copy_(optimizer_state[f"{state_name}.{param_slice.name}"])


def _build_param_groups(
    trainable_params: Mapping[str, nn.Parameter], train: TrainSettings
) -> Iterator[ParamGroup]:
    """Group parameters by model part and dtype, and into matrices, embeddings and vectors.

    Vectors, such as biases and norm weights, have no weight decay.
    """
    alignment = BLOCK_SIZE if train.optimizer == "adamw_8bit" else _ALIGNMENT
    learning_rates = train.learning_rate.model_dump(exclude_none=True)
    for part in MODEL_PARTS:
        lr = learning_rates.get(part, train.learning_rate.default)
        matrices: dict[str, nn.Parameter] = {}
        embeddings: dict[str, nn.Parameter] = {}
        vectors: dict[str, nn.Parameter] = {}
        for name, parameter in trainable_params.items():
            if get_part(name) != part:
                continue
            if _is_matmul_weight(name, parameter):
                matrices[name] = parameter
            elif parameter.dim() <= 1:
                vectors[name] = parameter
            else:
                embeddings[name] = parameter
        for named_params, weight_decay in (
            (matrices, train.weight_decay),
            (embeddings, train.weight_decay),
            (vectors, 0.0),
        ):
            for same_dtype in _group_by_dtype(named_params):
                yield ParamGroup(part, weight_decay, lr, same_dtype, alignment)


def _group_by_dtype(named_params: Mapping[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """Group parameters by dtype, in the order of first occurrence."""
    groups: dict[torch.dtype, dict[str, nn.Parameter]] = {}
    for name, parameter in named_params.items():
        groups.setdefault(parameter.dtype, {})[name] = parameter
    return list(groups.values())


def _is_matmul_weight(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix or stack of matrices, excluding lookup tables."""
    is_lookup = get_part(name) == "embeddings" or name.endswith((*EMBEDDING_SUFFIXES, CONV_SUFFIX))
    return parameter.dim() in (2, 3) and not is_lookup


class LossScaler:
    """Dynamic loss scaler for fp16.

    The scale is halved after an overflow, and doubled after `GROWTH_INTERVAL` steps without one. It
    is 1 in other precisions.
    """

    INIT_SCALE = 2.0**15
    MIN_SCALE = 1.0
    GROWTH_INTERVAL = 1000

    def __init__(self, is_enabled: bool) -> None:
        self.is_enabled = is_enabled
        self.scale = self.INIT_SCALE if is_enabled else 1.0
        self.growth_tracker = 0
        self.num_skipped = 0

    def update(self, grad_norm: float) -> bool:
        """Update the loss scale after the backward pass of a step.

        Args:
            grad_norm: Gradient norm of the step, non-finite after an overflow.

        Returns:
            False if the step overflowed because of the scale and must be skipped.
        """
        if math.isfinite(grad_norm):
            self.growth_tracker += 1
            if self.is_enabled and self.growth_tracker >= self.GROWTH_INTERVAL:
                self.scale *= 2
                self.growth_tracker = 0
            return True
        if not self.is_enabled or self.scale <= self.MIN_SCALE:
            return True
        self.scale /= 2
        self.growth_tracker = 0
        self.num_skipped += 1
        return False

    def state_dict(self) -> dict[str, float]:
        """Return the state of the scaler for a checkpoint."""
        return {
            "scale": self.scale,
            "growth_tracker": self.growth_tracker,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Restore the state that `state_dict` returned."""
        self.scale = float(state_dict["scale"])
        self.growth_tracker = int(state_dict["growth_tracker"])
        self.num_skipped = int(state_dict["num_skipped"])


def resolve_steps(value: StepsOrFraction, total_steps: int) -> int:
    """Convert a number of steps or a fraction of the run to steps, rounded up."""
    if isinstance(value, int):
        return value
    return math.ceil(value * total_steps)


class LRSchedule:
    """Learning rate schedule: linear warmup, then cosine, linear or no decay.

    The factor is positive in every step, including the first and the last one.

    Raises:
        UserError: The warmup is not shorter than the run.
    """

    def __init__(self, train: TrainSettings, total_steps: int) -> None:
        self.kind = train.lr_schedule
        self.total_steps = total_steps
        self.warmup_steps = resolve_steps(train.warmup, total_steps)
        if self.warmup_steps >= total_steps and self.warmup_steps > 1:
            few = "no warmup (0)"
            if total_steps > 1:
                few = f"fewer than {total_steps} steps"
            raise UserError(
                f"{self.warmup_steps} warmup steps in a run of {format_count(total_steps, 'step')}",
                where="train.warmup",
                expected=f"{few}, or a fraction of the run such as 0.03",
                remedy="lower train.warmup or train for more steps",
            )

    def lr_factor(self, step: int) -> float:
        """Return the factor in (0, 1] that multiplies the learning rates in a step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind == "linear":
            return 1 - progress
        return 1.0
