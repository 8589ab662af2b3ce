"""What all samples of a pack begin with is computed once, and teaches what it teaches in each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversations import make_conversation, make_pictures
from oracle import distance
from torch import Tensor

from finesight.config import Tune
from finesight.data.jsonl import Located
from finesight.data.sample import Message, TextPart
from finesight.encode.encoded import Encoded
from finesight.encode.pack import PackedBatch, beginning_of, filled, pack
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning, trainable
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import load_model
from finesight.train.loss import label_loss

CPU = torch.device("cpu")
ALL = Tune.model_validate(dict.fromkeys(("vision", "merger", "language", "embeddings"), "full"))
LORA = Tune.model_validate({"lora": {"rank": 4, "dropout": 0.0}})
BRIEF = "Say what you see. Name the colours, count the cats, and do not guess."


def told(sample: Located) -> Located:
    """The conversation after a system prompt that all have."""
    messages = [m for m in sample.sample.messages if m.role != "system"]
    brief = Message(role="system", content=(TextPart(text=BRIEF),))
    whole = sample.sample.model_copy(update={"messages": (brief, *messages)})
    return Located(whole, sample.folder)


def learned(model: VisionLanguageModel, batch: PackedBatch) -> dict[str, Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = label_loss(model(batch), model.head_weight, batch.target_L, torch.tensor(0.01))
    loss.backward()
    named = {n: p.grad for n, p in trainable(model).items() if p.grad is not None}
    return {"loss": loss.detach()} | {n: grad.clone() for n, grad in named.items()}


def encoded(folder: Path, model: ModelFolder, *, videos: bool) -> list[Encoded]:
    pictures, renderer = make_pictures(folder), Renderer(model)
    talks = (make_conversation(number, pictures, videos=videos) for number in range(6))
    return [renderer.encode(told(talk)) for talk in talks]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"])
@pytest.mark.parametrize("tune", [ALL, LORA], ids=["all", "lora"])
def test_loss_and_gradients_are_those_without(
    tmp_path: Path, family: TinyFamily, tune: Tune
) -> None:
    """Also of a pack that is filled up, and with all layers computed twice."""
    folder = ModelFolder(make_tiny(tmp_path / "model", family))
    samples = encoded(tmp_path, folder, videos=family != "qwen")
    shared = beginning_of([one.outline for one in samples])
    assert shared > 20, "no system prompt"
    model = load_model(folder, torch.float32, CPU)
    apply_tuning(model, tune, 0)
    for name, parameter in trainable(model).items():
        if ".adapter.b" in name:
            parameter.data.normal_(0, 0.1)
    model.train()
    expected = learned(model, pack(samples))
    once = pack(samples, beginning=shared)
    assert len(once.ids_T) == len(pack(samples).ids_T) - 5 * shared
    merge = None if family == "qwen" else 2
    model.recompute = 0.0
    found = {"once": learned(model, once), "filled": learned(model, filled(once, merge))}
    model.recompute = 1.0
    found["recomputed"] = learned(model, once)
    for numbers in found.values():
        off = {name: distance(numbers[name], value) for name, value in expected.items()}
        assert max(off.values()) <= 2e-5, sorted(off.items(), key=lambda item: -item[1])[:5]


def test_in_bf16_it_is_off_by_no_more_than_without(tmp_path: Path) -> None:
    """Gradients of what is shared are summed over samples: not rounded on the way."""
    folder = ModelFolder(make_tiny(tmp_path / "model"))
    samples = encoded(tmp_path, folder, videos=True)
    shared = beginning_of([one.outline for one in samples])
    exact = load_model(folder, torch.float32, CPU)
    apply_tuning(exact, ALL, 0)
    expected = learned(exact.train(), pack(samples))
    model = load_model(folder, torch.bfloat16, CPU)
    apply_tuning(model.train(), ALL, 0)
    off = []
    for batch in (pack(samples), pack(samples, beginning=shared)):
        found = learned(model, batch)
        far = [(found[n].float() - g).norm() / g.norm() for n, g in expected.items() if g.norm()]
        off.append(float(torch.stack(far).mean()))
    assert off[1] <= 1.05 * off[0]
