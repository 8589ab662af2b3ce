"""The parity benchmark at a tiny size on a CPU."""

import json
from types import ModuleType

import pytest
from module_loader import load_module


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_module("benchmarks/model_parity_cuda.py")


def test_one_line_per_model_with_errors_by_case(benchmark, tmp_path, capsys):
    benchmark.main(["--tiny", "--out", str(tmp_path / "out.jsonl")])
    printed = capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_text() == printed
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["model"] for line in lines] == ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    for line in lines:
        for case in ("images", "video", "text", "all"):
            found = line[case]
            # bf16 has 8 bits, and the native model has no more roundings than the reference.
            assert 0 < found["native-fp32"]["rms"] < 1.2 * found["sdpa-fp32"]["rms"] < 0.02
            assert 0 < found["native-sdpa"]["max"] < 0.02
