"""Answers of models in four bits: those of their dense twins, without ever making these."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_fixtures import encode_mixed_questions, generate_cached, install_request_adapters
from gptq_fixtures import GptqConfig, with_untied_head, write_quantized_model
from hf_reference import CPU, max_relative_error
from tiny_model import TinyFamily, create_tiny_model
from torch import Tensor

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import generate
from finesight.model.quant.base import MAX_GEMM_ROWS, MAX_GEMV_ROWS
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

STEPS = 9
FAMILIES: list[TinyFamily] = ["qwen", "qwen2_vl"]


def write_quantized_and_dense(
    folder: Path, family: TinyFamily, config: GptqConfig
) -> tuple[ModelFolder, ModelFolder]:
    if family == "qwen":
        pytest.importorskip("tiktoken")
    tiny = ModelFolder(create_tiny_model(folder / "tiny", family))
    return write_quantized_model(tiny, folder, config)


def write_and_load_quantized_head(folder: Path, device: torch.device) -> list[VisionLanguageModel]:
    """A model with its head in NF4, and one with the dequantized head."""
    untied = with_untied_head(write_quantized_and_dense(folder, "qwen2_vl", GptqConfig())[1])
    models = [load_model(untied, torch.float32, device, ("embeddings",)).eval() for _ in range(2)]
    assert models[1].lm_head is not None
    models[1].lm_head.dequantize()
    return models


def make_prompts(folder: Path) -> list[EncodedSample]:
    return encode_mixed_questions(NativeRenderer(ModelFolder(folder / "tiny")), folder)


@pytest.mark.parametrize("source", [*FAMILIES, "quantized head"])
def test_answers_match_the_dequantized_model(source, tmp_path):
    if source == "quantized head":
        models = write_and_load_quantized_head(tmp_path, CPU)
    else:
        config = GptqConfig(act_order=True, symmetric=False)
        folders = write_quantized_and_dense(tmp_path, source, config)
        models = [load_inference_model(str(folder.path), "cpu").model for folder in folders]
    found, expected = (
        generate(model, make_prompts(tmp_path), max_new_tokens=STEPS, end_ids=())
        for model in models
    )
    assert found == expected


def force_decode(
    model: VisionLanguageModel, prompts: Sequence[EncodedSample], tokens: Sequence[Sequence[int]]
) -> list[Tensor]:
    generated = generate_cached(model, prompts, len(tokens[0]), forced_tokens=tokens)
    return [logits_V for answer in generated for logits_V in answer.logits]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_seqs", [1, MAX_GEMV_ROWS, MAX_GEMM_ROWS])
@pytest.mark.parametrize("config", [GptqConfig(), GptqConfig(64, act_order=True, symmetric=False)])
@pytest.mark.parametrize("change", [None, install_request_adapters])
def test_cuda_graph_steps_match_the_dequantized_model(family, num_seqs, config, change, tmp_path):
    folders = write_quantized_and_dense(tmp_path, family, config)
    prompts = [make_prompts(tmp_path)[0]] * num_seqs
    tokens = [[(7 * step + row) % 200 for step in range(STEPS)] for row in range(num_seqs)]
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        models = [load_model(folder, dtype, torch.device("cuda")).eval() for folder in folders]
        if change is not None:
            for model in models:
                change(model)
        found, expected = (force_decode(model, prompts, tokens) for model in models)
        for ours, theirs in zip(found, expected, strict=True):
            assert max_relative_error(ours.float(), theirs.float()) <= bound
