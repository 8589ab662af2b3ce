"""What a tower computes as one digest, and its weights away and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from looking_run import LORA, session_of
from small_run import Task, losses

from finesight.model.network import VisionLanguageModel
from finesight.train import loop
from finesight.train.prepare import Session
from finesight.train.tower import OffCard, fingerprint

CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return session_of(tmp_path / "task")


def model_of(session: Session) -> VisionLanguageModel:
    assert isinstance(session.model, VisionLanguageModel)
    return session.model


def test_a_fingerprint_knows_every_number_and_setting(session: Session) -> None:
    tower = model_of(session).visual
    first = fingerprint(tower, {"heads": 2}, CPU)
    assert fingerprint(tower, {"heads": 2}, CPU) == first
    found = {first, fingerprint(tower, {"heads": 4}, CPU)}
    with torch.no_grad():
        for parameter in tower.parameters():
            flat = parameter.view(-1)
            old = flat[-1].clone()
            flat[-1] += 1
            found.add(fingerprint(tower, {"heads": 2}, CPU))
            flat[-1] = old
    assert len(found) == 2 + len(list(tower.parameters()))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert fingerprint(tower, {"heads": 2}, CPU) != first
    finally:
        torch.set_num_threads(threads)


def test_weights_leave_and_come_back(session: Session) -> None:
    """For everything that has a view of them too, as what watches frozen parts does."""
    model = model_of(session)
    batch = session.data.step(0).packs[0]
    expected = model.see(batch.patches_ND, batch.grids)
    views = [parameter.detach() for parameter in model.visual.parameters()]
    before = [view.clone() for view in views]
    others = {name: p.clone() for name, p in model.model.named_parameters()}
    card = OffCard(model)

    def held() -> int:
        return sum(p.untyped_storage().nbytes() for p in model.visual.parameters())

    whole = held()
    for _ in range(2):
        with card.away():
            assert held() == 0
            assert all(torch.equal(p, others[name]) for name, p in model.model.named_parameters())
            with card.back():
                assert torch.equal(model.see(batch.patches_ND, batch.grids), expected)
            assert held() == 0
        assert held() == whole
    assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True))
    assert torch.equal(model.see(batch.patches_ND, batch.grids), expected)
    with card.back():
        assert held() == whole, "it was not away"
    with pytest.raises(ZeroDivisionError), card.away():
        raise ZeroDivisionError
    assert held() == whole


def test_a_weight_that_came_to_lie_elsewhere_leaves_as_well(session: Session) -> None:
    """Kernels want some of them beside others, and find that out when they first see a picture."""
    model = model_of(session)
    card = OffCard(model)
    with card.away(), card.back():
        moved = next(model.visual.parameters())
        before = moved.detach().clone()
        room = before.new_zeros(len(before), before.shape[1] + 3)
        room[:, :-3] = before
        moved.data = room[:, :-3]
    with card.away():
        assert moved.untyped_storage().nbytes() == 0
        assert room.untyped_storage().nbytes() == 0
    assert torch.equal(moved, before)


def test_what_the_rest_of_the_model_uses_stays(session: Session) -> None:
    model = model_of(session)
    model.visual.register_buffer("shared", model.model.norm.weight.detach())
    with OffCard(model).away():
        assert torch.equal(model.model.norm.weight, model.visual.get_buffer("shared"))
        assert model.model.norm.weight.untyped_storage().nbytes() > 0


def test_a_run_whose_tower_is_away_learns_and_measures_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; frozen parts are compared with what they were in the end."""
    task, away = Task(tmp_path), []
    evaluation = {"metric": "classification", "every": 2, "max_new_tokens": 4}
    settings: dict[str, Any] = {"tune": LORA, "eval": evaluation}
    task.run(name="there", **settings)

    class Spying(OffCard):
        def _leave(self) -> None:
            super()._leave()
            away.append(True)

    monkeypatch.setattr(loop, "OffCard", Spying)
    monkeypatch.setattr(loop, "leaves", lambda device: True)
    task.run(name="away", **settings)
    assert len(away) == 3, "for the steps, and after each of the measurements between them"
    assert losses(tmp_path / "away") == losses(tmp_path / "there")
    measured = [
        [
            (line["step"], line["held_out_loss"], line["scores"])
            for line in task.history(name)
            if "held_out_loss" in line
        ]
        for name in ("there", "away")
    ]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 4
