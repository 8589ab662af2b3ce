"""Test the training of finesight-tiny at a small size, from scratch to inference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_tasks import fonts
from synthetic_tasks.tasks import EVAL_TASKS

from finesight.errors import UserError
from finesight.files.storage import verify_folder
from finesight.infer.model_loader import load_inference_model
from finesight.model_folder import ModelFolder

BUILD_PROGRAM = Path(__file__).parents[1] / "build_tiny_model.py"

MINIATURE = [
    *("--num-images", "24", "32", "40", "40", "--num-eval-samples=1"),
    *("train.steps=1", "train.batch_size=4", "train.warmup=0", "train.num_workers=0"),
    *("train.device=cpu", "train.precision=fp32", "eval=null"),
]


def make(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BUILD_PROGRAM), str(out), *MINIATURE]
    return subprocess.run(command, capture_output=True, text=True)


def test_pretraining_creates_a_loadable_model(tmp_path: Path) -> None:
    """Takes long: one run of all stages, with generated images of each task."""
    try:
        fonts.require_fonts(family for family in fonts.FONT_FAMILIES if family.script == "latin")
        fonts.list_faces("seen", "chinese")
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
    assert (
        sum(p.numel() for p in load_inference_model(str(folder), "cpu").model.parameters()) > 12e6
    )
    assert json.loads((out / "eval_results.json").read_text()).keys() == EVAL_TASKS.keys()
    assert "64 images" in (folder / "README.md").read_text(encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make(out).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
