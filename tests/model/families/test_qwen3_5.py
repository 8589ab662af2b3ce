"""Qwen3.5: published parameters, adapters of all linear layers, and rejected configs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import make_config
from random_model import init_random_model

from finesight.errors import UserError
from finesight.model.config import ConfigReader
from finesight.model.trainable import get_part
from finesight.model.vlm import build_model
from finesight.model.weights_io import hub_tensors
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


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_shapes_and_counts_are_published(name):
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


def test_unsupported_config_is_rejected():
    for change, problem in (
        ({"output_gate_type": "sigmoid"}, "output_gate_type"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads"),
        ({"attn_output_gate": False}, "attn_output_gate"),
    ):
        with pytest.raises(UserError, match=problem):
            init_random_model(make_config("qwen3_5", **change), 0, torch.float32, CPU)
