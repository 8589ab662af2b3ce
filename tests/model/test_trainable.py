"""Model parts and the trainable parameters of a recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_reference import CPU, make_config

from finesight.config import TuneSettings
from finesight.errors import UserError
from finesight.model.linear import find_adaptable_layers, hub_name, iter_adapters
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


def list_adapted_layers(model: VisionLanguageModel) -> set[str]:
    return {hub_name(path, output) for path, _, a in iter_adapters(model) for output in a.configs}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_prefix_determines_its_part(family: str) -> None:
    model = make_model(family, tie_word_embeddings=False)
    configure_tuning(model, tune(vision="lora", merger="lora", language="lora"), 0)
    names = [name for name, _ in model.named_parameters()]
    assert {get_part(name) for name in names} == set(MODEL_PARTS)
    for name in names:
        expected = {
            "visual.merger": "merger",
            "visual.deepstack_merger_list": "merger",
            "visual.pos_embed": "vision",
            "visual.blocks": "vision",
            "visual.patch_embed": "vision",
            "model.layers": "language",
            "model.norm": "language",
            "model.embed_tokens": "embeddings",
            "lm_head.weight": "embeddings",
        }[".".join(name.split(".")[:2])]
        assert get_part(name) == expected
    for tensor in hub_tensors(model):
        assert get_part(tensor.name) in MODEL_PARTS


@pytest.mark.parametrize("name", ["visual.sos_embed.weight", "model.lm_head.weight", "visual"])
def test_unknown_parameter_name_is_rejected(name: str) -> None:
    with pytest.raises(AssertionError, match=f"{name} belongs to no part"):
        get_part(name)


@pytest.mark.parametrize("part", ["vision", "merger", "language", "embeddings"])
def test_full_trains_only_its_part(part: str) -> None:
    model = make_model()
    configure_tuning(model, tune(**{part: "full"}), 0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (get_part(name) == part), name
    assert trainable_parameters(model).keys() == {
        n for n, _ in model.named_parameters() if get_part(n) == part
    }
    assert not list_adapted_layers(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["vision", "merger", "language"])
def test_lora_adapts_only_its_part(family: str, part: str) -> None:
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


def test_lora_decoder_with_full_vision_encoder() -> None:
    model = make_model()
    configure_tuning(model, tune(language="lora", vision="full"), 0)
    learning = trainable_parameters(model)
    assert {get_part(name) for name in learning} == {"language", "vision"}
    assert all(".adapter." in name for name in learning if get_part(name) == "language")
    assert "visual.patch_embed.proj.weight" in learning
    assert all(get_part(name) == "language" for name in list_adapted_layers(model))


def test_recipe_sets_rank_alpha_and_dropout() -> None:
    model = make_model()
    configure_tuning(
        model, tune(language="lora", lora={"rank": 3, "alpha": 12, "dropout": 0.25}), 0
    )
    for _, _, adapter in iter_adapters(model):
        assert adapter.dropout == 0.25
        assert {(low.rank, low.scale) for low in adapter.configs.values()} == {(3, 4.0)}
        assert len(adapter.lora_A) == 3 * len(adapter.configs)


def test_targets_apply_only_to_lora_parts() -> None:
    model = make_model("qwen2_5_vl")
    settings = {"target_modules": ["gate_proj", "q_proj"]}
    configure_tuning(model, tune(language="lora", vision="frozen", lora=settings), 0)
    expected = {
        f"model.layers.{layer}.{tail}"
        for layer in (0, 1)
        for tail in ("mlp.gate_proj", "self_attn.q_proj")
    }
    assert list_adapted_layers(model) == expected  # No visual.blocks.N.mlp.gate_proj.


def test_initialization_depends_only_on_seed_and_name() -> None:
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


def test_misspelled_target_suggests_existing_names() -> None:
    lora = {"target_modules": ["q_proj", "gate_porj"]}
    with pytest.raises(UserError) as caught:
        configure_tuning(make_model(), tune(language="lora", lora=lora), 0)
    message = str(caught.value)
    assert message.startswith(
        "tune.lora.target_modules: 'gate_porj' matches no linear layer of language"
    )
    assert "expected: some of gate_proj, " in message
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"):
        assert name in message


def test_numbered_layers_include_parent_name() -> None:
    with pytest.raises(UserError, match=r"some of mlp\.2, mlp\.0"):
        configure_tuning(make_model(), tune(merger="lora", lora={"target_modules": ["mlp.2x"]}), 0)
    model = make_model()
    configure_tuning(model, tune(merger="lora", lora={"target_modules": ["mlp.2"]}), 0)
    assert list_adapted_layers(model) == {"visual.merger.mlp.2"}


def test_part_without_matching_target_is_rejected() -> None:
    lora = {"target_modules": ["q_proj"]}
    with pytest.raises(UserError, match=r"tune\.vision is lora, but it has no layer named q_proj"):
        configure_tuning(make_model(), tune(language="lora", vision="lora", lora=lora), 0)


def test_rejected_target_leaves_no_adapter() -> None:
    model = make_model()
    with pytest.raises(UserError):
        configure_tuning(model, tune(language="lora", lora={"target_modules": ["q_proj", "x"]}), 0)
    assert not list_adapted_layers(model)


def test_every_adaptable_layer_belongs_to_a_lora_part() -> None:
    for family in FAMILIES:
        parts = {get_part(name) for name in find_adaptable_layers(make_model(family))}
        assert parts == {"vision", "merger", "language"}
