"""The native Qwen-VL against numbers of the published code: see published_qwen_vl."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published_qwen_vl import (
    ARRAYS,
    CASES,
    CONFIGS,
    GENERATED,
    conversation,
    native,
    projected,
    published,
    row_products,
)

from finesight.encode.pack import PackedBatch, pack
from finesight.infer.generate import generate
from finesight.model.network import VisionLanguageModel

MODES = [
    (number, mode)
    for number, case in enumerate(CASES)
    for mode in ("evaluating", "training")
    if mode in case
]


def _name(number: int, mode: str = "") -> str:
    return f"{CASES[number]['config']}: {CASES[number]['name']} {mode}"


def _packed(*cases: dict[str, Any]) -> PackedBatch:
    """The cases end to end, all tokens asked for their logits."""
    samples = [conversation(CONFIGS[c["config"]], c["parts"], c["seed"]).encoded for c in cases]
    batch = pack(samples)
    every_T = torch.arange(len(batch.ids_T))
    return replace(batch, predict_L=every_T, target_L=batch.ids_T)


def _logits(model: VisionLanguageModel, batch: PackedBatch) -> torch.Tensor:
    return model.logits(model(batch))


@pytest.mark.parametrize(("number", "mode"), MODES, ids=[_name(*each) for each in MODES])
def test_logits_loss_and_gradients_are_those_of_the_published_code(number: int, mode: str) -> None:
    case = CASES[number]
    config = CONFIGS[case["config"]]
    model = native(config).train(mode == "training")
    logits_TV = _logits(model, _packed(case))
    stored = {key: ARRAYS[f"{number} {mode} {key}"] for key in ("rows", "logits", "gradients")}
    tokens = len(logits_TV)
    assert tokens == case["tokens"]
    largest = case[mode]["largest"]
    found = logits_TV[[0, tokens // 2, tokens - 1]].detach().numpy()
    assert np.abs(found - stored["logits"]).max() <= 1e-5 * largest
    # A product adds up so many logits: a few times the difference of one.
    assert np.abs(row_products(logits_TV) - stored["rows"]).max() <= 5e-5 * largest

    labels_T = torch.from_numpy(conversation(config, case["parts"], case["seed"]).labels_T)
    loss = F.cross_entropy(logits_TV[:-1], labels_T[1:])
    assert abs(loss.item() - case[mode]["loss"]) <= 1e-5
    loss.backward()
    learning = {name for name in published(model) if not name.endswith("pos_embed")}
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = {name: tensor for name, tensor in published(model).items() if name in learning}
    for name, expected in zip(sorted(gradients), stored["gradients"], strict=True):
        difference = np.abs(projected(name, gradients[name]) - expected).max()
        assert difference <= 1e-4 * max(expected[-1], 1e-9), name


def test_a_pack_of_long_and_short_sequences_is_each_of_them_alone() -> None:
    several = [number for number, case in enumerate(CASES) if case["config"] == "few queries"]
    batch = _packed(*(CASES[number] for number in several))
    with torch.no_grad():
        logits_TV = _logits(native(CONFIGS["few queries"]), batch)
    rows = np.concatenate([ARRAYS[f"{number} evaluating rows"] for number in several])
    assert np.abs(row_products(logits_TV) - rows).max() <= 5e-5 * float(logits_TV.abs().max())


@pytest.mark.parametrize("name", dict.fromkeys(each["config"] for each in GENERATED))
def test_generation_is_that_of_the_published_code_token_by_token(name: str) -> None:
    # All prompts at once, short and long ones: the published code knew one at a time.
    asked = [each for each in GENERATED if each["config"] == name]
    prompts = [conversation(CONFIGS[name], each["parts"], each["seed"]).encoded for each in asked]
    longest = max(len(each["tokens"]) for each in asked)
    answers = generate(native(CONFIGS[name]), prompts, max_new_tokens=longest, end_ids=())
    for each, answer in zip(asked, answers, strict=True):
        assert answer[: len(each["tokens"])] == each["tokens"], each["parts"]
