"""Quantization while loading: selected layers, generations, and rejected models."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from engine_fixtures import compute_logits, pack_mixed_questions
from gptq_fixtures import GptqConfig, with_untied_head, write_quantized_model
from hf_reference import max_relative_error
from lora_fixtures import install_random_adapter, quantize_linear
from synthetic_tasks.dataset_writer import write_task
from synthetic_tasks.tasks import SyntheticTask
from tiny_model import TINY_PRESETS, TinyFamily, create_tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finesight.errors import UserError
from finesight.evaluate.generation_eval import evaluate
from finesight.infer.model_loader import load_inference_model
from finesight.model.backend import load_auto_model
from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear
from finesight.model.lora.peft_io import save_adapter
from finesight.model.quant import base, nf4
from finesight.model.quant.base import (
    MAX_GEMM_ROWS,
    MAX_GEMV_ROWS,
    QuantizedMatrix,
    find_quantized_weights,
)
from finesight.model.trainable import get_part
from finesight.model.weights_io import MATRIX_TYPES, hub_tensors, load_model
from finesight.model_folder import TINY_MODEL, ModelFolder
from finesight.samples.sample import LocatedSample, read_samples
from finesight.settings.config import EvalSettings
from finesight.settings.setting_types import WeightFormat

CPU = torch.device("cpu")
FORMATS: list[WeightFormat] = [kind for kind in get_args(WeightFormat) if kind != "auto"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


SHARES = {"int8": (0.0, 0.01), "fp8": (0.0, 0.03), "int4": (0.07, 0.11), "nf4": (0.085, 0.1)}
"""Bounds of the relative error of normally distributed values; for NF4 as published."""

NUM_BITS = {
    "int8": 8 + 32 / 1024,
    "fp8": 8 + 32 / 1024,
    "int4": 4 + 24 / 64 + 32 / 512,
    "nf4": 4.127,
}
"""Memory per weight of a matrix of 512 x 1024 elements, with scales and column permutation."""
FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen"]
SIGNS, SAMPLES = SyntheticTask("street", "built-in"), 24
ROOT = Path(__file__).parents[3]


def tiny(folder: Path, family: TinyFamily = "qwen2_5_vl", head: bool = False) -> ModelFolder:
    if family == "qwen":
        pytest.importorskip("tiktoken")
    made = ModelFolder(create_tiny_model(folder / family, family))
    if not head:
        return made
    (folder / family / "sha256.json").unlink(missing_ok=True)
    return with_untied_head(made)


def random_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_matrix(kind: str, values: Tensor, device: str = "cpu") -> QuantizedMatrix:
    matrix: QuantizedMatrix = MATRIX_TYPES[kind](*values.shape).to(device)
    (spec,) = matrix.tensor_specs()
    spec.load(values)
    return matrix


@pytest.mark.parametrize("kind", FORMATS)
def test_error_and_memory_of_a_format(kind):
    values = random_values(512, 1024)
    matrix = make_matrix(kind, values)
    off = matrix.dequantize(torch.float32) - values
    least, most = SHARES[kind]
    assert least < float(off.norm() / values.norm()) < most
    num_bytes = sum(buffer.nbytes for buffer in matrix.buffers())
    assert 8 * num_bytes / values.numel() == pytest.approx(NUM_BITS[kind], abs=0.001)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("shape", [(40, 64), (7, 3), (33, 80), (1, 1), (300, 17), (4096, 16)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_rowwise_quantization_error_is_bounded(kind, shape, size):
    """The largest value of a row is exact: beyond the largest FP8 code there is only NaN."""
    values = random_values(*shape) * size
    # One output is dominated by a single element, and one is all zeros.
    values[0, 0] *= 100
    values[-1] = 0 if len(values) > 1 else values[-1]
    matrix = make_matrix(kind, values)
    found, scales = matrix.dequantize(torch.float32), matrix.scales_O[:, None].expand_as(values)
    bound = scales / 2 if kind == "int8" else (values.abs() / 16).maximum(scales * 2**-10)
    assert bool(((found - values).abs() <= bound * (1 + 1e-5)).all())
    assert len(values) == 1 or not found[-1].any()
    largest = values.abs().argmax(1, keepdim=True)
    found_O1, largest_O1 = (x.gather(1, largest) for x in (found, values))
    torch.testing.assert_close(found_O1, largest_O1, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("at_once", [base.CHUNK_ELEMENTS, 100])
def test_rowwise_values_are_rounded_once(kind, at_once, monkeypatch):
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", at_once)
    matrix = make_matrix(kind, random_values(33, 80))
    exact = matrix.codes_OI.double() * matrix.scales_O[:, None].double()
    for dtype in TYPES:
        assert torch.equal(matrix.dequantize(dtype), exact.float().to(dtype))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 64), (1, 64)])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_output_and_gradients_match_dequantized(kind, dtype, shape, is_adapted):
    widths, results = {"q_proj": 40, "k_proj": 16, "v_proj": 16}, []
    for is_dense in (False, True):
        group = FusedLinear(64, widths, bias=True).to(dtype).requires_grad_(False)
        group.bias.copy_(random_values(72, seed=7))
        quantize_linear(group, MATRIX_TYPES[kind], weight_OI=random_values(72, 64))
        if is_dense:
            group.dequantize()
            group.requires_grad_(False)
        if is_adapted:
            group.adapter = LoraLinear(group, dict.fromkeys(widths, LoraConfig(3, 8.0)), 0.3)
            for seed, factor in enumerate(group.adapter.parameters()):
                factor.data.copy_(random_values(*factor.shape, seed=10 + seed))
        x = random_values(*shape, seed=3).to(dtype).requires_grad_()
        torch.manual_seed(3)
        outputs = group(x)
        torch.stack([y.float().square().sum() for y in outputs]).sum().backward()
        gradients = [p.grad for p in group.parameters() if p.requires_grad]
        results.append([*(y.detach() for y in outputs), x.grad, *gradients])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("family", "head"), [*((family, False) for family in FAMILIES), ("qwen2_5_vl", True)]
)
def test_only_the_decoder_is_quantized(kind, family, head, tmp_path):
    """Includes an untied head; the format overrides the NF4 parts of a run."""
    run_parts = ("vision", "merger", "language") if family == "qwen2_5_vl" else ()
    model = load_model(tiny(tmp_path, family, head), torch.float32, CPU, run_parts, kind)
    quantized = find_quantized_weights(model)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, FusedLinear)}
    assert {name for name in linear if get_part(name) == "language"} <= quantized.keys()
    parts = {get_part(name) for name in quantized}
    assert parts == {"language"} | ({"embeddings"} if model.lm_head is not None else set())
    matrices = [matrix for weight in quantized.values() for matrix in weight.matrices]
    assert {type(matrix) for matrix in matrices} == {MATRIX_TYPES[kind]}


@pytest.mark.parametrize("kind", FORMATS)
def test_adapter_stays_unmerged_on_quantized_weights(kind, tmp_path):
    folder = tiny(tmp_path)
    batch = pack_mixed_questions(folder, tmp_path)
    trained = load_model(folder, torch.float32, CPU)
    install_random_adapter(trained, 0, {"lora": {"rank": 2}})
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", trained, base_model=str(folder.path))
    model, baseline = (
        load_inference_model(str(path), "cpu", "fp32", kind).model
        for path in (tmp_path / "adapter", folder.path)
    )
    assert find_quantized_weights(model)
    found = compute_logits(model, batch)
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.dequantize()
    assert torch.equal(found, compute_logits(model.requires_grad_(False), batch))
    assert max_relative_error(found, compute_logits(baseline, batch)) > 0.01


class LargestTensorMode(TorchDispatchMode):
    """Records the number of elements of the largest floating-point tensor of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            real = isinstance(tensor, Tensor) and tensor.device.type != "meta"
            if real and tensor.is_floating_point():
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return made


@pytest.mark.parametrize("kind", ["parts in NF4", *FORMATS])
def test_loading_holds_one_dense_matrix_at_a_time(kind, tmp_path, monkeypatch):
    # On a CPU bitsandbytes compares every element with all 16 values at once.
    for module in (base, nf4):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2048)
    wide = dataclasses.replace(TINY_PRESETS["test"], intermediate_size=1024)
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny", "qwen2_5_vl", preset=wide))
    given = (("vision", "merger", "language"),) if kind == "parts in NF4" else ((), kind)
    most = []
    for options in (given, ()):
        with LargestTensorMode() as seen:
            model = load_model(folder, torch.bfloat16, CPU, *options)
        most.append(seen.most)
    # The fused gate_proj and up_proj are the largest parameter of the dense model.
    largest = max(tensor.num_elements for tensor in hub_tensors(model))
    assert most[0] <= largest
    assert most[1] == 2 * largest


@pytest.mark.parametrize("kind", FORMATS)
def test_unsupported_models_are_rejected(kind, tmp_path):
    experts = ModelFolder(create_tiny_model(tmp_path / "experts", "qwen3_vl_moe"))
    four, _ = write_quantized_model(tiny(tmp_path), tmp_path, GptqConfig())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    for folder, message in (
        (experts, f"in {kind}, but this model has experts"),
        (four, "is already in four bits by GPTQ"),
        (ModelFolder(tmp_path), f"weights in {kind} for a model of the family llava"),
    ):
        with pytest.raises(UserError, match=message):
            load_auto_model(folder, torch.float32, CPU, (), kind)


def test_triton_interpreter_runs_all_kernels(tmp_path):
    """Compare each format and tiling with the dequantized matrix, on a CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "quant_gemv.py", tmp_path / "found.json"],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    if "only 0-dimensional arrays" in done.stdout:
        pytest.skip("this Triton interprets nothing with this NumPy")
    found = json.loads((tmp_path / "found.json").read_text())
    lines = [dict(zip(found["columns"], line, strict=True)) for line in found["lines"]]
    assert {line["kind"] for line in lines} == set(FORMATS)
    assert not [line for line in lines if line.get("failed") or line["error"] > 1e-3]


@pytest.fixture(scope="module")
def compute_accuracy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[WeightFormat], float]:
    file = write_task(tmp_path_factory.mktemp("drawn") / "street", SIGNS, SAMPLES, 7, "find")
    samples = [LocatedSample(sample, file.parent) for sample in read_samples(file)]
    settings = EvalSettings.model_validate({"metric": "grounding", "max_new_tokens": 40})

    @cache
    def compute(kind: WeightFormat) -> float:
        found = load_inference_model(TINY_MODEL, "cpu", "fp32", kind)
        return evaluate(found.model, found.renderer, samples, settings).scores["accuracy_at_0.5"]

    return compute


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_model_accuracy_is_preserved(kind, compute_accuracy):
    """Allow two samples with other results."""
    assert compute_accuracy("auto") > 0.8
    assert abs(compute_accuracy(kind) - compute_accuracy("auto")) <= 2 / SAMPLES + 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "rows", [1, 2, MAX_GEMV_ROWS, MAX_GEMV_ROWS + 1, 40, MAX_GEMM_ROWS, MAX_GEMM_ROWS + 1]
)
@pytest.mark.parametrize("shape", [(512, 1024), (40, 768), (97, 384), (24, 200)])
def test_gpu_products_match_dequantized_weights(kind, dtype, rows, shape):
    """Includes partially filled blocks, and sizes without a kernel."""
    matrix = make_matrix(kind, random_values(*shape).bfloat16(), "cuda")
    dense = matrix.dequantize(torch.float32).double()
    bound = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for bias in (None, random_values(shape[0], seed=1).to("cuda", dtype)):
        x = random_values(rows, shape[1], seed=2).to("cuda", dtype).requires_grad_()
        y = matrix(x, bias)
        expected = x.detach().double() @ dense.T + (0 if bias is None else bias.double())
        assert max_relative_error(y, expected) < bound
        y.float().square().sum().backward()
        assert max_relative_error(x.grad, (2 * y.detach()).double() @ dense) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, MAX_GEMM_ROWS])
def test_cuda_graph_product_matches(kind, rows):
    """The matmul allocates no dense matrix."""
    outputs, inputs = 1024, 2048
    matrix = make_matrix(kind, random_values(outputs, inputs), "cuda")
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    expected = matrix(x, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    matrix(x, None)
    assert torch.cuda.max_memory_allocated() - before <= outputs * inputs // 4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = matrix(x, None)
    graph.replay()
    assert torch.equal(found, expected)
