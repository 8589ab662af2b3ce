"""Split fp32 master weights: exact restoration and correct rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finesight.train.optim_states import SplitBf16Master, break_bf16_ties, merge_fp32, split_fp32

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def from_bits(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def halves(wide_N: Tensor) -> tuple[Tensor, Tensor]:
    narrow_N = torch.empty(len(wide_N), dtype=torch.bfloat16)
    rest_N = torch.empty(len(wide_N), dtype=torch.int16)
    split_fp32(wide_N, narrow_N, rest_N)
    return narrow_N, rest_N


def round_to_dtype(wide_N: Tensor, dtype: torch.dtype) -> Tensor:
    return halves(wide_N)[0] if dtype == torch.bfloat16 else wide_N.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_split_roundtrip_for_any_bits() -> None:
    """Normal values, denormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    assert same_bits(merge_fp32(*halves(bits.view(torch.float32))), bits.view(torch.float32))


@pytest.mark.parametrize("sign", [0, 1 << 31], ids=["plus", "minus"])
@pytest.mark.parametrize(
    ("bits", "upper"),
    [
        (0x00000000, 0x0000),
        (0x00000001, 0x0000),  # the smallest denormal
        (0x00007FFF, 0x0000),
        (0x00008000, 0x0001),  # a middle between denormals
        (0x007FFFFF, 0x0080),  # up into the numbers
        (0x3F807FFF, 0x3F80),
        (0x3F808000, 0x3F81),  # the middle, away from zero: to even, it were 0x3F80
        (0x3F818000, 0x3F82),
        (0x3FFF8000, 0x4000),  # up into the next exponent
        (0x7F7F7FFF, 0x7F7F),
        (0x7F7FFFFF, 0x7F80),  # the largest is infinite in bf16
        (0x7F800000, 0x7F80),
        (0x7FC00000, 0x7FC0),
    ],
)
def test_upper_half_rounds_to_nearest(bits: int, upper: int, sign: int) -> None:
    wide_N = from_bits(bits | sign)
    narrow_N, rest_N = halves(wide_N)
    assert narrow_N.view(torch.int16).item() & 0xFFFF == upper | sign >> 16
    assert same_bits(merge_fp32(narrow_N, rest_N), wide_N)


def test_rounding_is_half_to_even_except_ties() -> None:
    wide_N = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1))
    wide_N[:1000] = from_bits(*(0x3F808000 + 0x10000 * n for n in range(1000)))
    narrow_N, _ = halves(wide_N)
    middle_N = wide_N.view(torch.int32) & 0xFFFF == 0x8000
    assert int(middle_N.sum()) >= 1000
    assert torch.equal(narrow_N[~middle_N], wide_N.bfloat16()[~middle_N])
    assert int((narrow_N != wide_N.bfloat16()).sum()) >= 500


def test_exported_value_rounds_to_compute_value() -> None:
    wide_N = torch.randn(1 << 16, generator=torch.Generator().manual_seed(2))
    wide_N[:1000] = from_bits(*(0x3F808000 + 0x10000 * n for n in range(1000)))
    wide_N[500:1000] *= -1
    published_N = break_bf16_ties(wide_N)
    assert torch.equal(published_N.bfloat16(), halves(wide_N)[0])
    torch.testing.assert_close(published_N, wide_N, rtol=2**-23, atol=0)
    assert int((published_N != wide_N).sum()) < 1010


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_small_updates_match_fp32(dtype: torch.dtype) -> None:
    """Each far below what the model's own type can hold."""
    generator = torch.Generator().manual_seed(3)
    start_E = (torch.randn(3000, generator=generator) * 1e-3).to(dtype)
    values, basic_E = SplitBf16Master(start_E.clone()), start_E.float()
    for _ in range(300):
        change_E = torch.randn(3000, generator=generator) * 1e-6
        basic_E.add_(change_E).mul_(0.9999)
        for location in (slice(0, 1000), slice(1000, 3000)):
            own_N = values.read(location)
            own_N.add_(change_E[location]).mul_(0.9999)
            values.write(own_N, location)
    full = slice(0, 3000)
    assert same_bits(values.read(full), basic_E)
    assert torch.equal(round_to_dtype(basic_E, dtype), values.params_E)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_loaded_values_are_exact(dtype: torch.dtype) -> None:
    values = SplitBf16Master(torch.zeros(10, dtype=dtype))
    given_N = torch.randn(6, generator=torch.Generator().manual_seed(4))
    values.load(given_N, slice(2, 8))
    assert same_bits(values.read(slice(2, 8)), given_N)
    assert torch.equal(values.params_E[2:8], round_to_dtype(given_N, dtype))
    assert not values.params_E[:2].any()
    assert not values.params_E[8:].any()
