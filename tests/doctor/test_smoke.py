"""The trial on a device: every stage on the CPU, and a device that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from doctoring import only

from finesight.doctor import smoke, smoke_child
from finesight.doctor.child import Ended
from finesight.doctor.graphics import Card, Torch
from finesight.doctor.smoke import Smoke, Stage

WENT = tuple(Stage(name, 1.0, "") for name in smoke.STAGES)


def test_every_stage_goes_well_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smoke_child, "STEPS", 3)
    monkeypatch.setattr(sys, "argv", ["smoke_child", "cpu", str(tmp_path)])
    smoke_child.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["stage"] for line in lines] == list(smoke.STAGES)
    assert "loss" in lines[2]["what"]


def test_every_card_is_tried_alone_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def ended(module: str, words: list[str], seconds: float, more: dict[str, str]) -> Ended:
        folders.append(Path(words[1]))
        shown = more.get("CUDA_VISIBLE_DEVICES")
        assert (words[0] == "cpu") == (shown is None)
        lines = [json.dumps({"stage": s, "seconds": 0.5, "what": "x"}) for s in smoke.STAGES]
        return Ended("\n".join(lines[:2] if shown == "1" else lines), "no" if shown == "1" else "")

    monkeypatch.setattr(smoke.child, "run", ended)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    card = Card("X", (9, 0), 1, 1, "")
    tried = smoke.gather(Torch("2", cards=(card, card)))
    assert [one.device for one in tried] == ["CPU", "GPU 0", "GPU 1"]
    assert not any(folder.exists() for folder in folders)
    found = smoke.judge(tried)
    assert [one.severity for one in found] == ["fine", "fine", "fault"]
    assert "the stage train failed: no" in found[2].what
    assert found[2].remedy == "export CUDA_VISIBLE_DEVICES=0"


def test_a_cpu_that_fails_is_shown_by_the_quickstart() -> None:
    found = only(smoke.judge([Smoke("CPU", None, WENT[:1], "Illegal instruction")]), "smoke")
    assert found.severity == "fault"
    assert found.remedy.startswith("finesight quickstart")
