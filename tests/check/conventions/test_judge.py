"""Conventions planted in sources of drawn objects, whose true boxes are known."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from finesight.check.conventions.edges import Sides
from finesight.check.conventions.frames import find_frame
from finesight.check.conventions.judge import conventions
from finesight.check.conventions.readings import Claim, Frame, Table
from finesight.check.conventions.witness import Witness, look_at
from finesight.check.findings import FAULTS
from finesight.data.boxes import BoxForm

Numbers = tuple[float, float, float, float]
Planted = Callable[[Numbers, tuple[int, int]], Numbers]

PICTURES: dict[Path, Sides] = {}


def draw(number: int, loose: float) -> list[Claim]:
    """One to three objects on a rough ground; `loose` widens their boxes by that share."""
    rng, noise = random.Random(number), np.random.default_rng(number)
    width, height = rng.choice(((320, 240), (240, 320), (360, 200), (300, 300)))
    ground = noise.normal(rng.randint(90, 160), 8, (height, width, 3)).clip(0, 255)
    image = Image.fromarray(ground.astype(np.uint8))
    path, claims = Path(f"{number}.png"), []
    for _ in range(rng.randint(1, 3)):
        across, down = rng.randint(25, 90), rng.randint(25, 90)
        x, y = rng.randint(4, width - across - 4), rng.randint(4, height - down - 4)
        fill = rng.choice(((20, 20, 60), (240, 240, 220), (200, 30, 30)))
        ImageDraw.Draw(image).ellipse((x, y, x + across - 1, y + down - 1), fill=fill)
        wide, high = loose * across, loose * down
        box = (
            max(0.0, x - wide),
            max(0.0, y - high),
            min(width, x + across + wide),
            min(height, y + down + high),
        )
        claims.append(Claim(f"line {number}", str(number), path, (height, width), 1, box))
    PICTURES[path] = Sides(np.asarray(image.convert("L")))
    return claims


@pytest.fixture(scope="module")
def objects() -> list[Claim]:
    return [claim for number in range(150) for claim in draw(number, 0.0)]


def planted(claims: list[Claim], change: Planted) -> list[Claim]:
    return [replace(claim, numbers=change(claim.numbers, claim.size)) for claim in claims]


def xywh(box: Numbers, size: tuple[int, int]) -> Numbers:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def of(width: float, height: float) -> Planted:
    """Boxes in a frame of a fixed size."""

    def change(box: Numbers, size: tuple[int, int]) -> Numbers:
        x, y = width / size[1], height / size[0]
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y

    return change


def times(factor: float) -> Planted:
    return lambda box, size: tuple(factor * number for number in box)


def look(path: Path) -> Sides:
    return PICTURES[path]


def codes(claims: list[Claim]) -> list[str]:
    return [verdict.code for verdict in conventions(claims, look)]


def test_boxes_that_mean_what_they_say_are_left_alone(objects: list[Claim]) -> None:
    assert codes(objects) == []


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("boxes-xywh", xywh),
        ("boxes-thousandths", of(1000, 1000)),
        ("boxes-shares", of(1, 1)),
        ("boxes-resized", of(224, 224)),
        ("boxes-resized", of(640, 480)),
        ("boxes-resized", times(0.5)),
        ("boxes-resized", times(2.0)),
    ],
)
def test_a_convention_is_named(objects: list[Claim], code: str, change: Planted) -> None:
    assert codes(planted(objects, change)) == [code]


def test_every_verdict_is_a_finding_with_its_numbers(objects: list[Claim]) -> None:
    (verdict,) = conventions(planted(objects, xywh), look)
    finding = verdict.finding("boxes.jsonl")
    assert finding.code in FAULTS
    assert finding.where == "boxes.jsonl"
    assert finding.remedy == "give --box-format xywh"
    assert f"{verdict.against} of 150 samples" in finding.evidence[0]
    assert finding.evidence[-1] == f"{100 * verdict.undecided:.0f} % of the samples cannot tell"


def test_who_cannot_tell_is_counted_by_sample() -> None:
    """Read as corners 30 of 40 samples are impossible; the other 10 fit both ways."""
    small = [Claim(f"{n}", "", Path("p"), (100, 100), 1, (50, 50, 20, 20)) for n in range(30)]
    large = [Claim(f"{n + 30}", "", Path("p"), (100, 100), 1, (10, 10, 60, 60)) for n in range(10)]
    (verdict,) = conventions(small + large, look=None)
    assert (verdict.code, verdict.against, verdict.samples) == ("boxes-xywh", 30, 40)
    assert verdict.undecided == pytest.approx(0.25)


def test_without_pictures_only_bounds_speak(objects: list[Claim]) -> None:
    def blind(change: Planted) -> list[str]:
        return [verdict.code for verdict in conventions(planted(objects, change), None)]

    assert blind(xywh) == ["boxes-xywh"]
    assert blind(of(1, 1)) == ["boxes-shares"]
    assert blind(of(1000, 1000)) == ["boxes-thousandths"]
    assert blind(times(0.5)) == []


@pytest.mark.parametrize("loose", [0.1, 0.25, 0.5])
def test_loosely_drawn_boxes_are_no_resized_copy(loose: float) -> None:
    claims = [claim for number in range(150) for claim in draw(number, loose)]
    assert codes(claims) == []


def test_boxes_that_have_nothing_to_do_with_their_pictures_are_not_accused(
    objects: list[Claim],
) -> None:
    rng = random.Random(0)
    shuffled = [claim.numbers for claim in objects if claim.size == (300, 300)]
    claims = [replace(claim, numbers=rng.choice(shuffled)) for claim in objects]
    inside = [c for c in claims if c.numbers[2] <= c.size[1] and c.numbers[3] <= c.size[0]]
    assert len(inside) > 100, "a source too small to say something about"
    assert codes(inside) == []


def test_a_few_slips_are_no_convention(objects: list[Claim]) -> None:
    def reversed_(claim: Claim) -> Claim:
        x1, y1, x2, y2 = claim.numbers
        return replace(claim, numbers=(x2, y2, x1, y1))

    assert codes([*map(reversed_, objects[:6]), *objects[6:]]) == []


def test_a_convention_is_named_in_spite_of_a_few_slips(objects: list[Claim]) -> None:
    claims = planted(objects, xywh)
    slips = [replace(claim, numbers=(9000.0, 9000.0, 1.0, 1.0)) for claim in claims[:5]]
    assert codes([*slips, *claims[5:]]) == ["boxes-xywh"]


def test_few_samples_say_nothing(objects: list[Claim]) -> None:
    few = [claim for claim in planted(objects, xywh) if int(claim.sample_id) < 15]
    assert codes(few) == []


def test_numbers_that_are_none_are_left_to_others(objects: list[Claim]) -> None:
    nothing = [replace(claim, numbers=(math.nan, 0.0, math.inf, 1.0)) for claim in objects]
    assert codes(nothing) == []
    assert codes([*nothing[:40], *objects[40:]]) == []


def test_negative_numbers_are_left_to_others(objects: list[Claim]) -> None:
    assert codes(planted(objects, times(-1.0))) == []


@pytest.mark.parametrize("wild", [300.0, 1e18])
def test_wild_numbers_are_left_to_others(objects: list[Claim], wild: float) -> None:
    rng = random.Random(0)
    anything = [
        replace(claim, numbers=tuple(rng.uniform(-wild, wild) for _ in range(4)))
        for claim in objects
    ]
    assert codes(anything) == []


def test_a_source_read_in_another_form_is_judged_by_that_form(objects: list[Claim]) -> None:
    form = BoxForm("xywh")
    right = [replace(claim, form=form) for claim in planted(objects, xywh)]
    wrong = [replace(claim, form=form) for claim in objects]
    assert codes(right) == []
    assert codes(wrong) == ["boxes-xyxy"]


def test_thousandths_that_are_pixels_are_named(objects: list[Claim]) -> None:
    assert codes([replace(c, form=BoxForm("xyxy", "1000")) for c in objects]) == ["boxes-pixels"]


def test_two_conventions_in_one_source_are_told_apart(objects: list[Claim]) -> None:
    half = len(objects) // 2
    (verdict,) = conventions([*planted(objects[:half], xywh), *objects[half:]], look)
    assert verdict.code == "boxes-mixed"
    assert 0.2 * 150 < verdict.against < 0.6 * 150


@pytest.mark.parametrize(
    ("change", "frame"),
    [
        (of(224, 224), Frame("fixed", 224, 224)),
        (of(700, 420), Frame("fixed", 700, 420)),
        (times(0.6), Frame("factor", 0.6, 0.6)),
    ],
)
def test_the_size_of_a_copy_is_found(objects: list[Claim], change: Planted, frame: Frame) -> None:
    table = Table(planted(objects, change))
    found = find_frame(table, Witness(table, look), "xyxy")
    assert found.reading.frame.base == frame.base
    assert found.reading.frame.across == pytest.approx(frame.across, rel=0.02)
    assert found.reading.frame.down == pytest.approx(frame.down, rel=0.02)


def test_a_longest_side_is_told_from_a_factor(objects: list[Claim]) -> None:
    changed = planted(objects, lambda box, size: times(200 / max(size))(box, size))
    (verdict,) = conventions(changed, look)
    assert verdict.reading.frame.base == "longest"
    assert verdict.reading.frame.across == pytest.approx(200, rel=0.02)
    assert "the longest side about 20" in verdict.meant


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> list[Claim]:
    """JPEG files with EXIF turns of all kinds, square ones among them, boxes as stored."""
    folder, claims = tmp_path_factory.mktemp("turned"), []
    for number in range(80):
        rng, noise = random.Random(number), np.random.default_rng(number)
        turn = rng.randint(2, 8)
        width, height = rng.choice(((160, 120), (140, 140)))
        ground = noise.normal(120, 8, (height, width, 3)).clip(0, 255)
        image = Image.fromarray(ground.astype(np.uint8))
        x, y = rng.randint(4, width - 54), rng.randint(4, height - 54)
        box = (x, y, x + rng.randint(20, 50), y + rng.randint(20, 50))
        ImageDraw.Draw(image).rectangle(
            (box[0], box[1], box[2] - 1, box[3] - 1), fill=(250, 250, 0)
        )
        exif = Image.Exif()
        exif[0x0112] = turn
        path = folder / f"{number}.jpg"
        image.save(path, exif=exif, quality=92)
        size = (height, width) if turn < 5 else (width, height)
        claims.append(Claim(path.name, path.name, path, size, turn, box))
    return claims


def test_boxes_before_the_exif_turn_are_named(turned: list[Claim]) -> None:
    (verdict,) = conventions(turned)
    assert verdict.code == "boxes-before-turn"
    assert verdict.undecided < 0.3
    assert "take the turn (EXIF tag Orientation) out" in verdict.finding("boxes.jsonl").remedy


def test_without_their_turn_the_pictures_lie_as_the_boxes_do(turned: list[Claim]) -> None:
    plain = [
        replace(c, orientation=1, size=c.size if c.orientation < 5 else c.size[::-1])
        for c in turned
    ]
    stored = {c.picture: Sides(np.asarray(Image.open(c.picture).convert("L"))) for c in turned}
    assert conventions(plain, stored.__getitem__) == []


def test_boxes_after_the_exif_turn_are_left_alone(turned: list[Claim]) -> None:
    (verdict,) = conventions(turned)
    shares = verdict.reading.shares(Table(turned))
    upright = [
        replace(claim, numbers=tuple(box * np.array(claim.size[::-1] * 2)))
        for claim, box in zip(turned, shares, strict=True)
    ]
    assert conventions(upright) == []


def test_upright_pictures_do_not_hide_those_with_a_turn(
    objects: list[Claim], turned: list[Claim]
) -> None:
    found = conventions(
        [*objects, *turned], lambda path: PICTURES[path] if path in PICTURES else look_at(path)
    )
    assert [verdict.code for verdict in found] == ["boxes-before-turn"]


def real_claims(shared: Path, change: Planted) -> list[Claim]:
    folder = shared / "data" / "grounding"
    rows = [json.loads(line) for line in (folder / "grounding.jsonl").open(encoding="utf-8")]
    return [
        Claim(
            row["id"],
            row["id"],
            folder / row["image"],
            (row["height"], row["width"]),
            1,
            change(tuple(row["bbox_xyxy"]), (row["height"], row["width"])),
        )
        for row in rows[::3] + rows[1::3]
    ]


@pytest.mark.parametrize(
    ("expected", "change"),
    [([], times(1.0)), (["boxes-xywh"], xywh), (["boxes-resized"], times(0.5))],
)
def test_real_words_and_receipts(shared: Path, expected: list[str], change: Planted) -> None:
    claims = real_claims(shared, change)
    assert [verdict.code for verdict in conventions(claims)] == expected
