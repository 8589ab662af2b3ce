"""Cards of base models: estimates of `plan`, and the GPU of this machine."""

import json
from pathlib import Path

import pytest

from finesight.app import model_cards
from finesight.app.model_cards import MODEL_CARDS, GpuQuery, find_gpu_memory
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


FIRST, SECOND = 24564 * 2**20 / 1e9, 8188 * 2**20 / 1e9
BOTH = "echo 24564, 0, GPU-a, {mode}; echo 8188, 1, GPU-b, [N/A]"


@pytest.mark.parametrize(
    ("program", "visible", "expected"),
    [
        (BOTH, None, FIRST),
        (BOTH, "1", SECOND),
        (BOTH, "GPU-a,1", FIRST),
        (BOTH, "2, 1", SECOND),
        ("echo 24564, 0, GPU-5a1b, [N/A]", "GPU-5a", FIRST),
        ("echo 24564, 0, GPU-5a1b, [N/A]", "GPU-5b", 0),
        (BOTH, "", 0),
        (BOTH.format(mode="Enabled"), None, SECOND),
        ("echo N/A, 0, GPU-a, Disabled; echo 8188, 1, GPU-b, Disabled", None, SECOND),
        ("echo N/A", None, 0),
        ("exit 9", None, 0),
        (None, None, 0),
    ],
)
def test_memory_is_that_of_the_largest_gpu(tmp_path, monkeypatch, program, visible, expected):
    file = tmp_path / "nvidia-smi"
    if program is not None:
        file.write_text(f"#!/bin/sh\n{program}\n")
        file.chmod(0o700)
    monkeypatch.setattr(model_cards, "QUERY_GPUS", (str(file),))
    monkeypatch.setattr(model_cards, "gpu_query", GpuQuery())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu_memory() == expected


def test_failed_query_is_repeated_after_a_while(tmp_path, monkeypatch):
    file = tmp_path / "nvidia-smi"
    monkeypatch.setattr(model_cards, "QUERY_GPUS", (str(file),))
    monkeypatch.setattr(model_cards, "gpu_query", GpuQuery())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpu_memory() == 0
    file.write_text("#!/bin/sh\necho 24564, 0, GPU-a, Disabled\n")
    file.chmod(0o700)
    assert find_gpu_memory() == 0
    model_cards.gpu_query.next_s = 0.0
    assert find_gpu_memory() == FIRST
