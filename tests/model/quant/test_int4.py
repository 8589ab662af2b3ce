"""GPTQ weights: dequantized values, matmuls and complete models."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case_files import load_cases
from each_value import each
from engine_fixtures import make_mixed_questions
from gptq_fixtures import (
    GPTQ_CONFIGS,
    GptqConfig,
    change_config,
    change_tensor,
    pack_weight,
    read_index,
    write_quantized_model,
)
from hf_reference import max_relative_error
from lora_fixtures import merge_to_folder
from safetensors.torch import load_file
from tiny_model import TinyFamily, create_tiny_model
from torch import Tensor

from finesight.config import Precision, TuneSettings
from finesight.encode.packing import PackedBatch, pack
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear, iter_adapters
from finesight.model.lora.peft_io import load_adapter, save_adapter
from finesight.model.quant import base
from finesight.model.quant.base import find_quantized_weights
from finesight.model.quant.int4 import Int4Matrix
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import DTYPES, load_model, save_model, stored_precision
from finesight.model_folder import ModelFolder

CASES = load_cases("int4")

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(40, 64), (8, 128), (24, 96), (16, 200)]
FAMILIES: list[TinyFamily] = ["qwen", "qwen2_vl", "qwen2_5_vl"]


def random_values(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_matrix(tensors: dict[str, Tensor], shape: tuple[int, int], way: GptqConfig) -> Int4Matrix:
    group = shape[1] if way.group == -1 else way.group
    matrix = Int4Matrix(*shape, group_size=group, where="a test")
    for name, values in tensors.items():
        matrix.load_tensor(name, values)
    return matrix


@each("way", GPTQ_CONFIGS)
@each("shape", SHAPES)
@each("at_once", [base.CHUNK_ELEMENTS, 300])
def test_dequantize_matches_reference(
    shape: tuple[int, int], way: GptqConfig, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes a smaller last group."""
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", at_once)
    tensors, expected = pack_weight(random_values(shape), way)
    matrix = make_matrix(tensors, shape, way)
    for dtype in TYPES:
        assert torch.equal(matrix.dequantize(dtype), expected.to(dtype))


def test_memory_per_weight_is_about_four_bits() -> None:
    shape = (256, 1024)
    way = GptqConfig(group=128, act_order=True)
    matrix = make_matrix(pack_weight(random_values(shape), way)[0], shape, way)
    taken = sum(buffer.nbytes for buffer in matrix.buffers())
    # 24 bits of scale and zero point per 128 elements, and the column permutation.
    assert 8 * taken / matrix.num_elements == pytest.approx(4 + 24 / 128 + 32 / 256)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_output_and_gradients_match_dequantized(dtype: torch.dtype, adapted: bool) -> None:
    way = GptqConfig(act_order=True, symmetric=False)
    widths, results = {"q": 40, "k": 16}, []
    for dense in (False, True):
        group = FusedLinear(64, widths, bias=True).to(dtype).requires_grad_(False)
        assert group.bias is not None
        group.bias.copy_(random_values((56,), seed=7))
        group.set_quantized_weight(partial(Int4Matrix, group_size=32, where="a test"))
        for seed, matrix in enumerate(find_quantized_weights(group)["weight"].matrices):
            pieces, _ = pack_weight(random_values((matrix.out_features, 64), seed=seed), way, seed)
            for piece in matrix.tensor_specs():
                piece.load(pieces[piece.name])
        if dense:
            group.dequantize()
            group.requires_grad_(False)
        if adapted:
            group.adapter = LoraLinear(group, dict.fromkeys(widths, LoraConfig(3, 8.0)), 0.0)
            for seed, factor in enumerate(group.adapter.parameters()):
                factor.data.copy_(random_values(tuple(factor.shape), seed=10 + seed))
        x = random_values((5, 64), dtype, seed=3).requires_grad_()
        outputs = group(x)
        torch.stack([(y.float() ** 2).sum() for y in outputs]).sum().backward()
        supervised = [p.grad for p in group.parameters() if p.requires_grad]
        results.append([*(y.detach() for y in outputs), x.grad, *supervised])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    if request.param == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    return ModelFolder(create_tiny_model(folder / "tiny", request.param))


def questions(folder: ModelFolder, tmp_path: Path) -> PackedBatch:
    renderer = NativeRenderer(folder)
    batch = pack([renderer.encode(question) for question in make_mixed_questions(tmp_path)])
    every_T = torch.arange(len(batch.ids_T))
    return dataclasses.replace(batch, logit_indices_L=every_T, labels_L=batch.ids_T)


@torch.no_grad()
def logits(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    return model.compute_logits(model.eval()(batch))


@each("way", GPTQ_CONFIGS)
def test_model_matches_dequantized_bit_exactly(
    source: ModelFolder, way: GptqConfig, tmp_path: Path
) -> None:
    four, dense = write_quantized_model(source, tmp_path, way)
    batch = questions(source, tmp_path)
    for dtype in TYPES[:2]:
        found = load_model(four, dtype, CPU)
        assert all(name.startswith("model.layers.") for name in find_quantized_weights(found))
        assert torch.equal(logits(found, batch), logits(load_model(dense, dtype, CPU), batch))
    # Every linear layer of the decoder, and no other.
    groups = {n for n, m in found.named_modules() if isinstance(m, FusedLinear)}
    expected = {f"{name}.weight" for name in groups if name.startswith("model.layers.")}
    assert set(find_quantized_weights(found)) == expected


def apply_tune(model: VisionLanguageModel, **settings: Any) -> VisionLanguageModel:
    configure_tuning(model, TuneSettings.model_validate({"language": "frozen"} | settings), 0)
    return model


def test_saved_weights_match_published(source: ModelFolder, tmp_path: Path) -> None:
    """The 4-bit weights remain those of the base next to trained parts."""
    four, _ = write_quantized_model(source, tmp_path, GptqConfig(act_order=True))
    model = load_model(four, torch.float32, CPU)
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, four, again, torch.float32, max_shard_bytes=100_000)
    copy = load_model(ModelFolder(again), torch.float32, CPU)
    found, expected = copy.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ModelFolder(again).config["quantization_config"] == GptqConfig(act_order=True).config


def test_full_training_of_int4_weights_is_rejected(source: ModelFolder, tmp_path: Path) -> None:
    four, _ = write_quantized_model(source, tmp_path, GptqConfig())
    with pytest.raises(UserError, match="language is full, but the model has 4-bit weights"):
        apply_tune(load_model(four, torch.float32, CPU), language="full")
    model = apply_tune(load_model(four, torch.float32, CPU), language="lora", merger="full")
    batch = questions(source, tmp_path)
    model.train()(batch).square().sum().backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(".adapter." in name for name in reached)
    assert any(name.startswith("visual.merger.") for name in reached)


def test_other_parts_can_use_nf4(source: ModelFolder, tmp_path: Path) -> None:
    four, dense = write_quantized_model(source, tmp_path, GptqConfig())
    batch = questions(source, tmp_path)
    models = [load_model(folder, torch.float32, CPU, ("vision",)) for folder in (four, dense)]
    assert torch.equal(*(logits(model, batch) for model in models))
    with pytest.raises(UserError, match="is already in four bits by GPTQ"):
        load_model(four, torch.float32, CPU, ("language",))


@pytest.mark.parametrize(
    ("changes", "message"), CASES["test_other_quantization_settings_are_rejected"], ids=str
)
def test_other_quantization_settings_are_rejected(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    change_config(source, quantization_config=GptqConfig().config | changes)
    for read in (lambda f: load_model(f, torch.float32, CPU), stored_precision):
        with pytest.raises(UserError, match=message) as refused:
            read(ModelFolder(source.path))
        assert "four bits by GPTQ" in refused.value.expected
        assert "without quantization" in refused.value.remedy


@pytest.mark.parametrize(
    ("ending", "tensor", "message"),
    [
        ("qzeros", None, r"missing: .*\.qzeros"),
        ("scales", None, r"missing: .*\.scales"),
        ("g_idx", None, r"missing: .*\.g_idx"),
        ("qweight", None, r"unknown to this model: .*g_idx"),
        (
            "qweight",
            torch.zeros(3, 8, dtype=torch.int32),
            r"of another shape: .*\.qweight \(3, 8\)",
        ),
        ("qzeros", torch.zeros(1, 8, dtype=torch.int32), r"of another shape: .*\.qzeros \(1, 8\)"),
        ("down_proj.bias", torch.ones(64, dtype=torch.float16), r"of layers without a bias: .*"),
    ],
    ids=str,
)
def test_damaged_weights_are_rejected(
    ending: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    four, _ = write_quantized_model(
        ModelFolder(create_tiny_model(tmp_path / "tiny")), tmp_path, GptqConfig()
    )
    change_tensor(four, ending, tensor)
    with pytest.raises(UserError, match=message):
        load_model(four, torch.float32, CPU)


def test_fused_layers_must_share_quantization(tmp_path: Path) -> None:
    four, dense = write_quantized_model(
        ModelFolder(create_tiny_model(tmp_path / "tiny")), tmp_path, GptqConfig()
    )
    weights = load_file(dense.path / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    for ending in ("qweight", "qzeros", "scales", "g_idx"):
        change_tensor(four, name.removesuffix("weight") + ending, None)
    change_tensor(four, "model.norm.weight", weights["model.norm.weight"], {name: weights[name]})
    with pytest.raises(
        UserError, match=r"of the fused layers .*up_proj, .*gate_proj are quantized"
    ):
        load_model(four, torch.float32, CPU)


def test_wrong_group_size_is_rejected(tmp_path: Path) -> None:
    four, _ = write_quantized_model(
        ModelFolder(create_tiny_model(tmp_path / "tiny")), tmp_path, GptqConfig(act_order=True)
    )
    change_tensor(four, "g_idx", torch.zeros(128, dtype=torch.int32))
    with pytest.raises(UserError, match=r"group sizes in g_idx of a layer differ from 32"):
        load_model(four, torch.float32, CPU)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_dequantized_export_is_the_dense_model(
    source: ModelFolder, precision: Precision, tmp_path: Path
) -> None:
    four, dense = write_quantized_model(
        source, tmp_path, GptqConfig(act_order=True, symmetric=False)
    )
    merged = merge_to_folder(four, None, tmp_path / "merged", precision)
    layers = sum(name.endswith("qweight") for name in read_index(four))
    assert (merged.merged_layers, merged.dequantized_layers) == (0, layers)
    folder = ModelFolder(merged.folder)
    assert "quantization_config" not in folder.config
    (found,), (expected,) = (
        [load_file(path) for path in one.weight_files()] for one in (folder, dense)
    )
    dtype = DTYPES[merged.precision]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    assert not find_quantized_weights(load_model(folder, torch.float32, CPU))


def test_adapter_merges_into_dequantized_weights(source: ModelFolder, tmp_path: Path) -> None:
    four, _ = write_quantized_model(source, tmp_path, GptqConfig())
    batch = questions(source, tmp_path)
    model = apply_tune(load_model(four, torch.float32, CPU), language="lora", lora={"rank": 2})
    with torch.no_grad():
        for _, _, group_adapter in iter_adapters(model):
            for factor in group_adapter.parameters():
                factor.copy_(random_values(tuple(factor.shape)) / 10)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, model, base_model=str(four.path), base_fingerprint=four.fingerprint())
    again = load_model(four, torch.float32, CPU)
    load_adapter(again, adapter, base_folder=four)
    assert torch.equal(logits(again, batch), logits(model, batch))
    merged = merge_to_folder(four, adapter, tmp_path / "merged", "fp32")
    assert merged.merged_layers == merged.dequantized_layers
    found = logits(load_model(ModelFolder(merged.folder), torch.float32, CPU), batch)
    assert max_relative_error(found, logits(model, batch)) <= 1e-5


def test_stored_precision_ignores_quantized_tensors(source: ModelFolder, tmp_path: Path) -> None:
    four, dense = write_quantized_model(source, tmp_path, GptqConfig())
    assert stored_precision(four) == stored_precision(dense) == "fp32"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 200])
@pytest.mark.parametrize(
    "way", [GptqConfig(), GptqConfig(64, True, False), GptqConfig(128)], ids=str
)
@pytest.mark.parametrize("shape", [(512, 1024), (40, 768), (96, 320)], ids=str)
def test_gpu_products_match_dequantized(
    dtype: torch.dtype, rows: int, way: GptqConfig, shape: tuple[int, int]
) -> None:
    tensors, dense = pack_weight(random_values(shape), way)
    matrix = make_matrix(tensors, shape, way).cuda()
    assert torch.equal(matrix.dequantize(dtype).cpu(), dense.to(dtype))
    bias = random_values((shape[0],), dtype, seed=4).cuda()
    for given in (None, bias):
        x = random_values((rows, shape[1]), dtype, seed=2).cuda().requires_grad_()
        y = matrix(x, given)
        expected = x.detach().double() @ dense.cuda().double().T
        expected = expected if given is None else expected + given.double()
        bound = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert max_relative_error(y.detach().double(), expected) < bound
        y.float().square().sum().backward()
        back = (2 * y.detach()).double() @ dense.cuda().double()
        assert x.grad is not None
        assert max_relative_error(x.grad.double(), back) < bound
