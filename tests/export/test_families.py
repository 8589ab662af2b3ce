"""Every family, and what was published in four bits, is merged with the same proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from gptq_fixtures import GptqConfig, write_quantized_model
from hf_reference import CPU
from lora_fixtures import tune_with_lora
from tiny_model import TinyFamily, create_tiny_model

from finesight.config import Precision
from finesight.export.hf_files import HF_ARCHITECTURES
from finesight.export.model_card import VerifiedMerge
from finesight.export.verified_merge import merge_and_verify
from finesight.infer.model_loader import resolve_model_source
from finesight.model.lora.peft_io import save_adapter
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

PARTS = {"language": "lora", "vision": "lora", "merger": "lora"}


def adapter_on(base: ModelFolder, folder: Path, **tune: Any) -> Path:
    model = tune_with_lora(
        load_model(base, torch.float32, CPU), tune | {"lora": {"rank": 2, "alpha": 1}}
    )
    folder.mkdir()
    save_adapter(folder, model, base_model=str(base.path), base_fingerprint=base.fingerprint())
    return folder


def merged(source: Path, out: Path, precision: Precision = "auto") -> VerifiedMerge:
    parts = resolve_model_source(str(source))
    return merge_and_verify(
        str(source), parts, out, precision=precision, num_samples=2, device="cpu"
    )


def is_proved(proved: VerifiedMerge) -> bool:
    parity = proved.parity
    return (
        parity.adapter_change > 1e-3
        and parity.merge_change < 1e-4
        and parity.reload_difference < 1e-5
        and parity.num_equal + len(parity.divergences) == 2
    )


@pytest.mark.parametrize("precision", ["auto", "bf16"])
@pytest.mark.parametrize("family", get_args(TinyFamily))
def test_every_family_is_merged_and_verified(
    family: TinyFamily, precision: Precision, tmp_path: Path
) -> None:
    base = ModelFolder(create_tiny_model(tmp_path / "base", family))
    proved = merged(adapter_on(base, tmp_path / "adapter", **PARTS), tmp_path / "out", precision)
    assert is_proved(proved), proved.parity
    assert (proved.parity.rounding_change is None) is (precision == "auto")
    config = json.loads((proved.folder / "config.json").read_text())
    if family in HF_ARCHITECTURES:
        assert config["architectures"] == [HF_ARCHITECTURES[family]]
    card = (proved.folder / "README.md").read_text()
    assert ("vllm serve out" in card) is (family in HF_ARCHITECTURES)


def test_adapter_on_four_bit_model(tmp_path: Path) -> None:
    """Compared with the bits as they are, and written as what they stand for."""
    source = ModelFolder(create_tiny_model(tmp_path / "source"))
    four, _ = write_quantized_model(source, tmp_path, GptqConfig())
    proved = merged(adapter_on(four, tmp_path / "adapter", language="lora"), tmp_path / "out")
    assert proved.dequantized_layers == proved.merged_layers == 14
    assert is_proved(proved), proved.parity
    assert "14 layers were dequantized from 4 bits" in (proved.folder / "README.md").read_text()
