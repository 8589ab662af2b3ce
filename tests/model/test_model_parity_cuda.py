"""The benchmark beside the tests, at a tiny size on the processor."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from by_path import loaded


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return loaded("benchmarks/model_parity_cuda.py")


def test_a_line_a_model_with_distances_by_case(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(["--tiny", "--out", str(tmp_path / "out.jsonl")])
    printed = capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_text() == printed
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["model"] for line in lines] == ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    for line in lines:
        for case in ("pictures", "video", "text", "all"):
            found = line[case]
            # bf16 keeps 8 bits, and the native model has no more rounding than the reference.
            assert 0 < found["native-fp32"]["rms"] < 1.2 * found["sdpa-fp32"]["rms"] < 0.02
            assert 0 < found["native-sdpa"]["max"] < 0.02


def test_distance_is_relative_to_what_is_expected(benchmark: ModuleType) -> None:
    expected = torch.tensor([3.0, -4.0])
    assert benchmark.distance(expected, expected) == {"max": 0.0, "rms": 0.0}
    assert benchmark.distance(torch.tensor([3.0, -2.0]), expected) == {"max": 0.5, "rms": 0.4}
