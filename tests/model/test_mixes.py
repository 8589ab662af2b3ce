"""Parts that learn in different ways at once: gradients against peft on transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import config, conversation, distance, native, packed, reference, reference_logits
from torch import Tensor
from tuned import FAMILIES, randomise

from finesight.config import Tune
from finesight.model.adapter import write_adapter
from finesight.model.lora import adapters, hub_name
from finesight.model.parts import apply_tuning, part_of
from finesight.model.peft_config import module_name
from finesight.model.weights import hub_tensors

SAMPLES = [
    conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4),
    conversation(5, 2, ("video", (2, 4, 6)), 3),
    conversation(1, 11),
]
LORA = {"rank": 4, "alpha": 6, "dropout": 0.0}
MIXES: dict[str, dict[str, Any]] = {
    "language lora, whole vision": {"vision": "full", "language": "lora"},
    "merger lora alone": {"merger": "lora", "language": "frozen"},
    "language lora, embeddings": {"embeddings": "full", "language": "lora"},
    "all kinds": {"vision": "lora", "merger": "full", "language": "lora", "embeddings": "full"},
    "lora between whole parts": {"vision": "full", "merger": "lora", "language": "full"},
    "some layers of a group": {
        "vision": "full",
        "language": "lora",
        "lora": LORA | {"targets": ["v_proj", "down_proj"]},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", MIXES)
def test_gradients_of_a_mix_equal_those_of_peft(
    family: str, tied: bool, how: str, tmp_path: Path
) -> None:
    tune = Tune.model_validate({"lora": LORA} | MIXES[how])
    theirs = reference(config(family, tie_word_embeddings=tied))
    ours = native(config(family, tie_word_embeddings=tied), theirs)
    apply_tuning(ours, tune, seed=0)
    randomise(factor for _, _, adapter in adapters(ours) for factor in adapter.parameters())
    write_adapter(tmp_path, ours, base="some/base")
    peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    modes = tune.model_dump()
    for name, parameter in theirs.named_parameters():
        whole = ".lora_" not in name and modes[part_of(_native(ours, name))] == "full"
        parameter.requires_grad_(".lora_" in name or whole)
    batch = packed(theirs, SAMPLES)
    weights = torch.randn(len(batch.ids_T), 100)
    ours.recompute = how == "all kinds"
    (ours.train().logits(ours(batch)) * weights).sum().backward()
    (torch.cat([reference_logits(theirs, s) for s in SAMPLES]) * weights).sum().backward()

    expected = {_native(ours, name): p.grad for name, p in theirs.named_parameters()}
    for path, _, adapter in adapters(ours):
        for output, band in adapter.bands.items():
            name = _native(ours, module_name(hub_name(path, output)))
            found = {"A": adapter.a.grad[band.rows], "B": adapter.b[output].grad}
            for side, gradient in found.items():
                wanted = expected.pop(f"{name}.lora_{side}.default.weight")
                assert distance(gradient, wanted) <= 1e-5, name
    for name, gradient in _gradients(ours).items():
        wanted = expected.pop(name)
        assert (gradient is None) == (wanted is None), name
        assert gradient is None or distance(gradient, wanted) <= 1e-5, name
    assert not expected


def _native(ours: Any, name: str) -> str:
    return ours.architecture.native_name(name.replace(".base_layer", ""))


def _gradients(model: Any) -> dict[str, Tensor | None]:
    """By hub name and in the hub's shape; None where nothing learns."""
    frozen = float("nan")
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.data = torch.full_like(parameter, frozen) if gradient is None else gradient
    return {
        tensor.name: None if tensor.data.isnan().all() else tensor.data.view(tensor.shape)
        for tensor in hub_tensors(model)
    }
