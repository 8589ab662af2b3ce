from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from case_files import load_cases
from each_value import each
from hf_reference import CPU, make_config

from finesight.errors import UserError
from finesight.model.config import ConfigReader, ModelConfig, parse_pixel_normalization
from finesight.model.vlm import build_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS, ModelFolder

CASES = load_cases("config")

META = torch.device("meta")


def geometry(settings: dict[str, Any]) -> ModelConfig:
    return build_model(
        ConfigReader(settings), ConfigReader(PREPROCESSOR_DEFAULTS), torch.float32, META
    ).config


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "kv_heads", "tied", "parameters"),
    CASES["test_published_configs"],
)
def test_published_configs(
    shared: Path,
    name: str,
    width: int,
    depth: int,
    heads: int,
    kv_heads: int,
    tied: bool,
    parameters: int,
) -> None:
    folder = ModelFolder(shared / "qwen_assets" / name)
    model = build_model(
        ConfigReader(folder.config), ConfigReader(folder.preprocessor_config), torch.bfloat16, META
    )
    language, vision = model.config.decoder, model.config.vision
    assert (language.hidden_size, language.num_layers, language.num_heads) == (width, depth, heads)
    assert (language.num_kv_heads, language.tie_word_embeddings, language.head_dim) == (
        kv_heads,
        tied,
        128,
    )
    newest = folder.family == "qwen3_vl"
    assert (vision.hidden_size, vision.num_layers) == ((1152, 27) if newest else (1280, 32))
    assert (vision.num_heads, vision.merge_size) == (16, 2)
    assert vision.out_hidden_size == width
    assert vision.patch_dim == (1536 if newest else 1176)
    assert sum(p.numel() for p in model.parameters()) == parameters


def _sized(family: str, text: tuple[int, ...], vision: tuple[int, ...]) -> dict[str, Any]:
    """Return a published config: hidden size, layers, heads, key heads, intermediate size,
    vocabulary.

    `vision` holds hidden size, layers and intermediate size of the vision encoder.
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    language = dict(zip((*names, "intermediate_size", "vocab_size"), text, strict=True))
    width, depth, inner = vision
    encoder: dict[str, Any] = {"depth": depth, "num_heads": 16}
    if family == "qwen2_vl":
        encoder |= {"embed_dim": width, "hidden_size": text[0], "mlp_ratio": 4}
    else:
        encoder |= {"hidden_size": width, "intermediate_size": inner, "out_hidden_size": text[0]}
    if not family.startswith("qwen3"):
        rope = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        return make_config(family, vision=encoder, tie_word_embeddings=False, **language, **rope)
    encoder |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}
    rope = {"rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20]}}
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": inner_of(text),
    }
    more = experts if family == "qwen3_vl_moe" else {}
    tied = text[0] < 4096 and not more
    return make_config(
        family, vision=encoder, tie_word_embeddings=tied, head_dim=128, **language, **rope, **more
    )


def inner_of(text: tuple[int, ...]) -> int:
    """Return the intermediate size of an expert, three eighths of the hidden size."""
    return text[0] * 3 // 8


@pytest.mark.parametrize(
    ("family", "text", "vision", "billions"),
    [
        ("qwen2_vl", (3584, 28, 28, 4, 18944, 152064), (1280, 32, 0), 8.291),
        ("qwen2_vl", (8192, 80, 64, 8, 29568, 152064), (1280, 32, 0), 73.4),
        ("qwen2_5_vl", (5120, 64, 40, 8, 27648, 152064), (1280, 32, 3456), 33.45),
        ("qwen2_5_vl", (8192, 80, 64, 8, 29568, 152064), (1280, 32, 3456), 73.41),
        ("qwen3_vl", (2048, 28, 16, 8, 6144, 151936), (1024, 24, 4096), 2.128),
        ("qwen3_vl", (2560, 36, 32, 8, 9728, 151936), (1024, 24, 4096), 4.438),
        ("qwen3_vl", (5120, 64, 64, 8, 25600, 151936), (1152, 27, 4304), 33.36),
        ("qwen3_vl_moe", (2048, 48, 32, 4, 6144, 151936), (1152, 27, 4304), 31.07),
        ("qwen3_vl_moe", (4096, 94, 64, 4, 12288, 151936), (1152, 27, 4304), 235.7),
    ],
)
def test_every_published_size_is_built(
    family: str, text: tuple[int, ...], vision: tuple[int, ...], billions: float
) -> None:
    settings = ConfigReader(_sized(family, text, vision))
    model = build_model(settings, ConfigReader(PREPROCESSOR_DEFAULTS), torch.bfloat16, META)
    found = sum(p.numel() for p in model.parameters()) / 1e9
    assert found == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_transformers_5_config_layout_is_equivalent(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    flat = make_config(family, rope_theta=5000.0, tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(flat))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "nested")
    nested = json.loads((tmp_path / "nested" / "config.json").read_text())
    assert "hidden_size" not in nested
    assert nested["text_config"]["hidden_size"] == 48
    assert geometry(nested) == geometry(flat)


def test_qwen3_transformers_5_config_layout_is_equivalent(tmp_path: Path) -> None:
    from transformers import AutoConfig

    hubs = make_config("qwen3_vl", rope_theta=5000.0, tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(hubs))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in again["text_config"]
    assert geometry(again) == geometry(hubs)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@each(("change", "key"), load_cases("model_config_errors"))
def test_invalid_config_values_are_reported(family: str, change: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as refused:
        geometry(make_config(family, **dict(change)))
    assert key in refused.value.what
    assert refused.value.where == "config.json"
    assert refused.value.expected


@each(("change", "key"), CASES["test_invalid_moe_config_is_reported"])
def test_invalid_moe_config_is_reported(change: dict[str, Any], key: str) -> None:
    assert geometry(make_config("qwen3_vl_moe", mlp_only_layers=[])).decoder.moe is not None
    with pytest.raises(UserError) as refused:
        geometry(make_config("qwen3_vl_moe", **change))
    assert key in refused.value.what


@each(("change", "key"), CASES["test_invalid_qwen3_config_is_reported"])
def test_invalid_qwen3_config_is_reported(change: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as refused:
        geometry(make_config("qwen3_vl", **dict(change)))
    assert key in refused.value.what
    assert refused.value.expected


def test_null_values_count_as_missing() -> None:
    nulls = dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "head_dim"), None)
    nulls |= dict.fromkeys(("num_key_value_heads", "max_position_embeddings"), None)
    found = geometry(make_config("qwen2_vl", **nulls)).decoder
    assert (found.tie_word_embeddings, found.num_kv_heads, found.max_position_embeddings) == (
        False,
        found.num_heads,
        32768,
    )


@pytest.mark.parametrize(
    "change",
    [{"window_size": 27}, {"fullatt_block_indexes": [-1]}, {"fullatt_block_indexes": [True]}],
)
def test_invalid_windows_are_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"vision_config.{next(iter(change))}"):
        geometry(make_config("qwen2_5_vl", vision=change))


@pytest.mark.parametrize(
    "change",
    [{"image_mean": [0.5]}, {"image_std": "0.5"}, {"rescale_factor": 0}, {"do_normalize": False}],
)
def test_invalid_pixel_settings_are_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        parse_pixel_normalization(ConfigReader({**PREPROCESSOR_DEFAULTS, **change}))


def test_build_sets_dtype_and_device() -> None:
    model = build_model(
        ConfigReader(make_config("qwen2_vl")),
        ConfigReader(PREPROCESSOR_DEFAULTS),
        torch.bfloat16,
        CPU,
    )
    assert {(p.dtype, p.device) for p in model.parameters()} == {(torch.bfloat16, CPU)}
    assert not list(model.buffers())
