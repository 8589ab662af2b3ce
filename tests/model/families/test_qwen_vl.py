"""Qwen-VL: published sizes and names, rejected configs, and rules beyond the network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from case_files import load_cases
from each_value import each
from qwen_vl_reference import CONFIGS

from finesight.errors import UserError
from finesight.model.config import ConfigReader, ModelConfig, parse_pixel_normalization
from finesight.model.families.qwen_vl import sincos_positions
from finesight.model.trainable import MODEL_PARTS, get_part
from finesight.model.vlm import ARCHITECTURES, VisionLanguageModel
from finesight.model.weights_io import HubTensor, hub_tensors, init_random_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS

CASES = load_cases("families_qwen_vl")

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "qwen_assets" / "Qwen-VL-Chat"
ARCHITECTURE = ARCHITECTURES["qwen"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def published() -> list[HubTensor]:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files next to the repository")
    config = ConfigReader(json.loads((ASSETS / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        visual = ARCHITECTURE.build_vision_encoder(
            config, parse_pixel_normalization(ConfigReader(PREPROCESSOR_DEFAULTS))
        )
        geometry = ModelConfig(ARCHITECTURE.parse_decoder_config(config), visual.config)
        return list(hub_tensors(VisionLanguageModel(ARCHITECTURE, geometry, visual)))


def test_published_model_tensor_count_and_size(published):
    # The sizes in the index that its weights were published with.
    assert len(published) == 853
    size = dict.fromkeys(MODEL_PARTS, 0)
    for tensor in published:
        size[get_part(tensor.name)] += tensor.data.numel()
    assert 2 * sum(size.values()) == 19_313_870_336
    millions = {part: round(numbers / 1e6) for part, numbers in size.items()}
    assert millions == {"vision": 1843, "merger": 93, "language": 6477, "embeddings": 1245}


def test_published_name_mapping_roundtrip(published):
    names = {tensor.name: ARCHITECTURE.to_hub_name(tensor.name) for tensor in published}
    assert all(ARCHITECTURE.to_native_name(theirs) == ours for ours, theirs in names.items())
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


@pytest.mark.parametrize(
    ("side", "width", "products"), CASES["test_resampler_positions_match_published"]
)
def test_resampler_positions_match_published(side, width, products):
    found = sincos_positions(side, width)
    vectors = np.random.RandomState(5).standard_normal((3, found.size))
    assert np.abs(vectors @ found.flatten() - products).max() < 1e-3
    model = init_random_model(CONFIGS["few queries"], 0, torch.float32, CPU)
    table = model.get_buffer("visual.merger.attn_pool.pos_embed")
    assert torch.equal(table, torch.from_numpy(sincos_positions(4, 256)))


@each(
    ("changes", "message"),
    [*CASES["test_unsupported_configs_are_rejected"], ({"visual": None}, "visual is missing")],
)
def test_unsupported_configs_are_rejected(changes, message):
    config = CONFIGS["few queries"]
    if changes.get("visual"):
        changes = changes | {"visual": config["visual"] | changes["visual"]}
    with pytest.raises(UserError, match=message):
        init_random_model(config | changes, 0, torch.float32, CPU)
