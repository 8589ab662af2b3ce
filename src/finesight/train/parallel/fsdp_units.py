"""Units of a sharded model, and the parameters that every rank keeps completely.

`FSDPStrategy` shards a model accordingly, and `plan` estimates the memory of the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from finesight.model.linear import FusedLinear, iter_adapters
from finesight.model.trainable import trainable_parameters
from finesight.model.vlm import VisionLanguageModel

MIN_UNIT_PARAMS = 256_000_000
"""Minimum number of parameters of an FSDP unit, which is all-gathered at once."""


def mark_as_sharded(model: VisionLanguageModel) -> None:
    """Select the code paths of linear layers whose weights are gathered for each pass."""
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.is_sharded = True


def list_units(model: VisionLanguageModel) -> list[list[nn.Module]]:
    """Return the modules of each unit in forward order.

    The last unit has the parameters outside of the layers.
    """
    return [*_group_layers(model.visual.blocks), *_group_layers(model.model.layers), [model]]


def _group_layers(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Group consecutive layers into FSDP units; small units are communication-bound."""
    layers = list(layers)
    num_params = sum(_count_params(layer) for layer in layers)
    unit: list[nn.Module] = []
    for layer in layers:
        unit.append(layer)
        if sum(map(_count_params, unit)) >= min(MIN_UNIT_PARAMS, num_params / 2):
            yield unit
            unit = []
    if unit:
        yield unit


def _count_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def is_resharded(index: int, num_units: int, *, is_zero2: bool) -> bool:
    """Return whether a unit is resharded after its forward pass.

    The loss uses the language model head of the last unit, and the backward pass starts with the
    last layers, in the unit before.
    """
    return not is_zero2 and index < num_units - 2


def list_lora_params(model: VisionLanguageModel) -> set[nn.Parameter]:
    """Return the parameters of all adapters."""
    return {parameter for *_, lora in iter_adapters(model) for parameter in lora.parameters()}


def find_replicated_params(
    model: VisionLanguageModel, dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that every rank keeps, by name.

    The all-gather of hundreds of LoRA weights costs the host more time than it saves memory, and
    the all-gather of weights that the model computes with in fp32 would round them.
    """
    lora_params = list_lora_params(model)
    return {
        name: parameter
        for name, parameter in trainable_parameters(model).items()
        if parameter in lora_params
        or (name.endswith(model.architecture.fp32_suffixes) and dtype != torch.float32)
    }


def is_frozen_fp32(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Return whether a frozen weight stays in fp32, and thus complete, beside a 16-bit model."""
    is_fp32 = parameter.dtype == torch.float32
    return is_fp32 and not parameter.requires_grad and dtype != torch.float32
