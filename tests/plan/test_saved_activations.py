"""Estimated activation memory compared with tensors that autograd saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_profile import profile_memory
from stub_kernels import stub_triton_kernels, without_triton
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import make_task
from torch import Tensor

from finesight.config import PixelRange, TrainFileSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.packing import PackedBatch, pack
from finesight.encode.renderer import NativeRenderer
from finesight.model.decoder import DecoderLayer
from finesight.model.fused_linear import FusedLinear
from finesight.model.layers import GatedMlp
from finesight.model.quant.fp8 import Fp8Matrix, Fp8Weight
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.plan.activation_memory import ActivationMemory
from finesight.plan.layer_memory import compute_unfused_layer_memory
from finesight.plan.layer_stack import LayerStack
from finesight.plan.mlp_memory import compute_mlp_memory, frozen_mlp_row_bytes
from finesight.plan.planned_pack import PlannedPack
from finesight.plan.saved_activations import ComputeConfig, LayerInputShape
from finesight.train.loss import fused_linear_cross_entropy

CPU = torch.device("cpu")
GPU = ComputeConfig(is_cuda=True, element_size=2, has_varlen_attention=True)
FAMILIES: tuple[TinyFamily, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen")
LORA = {"rank": 8, "dropout": 0.05}
TUNES: dict[str, dict[str, Any]] = {
    "lora": {"language": "lora", "lora": LORA},
    "lora without dropout": {"language": "lora", "lora": LORA | {"dropout": 0.0}},
    "lora everywhere": {"language": "lora", "vision": "lora", "merger": "lora", "lora": LORA},
    "language": {"language": "full"},
    "merger": {"language": "frozen", "merger": "full"},
    "vision": {"language": "frozen", "vision": "full"},
    "all": {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"},
}
TOLERANCE = 0.03
"""Relative tolerance: segments of a single image are views, and 16-bit means are smaller."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    for family in FAMILIES:
        create_tiny_model(folder / family, family)
    return folder


def make_batch(task: Path, family: str) -> PackedBatch:
    image_rule = None if family == "qwen" else PixelRange(min_pixels=784, max_pixels=7056)
    renderer = NativeRenderer(ModelFolder(task / family), image_rule)
    corpus = load_corpus((TrainFileSettings(path=task / "train.jsonl"),))
    return pack([renderer.encode(sample) for sample in corpus.read_samples()[:6]])


def make_model(
    task: Path, family: str, dtype: torch.dtype, tune: dict[str, Any]
) -> VisionLanguageModel:
    model = load_model(ModelFolder(task / family), dtype, CPU).train()
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return model


def saved_bytes(model: VisionLanguageModel, batch: PackedBatch) -> int:
    """Return the bytes that autograd saves for a pack, without the model and the pack."""
    inputs = (batch.ids_T, batch.position_ids_3T, batch.cu_seqlens_S1, batch.patches_ND)
    inputs += (batch.visual_indices_M, batch.logit_indices_L, batch.labels_L)
    # References prevent the reuse of freed addresses of the model.
    own_storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *inputs)]
    own_ptrs = {storage.data_ptr() for storage in own_storages}
    bytes_by_ptr: dict[int, int] = {}
    saved_tensors: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own_ptrs:
            bytes_by_ptr[storage.data_ptr()] = storage.nbytes()
        # A reference prevents the reuse of its address.
        saved_tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        one = torch.tensor(1.0, device=batch.ids_T.device)
        h_LD = model(batch, dropout_seed_1=one.int().reshape(1))
        fused_linear_cross_entropy(h_LD, model.lm_head_weight, batch.labels_L, one)
    return sum(bytes_by_ptr.values())


def rotary_bytes(model: VisionLanguageModel, batch: PackedBatch, compute: ComputeConfig) -> int:
    """Return the bytes of the rotary embeddings, which fused layers hold outside of autograd."""
    layers = model.model.layers
    if not (
        compute.uses_fused_layers
        and any(isinstance(layer, DecoderLayer) and layer.fusible_linears for layer in layers)
    ):
        return 0
    return 2 * len(batch.ids_T) * model.config.decoder.head_dim * compute.element_size


def estimated_bytes(
    model: VisionLanguageModel, batch: PackedBatch, dtype: torch.dtype, checkpointed_fraction: float
) -> int:
    compute = ComputeConfig(is_cuda=False, element_size=dtype.itemsize, has_varlen_attention=False)
    planned_pack = PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)
    return ActivationMemory(model, compute, checkpointed_fraction).saved_bytes(planned_pack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_estimated_bytes_match_autograd_saved_bytes(
    task: Path, family: str, dtype: torch.dtype
) -> None:
    batch = make_batch(task, family)
    for name, tune in TUNES.items():
        for checkpointed_fraction in (0.0, 0.5):
            model = make_model(task, family, dtype, tune)
            model.activation_checkpointing = checkpointed_fraction
            measured = saved_bytes(model, batch)
            assert estimated_bytes(model, batch, dtype, checkpointed_fraction) == pytest.approx(
                measured, rel=TOLERANCE
            ), name


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
def test_partially_adapted_fused_layer(task: Path, targets: list[str]) -> None:
    batch, dtype = make_batch(task, "qwen2_vl"), torch.float32
    tune = {"language": "lora", "lora": LORA | {"target_modules": targets}}
    model = make_model(task, "qwen2_vl", dtype, tune)
    # The number of dropped elements is random.
    assert estimated_bytes(model, batch, dtype, 0.0) == pytest.approx(
        saved_bytes(model, batch), rel=0.01
    )


def test_checkpointed_layers_store_only_inputs(task: Path) -> None:
    batch, dtype = make_batch(task, "qwen2_vl"), torch.float32
    model = make_model(task, "qwen2_vl", dtype, TUNES["lora"])
    model.activation_checkpointing = 1.0
    # The layers hold the rotary embeddings outside of autograd.
    rotary_size = 2 * len(batch.ids_T) * model.config.decoder.head_dim * 4
    sort_size = 2 * len(batch.ids_T) * 8
    expected = saved_bytes(model, batch) + rotary_size + sort_size
    assert estimated_bytes(model, batch, dtype, 1.0) == pytest.approx(expected, rel=0.001)


def test_gpu_layer_stores_required_activations(task: Path) -> None:
    model = make_model(task, "qwen2_vl", torch.bfloat16, TUNES["lora"])
    config, num_tokens = model.config.decoder, 100
    layer_memory = compute_unfused_layer_memory(model.model.layers[1], True, GPU)
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    kv_size = config.num_kv_heads * config.head_dim
    dropout_bytes = 2 + 1
    """Bytes per element after dropout: a copy and a one-byte mask."""
    attention = 2 * hidden_size + 4 + dropout_bytes * hidden_size + 2 * 3 * 8
    attention += (
        2 * (hidden_size + 2 * kv_size)
        + 2 * hidden_size
        + 4 * config.num_heads
        + dropout_bytes * hidden_size
        + 2 * 8
    )
    mlp = (
        2 * hidden_size
        + 4
        + dropout_bytes * hidden_size
        + 2 * 2 * 8
        + 2 * 2 * intermediate_size
        + dropout_bytes * intermediate_size
        + 2 * 8
    )
    assert layer_memory.saved_bytes(
        LayerInputShape((60, 40), num_tokens, num_tokens)
    ) == num_tokens * (attention + mlp)


def test_fused_kernels_store_required_activations(task: Path) -> None:
    model = make_model(task, "qwen2_vl", torch.bfloat16, TUNES["lora"])
    config, num_tokens, num_labels = model.config.decoder, 100, 30
    layers = LayerStack.from_modules(model.model.layers, True, GPU, 0.0)
    hidden_size, kv_size = config.hidden_size, config.num_kv_heads * config.head_dim
    attention = (
        2 * hidden_size
        + 4
        + 2 * 3 * 8
        + 2 * (hidden_size + 2 * kv_size)
        + 2 * hidden_size
        + 4 * config.num_heads
    )
    mlp = 2 * hidden_size + 4 + 2 * 2 * config.intermediate_size + 2 * 4 * 8
    full_shape, last_shape = (
        LayerInputShape((60, 40), num_tokens, num_tokens),
        LayerInputShape((60, 40), num_tokens, num_labels),
    )
    full_bytes, last_bytes = layers.saved_bytes([full_shape, last_shape])
    assert full_bytes == num_tokens * (attention + mlp)
    # The attention output of labelled rows is copied.
    assert last_bytes == num_tokens * attention + num_labels * (mlp + 2 * hidden_size)


@without_triton
@pytest.mark.parametrize("is_fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_vision_encoder_memory(
    task: Path, family: str, is_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    batch, model = make_batch(task, family), make_model(task, family, torch.float32, TUNES["lora"])
    if is_fp8:
        groups = [m for m in model.visual.blocks.modules() if isinstance(m, FusedLinear)]
        for group in groups:
            group.set_quantized_weight(Fp8Matrix, Fp8Weight)
    planned_pack = PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)
    activations = ActivationMemory(
        model, ComputeConfig(is_cuda=True, element_size=4, has_varlen_attention=True), 0.0
    )
    for has_patch_embed in (True, False):
        if not has_patch_embed:
            # In so small an encoder, the patch embedding determines the peak.
            x_ND = torch.zeros(planned_pack.num_patches, model.config.vision.hidden_size)
            monkeypatch.setattr(model.visual.patch_embed, "forward", lambda _, x_ND=x_ND: x_ND)
            monkeypatch.setattr(ActivationMemory, "_patch_embed_bytes", lambda *_: 0)
        with torch.no_grad(), profile_memory() as measured:
            model.encode_images(batch.patches_ND, batch.grid_thw)
        if has_patch_embed or family != "qwen":
            # In its small resampler, cross-attention determines the peak.
            estimated = activations.vision_forward_peak(planned_pack).total
            assert estimated == pytest.approx(measured.peak_bytes, rel=0.01), (
                f"{family} {has_patch_embed}"
            )


@without_triton
@pytest.mark.parametrize("is_trainable", [True, False])
def test_padded_columns_of_odd_inner_width(
    is_trainable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    monkeypatch.setattr(ComputeConfig, "uses_elementwise_kernels", True)
    compute, num_rows, hidden_size = (
        ComputeConfig(is_cuda=True, element_size=4, has_varlen_attention=True),
        300,
        64,
    )
    mlp = GatedMlp(hidden_size, 140, bias=True).requires_grad_(is_trainable)
    estimate = compute_mlp_memory(mlp, is_trainable, compute)
    x_TD = torch.zeros(num_rows, hidden_size, requires_grad=is_trainable)
    # The first pass allocates persistent buffers.
    mlp(x_TD)
    with torch.set_grad_enabled(is_trainable), profile_memory() as measured:
        y_TD = mlp(x_TD)
    if is_trainable:
        # The caller holds the input.
        assert estimate.weight_copy_bytes == 4 * hidden_size * 144
        assert (
            estimate.row_bytes * num_rows + estimate.weight_copy_bytes - x_TD.nbytes
            == measured.live_bytes - y_TD.nbytes
        )
    else:
        assert (
            estimate.persistent_bytes
            == mlp.down_proj.weight.untyped_storage().nbytes() - 4 * hidden_size * 140
        )
        assert measured.peak_bytes == num_rows * frozen_mlp_row_bytes(mlp, hidden_size, compute)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_estimated_gpu_bytes_match_autograd(task: Path, family: str) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    batch = make_batch(task, family)
    compute = ComputeConfig(
        is_cuda=True,
        element_size=2,
        has_varlen_attention=torch.cuda.get_device_capability() >= (8, 0),
    )
    planned_pack = PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)
    for name, tune in TUNES.items():
        model = make_model(task, family, dtype, tune).to(device)
        measured = saved_bytes(model, batch.to(device)) + rotary_bytes(model, batch, compute)
        expected = ActivationMemory(model, compute, 0.0).saved_bytes(planned_pack)
        assert expected == pytest.approx(measured, rel=TOLERANCE), name


@without_triton
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_fused_kernel_bytes_match_autograd(
    task: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    batch = make_batch(task, family)
    compute = ComputeConfig(is_cuda=True, element_size=4, has_varlen_attention=True)
    planned_pack = PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)
    for name in ("lora", "lora without dropout", "language"):
        model = make_model(task, family, torch.float32, TUNES[name])
        measured = saved_bytes(model, batch) + rotary_bytes(model, batch, compute)
        assert ActivationMemory(model, compute, 0.0).saved_bytes(planned_pack) == pytest.approx(
            measured, rel=0.01
        )
