"""A card of little memory, for tests: a model that refuses some packs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from finesight.encode.pack import PackedBatch
from finesight.model.layers import GatedMlp
from finesight.model.network import VisionLanguageModel

Refuses = Callable[[PackedBatch, VisionLanguageModel], bool]
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB left. And more.\nSee also"


@contextmanager
def small_card(refuses: Refuses) -> Iterator[list[int]]:
    """Within the block, learning from the packs that `refuses` names breaks off on the way back,
    when gradients of some layers have come. Yields the tokens of all packs that were tried."""
    tried: list[int] = []
    full = False

    def begins(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal full
        if isinstance(module, VisionLanguageModel):
            full = torch.is_grad_enabled() and refuses(inputs[0], module)
            if torch.is_grad_enabled():
                tried.append(sum(inputs[0].lengths))

    def refuse(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(FULL)

    def ends(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal full
        # Of the first layer, whose gradients come last.
        if full and isinstance(module, GatedMlp) and output.requires_grad:
            full = False
            output.register_hook(refuse)

    hooks = register_module_forward_pre_hook(begins), register_module_forward_hook(ends)
    try:
        yield tried
    finally:
        for hook in hooks:
            hook.remove()
