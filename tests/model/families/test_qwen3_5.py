"""Qwen3.5: packed = single at chunk borders, published parameters, checkpointing and adapters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import make_config
from torch import Tensor

from finesight.config import TuneSettings
from finesight.encode.packing import PackedBatch
from finesight.errors import UserError
from finesight.model.config import ConfigReader
from finesight.model.linear import find_adaptable_layers
from finesight.model.trainable import configure_tuning, get_part
from finesight.model.vlm import VisionLanguageModel, build_model
from finesight.model.weights_io import hub_tensors, init_random_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "qwen_assets"
CPU = torch.device("cpu")
PARAMETERS = {
    "Qwen3.5-0.8B": (0.853, 0.101),
    "Qwen3.5-2B": (2.213, 0.331),
    "Qwen3.5-4B": (4.539, 0.334),
    "Qwen3.5-9B": (9.410, 0.456),
    "Qwen3.5-27B": (27.357, 0.461),
    "Qwen3.5-35B-A3B": (35.107, 0.447),
    "Qwen3.6-27B": (27.357, 0.461),
    "Qwen3.6-35B-A3B": (35.107, 0.447),
    "Qwen3.8-27B": (27.357, 0.461),
}


def make_model(family: str = "qwen3_5", dtype: torch.dtype = torch.float64) -> VisionLanguageModel:
    """Make a model with random weights, A_log included."""
    model = init_random_model(make_config(family), 0, dtype, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15, generator=generator)
            if name.endswith("A_log"):
                parameter.uniform_(-4, 1, generator=generator)
    return model


def make_texts(lengths: list[int], seed: int = 0) -> PackedBatch:
    """Make random texts end to end, every token asked for its hidden state."""
    ids_T = torch.randint(90, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    position_T = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(
        sample_ids=tuple(map(str, range(len(lengths)))),
        lengths=tuple(lengths),
        grid_thw=(),
        ids_T=ids_T,
        position_ids_3T=position_T.expand(3, -1),
        cu_seqlens_S1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        patches_ND=torch.empty(0, 6, dtype=torch.uint8),
        visual_indices_M=torch.empty(0, dtype=torch.int64),
        logit_indices_L=torch.arange(len(ids_T)),
        labels_L=ids_T,
    )


def split_batch(batch: PackedBatch) -> list[PackedBatch]:
    """Make a batch of each sequence alone."""
    alone = []
    for start, length in zip(batch.cu_seqlens_S1.tolist(), batch.lengths, strict=False):
        tokens = slice(start, start + length)
        alone.append(
            replace(
                make_texts([length]),
                ids_T=batch.ids_T[tokens],
                labels_L=batch.ids_T[tokens],
            )
        )
    return alone


def run_backward(
    model: VisionLanguageModel, batches: list[PackedBatch]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return hidden states of all batches, and the gradients of a random loss."""
    model.zero_grad()
    h_LD = torch.cat([model(batch) for batch in batches])
    weights = torch.randn(h_LD.shape, generator=torch.Generator().manual_seed(2), dtype=h_LD.dtype)
    (h_LD * weights).sum().backward()
    return h_LD.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "lengths", [[1, 2, 3, 4], [63, 64, 65, 1, 127, 128, 129], [1, 1025, 1], [4097, 5, 64]]
)
def test_packed_sequences_equal_single_ones(lengths: list[int]) -> None:
    model, batch = make_model(), make_texts(lengths)
    packed, packed_grads = run_backward(model, [batch])
    alone, alone_grads = run_backward(model, split_batch(batch))
    torch.testing.assert_close(packed, alone, rtol=1e-8, atol=1e-9)
    assert packed_grads.keys() == alone_grads.keys()
    for name, gradient in packed_grads.items():
        error = (gradient - alone_grads[name]).abs().max() / alone_grads[name].abs().max()
        assert error <= 1e-8, name


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_activation_checkpointing_does_not_change_gradients(family: str) -> None:
    model, batch = make_model(family, torch.float32), make_texts([70, 9])
    hidden, expected = run_backward(model, [batch])
    model.activation_checkpointing = 1.0
    again, gradients = run_backward(model, [batch])
    assert torch.equal(hidden, again)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_decay_parameters_are_fp32_in_a_bf16_model() -> None:
    model = make_model(dtype=torch.bfloat16)
    wide = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    suffixes = ("linear_attn.A_log", "linear_attn.norm.weight")
    assert wide == {f"model.layers.{n}.{suffix}" for n in range(3) for suffix in suffixes}
    h_LD, gradients = run_backward(model, [make_texts([70, 9])])
    assert h_LD.dtype == torch.bfloat16
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_every_linear_layer_of_the_decoder_has_an_adapter() -> None:
    model = make_model("qwen3_5_moe")
    layers = {name.rpartition(".")[2] for name in find_adaptable_layers(model) if "model" in name}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z"} <= layers
    assert {"in_proj_b", "in_proj_a", "out_proj", "gate_proj", "up_proj", "down_proj"} <= layers
    configure_tuning(model, TuneSettings.model_validate({"language": "lora"}), seed=0)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".adapter." in name for name in trainable)
    assert any(".shared_expert." in name for name in trainable)


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_shapes_and_counts_are_published(name: str) -> None:
    table = ASSETS / name / "weights.tsv"
    if not table.exists():
        pytest.skip("no published files")
    config: dict[str, Any] = json.loads((table.parent / "config.json").read_text())
    model = build_model(
        ConfigReader(config),
        ConfigReader(PREPROCESSOR_DEFAULTS),
        torch.bfloat16,
        torch.device("meta"),
    )
    architecture = model.architecture
    found = {architecture.to_hub_name(t.name): t.shape for t in hub_tensors(model)}
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    published = {n: tuple(map(int, shape.split("x"))) for n, _, shape in rows}
    copied = {n for n in published if n.startswith(architecture.copied_prefixes)}
    assert copied
    assert found == {n: shape for n, shape in published.items() if n not in copied}
    sizes = {t.name: math.prod(t.shape) for t in hub_tensors(model)}
    vision = sum(n for name, n in sizes.items() if get_part(name) in ("vision", "merger"))
    total = sum(sizes.values())
    assert (round(total / 1e9, 3), round(vision / 1e9, 3)) == PARAMETERS[name]
    fp32 = {n for n, dtype, _ in rows if dtype == "F32"}
    assert all(n.endswith(architecture.fp32_suffixes) for n in fp32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"output_gate_type": "sigmoid"}, "output_gate_type"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads"),
        ({"attn_output_gate": False}, "attn_output_gate"),
    ],
)
def test_unsupported_config_is_rejected(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        init_random_model(make_config("qwen3_5", **change), 0, torch.float32, CPU)
