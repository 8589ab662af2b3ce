from __future__ import annotations

from dataclasses import replace
from typing import Any

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
)
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.model.config import ConfigReader
from finesight.model.linear import FusedLinear
from finesight.model.trainable import get_part
from finesight.model.vlm import VisionLanguageModel, build_model
from finesight.model.weights_io import hub_tensors
from finesight.model_folder import PREPROCESSOR_DEFAULTS

SAMPLES = [
    make_conversation(1, 3, ("image", (1, 10, 12)), 4),
    make_conversation(2, 9),
    make_conversation(3, 1, ("video", (2, 4, 6)), 2),
]

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]


@pytest.fixture(params=FAMILIES)
def reference_model(request: pytest.FixtureRequest) -> Any:
    model = make_reference_model(make_config(request.param))
    model.settings = make_config(request.param)
    return model


def test_hidden_states_only_at_supervised_positions(reference_model: Any) -> None:
    model = make_native_model(reference_model.settings, reference_model)
    batch = pack_conversations(reference_model, SAMPLES)
    some = replace(batch, logit_indices_L=torch.tensor([4, 0, 17]))
    assert model(some).shape == (3, 48)
    assert max_relative_error(model(some), model(batch)[[4, 0, 17]]) < 1e-6


def test_separate_steps_match_forward(reference_model: Any) -> None:
    from finesight.model.attention import PackedAttention, Segments

    model = make_native_model(reference_model.settings, reference_model)
    batch = pack_conversations(reference_model, SAMPLES)
    features_MKD = model.encode_images(batch.patches_ND, batch.grid_thw)
    assert features_MKD.shape == (len(batch.visual_indices_M), model.visual.features_per_token, 48)
    attention = PackedAttention(Segments.from_lengths(batch.lengths, torch.device("cpu")))
    h_TD = model.apply_final_norm(model.forward_hidden(batch, attention, features_MKD=features_MKD))
    assert torch.equal(h_TD, model(batch))
    assert torch.equal(h_TD, model.apply_final_norm(model.forward_hidden(batch, attention)))
    assert torch.equal(model.compute_logits(h_TD), h_TD @ model.lm_head_weight.T)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10**9, "too large for this machine's memory"),
        (2**61, "an integer from 1 to 2147483647"),
        (10**30, "an integer from 1 to 2147483647"),
    ],
)
def test_oversized_config_is_rejected(size: int, message: str) -> None:
    settings = make_config("qwen3_vl", vision={"hidden_size": size})
    with pytest.raises(UserError, match=message):
        build_model(ConfigReader(settings), ConfigReader(PREPROCESSOR_DEFAULTS), torch.float32, CPU)


def test_placeholder_ids_do_not_affect_output(reference_model: Any) -> None:
    model = make_native_model(reference_model.settings, reference_model)
    batch = pack_conversations(reference_model, SAMPLES)
    elsewhere = replace(batch, ids_T=batch.ids_T.index_fill(0, batch.visual_indices_M, 7))
    assert torch.equal(model(elsewhere), model(batch))


@pytest.mark.parametrize("layer", [1, 2])
def test_deepstack_features_affect_later_layers_only(layer: int) -> None:
    theirs = make_reference_model(make_config("qwen3_vl"))
    model = make_native_model(make_config("qwen3_vl"), theirs)
    batch = pack_conversations(theirs, SAMPLES)
    features_MKD = model.encode_images(batch.patches_ND, batch.grid_thw).detach()
    other_MKD = features_MKD.clone()
    other_MKD[:, layer] += 1
    heard = []
    for features in (features_MKD, other_MKD):
        states: list[Tensor] = []
        for block in model.model.layers:
            block.register_forward_pre_hook(lambda _, inputs, to=states: to.append(inputs[0]))
        model(batch, features)
        heard.append(states[: len(model.model.layers)])
    same = [torch.equal(*states) for states in zip(*heard, strict=True)]
    assert same == [number < layer for number in range(len(same))]


def test_missing_placeholders_raise(reference_model: Any) -> None:
    model = make_native_model(reference_model.settings, reference_model)
    batch = pack_conversations(reference_model, SAMPLES)
    with pytest.raises(AssertionError, match="41 placeholder tokens for 42 image features"):
        model(replace(batch, visual_indices_M=batch.visual_indices_M[1:]))
    with pytest.raises(AssertionError, match="167 patches for grids of 168"):
        model(replace(batch, patches_ND=batch.patches_ND[1:]))


def test_single_frame_matches_repeated_frames(reference_model: Any) -> None:
    model = make_native_model(reference_model.settings, reference_model)
    pixels = model.config.vision.patch_size**2
    one_NCP = torch.randint(0, 256, (16, 3, pixels), dtype=torch.uint8)
    both = one_NCP.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1)
    grids = ((1, 4, 4),)
    assert torch.equal(
        model.encode_images(one_NCP.flatten(1), grids), model.encode_images(both, grids)
    )


def test_frozen_encoder_builds_no_graph(reference_model: Any) -> None:
    model = make_native_model(reference_model.settings, reference_model)
    batch = pack_conversations(reference_model, SAMPLES)
    for part in (model.visual, model.model.embed_tokens):
        part.requires_grad_(False)
    assert not model.encode_images(batch.patches_ND, batch.grid_thw).requires_grad
    model(batch).sum().backward()
    assert model.model.layers[-1].self_attn.o_proj.weight.grad is not None


def test_merger_trains_with_frozen_encoder(reference_model: Any) -> None:
    model = make_native_model(reference_model.settings, reference_model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(get_part(name) == "merger")
    model(pack_conversations(reference_model, SAMPLES)).square().sum().backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == {name for name, _ in model.named_parameters() if get_part(name) == "merger"}


class NoiseAdapter(nn.Module):
    """Adapter stub: the base product with dropout and its own weight."""

    def __init__(self, group: FusedLinear) -> None:
        super().__init__()
        self.widths = list(group.output_sizes.values())
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        y = nn.functional.linear(nn.functional.dropout(x, 0.3, self.training), weight, bias)
        return (self.scale * y).split(self.widths, -1)


def with_noise_adapters(theirs: Any) -> VisionLanguageModel:
    model = make_native_model(theirs.settings, theirs)
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.adapter = NoiseAdapter(module)
    return model.train()


def test_adapter_makes_frozen_encoder_trainable(reference_model: Any) -> None:
    model = make_native_model(reference_model.settings, reference_model)
    model.requires_grad_(False)
    assert not model.visual.is_encoder_trainable
    proj = model.visual.blocks[0].attn.proj
    proj.adapter = NoiseAdapter(proj)
    assert model.visual.is_encoder_trainable
    model(pack_conversations(reference_model, SAMPLES)).square().sum().backward()
    assert proj.adapter.scale.grad.abs() > 0


def test_activation_checkpointing_is_bit_exact_with_dropout(reference_model: Any) -> None:
    batch = pack_conversations(reference_model, SAMPLES)
    found = []
    for checkpointed in (0.0, 0.4, 1.0):
        model = with_noise_adapters(reference_model)
        model.activation_checkpointing = checkpointed
        torch.manual_seed(3)
        loss = model(batch).square().sum()
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(list(with_noise_adapters(reference_model).parameters())) + 1
    assert all(map(torch.equal, *found[:2]))
    assert all(map(torch.equal, *found[1:]))


def test_activation_checkpointing_stores_less(reference_model: Any) -> None:
    batch = pack_conversations(reference_model, SAMPLES)
    retained = []
    for checkpointed in (0.0, 0.5, 1.0):
        model = make_native_model(reference_model.settings, reference_model)
        model.activation_checkpointing = checkpointed
        values = [0]

        def count(tensor: Tensor, values: list[int] = values) -> Tensor:
            values[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(batch)
        retained.append(values[0])
    assert retained[2] < retained[1] < retained[0]
    assert retained[2] < retained[0] / 2


def test_hub_names_are_separate_linear_layers(reference_model: Any) -> None:
    model = with_noise_adapters(reference_model)
    names = [tensor.name for tensor in hub_tensors(model)]
    assert len(names) == len(set(names))
    last_layer = len(model.model.layers) - 1
    assert f"model.layers.{last_layer}.self_attn.k_proj.weight" in names
    assert {"visual.merger.mlp.2.weight", "visual.merger.linear_fc2.weight"} & set(names)
    assert not [name for name in names if "adapter" in name or "qkv_proj" in name]
    assert sum(tensor.data.numel() for tensor in hub_tensors(model)) == sum(
        p.numel() for name, p in model.named_parameters() if "adapter" not in name
    )
