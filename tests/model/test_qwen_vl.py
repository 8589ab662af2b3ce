"""Qwen-VL's model: the published sizes and names, what is refused, and rules beside the network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_qwen_vl import CONFIGS

from finesight.errors import UserError
from finesight.hub import PREPROCESSOR_DEFAULTS
from finesight.model.geometry import Geometry, Settings, read_pixels
from finesight.model.network import FAMILIES, VisionLanguageModel
from finesight.model.parts import PARTS, part_of
from finesight.model.qwen_language import logn_scale, ntk_base, ntk_steps
from finesight.model.qwen_vl import sine_positions
from finesight.model.weights import HubTensor, hub_tensors, random_model

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "qwen_assets" / "Qwen-VL-Chat"
ARCHITECTURE = FAMILIES["qwen"]
CPU = torch.device("cpu")


def _small(**changes: Any) -> dict[str, Any]:
    config = CONFIGS["few queries"]
    return config | {"visual": config["visual"] | changes.pop("visual", {})} | changes


def _refused(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        random_model(config, 0, torch.float32, CPU)
    return str(caught.value)


@pytest.fixture(scope="module")
def published() -> list[HubTensor]:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    config = Settings(json.loads((ASSETS / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        visual = ARCHITECTURE.vision(config, read_pixels(Settings(PREPROCESSOR_DEFAULTS)))
        geometry = Geometry(ARCHITECTURE.language(config), visual.geometry)
        return list(hub_tensors(VisionLanguageModel(ARCHITECTURE, geometry, visual)))


def test_the_published_model_has_so_many_tensors_and_bytes(published: list[HubTensor]) -> None:
    # The numbers of the index that its weights were published with.
    assert len(published) == 853
    assert 2 * sum(tensor.data.numel() for tensor in published) == 19_313_870_336


def test_names_go_to_the_published_ones_and_back(published: list[HubTensor]) -> None:
    names = {tensor.name: ARCHITECTURE.published_name(tensor.name) for tensor in published}
    assert all(ARCHITECTURE.native_name(theirs) == ours for ours, theirs in names.items())
    shapes = {names[tensor.name]: tensor.shape for tensor in published}
    expected = {
        "lm_head.weight": (151936, 4096),
        "transformer.wte.weight": (151936, 4096),
        "transformer.ln_f.weight": (4096,),
        "transformer.h.31.attn.c_attn.weight": (12288, 4096),
        "transformer.h.0.attn.c_attn.bias": (12288,),
        "transformer.h.0.attn.c_proj.weight": (4096, 4096),
        "transformer.h.0.mlp.w1.weight": (11008, 4096),
        "transformer.h.0.mlp.w2.weight": (11008, 4096),
        "transformer.h.0.mlp.c_proj.weight": (4096, 11008),
        "transformer.visual.conv1.weight": (1664, 3, 14, 14),
        "transformer.visual.positional_embedding": (256, 1664),
        "transformer.visual.ln_pre.bias": (1664,),
        "transformer.visual.transformer.resblocks.47.attn.in_proj.weight": (4992, 1664),
        "transformer.visual.transformer.resblocks.0.mlp.c_fc.weight": (8192, 1664),
        "transformer.visual.attn_pool.query": (256, 4096),
        "transformer.visual.attn_pool.pos_embed": (256, 4096),
        "transformer.visual.attn_pool.kv_proj.weight": (4096, 1664),
        "transformer.visual.attn_pool.attn.in_proj_weight": (12288, 4096),
        "transformer.visual.attn_pool.attn.out_proj.bias": (4096,),
        "transformer.visual.ln_post.weight": (4096,),
        "transformer.visual.proj": (4096, 4096),
    }
    assert expected == {name: shapes[name] for name in expected}


def test_every_tensor_belongs_to_a_part(published: list[HubTensor]) -> None:
    size = dict.fromkeys(PARTS, 0)
    for tensor in published:
        size[part_of(tensor.name)] += tensor.data.numel()
    millions = {part: round(numbers / 1e6) for part, numbers in size.items()}
    assert millions == {"vision": 1843, "merger": 93, "language": 6477, "embeddings": 1245}


@pytest.mark.parametrize(
    ("side", "width", "products"),
    [
        (4, 128, [42.32709791, 12.605224, -19.32134915]),
        (16, 4096, [-481.36742857, 433.45265425, 666.47308018]),
    ],
)
def test_positions_of_queries_are_the_published_ones(
    side: int, width: int, products: list[float]
) -> None:
    found = sine_positions(side, width)
    vectors = np.random.RandomState(5).standard_normal((3, found.size))
    assert np.abs(vectors @ found.flatten() - products).max() < 1e-3
    model = random_model(_small(), 0, torch.float32, CPU)
    table = model.get_buffer("visual.merger.attn_pool.pos_embed")
    assert torch.equal(table, torch.from_numpy(sine_positions(4, 256)))


def test_the_rotary_base_grows_each_time_the_trained_length_doubles() -> None:
    lengths = torch.tensor([1, 2048, 2049, 4096, 4097, 8192, 8193])
    assert ntk_steps(lengths, 2048).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert ntk_base(1e4, 128, 0) == 1e4
    assert ntk_base(1e4, 128, 1) == pytest.approx(1e4 * 3 ** (128 / 126))


def test_queries_grow_with_the_logarithm_of_their_position() -> None:
    found = logn_scale(torch.tensor([0, 2047, 2048, 8191]), 2048)
    assert found.tolist() == pytest.approx(
        [1.0, 1.0, math.log(2049, 2048), math.log(8192, 2048)], abs=1e-7
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"visual": {"image_size": 120}}, "visual.image_size is 120"),
        ({"visual": {"image_size": 84}}, "visual.image_size is 84"),
        ({"visual": {"n_queries": 15}}, "expected: a multiple of 14 x 3"),
        ({"visual": {"heads": 5}}, "visual.heads is 5"),
        ({"visual": {"output_dim": 200}}, "visual.output_dim is 200"),
        ({"visual": {"output_dim": 128}}, "features of pictures are 128 wide"),
        ({"kv_channels": 32}, "kv_channels is 32"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ({"no_bias": False}, "no_bias is False"),
        ({"intermediate_size": 191}, "intermediate_size is 191"),
        ({"seq_length": None}, "seq_length is missing"),
        ({"seq_length": 1}, "seq_length is 1"),
    ],
)
def test_what_is_not_built_is_refused(changes: dict[str, Any], said: str) -> None:
    assert said in _refused(_small(**changes))


def test_a_language_model_alone_is_refused() -> None:
    config = _small()
    del config["visual"]
    assert "visual is missing" in _refused(config)
