"""Shared prefixes of a pack: computed once, with the same loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversation_fixtures import make_conversation, make_images
from hf_reference import max_relative_error
from tiny_model import TinyFamily, create_tiny_model
from torch import Tensor

from finesight.config import TuneSettings
from finesight.data.sample import LocatedSample, Message, TextPart
from finesight.encode.packing import PackedBatch, find_shared_prefix_length, pack, pad_batch
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train.loss import fused_linear_cross_entropy

CPU = torch.device("cpu")
ALL = TuneSettings.model_validate(
    dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
)
LORA = TuneSettings.model_validate({"lora": {"rank": 4, "dropout": 0.0}})
BRIEF = "Say what you see. Name the colours, count the cats, and do not guess."


def make_prefixed_conversation(sample: LocatedSample) -> LocatedSample:
    """The conversation after a system prompt that all have."""
    messages = [m for m in sample.sample.messages if m.role != "system"]
    brief = Message(role="system", content=(TextPart(text=BRIEF),))
    full = sample.sample.model_copy(update={"messages": (brief, *messages)})
    return LocatedSample(full, sample.folder)


def compute_loss_and_gradients(model: VisionLanguageModel, batch: PackedBatch) -> dict[str, Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = fused_linear_cross_entropy(
        model(batch), model.lm_head_weight, batch.labels_L, torch.tensor(0.01)
    )
    loss.backward()
    named = {n: p.grad for n, p in trainable_parameters(model).items() if p.grad is not None}
    return {"loss": loss.detach()} | {n: grad.clone() for n, grad in named.items()}


def encoded(folder: Path, model: ModelFolder, *, videos: bool) -> list[EncodedSample]:
    images, renderer = make_images(folder), NativeRenderer(model)
    chats = (make_conversation(number, images, videos=videos) for number in range(6))
    return [renderer.encode(make_prefixed_conversation(chat)) for chat in chats]


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen"],
)
@pytest.mark.parametrize("tune", [ALL, LORA], ids=["all", "lora"])
def test_shared_prefix_loss_and_gradients_match(
    tmp_path: Path, family: TinyFamily, tune: TuneSettings
) -> None:
    """Check padded packs, and activation checkpointing in all layers."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model", family))
    samples = encoded(tmp_path, folder, videos=family != "qwen")
    shared = find_shared_prefix_length([one.tokenized for one in samples])
    assert shared > 20, "no system prompt"
    model = load_model(folder, torch.float32, CPU)
    configure_tuning(model, tune, 0)
    for name, parameter in trainable_parameters(model).items():
        if ".adapter.lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.train()
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


def test_bf16_shared_prefix_error_is_not_larger(tmp_path: Path) -> None:
    """Gradients of what is shared are summed over samples: not rounded on the way."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model"))
    samples = encoded(tmp_path, folder, videos=True)
    shared = find_shared_prefix_length([one.tokenized for one in samples])
    exact = load_model(folder, torch.float32, CPU)
    configure_tuning(exact, ALL, 0)
    expected = compute_loss_and_gradients(exact.train(), pack(samples))
    model = load_model(folder, torch.bfloat16, CPU)
    configure_tuning(model.train(), ALL, 0)
    off = []
    for batch in (pack(samples), pack(samples, prefix_length=shared)):
        found = compute_loss_and_gradients(model, batch)
        far = [(found[n].float() - g).norm() / g.norm() for n, g in expected.items() if g.norm()]
        off.append(float(torch.stack(far).mean()))
    assert off[1] <= 1.05 * off[0]
