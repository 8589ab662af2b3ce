"""Cards of base models: estimates of `plan`, and the GPU of this machine."""

import json
from pathlib import Path

import pytest

from finesight.app import model_cards
from finesight.app.model_cards import MODEL_CARDS, find_gpu_memory
from finesight.model_folder import TINY_MODEL

RESULTS_FILE = Path(__file__).parents[2] / "benchmarks/results/which_card.json"


def test_estimates_are_those_of_plan():
    planned: dict[str, dict[float, list[tuple[float, bool]]]] = {}
    for row in json.loads(RESULTS_FILE.read_text())["rows"]:
        if row["way"] == "LoRA" and row["side"] == 1008:
            values = (row["samples_per_s"], bool(row["nf4"]))
            fitting = planned.setdefault(row["model"], {}).setdefault(row["card_gb"], [])
            fitting += [values] * row["fits"]
    for card in MODEL_CARDS:
        by_size = planned.get(card.name.split("/")[-1], {})
        # Of several GPUs with this memory, the slowest.
        slowest = {gpu_gb: min(fitting) for gpu_gb, fitting in by_size.items() if fitting}
        found = {one.gpu_gb: (one.samples_per_s, one.needs_nf4) for one in card.estimates}
        assert found == slowest
        assert [*found] == sorted(found)


def test_minutes_are_those_of_the_usual_duration():
    small = MODEL_CARDS[1]
    # 5 epochs of 320 samples, and at least 100 steps of 16 samples.
    assert small.estimate_minutes(25.3, 320) == round(5 * 320 / 4.56 / 60)
    assert small.estimate_minutes(25.3, 20) == round(100 * 8 / 4.56 / 60)
    assert small.estimate_minutes(6, 320) is None
    assert [one.name for one in MODEL_CARDS if one.is_practice] == [TINY_MODEL]
    assert MODEL_CARDS[0].download_gb == 0


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("echo 24564; echo 8188", 24564 * 2**20 / 1e9),
        ("echo N/A; echo 8188", 8188 * 2**20 / 1e9),
        ("echo N/A", 0),
        ("exit 9", 0),
        (None, 0),
    ],
)
def test_memory_is_that_of_the_largest_gpu(tmp_path, monkeypatch, program, expected):
    file = tmp_path / "nvidia-smi"
    if program is not None:
        file.write_text(f"#!/bin/sh\n{program}\n")
        file.chmod(0o700)
    monkeypatch.setattr(model_cards, "QUERY_GPUS", (str(file),))
    find_gpu_memory.cache_clear()
    try:
        assert find_gpu_memory() == expected
    finally:
        find_gpu_memory.cache_clear()
