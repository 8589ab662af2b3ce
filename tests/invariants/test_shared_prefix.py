"""Shared prefixes of a pack: computed once, with the same loss and gradients."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from conversation_fixtures import make_conversation, make_images
from cuda_graph_fixtures import CPU, make_model
from hf_reference import max_relative_error
from tiny_model import TinyFamily, create_tiny_model
from torch import Tensor

from finesight.encode.batch import PackedBatch, pad_batch
from finesight.encode.packing import find_shared_prefix_length, pack
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer.engine import build_engine
from finesight.infer.prediction import iter_completions
from finesight.infer.request import GenerationRequest, SamplingParams
from finesight.model.trainable import trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample, Message, TextPart
from finesight.settings.config import TuneSettings
from finesight.train.objectives import dpo
from finesight.train.objectives.dpo.loss import DpoObjective, compute_pair_losses
from finesight.train.objectives.objective import fused_linear_cross_entropy
from finesight.train.rollout import join_responses
from finesight.train.token_logps import compute_token_logps

ALL = TuneSettings.model_validate(
    dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
)
LORA = TuneSettings.model_validate({"lora": {"rank": 4, "dropout": 0.0}})
BRIEF = "Say what you see. Name the colours, count the cats, and do not guess."


def encode_samples(folder: Path, model: ModelFolder) -> list[EncodedSample]:
    """Conversations after a system prompt that all have."""
    images, renderer = make_images(folder), NativeRenderer(model)
    brief = Message(role="system", content=(TextPart(text=BRIEF),))
    encoded = []
    for number in range(6):
        sample = make_conversation(number, images, videos=model.family != "qwen").sample
        messages = [message for message in sample.messages if message.role != "system"]
        full = sample.model_copy(update={"messages": (brief, *messages)})
        encoded.append(renderer.encode(LocatedSample(full, folder)))
    return encoded


def read_gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    named = trainable_parameters(model).items()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def compute_loss_and_gradients(model: VisionLanguageModel, batch: PackedBatch) -> dict[str, Tensor]:
    model.zero_grad()
    h_LD, scale = model(batch), torch.tensor(0.01)
    loss = fused_linear_cross_entropy(h_LD, model.lm_head_weight, batch.labels_L, scale)
    loss.backward()
    return {"loss": loss.detach()} | read_gradients(model)


@pytest.mark.parametrize("family", get_args(TinyFamily))
@pytest.mark.parametrize("tune", [ALL, LORA], ids=["all", "lora"])
def test_shared_prefix_loss_and_gradients_match(tmp_path, family, tune):
    """Check padded packs, and activation checkpointing in all layers."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model", family))
    samples = encode_samples(tmp_path, folder)
    shared = find_shared_prefix_length([one.tokenized for one in samples])
    assert shared > 20, "no system prompt"
    model = make_model(torch.float32, CPU, tune, folder)
    expected = compute_loss_and_gradients(model, pack(samples))
    once = pack(samples, prefix_length=shared)
    assert len(once.ids_T) == len(pack(samples).ids_T) - 5 * shared
    merge = None if family == "qwen" else 2
    model.activation_checkpointing = 0.0
    found = {
        "once": compute_loss_and_gradients(model, once),
        "filled": compute_loss_and_gradients(model, pad_batch(once, merge)),
    }
    model.activation_checkpointing = 1.0
    found["checkpointed"] = compute_loss_and_gradients(model, once)
    for numbers in found.values():
        off = {name: max_relative_error(numbers[name], value) for name, value in expected.items()}
        assert max(off.values()) <= 2e-5, sorted(off.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("family", [family for family in get_args(TinyFamily) if family != "qwen"])
def test_preference_pair_matches_two_samples(tmp_path, family):
    """Only the last answers count; the images before them are encoded once."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model", family))
    model, renderer = make_model(torch.float32, CPU, ALL, folder), NativeRenderer(folder)
    images, objective = make_images(tmp_path), DpoObjective(dpo.Settings(beta=0.3))
    objective.reference_logps["train"] = {7: (-8.0, -9.0)}
    for number in (1, 3):
        chosen = make_conversation(number, images, videos=True).sample
        rejected = chosen.model_copy(update={"rejected": (TextPart(text="No, it is not."),)})
        pair = renderer.encode(LocatedSample(rejected, tmp_path))
        model.zero_grad()
        batch = pack([pair])
        inputs = objective.loss_inputs(batch, torch.tensor(1.0), ("train", (7,)))
        values = objective.compute_loss(model(batch), model.lm_head_weight, inputs)
        values[0].backward()
        found = read_gradients(model)
        model.zero_grad()
        logps, lengths = [], []
        for messages in (chosen.messages, rejected.rejected_messages):
            single = renderer.encode(
                LocatedSample(chosen.model_copy(update={"messages": messages}), tmp_path)
            )
            alone = pack([single])
            token_logps = compute_token_logps(model(alone), model.lm_head_weight, alone.labels_L)
            lengths.append(single.tokenized.num_answer_tokens)
            logps.append(token_logps[-lengths[-1] :].sum())
        assert len(batch.patches_ND) == len(alone.patches_ND)
        assert batch.num_supervised_tokens == sum(lengths)
        reference = torch.tensor([[-8.0], [-9.0]])
        loss = compute_pair_losses(
            objective.settings,
            torch.stack(logps)[:, None],
            reference,
            torch.tensor(lengths)[:, None],
        ).sum()
        loss.backward()
        torch.testing.assert_close(values[0], loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[-2:], torch.stack(logps), rtol=1e-5, atol=1e-4)
        for name, gradient in found.items():
            expected = trainable_parameters(model)[name].grad
            assert max_relative_error(gradient, expected) <= 1e-4, name


@pytest.mark.parametrize("family", [family for family in get_args(TinyFamily) if family != "qwen"])
def test_group_of_responses_matches_single_responses(tmp_path, family):
    """Sampled log-probabilities equal those of the trainer, packed together or one by one."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model", family))
    model, renderer = make_model(torch.float32, CPU, LORA, folder), NativeRenderer(folder)
    sample = make_conversation(1, make_images(tmp_path), videos=True).sample
    prompt = renderer.encode_prompt(LocatedSample(sample, tmp_path))
    banned = renderer.visual_token_ids
    lengths = 3, 9, 1, 6
    model.eval()
    completions = iter_completions(
        build_engine(model, [], [prompt.tokenized.num_tokens] * len(lengths), 9, 4),
        [
            (
                n,
                GenerationRequest(
                    prompt=prompt,
                    max_new_tokens=9,
                    sampling_params=SamplingParams(temperature=5.0, seed=n, banned_ids=banned),
                    logprobs=0,
                    processed_logprobs=True,
                ),
            )
            for n in range(len(lengths))
        ],
        4,
    )
    tokens = {n: found[: lengths[n]] for n, _, found in completions}
    model.train()
    responses = [tokens[n] for n in range(len(lengths))]
    results = []
    for groups in ([responses], [[one] for one in responses]):
        model.zero_grad()
        batches = [pack([join_responses(prompt, group)]) for group in groups]
        logps = torch.cat(
            [
                compute_token_logps(model(batch), model.lm_head_weight, batch.labels_L, 5.0, banned)
                for batch in batches
            ]
        )
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        results.append((logps.detach(), read_gradients(model)))
    (found, found_grads), (expected, expected_grads) = results
    sampled = torch.tensor([one.logprob for group in responses for one in group])
    assert not {one.id for group in responses for one in group} & set(banned)
    assert len(batches) == len(lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=5e-5)
    for name, gradient in found_grads.items():
        assert max_relative_error(gradient, expected_grads[name]) <= 1e-4, name


def test_bf16_shared_prefix_error_is_not_larger(tmp_path):
    """Gradients of what is shared are summed over samples: not rounded on the way."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model"))
    samples = encode_samples(tmp_path, folder)
    shared = find_shared_prefix_length([one.tokenized for one in samples])
    exact, model = (
        make_model(dtype, CPU, ALL, folder) for dtype in (torch.float32, torch.bfloat16)
    )
    expected = compute_loss_and_gradients(exact, pack(samples))
    off = []
    for batch in (pack(samples), pack(samples, prefix_length=shared)):
        found = compute_loss_and_gradients(model, batch)
        far = [(found[n].float() - g).norm() / g.norm() for n, g in expected.items() if g.norm()]
        off.append(float(torch.stack(far).mean()))
    assert off[1] <= 1.05 * off[0]
