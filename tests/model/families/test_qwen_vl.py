"""Qwen-VL: published sizes and names, rejected configs, and rules beyond the network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from case_files import load_cases
from qwen_vl_reference import CONFIGS
from random_model import init_random_model, sincos_positions

from finesight.errors import UserError
from finesight.model.config import ConfigReader
from finesight.model.trainable import MODEL_PARTS, get_part
from finesight.model.vlm import build_model
from finesight.model.weights_io import hub_tensors
from finesight.model_folder import PREPROCESSOR_DEFAULTS

CASES = load_cases("families_qwen_vl")

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "qwen_assets" / "Qwen-VL-Chat"
CPU = torch.device("cpu")


def test_published_model_tensor_count_and_size():
    """The names and shapes are tested with the weights of test_qwen_vl_parity."""
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files next to the repository")
    config = ConfigReader(json.loads((ASSETS / "config.json").read_text(encoding="utf-8")))
    settings = config, ConfigReader(PREPROCESSOR_DEFAULTS)
    published = list(hub_tensors(build_model(*settings, torch.bfloat16, torch.device("meta"))))
    # The sizes in the index that its weights were published with.
    assert len(published) == 853
    size = dict.fromkeys(MODEL_PARTS, 0)
    for tensor in published:
        size[get_part(tensor.name)] += tensor.data.numel()
    assert 2 * sum(size.values()) == 19_313_870_336
    millions = {part: round(numbers / 1e6) for part, numbers in size.items()}
    assert millions == {"vision": 1843, "merger": 93, "language": 6477, "embeddings": 1245}


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [*CASES["test_unsupported_configs_are_rejected"], ({"visual": None}, "visual is missing")],
)
def test_unsupported_configs_are_rejected(changes, message):
    config = CONFIGS["few queries"]
    if changes.get("visual"):
        changes = changes | {"visual": config["visual"] | changes["visual"]}
    with pytest.raises(UserError, match=message):
        init_random_model(config | changes, 0, torch.float32, CPU)
