"""Counted FLOPs compared with the counter of torch, and with numbers computed by hand."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from cuda_graph_fixtures import CPU, encode_samples, make_model
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import make_task
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from finesight.encode.packing import pack
from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import PlannedPack
from finesight.settings.config import TuneSettings
from finesight.train.flops import FlopCounter
from finesight.train.objectives.objective import fused_linear_cross_entropy


def count_addmm(
    into: Sequence[int], a: Sequence[int], b: Sequence[int], out_shape: object = None, **_: object
) -> int:
    """Count `into += a @ b`, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def count_grouped(a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """Count rows with a matrix for each group of them, and the gradients of both."""
    return 2 * a[0] * a[1] * b[-1]


def interpolate_without_matmul(table_SD: Tensor, locations: int) -> Tensor:
    """Resize a position table, whose FLOPs are not work of a sample, without a product."""
    source, target = math.isqrt(len(table_SD)), math.isqrt(locations)
    square = table_SD.view(1, source, source, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(target, target), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2)


def delta_rule_without_matmul(
    q_THD: Tensor, k_THD: Tensor, v_THV: Tensor, log_decay_TH: Tensor, beta_TH: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    """Depend on all inputs of the gated delta rule, which counts as attention."""
    scale_TH = (q_THD * k_THD).sum(-1) + log_decay_TH * beta_TH
    return v_THV * scale_TH[..., None].to(v_THV.dtype), v_THV


@pytest.mark.parametrize("family", get_args(TinyFamily))
@pytest.mark.parametrize(
    "tune",
    [
        {"language": "lora", "lora": {"rank": 8}},
        dict.fromkeys(("language", "vision", "merger", "embeddings"), "full"),
        {"language": "frozen", "merger": "full"},
    ],
)
def test_flops_match_torch_counter(tmp_path, family, tune, monkeypatch):
    for name, function in (
        ("families.qwen.architecture._interpolate_table", interpolate_without_matmul),
        ("model.gated_delta_net.chunk_gated_delta_rule", delta_rule_without_matmul),
    ):
        monkeypatch.setattr(f"finesight.{name}", function)
    make_task(tmp_path)
    folder = ModelFolder(create_tiny_model(tmp_path / family, family))
    max_pixels = None if family == "qwen" else 7056
    batch = pack(encode_samples(tmp_path, folder, max_pixels)[:4])
    model = make_model(torch.float32, CPU, TuneSettings.model_validate(tune), folder)
    others = {torch.ops.aten.addmm_: count_addmm, torch.ops.aten._grouped_mm: count_grouped}
    with FlopCounterMode(display=False, custom_mapping=others) as counter:
        h_LD, weight = model(batch), torch.tensor(1.0)
        fused_linear_cross_entropy(h_LD, model.lm_head_weight, batch.labels_L, weight).backward()
    # On a CPU torch's counter leaves attention out.
    breakdown = FlopCounter(model).count_by_part(batch)
    assert sum(breakdown.matmul_by_part.values()) == counter.get_total_flops()


def make_counter(folder: Path, family: TinyFamily) -> FlopCounter:
    model_folder = ModelFolder(create_tiny_model(folder / family, family))
    return FlopCounter(make_model(torch.float32, CPU, TuneSettings(language="lora"), model_folder))


def test_attention_flops_hand_computed(tmp_path):
    """Width 64 in 2 layers and 32 in 2 blocks, one of them windowed; a delta rule of 4 heads."""
    lengths, grids = [10, 30], [(1, 4, 6), (2, 2, 2)]
    causal = (10**2 + 30**2) * 4 * 64 * 2 // 2
    full = (24**2 + 2 * 4**2) * 4 * 32
    counted = sum(make_counter(tmp_path, "qwen2_vl").count_attention(lengths, grids))
    assert counted == 3 * causal + 2 * full
    windowed = sum(make_counter(tmp_path, "qwen2_5_vl").count_attention(lengths, grids))
    assert 3 * causal + full < windowed <= counted
    delta_rule = 40 * 4 * 6 * 16 * 16
    linear = sum(make_counter(tmp_path, "qwen3_5").count_attention(lengths, []))
    assert linear == 3 * (causal // 2 + delta_rule)


def test_shared_prefix_is_counted_once(tmp_path):
    """Compare a prefix of 10 tokens, shared by sequences of 20 and 5, with copies of it."""
    counter = make_counter(tmp_path, "qwen2_vl")
    once, apart = (
        counter.count_by_part(PlannedPack((10, 20, 5), (), 4, *prefix)) for prefix in ((10,), ())
    )
    assert once.matmul_by_part == apart.matmul_by_part
    # The queries of 20 and 5 tokens see all 10 before them.
    pairs = 10**2 + (30**2 - 10**2) + (15**2 - 10**2)
    assert once.decoder_attention == 3 * pairs * 4 * 64 * 2 // 2
    assert apart.decoder_attention == 3 * (10**2 + 20**2 + 5**2) * 4 * 64 * 2 // 2
