"""What layers are said to keep against what autograd really saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_profile import profile_memory
from stub_kernels import stub_triton_kernels
from tiny_task import make_task
from torch import Tensor

from finesight.config import PixelRange, TrainFileSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.native_renderer import NativeRenderer
from finesight.encode.packing import PackedBatch, pack
from finesight.model.decoder import DecoderLayer
from finesight.model.fused_linear import FusedLinear
from finesight.model.layers import GatedMlp
from finesight.model.quant.base import HAS_TRITON
from finesight.model.quant.fp8 import Fp8Weight
from finesight.model.quant.rowwise_quant import Fp8Matrix
from finesight.model.tiny import TinyFamily, create_tiny_model
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
CARD = ComputeConfig(is_cuda=True, element_size=2, has_varlen_attention=True)
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
CLOSE = 0.03
"""Relative tolerance: segments of one image are views, and a 16-bit mean is half as wide."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    for family in FAMILIES:
        create_tiny_model(folder / family, family)
    return folder


def batch_of(task: Path, family: str) -> PackedBatch:
    rule = None if family == "qwen" else PixelRange(min_pixels=784, max_pixels=7056)
    renderer = NativeRenderer(ModelFolder(task / family), rule)
    corpus = load_corpus((TrainFileSettings(path=task / "train.jsonl"),))
    return pack([renderer.encode(sample) for sample in corpus.read_samples()[:6]])


def model_of(
    task: Path, family: str, dtype: torch.dtype, tune: dict[str, Any]
) -> VisionLanguageModel:
    model = load_model(ModelFolder(task / family), dtype, CPU).train()
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return model


def saved_bytes(model: VisionLanguageModel, batch: PackedBatch) -> int:
    """Bytes of the memory behind everything that autograd keeps of a pack, but for the model and
    the pack itself."""
    inputs = (batch.ids_T, batch.position_ids_3T, batch.cu_seqlens_S1, batch.patches_ND)
    inputs += (batch.visual_indices_M, batch.logit_indices_L, batch.labels_L)
    # References keep the storages alive; freed memory could be reused by counted tensors.
    references = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *inputs)]
    own = {memory.data_ptr() for memory in references}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def count(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        # While it lives, no other tensor comes to lie where it does.
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        one = torch.tensor(1.0, device=batch.ids_T.device)
        h_LD = model(batch, dropout_seed_1=one.int().reshape(1))
        fused_linear_cross_entropy(h_LD, model.lm_head_weight, batch.labels_L, one)
    return sum(found.values())


def angles(model: VisionLanguageModel, batch: PackedBatch, computing: ComputeConfig) -> int:
    """Cosines and sines of all tokens, which layers in few kernels hold without autograd's
    knowledge."""
    layers = model.model.layers
    if not (
        computing.uses_fused_layers
        and any(isinstance(y, DecoderLayer) and y.fusible_linears for y in layers)
    ):
        return 0
    return 2 * len(batch.ids_T) * model.config.decoder.head_dim * computing.element_size


def estimated_bytes(
    model: VisionLanguageModel, batch: PackedBatch, dtype: torch.dtype, share: float
) -> int:
    computing = ComputeConfig(
        is_cuda=False, element_size=dtype.itemsize, has_varlen_attention=False
    )
    load = PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)
    return ActivationMemory(model, computing, share).saved_bytes(load)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_estimated_bytes_match_autograd_saved_bytes(
    task: Path, family: str, dtype: torch.dtype
) -> None:
    batch = batch_of(task, family)
    for name, tune in TUNES.items():
        for share in (0.0, 0.5):
            model = model_of(task, family, dtype, tune)
            model.activation_checkpointing = share
            really = saved_bytes(model, batch)
            assert estimated_bytes(model, batch, dtype, share) == pytest.approx(
                really, rel=CLOSE
            ), name


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
def test_partially_adapted_fused_layer(task: Path, targets: list[str]) -> None:
    batch, dtype = batch_of(task, "qwen2_vl"), torch.float32
    tune = {"language": "lora", "lora": LORA | {"target_modules": targets}}
    model = model_of(task, "qwen2_vl", dtype, tune)
    # But for how many numbers are dropped, which is drawn.
    assert estimated_bytes(model, batch, dtype, 0.0) == pytest.approx(
        saved_bytes(model, batch), rel=0.01
    )


def test_checkpointed_layers_store_only_inputs(task: Path) -> None:
    batch, dtype = batch_of(task, "qwen2_vl"), torch.float32
    model = model_of(task, "qwen2_vl", dtype, TUNES["lora"])
    model.activation_checkpointing = 1.0
    # Cosines and sines of all tokens, which the layers hold without autograd's knowledge.
    rotation = 2 * len(batch.ids_T) * model.config.decoder.head_dim * 4
    sorting = 2 * len(batch.ids_T) * 8
    expected = saved_bytes(model, batch) + rotation + sorting
    assert estimated_bytes(model, batch, dtype, 1.0) == pytest.approx(expected, rel=0.001)


def test_gpu_layer_stores_required_activations(task: Path) -> None:
    model = model_of(task, "qwen2_vl", torch.bfloat16, TUNES["lora"])
    size, tokens = model.config.decoder, 100
    retained = compute_unfused_layer_memory(model.model.layers[1], True, CARD)
    width, inner = size.hidden_size, size.intermediate_size
    shared = size.num_kv_heads * size.head_dim
    dropped = 2 + 1
    """Bytes of a dropped-out number: a copy, and a mask of one byte."""
    attention = 2 * width + 4 + dropped * width + 2 * 3 * 8
    attention += 2 * (width + 2 * shared) + 2 * width + 4 * size.num_heads + dropped * width + 2 * 8
    mlp = 2 * width + 4 + dropped * width + 2 * 2 * 8 + 2 * 2 * inner + dropped * inner + 2 * 8
    assert retained.saved_bytes(LayerInputShape((60, 40), tokens, tokens)) == tokens * (
        attention + mlp
    )


def test_fused_kernels_store_required_activations(task: Path) -> None:
    model = model_of(task, "qwen2_vl", torch.bfloat16, TUNES["lora"])
    size, tokens, labels = model.config.decoder, 100, 30
    layers = LayerStack.from_modules(model.model.layers, True, CARD, 0.0)
    width, shared = size.hidden_size, size.num_kv_heads * size.head_dim
    attention = (
        2 * width + 4 + 2 * 3 * 8 + 2 * (width + 2 * shared) + 2 * width + 4 * size.num_heads
    )
    mlp = 2 * width + 4 + 2 * 2 * size.intermediate_size + 2 * 4 * 8
    location, last = (
        LayerInputShape((60, 40), tokens, tokens),
        LayerInputShape((60, 40), tokens, labels),
    )
    full, part = layers.saved_bytes([location, last])
    assert full == tokens * (attention + mlp)
    # Attention's output of those that are labelled, once more.
    assert part == tokens * attention + labels * (mlp + 2 * width)


@pytest.mark.skipif(HAS_TRITON, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("in_fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_vision_encoder_memory(
    task: Path, family: str, in_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    batch, model = batch_of(task, family), model_of(task, family, torch.float32, TUNES["lora"])
    if in_fp8:
        groups = [m for m in model.visual.blocks.modules() if isinstance(m, FusedLinear)]
        for group in groups:
            group.set_quantized_weight(Fp8Matrix, Fp8Weight)
    load = PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)
    activations = ActivationMemory(
        model, ComputeConfig(is_cuda=True, element_size=4, has_varlen_attention=True), 0.0
    )
    for embeds in (True, False):
        if not embeds:
            # In such a narrow vision encoder, the patch embedding dominates.
            x_ND = torch.zeros(load.num_patches, model.config.vision.hidden_size)
            monkeypatch.setattr(model.visual.patch_embed, "forward", lambda _, x_ND=x_ND: x_ND)
            monkeypatch.setattr(ActivationMemory, "_patch_embed_bytes", lambda *_: 0)
        with torch.no_grad(), profile_memory() as really:
            model.encode_images(batch.patches_ND, batch.grid_thw)
        if embeds or family != "qwen":
            # Its resampler is so narrow that attention of its queries is the most.
            output = activations.vision_forward_peak(load).total
            assert output == pytest.approx(really.peak_bytes, rel=0.01), f"{family} {embeds}"


@pytest.mark.skipif(HAS_TRITON, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("trains", [True, False])
def test_padded_columns_of_odd_inner_width(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_triton_kernels(monkeypatch)
    monkeypatch.setattr(ComputeConfig, "uses_elementwise_kernels", True)
    computing, rows, width = (
        ComputeConfig(is_cuda=True, element_size=4, has_varlen_attention=True),
        300,
        64,
    )
    mlp = GatedMlp(width, 140, bias=True).requires_grad_(trains)
    output = compute_mlp_memory(mlp, trains, computing)
    x_TD = torch.zeros(rows, width, requires_grad=trains)
    # The first pass makes what stays.
    mlp(x_TD)
    with torch.set_grad_enabled(trains), profile_memory() as really:
        y_TD = mlp(x_TD)
    if trains:
        # The caller has the input.
        assert output.weight_copy_bytes == 4 * width * 144
        assert (
            output.row_bytes * rows + output.weight_copy_bytes - x_TD.nbytes
            == really.live_bytes - y_TD.nbytes
        )
    else:
        assert (
            output.persistent_bytes
            == mlp.down_proj.weight.untyped_storage().nbytes() - 4 * width * 140
        )
        assert really.peak_bytes == rows * frozen_mlp_row_bytes(mlp, width, computing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_estimated_gpu_bytes_match_autograd(task: Path, family: str) -> None:
    card, dtype = torch.device("cuda"), torch.bfloat16
    batch = batch_of(task, family)
    computing = ComputeConfig(
        is_cuda=True,
        element_size=2,
        has_varlen_attention=torch.cuda.get_device_capability() >= (8, 0),
    )
    load = PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)
    for name, tune in TUNES.items():
        model = model_of(task, family, dtype, tune).to(card)
        really = saved_bytes(model, batch.to(card)) + angles(model, batch, computing)
        expected = ActivationMemory(model, computing, 0.0).saved_bytes(load)
        assert expected == pytest.approx(really, rel=CLOSE), name


@pytest.mark.skipif(HAS_TRITON, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_fused_kernel_bytes_match_autograd(
    task: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    batch = batch_of(task, family)
    computing = ComputeConfig(is_cuda=True, element_size=4, has_varlen_attention=True)
    load = PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)
    for name in ("lora", "lora without dropout", "language"):
        model = model_of(task, family, torch.float32, TUNES[name])
        really = saved_bytes(model, batch) + angles(model, batch, computing)
        assert ActivationMemory(model, computing, 0.0).saved_bytes(load) == pytest.approx(
            really, rel=0.01
        )
