"""Answers of models in four bits: those of their dense twins, without ever making these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_fixtures import encode_mixed_questions, generate_cached, install_request_adapters
from gptq_fixtures import GptqConfig, pack_weight, with_untied_head, write_quantized_model
from hf_reference import CPU, max_relative_error
from tiny_model import TinyFamily, create_tiny_model
from torch import Tensor

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer.engine import generate
from finesight.infer.model_loader import load_inference_model
from finesight.model.quant.base import MAX_GEMM_ROWS, MAX_GEMV_ROWS
from finesight.model.quant.int4 import Int4Matrix
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

STEPS = 9
FAMILIES: list[TinyFamily] = ["qwen", "qwen2_vl"]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def write_quantized_and_dense(
    tmp_path: Path, family: TinyFamily, way: GptqConfig
) -> tuple[ModelFolder, ModelFolder]:
    if family == "qwen":
        pytest.importorskip("tiktoken")
    return write_quantized_model(
        ModelFolder(create_tiny_model(tmp_path / "tiny", family)), tmp_path, way
    )


def make_prompts(folder: ModelFolder, tmp_path: Path) -> list[EncodedSample]:
    return encode_mixed_questions(NativeRenderer(folder), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_match_the_dequantized_model(family: TinyFamily, tmp_path: Path) -> None:
    folders = write_quantized_and_dense(
        tmp_path, family, GptqConfig(act_order=True, symmetric=False)
    )
    prompts = make_prompts(folders[0], tmp_path)
    found, expected = (
        generate(
            load_inference_model(str(folder.path), "cpu").model,
            prompts,
            max_new_tokens=STEPS,
            end_ids=(),
        )
        for folder in folders
    )
    assert found == expected


def force_decode(
    model: VisionLanguageModel, prompts: Sequence[EncodedSample], tokens: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The logits of each answer and step, the tokens being given."""
    generated = generate_cached(model, prompts, len(tokens[0]), forced_tokens=tokens)
    return [logits_V for answer in generated for logits_V in answer.logits]


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_seqs", [1, MAX_GEMV_ROWS, MAX_GEMM_ROWS])
@pytest.mark.parametrize(
    "way", [GptqConfig(), GptqConfig(64, act_order=True, symmetric=False)], ids=str
)
@pytest.mark.parametrize("change", [None, install_request_adapters])
def test_cuda_graph_steps_match_the_dequantized_model(family, num_seqs, way, change, tmp_path):
    four, dense = write_quantized_and_dense(tmp_path, family, way)
    prompts = [make_prompts(four, tmp_path)[0]] * num_seqs
    tokens = [[(7 * step + row) % 200 for step in range(STEPS)] for row in range(num_seqs)]
    card = torch.device("cuda")
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        models = [load_model(folder, dtype, card).eval() for folder in (four, dense)]
        if change is not None:
            for model in models:
                change(model)
        found, expected = (force_decode(model, prompts, tokens) for model in models)
        for ours, theirs in zip(found, expected, strict=True):
            assert max_relative_error(ours.float(), theirs.float()) <= bound


@pytest.mark.gpu
@on_card
def test_small_batches_do_not_dequantize_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check several matrices as one, without memory for it in a wider dtype."""
    outputs, inputs = 1024, 4096
    matrix = Int4Matrix(outputs, inputs, group_size=128, where="a test")
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    for name, tensor in pack_weight(values, GptqConfig(128))[0].items():
        matrix.load_tensor(name, tensor)
    matrix = matrix.cuda()
    full = outputs * inputs * 2
    cases = ((1, full // 8), (MAX_GEMM_ROWS, full // 8), (MAX_GEMM_ROWS + 1, full + full // 4))
    for num_seqs, most in cases:
        x = torch.randn(num_seqs, inputs, device="cuda", dtype=torch.bfloat16)
        matrix(x, None)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        matrix(x, None)
        assert torch.cuda.max_memory_allocated() - before <= most


def with_frozen_head(folder: ModelFolder, device: torch.device) -> list[VisionLanguageModel]:
    """A model with its head in NF4, and one with the dense numbers of it."""
    pair = [load_model(folder, torch.float32, device, ("embeddings",)).eval() for _ in range(2)]
    assert pair[1].lm_head is not None
    pair[1].lm_head.dequantize()
    return pair


def test_answers_with_quantized_lm_head(tmp_path: Path) -> None:
    folder = with_untied_head(write_quantized_and_dense(tmp_path, "qwen2_vl", GptqConfig())[1])
    prompts = make_prompts(folder, tmp_path)
    found, expected = (
        generate(model, prompts, max_new_tokens=STEPS, end_ids=())
        for model in with_frozen_head(folder, CPU)
    )
    assert found == expected


@pytest.mark.gpu
@on_card
def test_cuda_graph_steps_with_quantized_lm_head(tmp_path: Path) -> None:
    folder = with_untied_head(write_quantized_and_dense(tmp_path, "qwen2_vl", GptqConfig())[1])
    prompts = make_prompts(folder, tmp_path)[:1]
    tokens = [[7 * step % 200 for step in range(STEPS)]]
    four, dense = with_frozen_head(folder, torch.device("cuda"))
    pairs = zip(
        force_decode(four, prompts, tokens), force_decode(dense, prompts, tokens), strict=True
    )
    assert max(max_relative_error(ours, theirs) for ours, theirs in pairs) < 0.02
