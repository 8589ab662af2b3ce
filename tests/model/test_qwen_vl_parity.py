"""Native Qwen-VL against reference values of the published code, see qwen_vl_reference."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from qwen_vl_reference import (
    ARRAYS,
    CASES,
    CONFIGS,
    GENERATED,
    make_conversation,
    make_native_model,
    project_gradient,
    project_logits,
    to_published_layout,
)

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import pack
from finesight.infer.prediction import generate
from finesight.model.vlm import VisionLanguageModel

MODES = [
    (number, mode)
    for number, case in enumerate(CASES)
    for mode in ("evaluating", "training")
    if mode in case
]


def _packed(*cases: dict[str, Any]) -> PackedBatch:
    """Return the packed cases with logits for all tokens."""
    samples = [
        make_conversation(CONFIGS[c["config"]], c["parts"], c["seed"]).encoded for c in cases
    ]
    batch = pack(samples)
    every_T = torch.arange(len(batch.ids_T))
    return replace(batch, logit_indices_L=every_T, labels_L=batch.ids_T)


def _logits(model: VisionLanguageModel, batch: PackedBatch) -> torch.Tensor:
    return model.compute_logits(model(batch))


@pytest.mark.parametrize(("number", "mode"), MODES)
def test_logits_loss_and_gradients_match_published_code(number, mode):
    case = CASES[number]
    config = CONFIGS[case["config"]]
    model = make_native_model(config).train(mode == "training")
    logits_TV = _logits(model, _packed(case))
    stored = {key: ARRAYS[f"{number} {mode} {key}"] for key in ("rows", "logits", "gradients")}
    tokens = len(logits_TV)
    assert tokens == case["tokens"]
    largest = case[mode]["largest"]
    found = logits_TV[[0, tokens // 2, tokens - 1]].detach().numpy()
    assert np.abs(found - stored["logits"]).max() <= 1e-5 * largest
    # A matmul sums over so many logits: a few times the difference of one.
    assert np.abs(project_logits(logits_TV) - stored["rows"]).max() <= 5e-5 * largest

    labels_T = torch.from_numpy(make_conversation(config, case["parts"], case["seed"]).labels_T)
    loss = F.cross_entropy(logits_TV[:-1], labels_T[1:])
    assert abs(loss.item() - case[mode]["loss"]) <= 1e-5
    loss.backward()
    learning = {name for name in to_published_layout(model) if not name.endswith("pos_embed")}
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = {
        name: tensor for name, tensor in to_published_layout(model).items() if name in learning
    }
    for name, expected in zip(sorted(gradients), stored["gradients"], strict=True):
        difference = np.abs(project_gradient(name, gradients[name]) - expected).max()
        assert difference <= 1e-4 * max(expected[-1], 1e-9), name


def test_packed_sequences_match_single_sequences():
    several = [number for number, case in enumerate(CASES) if case["config"] == "few queries"]
    batch = _packed(*(CASES[number] for number in several))
    with torch.no_grad():
        logits_TV = _logits(make_native_model(CONFIGS["few queries"]), batch)
    rows = np.concatenate([ARRAYS[f"{number} evaluating rows"] for number in several])
    assert np.abs(project_logits(logits_TV) - rows).max() <= 5e-5 * float(logits_TV.abs().max())


@pytest.mark.parametrize("name", dict.fromkeys(one["config"] for one in GENERATED))
def test_generation_matches_published_code(name):
    # All prompts in one batch, short and long ones; the published code supports one at a time.
    requested = [one for one in GENERATED if one["config"] == name]
    prompts = [
        make_conversation(CONFIGS[name], one["parts"], one["seed"]).encoded for one in requested
    ]
    longest = max(len(one["tokens"]) for one in requested)
    answers = generate(
        make_native_model(CONFIGS[name]), prompts, max_new_tokens=longest, end_ids=()
    )
    for one, answer in zip(requested, answers, strict=True):
        assert answer[: len(one["tokens"])] == one["tokens"], one["parts"]
