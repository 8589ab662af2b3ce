"""Kernels that launch nothing: what a model in few kernels allocates can be counted where there is
no card, though not what it computes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from finesight.model import attention, fp8, fused, fused_layer, joined, layers
from finesight.model.rowwise import Int8Matrix
from finesight.train import loss

NAMES = {
    "model.kernels.programs": "programs",
    "model.kernels.drop": "drop_kernels",
    "model.kernels.elementwise": "elementwise",
    "model.kernels.fp8": "fp8_kernels",
    "model.kernels.lora": "lora_kernels",
    "model.kernels.norm": "norm_kernels",
    "model.kernels.gate": "gate_kernels",
    "model.kernels.turn": "turn_kernels",
    "model.kernels.attention": "attention_kernels",
    "model.kernels.look": "look_kernels",
    "train.loss_kernels": "loss_kernels",
}
"""Modules of kernels, and what those that hold them call them."""

OWNERS = (fused_layer, layers, joined, fused, attention, fp8, loss)
"""Modules that hold those of kernels where Triton is."""


class _Nothing:
    """A kernel in any grid."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *inputs, **settings: None


def _jit(function: object = None, **settings: object) -> object:
    return _Nothing() if function is not None else lambda kernel: _Nothing()


def _stand_in() -> dict[str, ModuleType]:
    """As much of Triton as modules of kernels need to be imported, and to size what they write."""
    language: Any = ModuleType("triton.language")
    language.tensor = language.constexpr = object
    triton: Any = ModuleType("triton")
    triton.jit, triton.language = _jit, language
    triton.cdiv = lambda number, size: -(-number // size)
    triton.next_power_of_2 = lambda number: 1 << (number - 1).bit_length()
    extra: Any = ModuleType("triton.language.extra")
    extra.libdevice = None
    return {"triton": triton, "triton.language": language, "triton.language.extra": extra}


def launch_nothing(patch: pytest.MonkeyPatch) -> None:
    """Models on a CPU in fp32 go the way of 16 bits on a card: in 16 bits, products on a CPU take
    memory of their own."""
    with patch.context() as at_import:
        for name, module in _stand_in().items():
            at_import.setitem(sys.modules, name, module)
        made: dict[str, Any] = {n: importlib.import_module(f"finesight.{n}") for n in NAMES}
    for name, module in made.items():
        patch.delitem(sys.modules, f"finesight.{name}")
        for owner in OWNERS:
            patch.setattr(owner, NAMES[name], module, raising=False)
    drop = made["model.kernels.drop"]
    patch.setattr(fused_layer, "Drop", drop.Drop, raising=False)
    patch.setattr(fused_layer, "Norm", made["model.kernels.lora"].Norm, raising=False)
    patch.setattr(fused, "UNDROPPED", drop.UNDROPPED, raising=False)
    patch.setattr(fused_layer, "Heads", made["model.kernels.turn"].Heads, raising=False)
    patch.setattr(fused_layer, "takes", lambda x_TD: True)
    for owner in (layers, fused, fp8, loss):
        patch.setattr(owner, "has_kernels", lambda x: True)
    patch.setattr(attention, "KERNELS", True)
    patch.setattr(attention, "has_varlen", lambda q_THD: True)
    patch.setattr(attention, "_attend_varlen", lambda q_THD, *rest: torch.empty(q_THD.shape))
    for owner in (fp8, layers):
        patch.setattr(owner, "quantised", _quantised)
    patch.setattr(fp8, "multiplied", _multiplied)
    patch.setattr(Int8Matrix, "dense", _dense)


def _quantised(x_TI: Tensor, by_I: Tensor | None = None) -> fp8.Rows:
    codes_TI = torch.empty(x_TI.shape, dtype=torch.float8_e4m3fn)
    return fp8.Rows(codes_TI, torch.empty(len(x_TI), 1))


def _multiplied(
    x: fp8.Rows, w_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch.empty(len(x.codes_TI), len(w_OI), dtype=dtype)


def _dense(matrix: Int8Matrix, dtype: torch.dtype) -> Tensor:
    return torch.empty(matrix.outputs, matrix.inputs, dtype=dtype)
