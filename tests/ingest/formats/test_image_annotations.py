"""Masks and outlines of objects, against pycocotools and the definition of the border."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from finesight.ingest.formats.image_annotations import (
    decode_brush,
    decode_counts,
    decode_runs,
    enclose_mask,
    simplify_outline,
    trace_mask,
)
from finesight.samples.boxes import InvalidBoxError, find_bounds
from finesight.samples.frames import PIXELS
from finesight.samples.sample import LimitExceededError

masks = arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def encode_brush(mask_HW: np.ndarray) -> list[int]:
    """Encode a mask as Label Studio: RGBA bytes, in runs of at most 256 values of one byte."""
    values = np.repeat(mask_HW.ravel() * 255, 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    for value, group in itertools.groupby(values.tolist()):
        run = list(group)
        for chunk in (run[n : n + 256] for n in range(0, len(run), 256)):
            bits += f"110{len(chunk) - 1:08b}{value:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]


def contains(outline: np.ndarray, x: float, y: float) -> bool:
    """Return whether a ray to the right crosses an outline an odd number of times."""
    inside = False
    for (x1, y1), (x2, y2) in itertools.pairwise([*outline, outline[0]]):
        if (y1 > y) != (y2 > y):
            inside ^= x < x1 + (y - y1) * (x2 - x1) / (y2 - y1)
    return inside


@given(masks)
def test_masks_decode_as_in_pycocotools(mask_HW: np.ndarray) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    text = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))["counts"].decode()
    assert (decode_runs(decode_counts(text), mask_HW.shape, "F") == mask_HW).all()
    assert (decode_brush(encode_brush(mask_HW), mask_HW.shape) == mask_HW).all()


@given(masks)
def test_outlines_contain_the_pixels_of_a_mask(mask_HW: np.ndarray) -> None:
    outlines, num_holes, _ = trace_mask(mask_HW, left=2, top=3)
    filled = 0
    for y, x in np.ndindex(mask_HW.shape):
        count = sum(contains(np.array(one), x + 2.5, y + 3.5) for one in outlines)
        assert count >= mask_HW[y, x]
        filled += bool(count) and not mask_HW[y, x]
    assert (num_holes > 0) == (filled > 0)
    boxes = enclose_mask(mask_HW).polygons
    assert len(boxes) == mask_HW.any()
    for x1, y1, x2, y2 in (find_bounds(corners, mask_HW) for corners in boxes):
        bounds = find_bounds(itertools.chain(*outlines), mask_HW)
        assert bounds == [x1 + 2, y1 + 3, x2 + 2, y2 + 3]


@given(st.integers(3, 60), st.sampled_from([(50, 60), (3000, 1500)]), st.integers(0, 9))
def test_removed_corners_are_within_half_a_unit(count: int, size: tuple, seed: int) -> None:
    rng, (height, width) = np.random.default_rng(seed), size
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    radius = min(size) * rng.uniform(0.2, 0.201, count)
    outline = np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None] + min(size) / 2
    simple = np.array(simplify_outline(outline.tolist(), size, PIXELS))
    assert {*map(tuple, simple)} <= {*map(tuple, outline)}
    unit = np.maximum([width, height], 1000) / [width, height]
    for corner in outline * unit:
        ends = itertools.pairwise([*simple * unit, simple[0] * unit])
        assert min(distance(corner, *end) for end in ends) < 0.5 + 1e-6


def distance(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    along = np.clip((point - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    return float(np.hypot(*(point - start - along * (end - start))))


@pytest.mark.parametrize("outline", [[[0, 0], [1, 1]], [[0, 0], [1, float("nan")], [2, 2]], [1]])
def test_invalid_outlines(outline: list) -> None:
    with pytest.raises(InvalidBoxError, match="three or more points"):
        simplify_outline(outline, (9, 9), PIXELS)


def test_invalid_masks() -> None:
    overflow = [*[2**62] * 4, 4]  # its sum is 4 in 64 bits
    for counts in ([3, -1, 2], [3], overflow, [5, -1], [*decode_counts("ooooooooo0" * 9), 4]):
        with pytest.raises(ValueError, match="pixels in a mask"):
            decode_runs(counts, (2, 2), "F")
    with pytest.raises(ValueError, match="bits"):
        decode_counts("P" * 99)
    with pytest.raises(ValueError, match="values in a mask"):
        decode_brush([0, 0, 0, 8, 0, 0, 0, 0, 0], (9, 9))
    with pytest.raises(LimitExceededError):
        trace_mask(np.indices((400, 400)).sum(0) % 2 == 0)
