"""The making of finesight-tiny, in miniature: from nothing to a folder that answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finesight.digests import verify_folder
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer.load import load_answerer
from finesight.synth import fonts
from finesight.synth.tasks import HELD_OUT

MAKE = Path(__file__).parents[1] / "pretraining" / "make.py"

MINIATURE = [
    *("--pictures", "24", "32", "40", "40", "--held-out=1"),
    *("train.steps=2", "train.batch=8", "train.warmup=1", "train.workers=0"),
    *("train.device=cpu", "train.precision=fp32", "eval=null"),
]


def make(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MAKE), str(out), *MINIATURE]
    return subprocess.run(command, capture_output=True, text=True)


def test_one_command_makes_a_model_that_loads(tmp_path: Path) -> None:
    try:
        fonts.require(family for family in fonts.FAMILIES if family.script == "latin")
        fonts.faces("seen", "chinese")
    except UserError as missing:
        pytest.skip(f"{missing}")
    out = tmp_path / "out"
    done = make(out)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = out / "finesight-tiny"
    verify_folder(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["metadata"]["sha256"]) == set(index["weight_map"].values())
    assert all(file.stat().st_size < 12_000_000 for file in ModelFolder(folder).weight_files())
    assert sum(p.numel() for p in load_answerer(str(folder), "cpu").model.parameters()) > 12e6
    assert json.loads((out / "measured.json").read_text()).keys() == HELD_OUT.keys()
    assert "64 pictures" in (folder / "README.md").read_text(encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make(out).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
