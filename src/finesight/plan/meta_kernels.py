"""Cache of the results of operations on the meta device.

The meta kernels of torch are Python functions that compute shapes, strides and data types, which
takes most of the time of a trace. The layers of a model repeat the same operations, so that each
result is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _TensorLayout:
    """Layout of a contiguous or strided tensor, and the bytes of its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def allocate(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_Result = _TensorLayout | tuple[_TensorLayout | None, ...]


class MetaKernels:
    """Runs operations on meta tensors, and repeats results for operands of equal layout.

    Results are only repeated if they are new tensors: an operation that returns or changes one of
    its operands, or whose result is a part of a larger storage, is run each time. The default data
    type of torch must not change meanwhile.
    """

    def __init__(self) -> None:
        self._results: dict[object, _Result | None] = {}
        self._is_pure: dict[object, bool] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation, or return new tensors of the layout of its earlier result."""
        if not self._check_pure(func):
            return func(*args, **kwargs)
        try:
            key = func, _describe(args), _describe(tuple(kwargs.items()))
            result = self._results.get(key)
        except _UnknownOperandError:
            return func(*args, **kwargs)
        if isinstance(result, _TensorLayout):
            return result.allocate()
        if result is not None:
            return tuple(one and one.allocate() for one in result)
        outputs = func(*args, **kwargs)
        if key not in self._results:
            self._results[key] = _read_result(outputs, args, kwargs)
        return outputs

    def _check_pure(self, func: Any) -> bool:
        """Check if an operation neither changes its operands nor returns views of them."""
        if func not in self._is_pure:
            schema = getattr(func, "_schema", None)
            is_pure = schema is not None
            if schema is not None:
                values = [*schema.arguments, *schema.returns]
                is_pure = all(one.alias_info is None for one in values)
            self._is_pure[func] = is_pure
        return self._is_pure[func]


class _UnknownOperandError(Exception):
    """An operand has no description, such as a generator or a tensor with data."""


def _describe(value: Any) -> object:
    """Describe an operand by what the result depends on; 1, 1.0 and True differ."""
    if isinstance(value, Tensor):
        is_plain = type(value) in (Tensor, torch.nn.Parameter) and not value.is_sparse
        if value.device.type != "meta" or value.dtype.is_complex or not is_plain:
            raise _UnknownOperandError
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_describe(one) for one in value)
    if value is None or isinstance(
        value, (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    ):
        return type(value), value
    raise _UnknownOperandError


def _read_result(outputs: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Result | None:
    """Return the layouts of new tensors; None if a result has to be computed each time."""
    operands = {id(one.untyped_storage()) for one in _list_tensors((args, tuple(kwargs.values())))}
    if isinstance(outputs, Tensor):
        return _read_layout(outputs, operands)
    if type(outputs) is not tuple:
        return None
    layouts: list[_TensorLayout | None] = []
    for output in outputs:
        layout = None
        if output is not None:
            layout = _read_layout(output, operands)
            if layout is None:
                return None
        layouts.append(layout)
    return tuple(layouts)


def _read_layout(output: object, operands: set[int]) -> _TensorLayout | None:
    """Return the layout of an output with a storage of its own, which `operands` receives."""
    if not isinstance(output, Tensor) or output.device.type != "meta" or output.dtype.is_complex:
        return None
    storage = output.untyped_storage()
    if id(storage) in operands:
        return None
    operands.add(id(storage))
    layout = _TensorLayout(tuple(output.shape), output.stride(), output.dtype)
    if layout.allocate().untyped_storage().nbytes() != storage.nbytes():
        return None
    return layout


def _list_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in _list_tensors(one)]
    return []
