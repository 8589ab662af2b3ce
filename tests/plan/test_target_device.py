"""GPU specifications by name, in several spellings."""

from __future__ import annotations

from typing import Any

import pytest
from case_files import load_cases
from each_value import each

from finesight.errors import UserError
from finesight.plan.step_time import build_named_target, find_gpu_spec

CASES = load_cases("target_device")


@each(("spelling", "name"), CASES["test_gpu_name_spellings"])
def test_gpu_name_spellings(spelling: str, name: str) -> None:
    assert find_gpu_spec(spelling).name == name


def test_unknown_gpu_suggests_similar_names() -> None:
    with pytest.raises(UserError, match="'RTX 4095'") as caught:
        find_gpu_spec("RTX 4095")
    assert caught.value.where == "--gpu"
    assert "RTX 4090" in caught.value.expected
    with pytest.raises(UserError, match=r"T4.*B200"):
        find_gpu_spec("abacus")


@each(
    ("name", "precision", "expected"),
    [("T4", "auto", "fp16"), ("A10", "auto", "bf16"), ("A10", "fp32", "fp32")],
)
def test_precision_of_named_gpu(name: str, precision: Any, expected: str) -> None:
    target = build_named_target(name, precision)
    assert target.precision == expected
    assert target.compute.has_varlen_attention == (expected == "bf16")
    assert not target.is_measured
