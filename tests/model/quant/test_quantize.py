"""Quantization while loading: selected layers, generations, and rejected models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from each_value import each
from engine_fixtures import make_mixed_questions
from gptq_fixtures import GptqConfig, with_untied_head, write_quantized_model
from hf_reference import max_relative_error
from synthetic_tasks.dataset_writer import write_task
from synthetic_tasks.tasks import SyntheticTask
from tiny_model import TinyFamily, create_tiny_model
from torch import Tensor

from finesight.config import EvalSettings, TuneSettings, WeightFormat
from finesight.data.sample import LocatedSample, read_samples
from finesight.encode.packing import PackedBatch, pack
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.evaluate.generation_eval import evaluate
from finesight.infer.model_loader import load_inference_model
from finesight.model.hf_backend import load_auto_model
from finesight.model.linear import FusedLinear, iter_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model.quant import base, nf4
from finesight.model.quant.base import (
    MAX_GEMM_ROWS,
    MAX_GEMV_ROWS,
    QuantizedMatrix,
    find_quantized_weights,
)
from finesight.model.trainable import configure_tuning, get_part
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import MATRIX_TYPES, hub_tensors, load_model
from finesight.model_folder import TINY_MODEL, ModelFolder

CPU = torch.device("cpu")
FORMATS: list[WeightFormat] = [kind for kind in get_args(WeightFormat) if kind != "auto"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen"]
SIGNS, SAMPLES = SyntheticTask("street", "built-in"), 24
ROOT = Path(__file__).parents[3]


def test_every_quantization_format_is_registered() -> None:
    assert set(MATRIX_TYPES) == set(FORMATS)


def tiny(folder: Path, family: TinyFamily = "qwen2_5_vl", head: bool = False) -> ModelFolder:
    if family == "qwen":
        pytest.importorskip("tiktoken")
    made = ModelFolder(create_tiny_model(folder / family, family))
    if not head:
        return made
    (folder / family / "sha256.json").unlink(missing_ok=True)
    return with_untied_head(made)


def questions(folder: ModelFolder, tmp_path: Path) -> PackedBatch:
    renderer = NativeRenderer(folder)
    batch = pack([renderer.encode_prompt(question) for question in make_mixed_questions(tmp_path)])
    every_T = torch.arange(len(batch.ids_T))
    return dataclasses.replace(batch, logit_indices_L=every_T, labels_L=batch.ids_T)


@torch.no_grad()
def logits(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    return model.eval().compute_logits(model(batch))


def dequantize_model(model: VisionLanguageModel) -> VisionLanguageModel:
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.dequantize()
    return model.requires_grad_(False)


@each("kind", FORMATS)
@each("family", FAMILIES)
def test_only_the_decoder_is_quantized(
    kind: WeightFormat, family: TinyFamily, tmp_path: Path
) -> None:
    model = load_model(tiny(tmp_path, family), torch.float32, CPU, (), kind)
    few = find_quantized_weights(model)
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, FusedLinear)
    }
    assert {name for name in linear if get_part(name) == "language"} <= few.keys()
    parts = {get_part(name) for name in few}
    assert parts == {"language"} | ({"embeddings"} if model.lm_head is not None else set())
    retained = {type(matrix) for weight in few.values() for matrix in weight.matrices}
    assert retained == {MATRIX_TYPES[kind]}


@pytest.mark.parametrize("kind", FORMATS)
def test_untied_lm_head_is_quantized(kind: WeightFormat, tmp_path: Path) -> None:
    own = load_model(tiny(tmp_path, head=True), torch.float32, CPU, (), kind)
    assert "lm_head.weight" in find_quantized_weights(own)
    tied = load_model(tiny(tmp_path / "tied"), torch.float32, CPU, (), kind)
    assert {get_part(name) for name in find_quantized_weights(tied)} == {"language"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_logits_match_dequantized_weights(
    kind: WeightFormat, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny(tmp_path, head=True)
    batch = questions(folder, tmp_path)
    model = load_model(folder, dtype, CPU, (), kind)
    found = logits(model, batch)
    assert torch.equal(found, logits(dequantize_model(model), batch))


@pytest.mark.parametrize("kind", FORMATS)
def test_explicit_weight_format_overrides_the_run(kind: WeightFormat, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    model = load_model(folder, torch.float32, CPU, ("vision", "merger", "language"), kind)
    parts = {get_part(name) for name in find_quantized_weights(model)}
    assert parts == {"language"}


@pytest.mark.parametrize("kind", FORMATS)
def test_adapter_stays_unmerged_on_quantized_weights(kind: WeightFormat, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    batch = questions(folder, tmp_path)
    trained = load_model(folder, torch.float32, CPU)
    configure_tuning(trained, TuneSettings.model_validate({"lora": {"rank": 2}}), 0)
    with torch.no_grad():
        for _, _, adapter in iter_adapters(trained):
            for factor in adapter.parameters():
                factor.fill_(0.05)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", trained, base_model=str(folder.path))
    answerer = load_inference_model(str(tmp_path / "adapter"), "cpu", "fp32", kind)
    assert isinstance(answerer.model, VisionLanguageModel)
    assert find_quantized_weights(answerer.model)
    found = logits(answerer.model, batch)
    assert torch.equal(found, logits(dequantize_model(answerer.model), batch))
    baseline = load_inference_model(str(folder.path), "cpu", "fp32", kind).model
    assert isinstance(baseline, VisionLanguageModel)
    assert max_relative_error(found, logits(baseline, batch)) > 0.01


@pytest.mark.parametrize("kind", FORMATS)
def test_loading_never_upcasts_a_full_matrix(
    kind: WeightFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense weights are converted in chunks of rows."""
    from test_qlora import LargestTensorMode

    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 64)
    # On a CPU bitsandbytes compares every element with all 16 values at once.
    monkeypatch.setattr(nf4, "CHUNK_ELEMENTS", 64)
    folder = tiny(tmp_path)
    with LargestTensorMode() as seen:
        model = load_model(folder, torch.bfloat16, CPU, (), kind)
    assert seen.most <= max(t.num_elements for t in hub_tensors(model))


@pytest.mark.parametrize("kind", FORMATS)
def test_unsupported_models_are_rejected(kind: WeightFormat, tmp_path: Path) -> None:
    experts = ModelFolder(create_tiny_model(tmp_path / "experts", "qwen3_vl_moe"))
    with pytest.raises(UserError, match=rf"in {kind}, but this model has experts") as refused:
        load_model(experts, torch.float32, CPU, (), kind)
    assert refused.value.where == "--weight-format"
    four, _ = write_quantized_model(tiny(tmp_path), tmp_path, GptqConfig())
    with pytest.raises(UserError, match="is already in four bits by GPTQ"):
        load_model(four, torch.float32, CPU, (), kind)


def test_hf_backend_models_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(
        UserError, match="weights in int8 for a model of the family llava"
    ) as refused:
        load_auto_model(ModelFolder(tmp_path), torch.float32, CPU, (), "int8")
    assert refused.value.where == "--weight-format"


def test_triton_interpreter_runs_all_kernels(tmp_path: Path) -> None:
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
def word_samples(tmp_path_factory: pytest.TempPathFactory) -> list[LocatedSample]:
    """Return samples of words in clutter, in fonts unknown to the bundled model."""
    file = write_task(tmp_path_factory.mktemp("drawn") / "street", SIGNS, SAMPLES, 7, "find")
    return [LocatedSample(sample, file.parent) for sample in read_samples(file)]


def accuracy(drawn: list[LocatedSample], kind: WeightFormat) -> float:
    settings = EvalSettings.model_validate(
        {"metric": "grounding", "max_new_tokens": 40, "batch_size": SAMPLES}
    )
    answerer = load_inference_model(TINY_MODEL, "cpu", "fp32", kind)
    return evaluate(answerer.model, answerer.renderer, drawn, settings).scores["accuracy_at_0.5"]


@pytest.fixture(scope="module")
def baseline_accuracy(word_samples: list[LocatedSample]) -> float:
    return accuracy(word_samples, "auto")


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_model_accuracy_is_preserved(
    kind: WeightFormat, word_samples: list[LocatedSample], baseline_accuracy: float
) -> None:
    """Allow two samples with other results."""
    assert baseline_accuracy > 0.8
    assert abs(accuracy(word_samples, kind) - baseline_accuracy) <= 2 / SAMPLES + 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "rows", [1, 2, MAX_GEMV_ROWS, MAX_GEMV_ROWS + 1, 40, MAX_GEMM_ROWS, MAX_GEMM_ROWS + 1]
)
@pytest.mark.parametrize("shape", [(512, 1024), (40, 768), (97, 384), (24, 200)], ids=str)
def test_gpu_products_match_dequantized_weights(
    kind: str, dtype: torch.dtype, rows: int, shape: tuple[int, int]
) -> None:
    """Includes partially filled blocks, and sizes without a kernel."""
    generator = torch.Generator().manual_seed(0)
    matrix: QuantizedMatrix = MATRIX_TYPES[kind](*shape).cuda()
    (piece,) = matrix.tensor_specs()
    piece.load(torch.randn(shape, generator=generator).bfloat16())
    dense = matrix.dequantize(torch.float32).double()
    for bias in (None, torch.randn(shape[0], generator=generator).to("cuda", dtype)):
        x = torch.randn(rows, shape[1], generator=generator).to("cuda", dtype).requires_grad_()
        y = matrix(x, bias)
        expected = x.detach().double() @ dense.T + (0 if bias is None else bias.double())
        bound = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert max_relative_error(y.detach().double(), expected) < bound
        y.float().square().sum().backward()
        assert x.grad is not None
        assert max_relative_error(x.grad.double(), (2 * y.detach()).double() @ dense) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, MAX_GEMM_ROWS])
def test_cuda_graph_product_matches(kind: str, rows: int) -> None:
    """The matmul allocates no dense matrix."""
    shape = (1024, 2048)
    matrix: QuantizedMatrix = MATRIX_TYPES[kind](*shape).cuda()
    (piece,) = matrix.tensor_specs()
    piece.load(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    expected = matrix(x, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    matrix(x, None)
    assert torch.cuda.max_memory_allocated() - before <= shape[0] * shape[1] // 4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = matrix(x, None)
    graph.replay()
    assert torch.equal(found, expected)
