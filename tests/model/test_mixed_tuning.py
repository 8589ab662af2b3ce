"""Parts with different tuning modes: gradients against peft on transformers."""

from typing import Any

import peft
import pytest
import torch
from each_value import each
from hf_reference import (
    make_config,
    make_conversation,
    make_native_model,
    make_reference_model,
    max_relative_error,
    pack_conversations,
    reference_logits,
)
from lora_fixtures import FAMILIES, get_tolerance, randomize_parameters
from torch import Tensor

from finesight.config import TuneSettings
from finesight.model.families.architecture import to_module_name
from finesight.model.linear import hub_name, iter_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model.trainable import configure_tuning, get_part
from finesight.model.weights_io import hub_tensors

SAMPLES = [
    make_conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4),
    make_conversation(5, 2, ("video", (2, 4, 6)), 3),
    make_conversation(1, 11),
]
LORA = {"rank": 4, "alpha": 6, "dropout": 0.0}
MIXES: dict[str, dict[str, Any]] = {
    "language lora, full vision": {"vision": "full", "language": "lora"},
    "merger lora alone": {"merger": "lora", "language": "frozen"},
    "language lora, embeddings": {"embeddings": "full", "language": "lora"},
    "all kinds": {"vision": "lora", "merger": "full", "language": "lora", "embeddings": "full"},
    "lora between full parts": {"vision": "full", "merger": "lora", "language": "full"},
    "some layers of a group": {
        "vision": "full",
        "language": "lora",
        "lora": LORA | {"target_modules": ["v_proj", "down_proj"]},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@each("tied", [True, False])
@each("how", MIXES)
def test_mixed_tuning_gradients_match_peft(family, tied, how, tmp_path):
    tune = TuneSettings.model_validate({"lora": LORA} | MIXES[how])
    theirs = make_reference_model(make_config(family, tie_word_embeddings=tied))
    ours = make_native_model(make_config(family, tie_word_embeddings=tied), theirs)
    configure_tuning(ours, tune, seed=0)
    randomize_parameters(
        factor for _, _, adapter in iter_adapters(ours) for factor in adapter.parameters()
    )
    save_adapter(tmp_path, ours, base_model="some/base")
    peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    modes = tune.model_dump()
    for name, parameter in theirs.named_parameters():
        full = ".lora_" not in name and modes[get_part(_native(ours, name))] == "full"
        parameter.requires_grad_(".lora_" in name or full)
    batch = pack_conversations(theirs, SAMPLES)
    weights = torch.randn(len(batch.ids_T), 100, generator=torch.Generator().manual_seed(4))
    ours.activation_checkpointing = how == "all kinds"
    (ours.train().compute_logits(ours(batch)) * weights).sum().backward()
    (torch.cat([reference_logits(theirs, s) for s in SAMPLES]) * weights).sum().backward()

    expected = {_native(ours, name): p.grad for name, p in theirs.named_parameters()}
    for path, _, adapter in iter_adapters(ours):
        for output, band in adapter.slices.items():
            name = _native(ours, to_module_name(hub_name(path, output)))
            found = {"A": adapter.lora_A.grad[band.rank_slice], "B": adapter.lora_B[output].grad}
            for side, gradient in found.items():
                wanted = expected.pop(f"{name}.lora_{side}.default.weight")
                assert max_relative_error(gradient, wanted) <= get_tolerance(family), name
    for name, gradient in _gradients(ours).items():
        wanted = expected.pop(name)
        assert (gradient is None) == (wanted is None), name
        assert gradient is None or max_relative_error(gradient, wanted) <= get_tolerance(family), (
            name
        )
    assert not expected


def _native(ours: Any, name: str) -> str:
    return ours.architecture.to_native_name(name.replace(".base_layer", ""))


def _gradients(model: Any) -> dict[str, Tensor | None]:
    """Return gradients by hub name in the hub's shape; None for frozen parameters."""
    frozen = float("nan")
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.data = torch.full_like(parameter, frozen) if gradient is None else gradient
    return {
        tensor.name: None if tensor.data.isnan().all() else tensor.data.view(tensor.shape)
        for tensor in hub_tensors(model)
    }
