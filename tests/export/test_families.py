"""Every family, and what was published in four bits, is merged with the same proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from gptq import Way, publish
from oracle import CPU
from tuned import tuned

from finesight.config import Precision
from finesight.export.files import ARCHITECTURES
from finesight.export.merging import Proved, merge
from finesight.hub import ModelFolder
from finesight.infer.load import find_parts
from finesight.model.adapter import write_adapter
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import load_model

PARTS = {"language": "lora", "vision": "lora", "merger": "lora"}


def adapter_on(base: ModelFolder, folder: Path, **tune: Any) -> Path:
    model = tuned(load_model(base, torch.float32, CPU), tune | {"lora": {"rank": 2, "alpha": 1}})
    folder.mkdir()
    write_adapter(folder, model, base=str(base.path), base_fingerprint=base.fingerprint())
    return folder


def merged(source: Path, out: Path, precision: Precision = "auto") -> Proved:
    parts = find_parts(str(source))
    return merge(str(source), parts, out, precision=precision, samples=2, device="cpu")


def is_proved(proved: Proved) -> bool:
    parity = proved.parity
    return (
        parity.adapter > 1e-3
        and parity.summed < 1e-4
        and parity.reloaded < 1e-5
        and parity.equal + len(parity.partings) == 2
    )


@pytest.mark.parametrize("precision", ["auto", "bf16"])
@pytest.mark.parametrize("family", get_args(TinyFamily))
def test_every_family(family: TinyFamily, precision: Precision, tmp_path: Path) -> None:
    base = ModelFolder(make_tiny(tmp_path / "base", family))
    proved = merged(adapter_on(base, tmp_path / "adapter", **PARTS), tmp_path / "out", precision)
    assert is_proved(proved), proved.parity
    assert (proved.parity.rounded is None) is (precision == "auto")
    config = json.loads((proved.folder / "config.json").read_text())
    if family in ARCHITECTURES:
        assert config["architectures"] == [ARCHITECTURES[family]]
    card = (proved.folder / "README.md").read_text()
    assert ("vllm serve out" in card) is (family in ARCHITECTURES)


def test_an_adapter_on_four_bits(tmp_path: Path) -> None:
    """Compared with the bits as they are, and written as what they stand for."""
    source = ModelFolder(make_tiny(tmp_path / "source"))
    four, _ = publish(source, tmp_path, Way())
    proved = merged(adapter_on(four, tmp_path / "adapter", language="lora"), tmp_path / "out")
    assert proved.thawed == proved.layers == 14
    assert is_proved(proved), proved.parity
    assert "14 layers were published in four bits" in (proved.folder / "README.md").read_text()
