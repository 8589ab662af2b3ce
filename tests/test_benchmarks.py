"""The arithmetic of the benchmarks that compare whole runs, and the smallest of them run once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import big_data
import growth
import peer_figures
import pytest
import which_card
from peer_data import PHOTO, Counted, count, draw, resized
from PIL import Image
from rich.console import Console
from stopwatch import watch

from finesight.hub import locate
from finesight.plan.plan import make_plan
from finesight.train.progress import Screen

ROOT = Path(__file__).resolve().parents[1]
COUNTED = Counted(100, 50.0, 10.0, 64.0, 80, 2e9, 1e9, 1e12)
TOLD = {
    "setting": {},
    "versions": {},
    "samples": [16] * 5,
    "seconds": [9.0, 9.0, 9.0, 0.5, 0.5],
    "places": 60.0,
    "patches": 64.0,
    "peak_gb": 1.0,
    "first_step_s": 10.0,
    "last_step_s": 29.0,
    "whole_s": 31.0,
    "loss": [2.0, 1.0],
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six of the drawn scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peer_data.SAMPLES", 6)
        return draw(tmp_path_factory.mktemp("scenes") / "data")


def test_a_row_leaves_out_the_steps_that_warm_up() -> None:
    row = peer_figures.row("one", 16, TOLD, COUNTED)
    assert row["samples_per_s"] == 32
    assert row["tokens_per_s"] == 1600
    assert row["share_of_peak"] == pytest.approx(32 * 2e9 / 1e12)
    # To the first step 10 s, the other 184 samples, and 2 s from the last step to the end.
    assert row["recipe_s"] == pytest.approx(10 + 184 / 32 + 2, abs=0.1)
    assert "other_work" not in row


def test_a_row_says_who_saw_other_pictures_and_who_failed() -> None:
    odd = peer_figures.row("odd", 16, TOLD | {"patches": 400.0}, COUNTED)
    failed = peer_figures.row(
        "late", 16, {"failed": "first\nnot | installed", "setting": {}, "whole_s": 1.0}, COUNTED
    )
    lines = peer_figures.as_table([odd, failed])
    assert lines[2].startswith("| odd (pictures of another size) | 16 | 32 |")
    assert lines[3].startswith("| late | 16 | not / installed |")


def test_the_table_has_the_median_of_the_rounds() -> None:
    rows = [
        peer_figures.row("one", 16, TOLD | {"peak_gb": peak}, COUNTED) for peak in (1.0, 9.0, 2.0)
    ]
    assert "| 2.0 |" in peer_figures.as_table(rows)[2]


def test_a_command_that_takes_too_long_ends_with_its_lines_kept() -> None:
    program = "import time; print('here', flush=True); time.sleep(600)"
    watched = watch([sys.executable, "-c", program], {}, 5.0)
    assert watched.stopped
    assert watched.code != 0
    assert watched.at("he") <= watched.seconds
    with pytest.raises(LookupError, match="'there'"):
        watched.at("there")


def test_everybody_else_gets_pictures_of_their_size(table: Path, tmp_path: Path) -> None:
    found = resized(table, tmp_path / "resized", 56)
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert len(rows) == 6
    with Image.open(next((table.parent / "pictures").iterdir())) as picture:
        assert picture.size == PHOTO
    for row in rows:
        with Image.open(row["images"][0]) as picture:
            assert picture.size == (56, 56)
        assert row["messages"][0]["content"].startswith("<image>")


def test_long_samples_are_as_long_as_asked(table: Path, tmp_path: Path) -> None:
    model = locate("finesight-tiny").path

    def longest(path: Path) -> int:
        return count(model, path, 56, peer_figures.lora()).longest

    for tokens in (200, 1000):
        path = growth.lengthened(table, tmp_path / "long.jsonl", tokens, longest)
        assert tokens - 5 <= longest(path) <= tokens
    again = growth.repeated(table, tmp_path / "repeated.jsonl", 20)
    assert len(again.read_text().splitlines()) == 20


def test_finesight_and_a_peer_that_is_not_there(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    model = locate("finesight-tiny").path
    words = [str(model), "--work", str(tmp_path / "work"), "--out", str(out), "--data", str(table)]
    words += ["--only", "finesight,unsloth", "--steps", "2", "--side", "56", "--batch", "2"]
    program = str(ROOT / "benchmarks" / "peers.py")
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = json.loads(out.read_text())["results"]
    assert ours["steps"] == 2
    assert ours["samples_per_s"] > 0
    assert theirs["failed"].startswith("not installed: unsloth")
    assert "| unsloth | 2 | not installed: unsloth |" in done.stdout


def test_very_many_samples_are_read_as_they_are_and_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(big_data, "PICTURES", 3)
    monkeypatch.setattr(big_data, "SHARD", 30)
    monkeypatch.setitem(big_data.READ, "large", 2)
    big_data.write(tmp_path / "large.jsonl", big_data.draw(tmp_path, "large"), 80)
    for source in (tmp_path / "large.jsonl", *big_data.pack(tmp_path / "large.jsonl")):
        row = big_data.read(source, None, "large", 0)
        assert (row["samples"], row["pixels"]) == (80, "448")
        assert row["samples_per_s"] > 0
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_a_card_is_told_by_the_first_way_that_fits(tmp_path: Path) -> None:
    data, screen = which_card.draw(tmp_path, 84), Screen(Console(quiet=True))
    rows = []
    for way in which_card.WAYS[:2]:
        recipe = which_card.recipe_of("finesight-tiny", data, 84, way)
        row = which_card.row_of(make_plan(recipe, "T4", screen), way)
        rows.append({"model": "tiny", "side": 84, **row})
    lora, everything = rows
    assert lora["memory_gb"] < everything["memory_gb"]
    assert which_card.as_cell([{**lora, "fits": False}, everything]).startswith("all: ")
    assert which_card.as_cell([{**lora, "fits": False}]) == "no"
    (line,) = which_card.as_table(rows, 84, ("LoRA",))[2:]
    assert line.startswith("| T4, 16 GB | LoRA: ")
