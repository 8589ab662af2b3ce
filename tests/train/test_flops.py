"""Counted arithmetic against torch's own counter of operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_run import make_task
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from finesight.config import DataFile, PixelRange, Tune
from finesight.data.sources import load_sources
from finesight.encode.pack import PackedBatch, pack
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.model.parts import apply_tuning
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import load_model
from finesight.plan.load import Load
from finesight.train.flops import Arithmetic, measured_peak
from finesight.train.loss import label_loss

CPU = torch.device("cpu")


def batch_of(folder: Path, model: str = "tiny") -> PackedBatch:
    rule = None if model == "qwen" else PixelRange(min_pixels=784, max_pixels=7056)
    renderer = Renderer(ModelFolder(folder / model), rule)
    corpus = load_sources((DataFile(path=folder / "train.jsonl"),))
    return pack([renderer.encode(sample) for sample in corpus.read()[:4]])


def product(
    into: Sequence[int], a: Sequence[int], b: Sequence[int], out_shape: object = None, **_: object
) -> int:
    """Of `into += a @ b`, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def stretched(table_SD: Tensor, places: int) -> Tensor:
    """A table of positions, without a product: what stretches it is no work of a sample."""
    source, target = math.isqrt(len(table_SD)), math.isqrt(places)
    square = table_SD.view(1, source, source, -1).permute(0, 3, 1, 2)
    spread = F.interpolate(square, size=(target, target), mode="bicubic", align_corners=False)
    return spread.permute(0, 2, 3, 1).flatten(0, 2)


def grouped(a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """Of rows with a matrix for each stretch of them, and of the gradients of both."""
    return 2 * a[0] * a[1] * b[-1]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"])
@pytest.mark.parametrize(
    "tune",
    [
        {"language": "lora", "lora": {"rank": 8}},
        {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"},
        {"language": "frozen", "merger": "full"},
    ],
    ids=["lora", "full", "merger"],
)
def test_products_equal_torchs_count(
    tmp_path: Path, family: TinyFamily, tune: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finesight.model.qwen_vl._spread", stretched)
    make_task(tmp_path)
    make_tiny(tmp_path / family, family)
    batch = batch_of(tmp_path, family)
    model = load_model(ModelFolder(tmp_path / family), torch.float32, CPU)
    apply_tuning(model, Tune.model_validate(tune), 0)
    others = {torch.ops.aten.addmm_: product, torch.ops.aten._grouped_mm: grouped}
    with FlopCounterMode(display=False, custom_mapping=others) as counter:
        loss = label_loss(model(batch), model.head_weight, batch.target_L, torch.tensor(1.0))
        loss.backward()  # type: ignore[no-untyped-call]
    # On a CPU torch's counter leaves attention out.
    assert Arithmetic(model).products(batch) == counter.get_total_flops()


def test_frozen_parts_cost_less(tmp_path: Path) -> None:
    make_task(tmp_path)
    batch = batch_of(tmp_path)

    def count(**tune: str) -> float:
        model = load_model(ModelFolder(tmp_path / "tiny"), torch.float32, CPU)
        apply_tuning(model, Tune.model_validate(tune), 0)
        return Arithmetic(model).of(batch)

    whole = count(language="full", vision="full", merger="full", embeddings="full")
    assert count(language="full") < count(language="full", vision="full") < whole


def test_attention_by_hand(tmp_path: Path) -> None:
    """Width 64 in 2 layers and 32 in 2 blocks; Qwen2.5-VL's tiny tower has one windowed block."""
    make_tiny(tmp_path / "a", "qwen2_vl")
    make_tiny(tmp_path / "b", "qwen2_5_vl")
    lengths, grids = [10, 30], [(1, 4, 6), (2, 2, 2)]
    causal = (10**2 + 30**2) * 4 * 64 * 2 // 2
    whole = (24**2 + 2 * 4**2) * 4 * 32
    for name, blocks in (("a", 2 * whole), ("b", None)):
        model = load_model(ModelFolder(tmp_path / name), torch.float32, CPU)
        apply_tuning(model, Tune(language="lora"), 0)
        counted = Arithmetic(model).attention(lengths, grids)
        if blocks is not None:
            assert counted == 3 * causal + blocks
        else:
            assert 3 * causal + whole < counted <= 3 * causal + 2 * whole


def test_what_samples_share_is_counted_once(tmp_path: Path) -> None:
    """A sequence of 10 tokens that two of 20 and 5 go on from, against copies of it."""
    make_tiny(tmp_path / "a", "qwen2_vl")
    model = load_model(ModelFolder(tmp_path / "a"), torch.float32, CPU)
    apply_tuning(model, Tune(language="lora"), 0)
    arithmetic = Arithmetic(model)
    once = arithmetic.by_part(Load((10, 20, 5), (), 4, 10))
    apart = arithmetic.by_part(Load((10, 20, 5), (), 4))
    assert once.weights == apart.weights
    # The queries of 20 and 5 tokens see all 10 before them.
    pairs = 10**2 + (30**2 - 10**2) + (15**2 - 10**2)
    assert once.tokens == 3 * pairs * 4 * 64 * 2 // 2
    assert apart.tokens == 3 * (10**2 + 20**2 + 5**2) * 4 * 64 * 2 // 2


def test_peak_is_a_speed() -> None:
    assert 1e8 < measured_peak(CPU, torch.float32) < 1e14
