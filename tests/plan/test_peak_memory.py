"""What stays and what comes and goes, against what a step really allocates on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_profile import profile_memory
from stub_kernels import stub_triton_kernels
from tiny_task import make_task

from finesight.config import PixelRange, TrainFileSettings, TrainSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.native_renderer import NativeRenderer
from finesight.encode.packing import PackedBatch, find_shared_prefix_length, pack
from finesight.model.lora.layer import stacked_row_counts
from finesight.model.quant.base import HAS_TRITON
from finesight.model.tiny import create_tiny_model
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.plan.activation_memory import ActivationMemory
from finesight.plan.gradient_timeline import GradientTimeline
from finesight.plan.peak_memory import (
    CPU_PROCESS_BYTES,
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    PersistentMemory,
    compute_peak_memory,
    compute_persistent_memory,
)
from finesight.plan.planned_model import build_meta_model
from finesight.plan.planned_pack import PlannedPack
from finesight.plan.saved_activations import ComputeConfig
from finesight.train.loss import fused_linear_cross_entropy
from finesight.train.optimizer import MasterWeightOptimizer

CPU = torch.device("cpu")
LORA = {"language": "lora", "lora": {"rank": 8, "dropout": 0.05}}
ALL_BUT_VISION = {"language": "full", "embeddings": "full"}
ALL = ALL_BUT_VISION | {"vision": "full", "merger": "full"}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    create_tiny_model(folder / "deep", "qwen2_vl", preset="finesight-tiny")
    return folder


def batch_of(task: Path, *, once: bool = False) -> PackedBatch:
    """Pack the samples; `once` computes the shared prefix once."""
    renderer = NativeRenderer(
        ModelFolder(task / "deep"), PixelRange(min_pixels=784, max_pixels=7056)
    )
    corpus = load_corpus((TrainFileSettings(path=task / "train.jsonl"),))
    samples = [renderer.encode(sample) for sample in corpus.read_samples()]
    return pack(
        samples,
        prefix_length=find_shared_prefix_length([one.tokenized for one in samples]) if once else 0,
    )


def make_model(task: Path, dtype: torch.dtype, tune: dict[str, Any]) -> VisionLanguageModel:
    model = load_model(ModelFolder(task / "deep"), dtype, CPU).train()
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return model


def run_forward_backward(model: VisionLanguageModel, batch: PackedBatch) -> None:
    """The batch forwards and backwards, as a run does it."""
    h_LD = model(batch, dropout_seed_1=torch.ones(1, dtype=torch.int32))
    loss = fused_linear_cross_entropy(h_LD, model.lm_head_weight, batch.labels_L, torch.tensor(1.0))
    loss.backward()  # type: ignore[no-untyped-call]


class FusedComputing(ComputeConfig):
    """A card, in wider numbers than are computed with there."""

    uses_elementwise_kernels = True


def measure_peak(
    task: Path,
    batch: PackedBatch,
    computing: ComputeConfig,
    tune: dict[str, Any],
    share: float,
) -> tuple[int, int]:
    """Most bytes that this pack, forwards and backwards, is said to have beside what was there
    before, and those that it has, its gradients among them."""
    model = make_model(task, torch.float32 if computing.element_size == 4 else torch.bfloat16, tune)
    model.activation_checkpointing = share
    run_forward_backward(model, batch)
    model.zero_grad(set_to_none=True)
    with profile_memory() as really:
        run_forward_backward(model, batch)
    load = PlannedPack(
        batch.lengths, batch.grid_thw, batch.num_supervised_tokens, batch.prefix_length
    )
    activations = ActivationMemory(model, computing, share)
    moments = activations.iter_snapshots(load, activations.gradient_timeline())
    return max(moment.total for moment in moments), really.peak_bytes


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("once", [False, True])
def test_peak_memory_of_pack_is_within_an_eighth(
    task: Path, once: bool, dtype: torch.dtype, tune: dict[str, Any], share: float
) -> None:
    computing = ComputeConfig(
        is_cuda=False, element_size=dtype.itemsize, has_varlen_attention=False
    )
    output, really = measure_peak(task, batch_of(task, once=once), computing, tune, share)
    assert output == pytest.approx(really, rel=0.125)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
def test_long_sequence_peak_is_within_six_percent(
    task: Path, tune: dict[str, Any], share: float
) -> None:
    batch = batch_of(task)
    tokens = sum(batch.lengths)
    cu_seqlens_S1 = torch.tensor([0, tokens], dtype=torch.int32)
    long = replace(batch, lengths=(tokens,), cu_seqlens_S1=cu_seqlens_S1)
    computing = ComputeConfig(is_cuda=False, element_size=2, has_varlen_attention=False)
    output, really = measure_peak(task, long, computing, tune, share)
    # What oneDNN lays anew on each thread is counted roughly.
    assert output == pytest.approx(really, rel=0.06)


@pytest.mark.skipif(HAS_TRITON, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tune", [LORA, ALL_BUT_VISION], ids=["lora", "all but vision"])
@pytest.mark.parametrize("once", [False, True])
def test_fused_kernel_peak_is_within_two_percent(
    task: Path, once: bool, tune: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    computing = FusedComputing(is_cuda=True, element_size=4, has_varlen_attention=True)
    output, really = measure_peak(task, batch_of(task, once=once), computing, tune, share)
    assert output == pytest.approx(really, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_static_memory_matches_a_run(
    task: Path, dtype: torch.dtype, tune: dict[str, Any], optimizer: str
) -> None:
    train = TrainSettings.model_validate({"optimizer": optimizer})
    bare = build_meta_model(ModelFolder(task / "deep"), dtype, (), ())
    configure_tuning(bare, TuneSettings.model_validate(tune), 0)
    output = compute_persistent_memory(
        bare,
        train,
        ComputeConfig(is_cuda=False, element_size=dtype.itemsize, has_varlen_attention=False),
    )
    model = make_model(task, dtype, tune)
    masters = MasterWeightOptimizer(trainable_parameters(model), train, stacked_row_counts(model))
    assert output.weight_bytes == sum(p.nbytes for p in model.parameters())
    groups = masters.param_groups
    wide = dtype == torch.float32
    values = sum(len(group.master_weights) for group in groups)
    assert output.num_trainable == pytest.approx(values, rel=0.01)
    assert output.master_weight_bytes == (0 if wide else 2 * output.num_trainable)
    run_forward_backward(model, batch_of(task))
    came = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    masters.accumulate_gradients()
    sums = sum(
        g.nbytes for group in groups for g in group.gradients.per_parameter() if g is not None
    )
    # Large gradients go into sums that are there already, and leave nothing behind.
    come = GradientTimeline.from_model(bare, output.accumulated_ids[False])
    assert come.at_end == came
    assert output.grad_sum_bytes + output.multi_pack_grad_sum_bytes == pytest.approx(sums, rel=0.05)
    moments = masters.optimizer_state()
    retained = sum(tensor.nbytes for name, tensor in moments.items() if name != "steps")
    assert output.optimizer_state_bytes == pytest.approx(retained, rel=0.01)


def test_memory_parts_sum_to_the_peak(task: Path) -> None:
    model = make_model(task, torch.bfloat16, LORA)
    sizes = {
        "weight_bytes": 10,
        "master_weight_bytes": 20,
        "grad_sum_bytes": 30,
        "multi_pack_grad_sum_bytes": 7,
        "optimizer_state_bytes": 40,
        "optimizer_step_bytes": 5,
    }
    stays = PersistentMemory(num_trainable=3, **sizes)
    computing = ComputeConfig(is_cuda=True, element_size=2, has_varlen_attention=True)
    activations = ActivationMemory(model, computing, 0.0)
    none = stays, activations, [], computing, 4
    no_pack = compute_peak_memory(*none, has_multiple_packs=False)
    parts = (
        105
        + activations.persistent_bytes
        + sum(p.nbytes for p in trainable_parameters(model).values())
    )
    assert no_pack.total == parts + CUBLAS_WORKSPACE_BYTES + CUDA_CONTEXT_BYTES
    assert no_pack.allocated == parts + CUBLAS_WORKSPACE_BYTES
    assert compute_peak_memory(*none, has_multiple_packs=True).total == no_pack.total + 7
    computing = ComputeConfig(is_cuda=False, element_size=2, has_varlen_attention=False)
    no_pack = compute_peak_memory(
        stays, ActivationMemory(model, computing, 0.0), [], computing, 4, has_multiple_packs=False
    )
    assert (
        no_pack.allocated
        == no_pack.total
        == parts - activations.persistent_bytes + CPU_PROCESS_BYTES
    )
