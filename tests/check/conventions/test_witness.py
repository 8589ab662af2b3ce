"""What pictures say of boxes: the measures of known sides, and the chance of an accident."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finesight.check.conventions.edges import SIDE, Sides, small_grey
from finesight.check.conventions.readings import Claim, Reading, Table
from finesight.check.conventions.witness import FEWEST, RARE, Witness, chance, look_at, needed
from finesight.data.headers import DamagedPicture

RNG = np.random.default_rng(0)


def picture(x: int, y: int) -> Sides:
    """A bright patch of 30 by 20 pixels with its corner at (x, y), on a dark rough ground."""
    grey = np.random.default_rng(x * 1000 + y).integers(20, 40, (100, 150))
    grey[y : y + 20, x : x + 30] += 150
    return Sides(grey.astype(np.uint8))


def shares(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(boxes) / (150, 100, 150, 100)


def test_the_true_box_scores_above_any_other() -> None:
    true, *others = (
        picture(40, 30)
        .measure(
            shares(
                (40, 30, 70, 50),
                (46, 30, 76, 50),
                (40, 38, 70, 58),
                (30, 20, 80, 60),
                (48, 36, 62, 44),
                (90, 60, 120, 80),
            )
        )
        .sum(axis=1)
    )
    assert all(true > other + 1 for other in others)


def test_left_and_right_sides_are_scored_apart() -> None:
    left_right = picture(40, 30).measure(shares((40, 30, 70, 50), (40, 30, 90, 70)))
    assert left_right[1, 0] > 0.3 * left_right[0, 0]
    assert left_right[1, 1] < 0.1 * left_right[0, 1]


def test_sides_on_the_border_do_not_count() -> None:
    assert picture(40, 30).measure(shares((0, 0, 150, 100))).tolist() == [[0.0, 0.0]]


def source(shift: int, pictures: int = 60) -> tuple[Table, dict[Path, Sides]]:
    claims, seen = [], {}
    for number in range(pictures):
        x, y = int(RNG.integers(5, 80)), int(RNG.integers(5, 60))
        path = Path(str(number))
        seen[path] = picture(x, y)
        box = (x + shift, y, x + shift + 30, y + 20)
        claims.append(Claim(str(number), "", path, (100, 150), 1, box))
    return Table(claims), seen


def test_true_boxes_know_their_pictures_and_moved_ones_do_not() -> None:
    found = {}
    for shift in (0, 40):
        table, seen = source(shift)
        witness = Witness(table, seen.__getitem__)
        boxes = Reading("xyxy").shares(table)[witness.rows]
        found[shift] = witness.surprise(witness.scores(boxes[:, None])[:, 0].sum(axis=1))
    assert found[0] > needed()
    assert abs(found[40]) < needed()


def test_a_box_outside_of_its_picture_has_no_score() -> None:
    table, seen = source(0)
    witness = Witness(table, seen.__getitem__)
    boxes = np.tile([0.5, 0.5, 1.2, 0.9], (len(witness.rows), 1, 1))
    assert np.isnan(witness.scores(boxes)).all()


def test_the_same_box_everywhere_knows_nothing_in_pictures_that_are_alike() -> None:
    table, seen = source(0)
    first = seen[Path("0")]
    witness = Witness(table, lambda path: first)
    boxes = np.tile(Reading("xyxy").shares(table)[0], (len(witness.rows), 1, 1))
    assert np.abs(witness.scores(boxes)).max() < 1e-9


def test_pictures_that_cannot_be_opened_are_passed_over() -> None:
    table, seen = source(0)

    def look(path: Path) -> Sides:
        if int(path.name) % 2:
            raise DamagedPicture("cut off", where=str(path), expected="a picture", remedy="none")
        return seen[path]

    witness = Witness(table, look)
    assert len(witness.rows) == 30
    assert witness.able
    few = Witness(source(0, FEWEST - 1)[0], seen.__getitem__)
    assert not few.able


def test_the_bound_holds_for_random_signs() -> None:
    sizes = RNG.exponential(size=40)
    sums = RNG.choice((-1.0, 1.0), (20_000, 40)) @ sizes / np.sqrt((sizes**2).sum())
    for z in (1.0, 2.0, 3.0):
        assert (sums >= z).mean() <= chance(z)
    assert chance(needed()) == pytest.approx(RARE)
    assert chance(needed(500), 500) == pytest.approx(RARE)
    assert chance(-1.0) == chance(0.0) == 1.0


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_small_copies_are_grey_upright_and_small(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (1800, 900), (200, 200, 200))
    image.paste((0, 0, 0), (0, 0, 900, 450))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"p.{suffix}"
    image.save(path, exif=exif)
    grey = small_grey(path)
    assert grey.shape == (SIDE, SIDE // 2)
    # Turned clockwise the dark upper left quarter is the upper right one.
    assert grey[SIDE // 4, 3 * SIDE // 8] < 20
    assert grey[SIDE // 4, SIDE // 8] > 180


def test_a_damaged_picture_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "p.jpg"
    Image.fromarray(RNG.integers(0, 255, (700, 900, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DamagedPicture, match="cut off"):
        look_at(path)


def test_a_picture_is_kept_in_a_few_bytes_a_pixel() -> None:
    grey = RNG.integers(0, 255, (336, SIDE)).astype(np.uint8)
    tracemalloc.start()
    sides = Sides(grey)
    sides.measure(np.array([[0.2, 0.2, 0.7, 0.7]]))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4 * grey.size, f"{kept} bytes of {grey.size} pixels, 300 times"
