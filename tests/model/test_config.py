from typing import Any

import pytest
import torch
from case_files import load_cases
from hf_reference import CPU, make_config

from finesight.errors import UserError
from finesight.model.config import ConfigReader, parse_pixel_normalization
from finesight.model.vlm import build_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS, ModelFolder

CASES = load_cases("config")

META = torch.device("meta")


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("Qwen2-VL-2B-Instruct", 2208985600),
        ("Qwen2.5-VL-3B-Instruct", 3754622976),
        ("Qwen2.5-VL-7B-Instruct", 8292166656),
        ("Qwen3-VL-Embedding-8B", 8767123696),
    ],
)
def test_published_configs(shared, name, num_parameters):
    folder = ModelFolder(shared / "qwen_assets" / name)
    model = build_model(
        ConfigReader(folder.config), ConfigReader(folder.preprocessor_config), torch.bfloat16, META
    )
    assert sum(p.numel() for p in model.parameters()) == num_parameters


def assert_reported(family: str, change: dict[str, Any], key: str) -> None:
    given = ConfigReader(make_config(family, **dict(change))), ConfigReader(PREPROCESSOR_DEFAULTS)
    with pytest.raises(UserError) as refused:
        build_model(*given, torch.float32, META)
    assert key in refused.value.what
    assert refused.value.where == "config.json"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("change", "key"), load_cases("model_config_errors"))
def test_invalid_config_values_are_reported(family, change, key):
    assert_reported(family, change, key)


def test_invalid_values_of_a_family_are_reported():
    for family, change, key in (
        ("qwen2_5_vl", {"vision": {"window_size": 27}}, "vision_config.window_size"),
        ("qwen2_5_vl", {"vision": {"fullatt_block_indexes": [-1]}}, "fullatt_block_indexes"),
        ("qwen2_5_vl", {"vision": {"fullatt_block_indexes": [True]}}, "fullatt_block_indexes"),
        *(("qwen3_vl", *case) for case in CASES["test_invalid_qwen3_config_is_reported"]),
        *(("qwen3_vl_moe", *case) for case in CASES["test_invalid_moe_config_is_reported"]),
    ):
        assert_reported(family, change, key)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10**9, "too large for this machine's memory"),
        (2**61, "an integer from 1 to 2147483647"),
        (10**30, "an integer from 1 to 2147483647"),
    ],
)
def test_oversized_config_is_rejected(size, message):
    settings = make_config("qwen3_vl", vision={"hidden_size": size})
    with pytest.raises(UserError, match=message):
        build_model(ConfigReader(settings), ConfigReader(PREPROCESSOR_DEFAULTS), torch.float32, CPU)


@pytest.mark.parametrize(
    "change",
    [{"image_mean": [0.5]}, {"image_std": "0.5"}, {"rescale_factor": 0}, {"do_normalize": False}],
)
def test_invalid_pixel_settings_are_rejected(change):
    with pytest.raises(UserError, match=next(iter(change))):
        parse_pixel_normalization(ConfigReader({**PREPROCESSOR_DEFAULTS, **change}))
