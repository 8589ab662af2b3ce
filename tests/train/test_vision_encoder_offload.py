"""Vision encoder fingerprint, offload and reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import TinyTask, read_losses
from vision_cache_fixtures import LORA, make_train_state

from finesight.model.vlm import VisionLanguageModel
from finesight.train import vision_cache
from finesight.train.train_state import TrainState
from finesight.train.vision_cache import EncoderOffloader, fingerprint_encoder

CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path: Path) -> TrainState:
    return make_train_state(tmp_path / "task")


def model_of(session: TrainState) -> VisionLanguageModel:
    assert isinstance(session.model, VisionLanguageModel)
    return session.model


def test_fingerprint_covers_weights_and_settings(session: TrainState) -> None:
    encoder = model_of(session).visual
    first = fingerprint_encoder(encoder, {"heads": 2}, CPU)
    assert fingerprint_encoder(encoder, {"heads": 2}, CPU) == first
    found = {first, fingerprint_encoder(encoder, {"heads": 4}, CPU)}
    with torch.no_grad():
        for parameter in encoder.parameters():
            flat = parameter.view(-1)
            old = flat[-1].clone()
            flat[-1] += 1
            found.add(fingerprint_encoder(encoder, {"heads": 2}, CPU))
            flat[-1] = old
    assert len(found) == 2 + len(list(encoder.parameters()))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert fingerprint_encoder(encoder, {"heads": 2}, CPU) != first
    finally:
        torch.set_num_threads(threads)


def test_weights_are_offloaded_and_restored(session: TrainState) -> None:
    """For everything that has a view of them too, as what watches frozen parts does."""
    model = model_of(session)
    batch = session.step_dataset.get_step(0).packs[0]
    expected = model.encode_images(batch.patches_ND, batch.grid_thw)
    views = [parameter.detach() for parameter in model.visual.parameters()]
    before = [view.clone() for view in views]
    others = {name: p.clone() for name, p in model.model.named_parameters()}
    card = EncoderOffloader(model)

    def held() -> int:
        return sum(p.untyped_storage().nbytes() for p in model.visual.parameters())

    full = held()
    for _ in range(2):
        with card.offload():
            assert held() == 0
            assert all(torch.equal(p, others[name]) for name, p in model.model.named_parameters())
            with card.reload():
                assert torch.equal(model.encode_images(batch.patches_ND, batch.grid_thw), expected)
            assert held() == 0
        assert held() == full
    assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True))
    assert torch.equal(model.encode_images(batch.patches_ND, batch.grid_thw), expected)
    with card.reload():
        assert held() == full, "it was not away"
    with pytest.raises(ZeroDivisionError), card.offload():
        raise ZeroDivisionError
    assert held() == full


def test_reallocated_weight_is_offloaded(session: TrainState) -> None:
    """Kernels may reallocate weights at the first image."""
    model = model_of(session)
    card = EncoderOffloader(model)
    with card.offload(), card.reload():
        changed = next(model.visual.parameters())
        before = changed.detach().clone()
        buffer = before.new_zeros(len(before), before.shape[1] + 3)
        buffer[:, :-3] = before
        changed.data = buffer[:, :-3]
    with card.offload():
        assert changed.untyped_storage().nbytes() == 0
        assert buffer.untyped_storage().nbytes() == 0
    assert torch.equal(changed, before)


def test_shared_parameters_stay_on_device(session: TrainState) -> None:
    model = model_of(session)
    model.visual.register_buffer("shared", model.model.norm.weight.detach())
    with EncoderOffloader(model).offload():
        assert torch.equal(model.model.norm.weight, model.visual.get_buffer("shared"))
        assert model.model.norm.weight.untyped_storage().nbytes() > 0


def test_offloaded_run_equals_resident_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; frozen parts are compared with what they were in the end."""
    task, away = TinyTask(tmp_path), []
    evaluation = {"metric": "classification", "every": 2, "max_new_tokens": 4}
    settings: dict[str, Any] = {"tune": LORA, "eval": evaluation}
    task.run(name="there", **settings)

    class Spying(EncoderOffloader):
        def _move_to_cpu(self) -> None:
            super()._move_to_cpu()
            away.append(True)

    monkeypatch.setattr(vision_cache, "EncoderOffloader", Spying)
    monkeypatch.setattr(vision_cache, "should_offload", lambda device: True)
    task.run(name="away", **settings)
    assert len(away) == 3, "for the steps, and after each of the measurements between them"
    assert read_losses(tmp_path / "away") == read_losses(tmp_path / "there")
    measured = [
        [
            (line["step"], line["validation_loss"], line["scores"])
            for line in task.read_metrics(name)
            if "validation_loss" in line
        ]
        for name in ("there", "away")
    ]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 4
