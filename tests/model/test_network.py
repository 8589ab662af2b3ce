from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import CPU, config, conversation, distance, native, packed, reference
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.hub import PREPROCESSOR_DEFAULTS
from finesight.model.geometry import Settings
from finesight.model.linear import GroupedLinear
from finesight.model.network import VisionLanguageModel, build
from finesight.model.parts import part_of
from finesight.model.weights import hub_tensors

SAMPLES = [
    conversation(1, 3, ("image", (1, 10, 12)), 4),
    conversation(2, 9),
    conversation(3, 1, ("video", (2, 4, 6)), 2),
]

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]


@pytest.fixture(params=FAMILIES)
def theirs(request: pytest.FixtureRequest) -> Any:
    model = reference(config(request.param))
    model.settings = config(request.param)
    return model


def test_hidden_states_come_only_where_a_learned_token_is_predicted(theirs: Any) -> None:
    model = native(theirs.settings, theirs)
    batch = packed(theirs, SAMPLES)
    some = replace(batch, predict_L=torch.tensor([4, 0, 17]))
    assert model(some).shape == (3, 48)
    assert distance(model(some), model(batch)[[4, 0, 17]]) < 1e-6


def test_the_steps_one_by_one_are_the_forward_pass(theirs: Any) -> None:
    from finesight.model.attention import PackedAttention, Segments

    model = native(theirs.settings, theirs)
    batch = packed(theirs, SAMPLES)
    features_MKD = model.see(batch.patches_ND, batch.grids)
    assert features_MKD.shape == (len(batch.visual_at_M), model.visual.features, 48)
    attention = PackedAttention(Segments.of(batch.lengths, torch.device("cpu")))
    h_TD = model.normed(model.read(batch, attention, features_MKD=features_MKD))
    assert torch.equal(h_TD, model(batch))
    assert torch.equal(h_TD, model.normed(model.read(batch, attention)))
    assert torch.equal(model.logits(h_TD), h_TD @ model.head_weight.T)


@pytest.mark.parametrize("size", [10**9, 2**61, 10**30])
def test_sizes_beyond_any_memory_are_refused(size: int) -> None:
    settings = config("qwen3_vl", vision={"hidden_size": size})
    with pytest.raises(UserError, match="too large for this machine's memory"):
        build(Settings(settings), Settings(PREPROCESSOR_DEFAULTS), torch.float32, CPU)


def test_features_stand_for_their_placeholders(theirs: Any) -> None:
    model = native(theirs.settings, theirs)
    batch = packed(theirs, SAMPLES)
    elsewhere = replace(batch, ids_T=batch.ids_T.index_fill(0, batch.visual_at_M, 7))
    assert torch.equal(model(elsewhere), model(batch))


@pytest.mark.parametrize("layer", [1, 2])
def test_each_deepstack_feature_matters_from_its_layer_on(layer: int) -> None:
    theirs = reference(config("qwen3_vl"))
    model = native(config("qwen3_vl"), theirs)
    batch = packed(theirs, SAMPLES)
    features_MKD = model.see(batch.patches_ND, batch.grids).detach()
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


def test_pictures_without_placeholders_are_an_error(theirs: Any) -> None:
    model = native(theirs.settings, theirs)
    batch = packed(theirs, SAMPLES)
    with pytest.raises(AssertionError, match="41 placeholder tokens for 42 picture features"):
        model(replace(batch, visual_at_M=batch.visual_at_M[1:]))
    with pytest.raises(AssertionError, match="167 patches for grids of 168"):
        model(replace(batch, patches_ND=batch.patches_ND[1:]))


def test_one_frame_stands_for_frames_that_are_alike(theirs: Any) -> None:
    model = native(theirs.settings, theirs)
    pixels = model.geometry.vision.patch**2
    one_NCP = torch.randint(0, 256, (16, 3, pixels), dtype=torch.uint8)
    both = one_NCP.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1)
    grids = ((1, 4, 4),)
    assert torch.equal(model.see(one_NCP.flatten(1), grids), model.see(both, grids))


def test_frozen_vision_keeps_no_graph_and_the_first_layer_no_gradient(theirs: Any) -> None:
    model = native(theirs.settings, theirs)
    batch = packed(theirs, SAMPLES)
    for part in (model.visual, model.model.embed_tokens):
        part.requires_grad_(False)
    assert not model.see(batch.patches_ND, batch.grids).requires_grad
    model(batch).sum().backward()
    assert model.model.layers[0].self_attn.o_proj.weight.grad is not None


def test_the_merger_trains_on_frozen_vision(theirs: Any) -> None:
    model = native(theirs.settings, theirs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) == "merger")
    model(packed(theirs, SAMPLES)).square().sum().backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == {name for name, _ in model.named_parameters() if part_of(name) == "merger"}


class Noise(nn.Module):
    """Stands where an adapter stands: the product with dropout and a weight of its own."""

    def __init__(self, group: GroupedLinear) -> None:
        super().__init__()
        self.widths = list(group.outputs.values())
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        y = nn.functional.linear(nn.functional.dropout(x, 0.3, self.training), weight, bias)
        return (self.scale * y).split(self.widths, -1)


def noisy(theirs: Any) -> VisionLanguageModel:
    model = native(theirs.settings, theirs)
    for module in model.modules():
        if isinstance(module, GroupedLinear):
            module.adapter = Noise(module)
    return model.train()


def test_an_adapter_makes_frozen_vision_train(theirs: Any) -> None:
    model = native(theirs.settings, theirs)
    model.requires_grad_(False)
    assert not model.visual.trains
    proj = model.visual.blocks[0].attn.proj
    proj.adapter = Noise(proj)
    assert model.visual.trains
    model(packed(theirs, SAMPLES)).square().sum().backward()
    assert proj.adapter.scale.grad.abs() > 0


def test_recomputed_activations_give_the_same_bits_with_dropout(theirs: Any) -> None:
    batch = packed(theirs, SAMPLES)
    found = []
    for recompute in (0.0, 0.4, 1.0):
        model = noisy(theirs)
        model.recompute = recompute
        torch.manual_seed(3)
        loss = model(batch).square().sum()
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(list(noisy(theirs).parameters())) + 1
    assert all(map(torch.equal, *found[:2]))
    assert all(map(torch.equal, *found[1:]))


def test_recomputing_keeps_less_for_the_backward_pass(theirs: Any) -> None:
    batch = packed(theirs, SAMPLES)
    kept = []
    for recompute in (0.0, 0.5, 1.0):
        model = native(theirs.settings, theirs)
        model.recompute = recompute
        numbers = [0]

        def count(tensor: Tensor, numbers: list[int] = numbers) -> Tensor:
            numbers[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(batch)
        kept.append(numbers[0])
    assert kept[2] < kept[1] < kept[0]
    assert kept[2] < kept[0] / 2


def test_hub_names_are_each_linear_layer_on_its_own(theirs: Any) -> None:
    model = noisy(theirs)
    names = [tensor.name for tensor in hub_tensors(model)]
    assert len(names) == len(set(names))
    assert "model.layers.1.self_attn.k_proj.weight" in names
    assert {"visual.merger.mlp.2.weight", "visual.merger.linear_fc2.weight"} & set(names)
    assert not [name for name in names if "adapter" in name or "qkv_proj" in name]
    assert sum(tensor.data.numel() for tensor in hub_tensors(model)) == sum(
        p.numel() for name, p in model.named_parameters() if "adapter" not in name
    )
