"""Readings of numbers, against boxes worked out by hand."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finesight.ingest.check.box_hypothesis import (
    MAX_FALSE_POSITIVE_RATE,
    MAX_SIDE,
    MIN_IMAGES,
    BoxClaim,
    BoxClaimTable,
    EdgeContrast,
    ImageEvidence,
    find_invalid_boxes,
    hoeffding_bound,
    load_small_gray,
    min_z_score,
    normalize_boxes,
    open_edge_contrast,
)
from finesight.samples.frames import BoxFrame
from finesight.samples.image_file import CorruptImageError

Coordinates = tuple[float, float, float, float]


def table(*values: Coordinates, size: tuple[int, int] = (100, 200), turn: int = 1) -> BoxClaimTable:
    return BoxClaimTable(
        [BoxClaim("", str(n), Path("p"), size, turn, box) for n, box in enumerate(values)]
    )


def test_impossible_boxes_are_flagged() -> None:
    boxes: list[tuple[Coordinates, bool]] = [
        ((10, 10, 50, 50), False),
        ((0, 0, 200, 100), False),
        ((-1, 0, 201, 100), False),
        ((50, 10, 10, 50), True),
        ((10, 10, 10, 50), True),
        ((10, 10, 205, 50), True),
        ((-4, 10, 50, 50), True),
        ((0.1, 0.1, 0.8, 0.9), True),
        ((0.1, 10, 0.8, 60), False),
        ((float("nan"), 0, 1, 1), True),
    ]
    claims = table(*(box for box, _ in boxes))
    found = find_invalid_boxes(normalize_boxes(BoxFrame(), claims), claims)
    assert found.tolist() == [expected for _, expected in boxes]


RNG = np.random.default_rng(0)


def make_edge_image(x: int, y: int) -> EdgeContrast:
    """A bright patch of 30 by 20 pixels with its corner at (x, y), on a dark rough ground."""
    grey = np.random.default_rng(x * 1000 + y).integers(20, 40, (100, 150))
    grey[y : y + 20, x : x + 30] += 150
    return EdgeContrast(grey.astype(np.uint8))


def to_fractions(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(boxes) / (150, 100, 150, 100)


def test_horizontal_and_vertical_edges_are_scored_separately() -> None:
    left_right = make_edge_image(40, 30).score_boxes(
        to_fractions((40, 30, 70, 50), (40, 30, 90, 70))
    )
    assert left_right[1, 0] > 0.3 * left_right[0, 0]
    assert left_right[1, 1] < 0.1 * left_right[0, 1]


def source(shift: int, num_images: int = 60) -> tuple[BoxClaimTable, dict[Path, EdgeContrast]]:
    claims, seen = [], {}
    for number in range(num_images):
        x, y = int(RNG.integers(5, 80)), int(RNG.integers(5, 60))
        path = Path(str(number))
        seen[path] = make_edge_image(x, y)
        box = (x + shift, y, x + shift + 30, y + 20)
        claims.append(BoxClaim(str(number), "", path, (100, 150), 1, box))
    return BoxClaimTable(claims), seen


def test_true_boxes_have_evidence_and_shifted_or_outer_boxes_do_not() -> None:
    found = {}
    for shift in (0, 40):
        table, seen = source(shift)
        witness = ImageEvidence(table, seen.__getitem__)
        boxes = normalize_boxes(BoxFrame(), table)[witness.claim_rows]
        found[shift] = witness.z_score(witness.score_boxes(boxes[:, None])[:, 0].sum(axis=1))
    assert found[0] > min_z_score()
    assert abs(found[40]) < min_z_score()
    boxes = np.tile([0.5, 0.5, 1.2, 0.9], (len(witness.claim_rows), 1, 1))
    assert np.isnan(witness.score_boxes(boxes)).all()


def test_identical_images_give_no_evidence() -> None:
    table, seen = source(0)
    first = seen[Path("0")]
    witness = ImageEvidence(table, lambda path: first)
    boxes = np.tile(normalize_boxes(BoxFrame(), table)[0], (len(witness.claim_rows), 1, 1))
    assert np.abs(witness.score_boxes(boxes)).max() < 1e-9


def test_unreadable_images_are_skipped() -> None:
    table, seen = source(0)

    def look(path: Path) -> EdgeContrast:
        if int(path.name) % 2:
            raise CorruptImageError("cut off", where=str(path), expected="an image", remedy="none")
        return seen[path]

    witness = ImageEvidence(table, look)
    assert len(witness.claim_rows) == 30
    assert witness.is_sufficient
    few = ImageEvidence(source(0, MIN_IMAGES - 1)[0], seen.__getitem__)
    assert not few.is_sufficient


def test_evidence_bound_holds_for_random_signs() -> None:
    sizes = RNG.exponential(size=40)
    sums = RNG.choice((-1.0, 1.0), (20_000, 40)) @ sizes / np.sqrt((sizes**2).sum())
    for z in (1.0, 2.0, 3.0):
        assert (sums >= z).mean() <= hoeffding_bound(z)
    assert hoeffding_bound(min_z_score()) == pytest.approx(MAX_FALSE_POSITIVE_RATE)
    assert hoeffding_bound(min_z_score(500), 500) == pytest.approx(MAX_FALSE_POSITIVE_RATE)
    assert hoeffding_bound(-1.0) == hoeffding_bound(0.0) == 1.0


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_thumbnails_are_small_gray_and_upright(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (1800, 900), (200, 200, 200))
    image.paste((0, 0, 0), (0, 0, 900, 450))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"p.{suffix}"
    image.save(path, exif=exif)
    grey = load_small_gray(path)
    assert grey.shape == (MAX_SIDE, MAX_SIDE // 2)
    # Turned clockwise the dark upper left quarter is the upper right one.
    assert grey[MAX_SIDE // 4, 3 * MAX_SIDE // 8] < 20
    assert grey[MAX_SIDE // 4, MAX_SIDE // 8] > 180


def test_image_evidence_uses_few_bytes_per_pixel() -> None:
    grey = RNG.integers(0, 255, (336, MAX_SIDE)).astype(np.uint8)
    tracemalloc.start()
    sides = EdgeContrast(grey)
    sides.score_boxes(np.array([[0.2, 0.2, 0.7, 0.7]]))
    retained, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert retained < 4 * grey.size, f"{retained} bytes of {grey.size} pixels, 300 times"


def test_truncated_image_raises_damaged_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jpg"
    Image.fromarray(RNG.integers(0, 255, (700, 900, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CorruptImageError, match="truncated"):
        open_edge_contrast(path)
