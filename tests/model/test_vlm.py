from dataclasses import replace
from typing import Any

import hf_reference
import pytest
import torch
from torch import Tensor, nn

from finesight.encode.batch import PackedBatch
from finesight.model.linear import FusedLinear
from finesight.model.trainable import get_part
from finesight.model.vlm import VisionLanguageModel

SAMPLES = [
    hf_reference.make_conversation(1, 3, ("image", (1, 10, 12)), 4),
    hf_reference.make_conversation(2, 9),
    hf_reference.make_conversation(3, 1, ("video", (2, 4, 6)), 2),
]

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def reference_model(request: pytest.FixtureRequest) -> Any:
    model = hf_reference.make_reference_model(hf_reference.make_config(request.param))
    model.settings = hf_reference.make_config(request.param)
    return model


@pytest.fixture
def model(reference_model: Any) -> VisionLanguageModel:
    return hf_reference.make_native_model(reference_model.settings, reference_model)


@pytest.fixture(scope="module")
def batch(reference_model: Any) -> PackedBatch:
    return hf_reference.pack_conversations(reference_model, SAMPLES)


def test_hidden_states_only_at_supervised_positions(model, batch):
    """Token ids of the placeholders have no effect, nor has encoding images in advance."""
    h_LD = model(batch)
    some = replace(batch, logit_indices_L=torch.tensor([4, 0, 17]))
    assert model(some).shape == (3, 48)
    assert hf_reference.max_relative_error(model(some), h_LD[[4, 0, 17]]) < 1e-6
    elsewhere = replace(batch, ids_T=batch.ids_T.index_fill(0, batch.visual_indices_M, 7))
    assert torch.equal(model(elsewhere), h_LD)
    features_MKD = model.encode_images(batch.patches_ND, batch.grid_thw)
    assert torch.equal(model(batch, features_MKD), h_LD)


def test_single_frame_matches_repeated_frames(model):
    pixels = model.config.vision.patch_size**2
    one_NCP = torch.randint(0, 256, (16, 3, pixels), dtype=torch.uint8)
    both_ND = one_NCP.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1)
    found, expected = (
        model.encode_images(patches_ND, ((1, 4, 4),))
        for patches_ND in (one_NCP.flatten(1), both_ND)
    )
    assert torch.equal(found, expected)


def test_frozen_encoder_builds_no_graph(model, batch):
    """The merger and the adapters of a frozen encoder are trained."""
    for part in (model.visual, model.model.embed_tokens):
        part.requires_grad_(False)
    assert not model.encode_images(batch.patches_ND, batch.grid_thw).requires_grad
    model(batch).sum().backward()
    assert model.model.layers[-1].self_attn.o_proj.weight.grad is not None
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(get_part(name) == "merger")
    proj = model.visual.blocks[0].attn.proj
    for adapted in (False, True):
        if adapted:
            proj.adapter = NoiseAdapter(proj)
        assert model.visual.is_encoder_trainable == adapted
        model(batch).square().sum().backward()
        gradients = {name for name, p in model.named_parameters() if p.grad is not None}
        assert gradients == {name for name, p in model.named_parameters() if p.requires_grad}


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
    model = hf_reference.make_native_model(theirs.settings, theirs)
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.adapter = NoiseAdapter(module)
    return model.train()


def test_activation_checkpointing_is_bit_exact_with_dropout(reference_model, batch):
    found, retained = [], []

    def count(tensor: Tensor) -> Tensor:
        retained[-1] += tensor.numel()
        return tensor

    for checkpointed in (0.0, 0.4, 1.0):
        model = with_noise_adapters(reference_model)
        model.activation_checkpointing = checkpointed
        torch.manual_seed(3)
        retained.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(batch).square().sum()
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(list(model.parameters())) + 1
    assert all(map(torch.equal, *found[:2]))
    assert all(map(torch.equal, *found[1:]))
    assert retained[2] < retained[1] < retained[0]
    assert retained[2] < retained[0] / 2
