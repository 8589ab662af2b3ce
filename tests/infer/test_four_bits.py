"""Answers of models in four bits: those of their dense twins, without ever making these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from asking import adapt_by_request, grow, mixed_questions
from gptq import Way, packed, publish, with_a_head
from oracle import CPU, distance
from torch import Tensor

from finesight.encode.encoded import Encoded
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer.generate import generate
from finesight.infer.load import load_answerer
from finesight.model.frozen import ROWS, TILE_ROWS
from finesight.model.int4 import Int4Matrix
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import load_model

STEPS = 9
FAMILIES: list[TinyFamily] = ["qwen", "qwen2_vl"]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def twins(tmp_path: Path, family: TinyFamily, way: Way) -> tuple[ModelFolder, ModelFolder]:
    if family == "qwen":
        pytest.importorskip("tiktoken")
    return publish(ModelFolder(make_tiny(tmp_path / "tiny", family)), tmp_path, way)


def prompts_of(folder: ModelFolder, tmp_path: Path) -> list[Encoded]:
    return [Renderer(folder).prompt(question) for question in mixed_questions(tmp_path)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_those_of_the_dense_numbers(family: TinyFamily, tmp_path: Path) -> None:
    folders = twins(tmp_path, family, Way(act_order=True, symmetric=False))
    prompts = prompts_of(folders[0], tmp_path)
    found, expected = (
        generate(
            load_answerer(str(folder.path), "cpu").model, prompts, max_new_tokens=STEPS, end_ids=()
        )
        for folder in folders
    )
    assert found == expected


def spoken(
    model: VisionLanguageModel, prompts: Sequence[Encoded], tokens: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The logits of each answer and step, the tokens being given."""
    grown = grow(model, prompts, len(tokens[0]), spoken=tokens)
    return [logits_V for answer in grown for logits_V in answer.logits]


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, ROWS, TILE_ROWS])
@pytest.mark.parametrize("way", [Way(), Way(64, act_order=True, symmetric=False)], ids=str)
@pytest.mark.parametrize("change", [None, adapt_by_request])
def test_recorded_steps_on_a_card_are_those_of_the_dense_numbers(
    family: TinyFamily,
    rows: int,
    way: Way,
    change: Callable[[VisionLanguageModel], None] | None,
    tmp_path: Path,
) -> None:
    four, dense = twins(tmp_path, family, way)
    prompts = [prompts_of(four, tmp_path)[0]] * rows
    tokens = [[(7 * step + row) % 200 for step in range(STEPS)] for row in range(rows)]
    card = torch.device("cuda")
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        models = [load_model(folder, dtype, card).eval() for folder in (four, dense)]
        if change is not None:
            for model in models:
                change(model)
        found, expected = (spoken(model, prompts, tokens) for model in models)
        for ours, theirs in zip(found, expected, strict=True):
            assert distance(ours.float(), theirs.float()) <= bound


@pytest.mark.gpu
@on_card
def test_few_rows_make_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """And many make one, without room for it in a wider type."""
    outputs, inputs = 1024, 4096
    matrix = Int4Matrix(outputs, inputs, group=128, where="a test")
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    for name, tensor in packed(values, Way(128))[0].items():
        matrix.take(name, tensor)
    matrix = matrix.cuda()
    whole = outputs * inputs * 2
    cases = ((1, whole // 8), (TILE_ROWS, whole // 8), (TILE_ROWS + 1, whole + whole // 4))
    for rows, most in cases:
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        matrix(x, None)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        matrix(x, None)
        assert torch.cuda.max_memory_allocated() - before <= most


def with_frozen_head(folder: ModelFolder, device: torch.device) -> list[VisionLanguageModel]:
    """A model with its head in NF4, and one with the dense numbers of it."""
    pair = [load_model(folder, torch.float32, device, ("embeddings",)).eval() for _ in range(2)]
    assert pair[1].lm_head is not None
    pair[1].lm_head.thaw()
    return pair


def test_answers_with_the_head_in_four_bits(tmp_path: Path) -> None:
    folder = with_a_head(twins(tmp_path, "qwen2_vl", Way())[1])
    prompts = prompts_of(folder, tmp_path)
    found, expected = (
        generate(model, prompts, max_new_tokens=STEPS, end_ids=())
        for model in with_frozen_head(folder, CPU)
    )
    assert found == expected


@pytest.mark.gpu
@on_card
def test_recorded_steps_with_the_head_in_four_bits(tmp_path: Path) -> None:
    folder = with_a_head(twins(tmp_path, "qwen2_vl", Way())[1])
    prompts = prompts_of(folder, tmp_path)[:1]
    tokens = [[7 * step % 200 for step in range(STEPS)]]
    four, dense = with_frozen_head(folder, torch.device("cuda"))
    pairs = zip(spoken(four, prompts, tokens), spoken(dense, prompts, tokens), strict=True)
    assert max(distance(ours, theirs) for ours, theirs in pairs) < 0.02
