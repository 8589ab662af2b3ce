"""Model parts and the trainable parameters of a recipe."""

from typing import Any

import pytest
import torch
from hf_reference import CPU, make_config
from lora_fixtures import list_adapted_layers

from finesight.config import TuneSettings
from finesight.errors import UserError
from finesight.model.linear import hub_name, iter_adapters
from finesight.model.trainable import MODEL_PARTS, configure_tuning, get_part, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import hub_tensors, init_random_model

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


def test_initialization_depends_only_on_seed_and_name():
    def values(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        model = make_model()
        configure_tuning(model, tune(**settings), seed)
        return {
            hub_name(path, output): factors.lora_A.clone()
            for path, _, adapter in iter_adapters(model)
            for output, factors in adapter.factors().items()
        }

    all_of_it = values(1, language="lora", vision="lora")
    some = values(1, language="lora", lora={"target_modules": ["v_proj"]})
    assert len(some) == 2
    for name, a_RI in some.items():
        assert torch.equal(a_RI, all_of_it[name])
        assert not torch.equal(a_RI, values(2, language="lora")[name])
    assert len({a_RI.sum().item() for a_RI in all_of_it.values()}) == len(all_of_it)
