"""Counted arithmetic against torch's own counter of operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_files import load_cases
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import make_task
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from finesight.config import PixelRange, TrainFileSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.packing import PackedBatch, pack
from finesight.encode.renderer import NativeRenderer
from finesight.model.trainable import configure_tuning
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.plan.planned_pack import PlannedPack
from finesight.train.flops import FlopCounter, measure_peak_flops
from finesight.train.loss import fused_linear_cross_entropy

CASES = load_cases("flops")

CPU = torch.device("cpu")


def batch_of(folder: Path, model: str = "tiny") -> PackedBatch:
    rule = None if model == "qwen" else PixelRange(min_pixels=784, max_pixels=7056)
    renderer = NativeRenderer(ModelFolder(folder / model), rule)
    corpus = load_corpus((TrainFileSettings(path=folder / "train.jsonl"),))
    return pack([renderer.encode(sample) for sample in corpus.read_samples()[:4]])


def product(
    into: Sequence[int], a: Sequence[int], b: Sequence[int], out_shape: object = None, **_: object
) -> int:
    """Of `into += a @ b`, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def interpolate_without_matmul(table_SD: Tensor, locations: int) -> Tensor:
    """A table of positions, without a product: what stretches it is no work of a sample."""
    source, target = math.isqrt(len(table_SD)), math.isqrt(locations)
    square = table_SD.view(1, source, source, -1).permute(0, 3, 1, 2)
    spread = F.interpolate(square, size=(target, target), mode="bicubic", align_corners=False)
    return spread.permute(0, 2, 3, 1).flatten(0, 2)


def delta_rule_without_matmul(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    log_decay_TH: Tensor,
    beta_TH: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    """Depend on all inputs of the gated delta rule, without a product of matrices."""
    scale_TH = (q_THD * k_THD).sum(-1) + log_decay_TH * beta_TH
    return v_THV * scale_TH[..., None].to(v_THV.dtype), v_THV


def grouped(a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """Of rows with a matrix for each stretch of them, and of the gradients of both."""
    return 2 * a[0] * a[1] * b[-1]


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen"],
)
@pytest.mark.parametrize(
    "tune", CASES["test_flops_match_torch_counter"], ids=["lora", "full", "merger"]
)
def test_flops_match_torch_counter(
    tmp_path: Path, family: TinyFamily, tune: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "finesight.model.families.qwen_vl._interpolate_table", interpolate_without_matmul
    )
    # The delta rule counts as attention.
    monkeypatch.setattr(
        "finesight.model.gated_delta_net.chunk_gated_delta_rule", delta_rule_without_matmul
    )
    make_task(tmp_path)
    create_tiny_model(tmp_path / family, family)
    batch = batch_of(tmp_path, family)
    model = load_model(ModelFolder(tmp_path / family), torch.float32, CPU)
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    others = {torch.ops.aten.addmm_: product, torch.ops.aten._grouped_mm: grouped}
    with FlopCounterMode(display=False, custom_mapping=others) as counter:
        loss = fused_linear_cross_entropy(
            model(batch), model.lm_head_weight, batch.labels_L, torch.tensor(1.0)
        )
        loss.backward()  # type: ignore[no-untyped-call]
    # On a CPU torch's counter leaves attention out.
    assert FlopCounter(model).count_matmul(batch) == counter.get_total_flops()


def test_frozen_parts_have_fewer_flops(tmp_path: Path) -> None:
    make_task(tmp_path)
    batch = batch_of(tmp_path)

    def count(**tune: str) -> float:
        model = load_model(ModelFolder(tmp_path / "tiny"), torch.float32, CPU)
        configure_tuning(model, TuneSettings.model_validate(tune), 0)
        return FlopCounter(model).count(batch)

    full = count(language="full", vision="full", merger="full", embeddings="full")
    assert count(language="full") < count(language="full", vision="full") < full


def test_attention_flops_hand_computed(tmp_path: Path) -> None:
    """Width 64 in 2 layers and 32 in 2 blocks; the tiny Qwen2.5-VL has one windowed block."""
    create_tiny_model(tmp_path / "a", "qwen2_vl")
    create_tiny_model(tmp_path / "b", "qwen2_5_vl")
    lengths, grids = [10, 30], [(1, 4, 6), (2, 2, 2)]
    causal = (10**2 + 30**2) * 4 * 64 * 2 // 2
    full = (24**2 + 2 * 4**2) * 4 * 32
    for name, blocks in (("a", 2 * full), ("b", None)):
        model = load_model(ModelFolder(tmp_path / name), torch.float32, CPU)
        configure_tuning(model, TuneSettings(language="lora"), 0)
        counted = FlopCounter(model).count_attention(lengths, grids)
        if blocks is not None:
            assert counted == 3 * causal + blocks
        else:
            assert 3 * causal + full < counted <= 3 * causal + 2 * full


def test_shared_prefix_is_counted_once(tmp_path: Path) -> None:
    """Compare a prefix of 10 tokens, shared by sequences of 20 and 5, with copies of it."""
    create_tiny_model(tmp_path / "a", "qwen2_vl")
    model = load_model(ModelFolder(tmp_path / "a"), torch.float32, CPU)
    configure_tuning(model, TuneSettings(language="lora"), 0)
    arithmetic = FlopCounter(model)
    once = arithmetic.count_by_part(PlannedPack((10, 20, 5), (), 4, 10))
    apart = arithmetic.count_by_part(PlannedPack((10, 20, 5), (), 4))
    assert once.matmul_by_part == apart.matmul_by_part
    # The queries of 20 and 5 tokens see all 10 before them.
    pairs = 10**2 + (30**2 - 10**2) + (15**2 - 10**2)
    assert once.decoder_attention == 3 * pairs * 4 * 64 * 2 // 2
    assert apart.decoder_attention == 3 * (10**2 + 20**2 + 5**2) * 4 * 64 * 2 // 2


def test_peak_flops_is_plausible() -> None:
    assert 1e8 < measure_peak_flops(CPU, torch.float32) < 1e14


def test_delta_rule_flops_hand_computed(tmp_path: Path) -> None:
    """One layer with 4 heads of 16 x 16, one with full attention; three passes."""
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny", "qwen3_5"))
    model = load_model(folder, torch.float32, CPU)
    configure_tuning(model, TuneSettings(language="lora"), 0)
    causal = (10**2 + 30**2) * 4 * 64 // 2
    delta_rule = 40 * 4 * 6 * 16 * 16
    assert FlopCounter(model).count_attention([10, 30], []) == 3 * (causal + delta_rule)
