"""Model parts and the trainable parameters of a recipe."""

from typing import Any

import lora_fixtures
import peft
import pytest
import torch
from hf_reference import (
    CPU,
    make_config,
    make_conversation,
    make_native_model,
    make_reference_model,
    max_relative_error,
    pack_conversations,
    reference_logits,
)
from lora_fixtures import get_tolerance, list_adapted_layers, randomize_parameters
from random_model import init_random_model
from torch import Tensor

from finesight.errors import UserError
from finesight.model.families import to_module_name
from finesight.model.linear import hub_name, iter_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model.trainable import MODEL_PARTS, configure_tuning, get_part, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import hub_tensors
from finesight.settings.config import TuneSettings

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


def make_model(family: str = "qwen2_5_vl", **changes: Any) -> VisionLanguageModel:
    return init_random_model(
        make_config(family, **changes), seed=0, dtype=torch.float32, device=CPU
    )


def tune(**settings: Any) -> TuneSettings:
    return TuneSettings.model_validate({"language": "frozen"} | settings)


PREFIXES = {
    "visual.merger": "merger",
    "visual.deepstack_merger_list": "merger",
    "visual.pos_embed": "vision",
    "visual.blocks": "vision",
    "visual.patch_embed": "vision",
    "model.layers": "language",
    "model.norm": "language",
    "model.embed_tokens": "embeddings",
    "lm_head.weight": "embeddings",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_prefix_determines_its_part(family):
    model = make_model(family, tie_word_embeddings=False)
    configure_tuning(model, tune(vision="lora", merger="lora", language="lora"), 0)
    names = [name for name, _ in model.named_parameters()]
    assert {get_part(name) for name in names} == set(MODEL_PARTS)
    for name in names:
        assert get_part(name) == PREFIXES[".".join(name.split(".")[:2])]
    assert {get_part(tensor.name) for tensor in hub_tensors(model)} <= set(MODEL_PARTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["vision", "merger", "language"])
def test_lora_adapts_only_its_part(family, part):
    model = make_model(family)
    configure_tuning(model, tune(**{part: "lora"}), 0)
    matrices = {
        tensor.name.removesuffix(".weight")
        for tensor in hub_tensors(model)
        if tensor.data.ndim == 2 and get_part(tensor.name) == part
    }
    assert list_adapted_layers(model) == matrices - {"visual.patch_embed.proj", "visual.pos_embed"}
    for name in trainable_parameters(model):
        assert ".adapter." in name
        assert get_part(name) == part
    assert len(trainable_parameters(model)) > 0


def test_targets_apply_only_to_lora_parts():
    for settings, targets, expected in (
        # Not those of the frozen or fully trained vision encoder.
        ({"language": "lora"}, ["gate_proj"], ["model.layers.{}.mlp.gate_proj"]),
        ({"language": "lora", "vision": "full"}, ["q_proj"], ["model.layers.{}.self_attn.q_proj"]),
        ({"merger": "lora"}, ["mlp.2"], ["visual.merger.mlp.2"]),
    ):
        model = make_model()
        lora = {"target_modules": targets, "rank": 3, "alpha": 12, "dropout": 0.25}
        configure_tuning(model, tune(**settings, lora=lora), 0)
        layers = {name.format(index) for name in expected for index in range(2)}
        assert list_adapted_layers(model) == layers
        for _, _, adapter in iter_adapters(model):
            assert adapter.dropout == 0.25
            assert {(low.rank, low.scale) for low in adapter.configs.values()} == {(3, 4.0)}
        learning = trainable_parameters(model)
        assert {get_part(name) for name in learning} == settings.keys()
        assert ("visual.patch_embed.proj.weight" in learning) == (settings.get("vision") == "full")


def test_unknown_targets_are_rejected():
    for parts, targets, message in (
        (("language",), ["q_proj", "gate_porj"], "'gate_porj' matches no linear layer"),
        (("merger",), ["mlp.2x"], r"some of mlp\.2, mlp\.0"),
        (("language", "vision"), ["q_proj"], r"tune\.vision is lora"),
    ):
        model = make_model()
        settings = tune(**dict.fromkeys(parts, "lora"), lora={"target_modules": targets})
        with pytest.raises(UserError, match=message):
            configure_tuning(model, settings, 0)
        assert not list_adapted_layers(model)


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


@pytest.mark.parametrize("family", lora_fixtures.FAMILIES)
@pytest.mark.parametrize(
    ("how", "tied"),
    [(how, tied) for how in MIXES for tied in (True, False) if tied or "embeddings" in MIXES[how]],
)
def test_mixed_tuning_gradients_match_peft(family, tied, how, tmp_path):
    if not tied and family not in ("qwen2_vl", "qwen3_5_moe"):
        pytest.skip("two families show it")
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
