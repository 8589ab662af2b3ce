"""Optimizer of all trainable parameters, with fp32 master weights and gradient accumulation.

Each parameter group has an optimizer of its own (`train.optim`). The bytes per trainable bf16
parameter are, beside its state:

- 2 for the parameter.
- 2 for the residual of the fp32 master weight.
- 2 for the gradient, from the backward pass to the optimizer step; 4 with several micro-batches.

A bf16 parameter is the upper half of the bits of an fp32 value, rounded to nearest. The residual is
the lower half. Together they restore the fp32 value exactly: the highest bit of the residual
encodes whether the upper half was rounded up.

A single micro-batch uses `parameter.grad` directly; several are accumulated in fp32. The gradient
norm reads 2 bytes per parameter.

Shapes: E flat elements of a parameter group, N elements of a slice, and those of a matrix: R rows
and C columns.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn

from finesight.components import SettingsT
from finesight.errors import UserError, format_count
from finesight.host_memory import keep_out_of_forks
from finesight.model.kernels import param_tiles
from finesight.model.kernels.runtime import HAS_TRITON
from finesight.model.trainable import (
    CONV_SUFFIX,
    EMBEDDING_SUFFIXES,
    MODEL_PARTS,
    ModelPart,
    get_part,
)
from finesight.optimizer_components import DEFAULT_OPTIMIZER, OPTIMIZERS
from finesight.settings.config import TrainSettings
from finesight.settings.setting_types import StepsOrFraction

LARGE_PARAM_ELEMENTS = 1 << 20
"""Number of elements from which a parameter's gradient is accumulated by an autograd hook.

CUDA graphs write the gradients of these parameters to static buffers (`train.graph_buffers`).
"""


@dataclass(frozen=True)
class ParamSlice:
    """Parameter and its location in the flat buffer of its parameter group.

    Attributes:
        row_counts: Number of rows of each matrix in a stacked parameter; empty for a single one.
    """

    name: str
    parameter: nn.Parameter
    flat_slice: slice
    row_counts: Sequence[int] = ()

    def view(self, flat_E: Tensor) -> Tensor:
        """Return the view of a flat group tensor [E] that belongs to this parameter."""
        return flat_E[self.flat_slice].view(self.parameter.shape)

    def split_matrices(self, flat_E: Tensor) -> Sequence[Tensor]:
        """Return views of the matrices [R, C] of this parameter in a flat group tensor [E]."""
        stack = self.view(flat_E)
        # Stacked MoE experts are several matrices.
        row_counts = self.row_counts or (stack.shape[-2],)
        num_copies = stack.numel() // stack.shape[-1] // sum(row_counts)
        return torch.split(stack.flatten(0, -2), [*row_counts] * num_copies)


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
        self.tiles: param_tiles.ParamTiles | None = None
        self._small_tiles: param_tiles.ParamTiles | None = None
        if HAS_TRITON and self.device.type == "cuda":
            self.tiles = param_tiles.ParamTiles(flat_slices, self.device)
            if small_slices:
                self._small_tiles = param_tiles.ParamTiles(small_slices, self.device)

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
            param_tiles.accumulate_gradients(
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
            return param_tiles.squared_norm(self.tiles, all_gradients)
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


class Optimizer(ABC, Generic[SettingsT]):
    """Optimizer of one parameter group: its state and its update. A plan creates it on `meta`.

    Attributes:
        alignment: Each parameter of a group starts at a multiple of this number of elements, itself
            a multiple of 64 (128 bytes in bf16).
        num_steps: Number of applied steps; 0 if the update does not depend on it.
    """

    alignment: ClassVar[int] = 64
    num_steps: int = 0

    def __init__(self, group: ParamGroup, settings: SettingsT, train: TrainSettings) -> None:
        self.master_weights = group.master_weights
        self.gradients = group.gradients
        self.settings = settings

    @abstractmethod
    def step(self, grad_factor: Tensor, lr: float, weight_decay: float) -> None:
        """Update the master weights from the accumulated gradients.

        Args:
            grad_factor: Scalar on the device that multiplies all gradients, for clipping and
                unscaling; NaN skips the step.
        """

    @abstractmethod
    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return views of the state of the parameter in a slice of the group, for checkpoints.

        The last tensor stays zero until the parameter receives a non-zero gradient. The dictionary
        is empty for an optimizer without state.
        """

    def state_bytes(self) -> int:
        """Return the bytes of the state, with the padding between parameters.

        The default asks `state_tensors` for the whole group as one vector.
        """
        length = len(self.master_weights)
        state = self.state_tensors(slice(0, length), torch.Size([length]))
        return sum(tensor.nbytes for tensor in state.values())

    @abstractmethod
    def workspace_bytes(self, is_cuda: bool) -> int:
        """Return the temporary bytes of a step."""

    @abstractmethod
    def traffic_bytes(self, is_cuda: bool) -> int:
        """Return the bytes of memory traffic of a step, with gradient norm and clipping."""


def load_optimizer_class(name: str) -> type[Optimizer[Any]]:
    """Import the heavy half of an optimizer.

    Raises:
        UserError: That of a plug-in cannot be imported, is another object, or has an alignment that
            the kernels do not support.
    """
    optimizer_class = OPTIMIZERS.load_implementation(name, Optimizer)  # type: ignore[type-abstract]
    alignment: object = optimizer_class.alignment
    if not isinstance(alignment, int) or alignment <= 0 or alignment % Optimizer.alignment:
        target = OPTIMIZERS[name].implementation
        problem = f"alignment is {alignment!r:.60}, no multiple of {Optimizer.alignment}"
        raise OPTIMIZERS.build_error(name, target, problem, Optimizer)
    return optimizer_class


class ParamGroup:
    """Parameters of one model part with the same learning rate and weight decay.

    The parameters become views of one flat tensor, which `master_weights` extends to fp32. Each
    parameter starts at a multiple of `alignment` elements.
    """

    optimizer: Optimizer[Any]

    def __init__(
        self,
        part: ModelPart,
        weight_decay: float,
        lr: float,
        named_params: Mapping[str, nn.Parameter],
        stacked_rows: Mapping[str, Sequence[int]],
        alignment: int,
    ) -> None:
        self.part = part
        self.weight_decay = weight_decay
        self.lr = lr
        self.param_slices: list[ParamSlice] = []
        end = 0
        for name, parameter in named_params.items():
            flat_slice = slice(end, end + parameter.numel())
            row_counts = stacked_rows.get(name, ())
            self.param_slices.append(ParamSlice(name, parameter, flat_slice, row_counts))
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

    def create_optimizer(self, train: TrainSettings) -> None:
        """Create the optimizer of the group: the chosen one, or the default one if only that fits.

        Raises:
            UserError: The optimizer of a plug-in does not work.
        """
        component = train.optimizer_component
        if component.only_matrices and not self.has_matrices:
            component = OPTIMIZERS[DEFAULT_OPTIMIZER]
        optimizer_class = load_optimizer_class(component.name)
        settings = component.settings_of(train)
        self.optimizer = OPTIMIZERS.call(
            component.name,
            optimizer_class,
            self,
            settings,
            train,
            passes=(MemoryError, torch.OutOfMemoryError),
        )
        if not OPTIMIZERS.is_built_in(component.name):
            self._check_optimizer(component.name)

    def _check_optimizer(self, name: str) -> None:
        """Call the functions that checkpoints and plans need, before the first step.

        Raises:
            UserError: A function does not work, or returns another object.
        """
        optimizer = self.optimizer
        is_cuda = self.master_weights.params_E.is_cuda
        read_state = optimizer.state_tensors
        for param_slice in self.param_slices:
            shape = param_slice.parameter.shape
            state: object = OPTIMIZERS.call(name, read_state, param_slice.flat_slice, shape)
            tensors = [*state.values()] if isinstance(state, dict) else [state]
            if not all(isinstance(tensor, Tensor) for tensor in tensors):
                problem = f"returns {state!r:.60} instead of a dictionary of tensors"
                raise OPTIMIZERS.build_call_error(name, read_state, problem)
        sizes: tuple[tuple[Callable[..., object], tuple[bool, ...]], ...] = (
            (optimizer.workspace_bytes, (is_cuda,)),
            (optimizer.traffic_bytes, (is_cuda,)),
            (optimizer.state_bytes, ()),
        )
        for function, arguments in sizes:
            num_bytes: object = OPTIMIZERS.call(name, function, *arguments)
            if not isinstance(num_bytes, int):
                problem = f"returns {num_bytes!r:.60} instead of a number of bytes"
                raise OPTIMIZERS.build_call_error(name, function, problem)
        if not isinstance(optimizer.num_steps, int):
            target = OPTIMIZERS[name].implementation
            problem = f"num_steps is {optimizer.num_steps!r:.60}, no integer"
            raise OPTIMIZERS.build_error(name, target, problem, Optimizer)

    @property
    def has_matrices(self) -> bool:
        """Return whether the parameters are weight matrices or stacks of them."""
        return all(_is_matmul_weight(one.name, one.parameter) for one in self.param_slices)

    def state_tensors(self, param_slice: ParamSlice) -> dict[str, Tensor]:
        """Return views of the optimizer state of one parameter, by state name."""
        return self.optimizer.state_tensors(param_slice.flat_slice, param_slice.parameter.shape)


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
        self.param_groups = list(_build_param_groups(trainable_params, train, stacked_rows or {}))
        for group in self.param_groups:
            group.create_optimizer(train)
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

        Keys are `num_steps`, and the names of `Optimizer.state_tensors` with that of the parameter,
        such as `exp_avg.NAME`.
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
                state = [*group.state_tensors(param_slice).values()]
                if state:
                    has_gradient = state[-1].any()
                else:
                    # An optimizer without state does not know the gradients of earlier steps.
                    device = param_slice.parameter.device
                    has_gradient = torch.ones((), dtype=torch.bool, device=device)
                nonzero_flags[param_slice.name] = has_gradient
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
    trainable_params: Mapping[str, nn.Parameter],
    train: TrainSettings,
    stacked_rows: Mapping[str, Sequence[int]],
) -> Iterator[ParamGroup]:
    """Group parameters by model part and dtype, and into matrices, embeddings and vectors.

    Vectors, such as biases and norm weights, have no weight decay.
    """
    alignment = load_optimizer_class(train.optimizer).alignment
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
                yield ParamGroup(part, weight_decay, lr, same_dtype, stacked_rows, alignment)


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
