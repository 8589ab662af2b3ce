"""What belongs to each part, and what a recipe sets learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import CPU, config

from finesight.config import Tune
from finesight.errors import UserError
from finesight.model.lora import adaptable_layers, adapters, hub_name
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import PARTS, apply_tuning, part_of, trainable
from finesight.model.weights import hub_tensors, random_model

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def make_model(family: str = "qwen2_5_vl", **changes: Any) -> VisionLanguageModel:
    return random_model(config(family, **changes), seed=0, dtype=torch.float32, device=CPU)


def tune(**settings: Any) -> Tune:
    return Tune.model_validate({"language": "frozen"} | settings)


def adapted(model: VisionLanguageModel) -> set[str]:
    return {hub_name(path, output) for path, _, a in adapters(model) for output in a.layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_the_part_that_its_beginning_says(family: str) -> None:
    model = make_model(family, tie_word_embeddings=False)
    apply_tuning(model, tune(vision="lora", merger="lora", language="lora"), 0)
    names = [name for name, _ in model.named_parameters()]
    assert {part_of(name) for name in names} == set(PARTS)
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
        assert part_of(name) == expected
    for tensor in hub_tensors(model):
        assert part_of(tensor.name) in PARTS


@pytest.mark.parametrize("name", ["visual.sos_embed.weight", "model.lm_head.weight", "visual"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match=f"{name} belongs to no part"):
        part_of(name)


@pytest.mark.parametrize("part", ["vision", "merger", "language", "embeddings"])
def test_full_trains_all_of_the_part_and_nothing_else(part: str) -> None:
    model = make_model()
    apply_tuning(model, tune(**{part: "full"}), 0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part_of(name) == part), name
    assert trainable(model).keys() == {n for n, _ in model.named_parameters() if part_of(n) == part}
    assert not adapted(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["vision", "merger", "language"])
def test_lora_adapts_every_linear_layer_of_the_part_and_trains_nothing_else(
    family: str, part: str
) -> None:
    model = make_model(family)
    apply_tuning(model, tune(**{part: "lora"}), 0)
    matrices = {
        tensor.name.removesuffix(".weight")
        for tensor in hub_tensors(model)
        if tensor.data.ndim == 2 and part_of(tensor.name) == part
    }
    assert adapted(model) == matrices - {"visual.patch_embed.proj", "visual.pos_embed"}
    for name in trainable(model):
        assert ".adapter." in name
        assert part_of(name) == part
    assert len(trainable(model)) > 0


def test_lora_on_the_language_model_with_the_whole_vision_tower() -> None:
    model = make_model()
    apply_tuning(model, tune(language="lora", vision="full"), 0)
    learning = trainable(model)
    assert {part_of(name) for name in learning} == {"language", "vision"}
    assert all(".adapter." in name for name in learning if part_of(name) == "language")
    assert "visual.patch_embed.proj.weight" in learning
    assert all(part_of(name) == "language" for name in adapted(model))


def test_rank_alpha_and_dropout_are_those_of_the_recipe() -> None:
    model = make_model()
    apply_tuning(model, tune(language="lora", lora={"rank": 3, "alpha": 12, "dropout": 0.25}), 0)
    for _, _, adapter in adapters(model):
        assert adapter.dropout == 0.25
        assert {(low.rank, low.scale) for low in adapter.layers.values()} == {(3, 4.0)}
        assert len(adapter.a) == 3 * len(adapter.layers)


def test_targets_are_anchored_to_the_parts_that_use_lora() -> None:
    model = make_model("qwen2_5_vl")
    settings = {"targets": ["gate_proj", "q_proj"]}
    apply_tuning(model, tune(language="lora", vision="frozen", lora=settings), 0)
    expected = {
        f"model.layers.{layer}.{tail}"
        for layer in (0, 1)
        for tail in ("mlp.gate_proj", "self_attn.q_proj")
    }
    assert adapted(model) == expected  # and no visual.blocks.N.mlp.gate_proj


def test_the_start_depends_on_the_seed_and_the_name_only() -> None:
    def values(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        model = make_model()
        apply_tuning(model, tune(**settings), seed)
        return {
            hub_name(path, output): factors.a.clone()
            for path, _, adapter in adapters(model)
            for output, factors in adapter.factors().items()
        }

    all_of_it = values(1, language="lora", vision="lora")
    some = values(1, language="lora", lora={"targets": ["v_proj"]})
    assert len(some) == 2
    for name, a_RI in some.items():
        assert torch.equal(a_RI, all_of_it[name])
        assert not torch.equal(a_RI, values(2, language="lora")[name])
    assert len({a_RI.sum().item() for a_RI in all_of_it.values()}) == len(all_of_it)


def test_a_misspelt_target_is_refused_with_the_names_that_exist_nearest_first() -> None:
    lora = {"targets": ["q_proj", "gate_porj"]}
    with pytest.raises(UserError) as caught:
        apply_tuning(make_model(), tune(language="lora", lora=lora), 0)
    message = str(caught.value)
    assert message.startswith("tune.lora.targets: 'gate_porj' names no linear layer of language")
    assert "expected: some of gate_proj, " in message
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"):
        assert name in message


def test_numbered_layers_are_named_with_the_piece_before() -> None:
    with pytest.raises(UserError, match=r"some of mlp\.2, mlp\.0"):
        apply_tuning(make_model(), tune(merger="lora", lora={"targets": ["mlp.2x"]}), 0)
    model = make_model()
    apply_tuning(model, tune(merger="lora", lora={"targets": ["mlp.2"]}), 0)
    assert adapted(model) == {"visual.merger.mlp.2"}


def test_a_part_that_the_targets_leave_empty_is_refused() -> None:
    lora = {"targets": ["q_proj"]}
    with pytest.raises(UserError, match=r"tune\.vision is lora, but none of q_proj is a layer"):
        apply_tuning(make_model(), tune(language="lora", vision="lora", lora=lora), 0)


def test_a_refused_target_leaves_no_adapter_behind() -> None:
    model = make_model()
    with pytest.raises(UserError):
        apply_tuning(model, tune(language="lora", lora={"targets": ["q_proj", "x"]}), 0)
    assert not adapted(model)


def test_every_adaptable_layer_belongs_to_a_part_with_lora() -> None:
    for family in FAMILIES:
        parts = {part_of(name) for name in adaptable_layers(make_model(family))}
        assert parts == {"vision", "merger", "language"}
