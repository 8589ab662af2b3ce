"""Simulated GPU out-of-memory errors for selected packs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from finesight.encode.packing import PackedBatch
from finesight.model.layers import GatedMlp
from finesight.model.vlm import VisionLanguageModel

OomPredicate = Callable[[PackedBatch, VisionLanguageModel], bool]
OOM_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB left. And more.\nSee also"
)


@contextmanager
def simulate_oom(should_fail: OomPredicate) -> Iterator[list[int]]:
    """Raise an out-of-memory error in the backward pass of selected training packs.

    Yields the tokens of all packs that were tried.
    """
    tried: list[int] = []
    is_failing = False

    def before_forward(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal is_failing
        if isinstance(module, VisionLanguageModel):
            is_failing = torch.is_grad_enabled() and should_fail(inputs[0], module)
            if torch.is_grad_enabled():
                tried.append(sum(inputs[0].lengths))

    def raise_oom(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(OOM_MESSAGE)

    def after_forward(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal is_failing
        # The first layer, whose gradients are computed last.
        if is_failing and isinstance(module, GatedMlp) and output.requires_grad:
            is_failing = False
            output.register_hook(raise_oom)

    hooks = (
        register_module_forward_pre_hook(before_forward),
        register_module_forward_hook(after_forward),
    )
    try:
        yield tried
    finally:
        for hook in hooks:
            hook.remove()
