"""Conventions planted in sources of drawn objects, whose true boxes are known."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from finesight.ingest.check.box_hypothesis import (
    BoxClaim,
    BoxClaimTable,
    EdgeContrast,
    ImageEvidence,
    normalize_boxes,
    open_edge_contrast,
)
from finesight.ingest.check.check_issues import ISSUE_TYPES
from finesight.ingest.check.convention_detector import find_convention_issues, find_frame
from finesight.samples.frames import RESIZE_LIMITS, BoxFrame, get_frame, smart_resize

Coordinates = tuple[float, float, float, float]
BoxTransform = Callable[[Coordinates, tuple[int, int]], Coordinates]

NUM_IMAGES = 80
IMAGE_EVIDENCE: dict[Path, EdgeContrast] = {}


def draw(number: int, loose: float) -> list[BoxClaim]:
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
        claims.append(BoxClaim(f"line {number}", str(number), path, (height, width), 1, box))
    IMAGE_EVIDENCE[path] = EdgeContrast(np.asarray(image.convert("L")))
    return claims


@pytest.fixture(scope="module")
def objects() -> list[BoxClaim]:
    return [claim for number in range(NUM_IMAGES) for claim in draw(number, 0.0)]


def apply_convention(claims: list[BoxClaim], change: BoxTransform) -> list[BoxClaim]:
    return [
        replace(claim, coordinates=change(claim.coordinates, claim.image_size)) for claim in claims
    ]


def xywh(box: Coordinates, size: tuple[int, int]) -> Coordinates:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def yxyx(box: Coordinates, size: tuple[int, int]) -> Coordinates:
    return box[1], box[0], box[3], box[2]


def in_fixed_frame(width: float, height: float) -> BoxTransform:
    """Boxes in a frame of a fixed size."""

    def change(box: Coordinates, size: tuple[int, int]) -> Coordinates:
        x, y = width / size[1], height / size[0]
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y

    return change


def scaled_by(factor: float) -> BoxTransform:
    return lambda box, size: tuple(factor * number for number in box)


def get_image_evidence(path: Path) -> EdgeContrast:
    return IMAGE_EVIDENCE[path]


def codes(claims: list[BoxClaim]) -> list[str]:
    return [verdict.code for verdict in find_convention_issues(claims, get_image_evidence)]


def at(coordinates: Coordinates) -> BoxTransform:
    return lambda box, size: coordinates


def at_random(wild: float) -> BoxTransform:
    rng = random.Random(0)
    return lambda box, size: tuple(rng.uniform(-wild, wild) for _ in range(4))


HARMLESS: dict[str, Callable[[list[BoxClaim]], list[BoxClaim]]] = {
    "correct": list,
    "a little loose": lambda _: [claim for n in range(NUM_IMAGES) for claim in draw(n, 0.1)],
    "loose": lambda _: [claim for n in range(NUM_IMAGES) for claim in draw(n, 0.5)],
    "few reversed": lambda claims: [
        *apply_convention(claims[:6], lambda box, size: (*box[2:], *box[:2])),
        *claims[6:],
    ],
    "too few": lambda claims: apply_convention(
        [claim for claim in claims if int(claim.sample_id) < 15], xywh
    ),
    "not finite": lambda claims: apply_convention(claims, at((math.nan, 0.0, math.inf, 1.0))),
    "some not finite": lambda claims: [
        *apply_convention(claims[:40], at((math.nan, 0.0, math.inf, 1.0))),
        *claims[40:],
    ],
    "negative": lambda claims: apply_convention(claims, scaled_by(-1.0)),
    "random": lambda claims: apply_convention(claims, at_random(300.0)),
    "huge": lambda claims: apply_convention(claims, at_random(1e18)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_boxes_raise_no_convention_issue(objects, name):
    assert codes(HARMLESS[name](objects)) == []


def test_convention_is_detected_despite_outliers(objects):
    claims = apply_convention(objects, xywh)
    slips = apply_convention(claims[:5], at((9000.0, 9000.0, 1.0, 1.0)))
    assert codes([*slips, *claims[5:]]) == ["boxes-xywh"]


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("boxes-xywh", xywh),
        ("boxes-yxyx", yxyx),
        ("boxes-thousandths", in_fixed_frame(1000, 1000)),
        ("boxes-percent", in_fixed_frame(100, 100)),
        ("boxes-normalized", in_fixed_frame(1, 1)),
        ("boxes-resized", in_fixed_frame(224, 224)),
        ("boxes-resized", in_fixed_frame(640, 480)),
        ("boxes-resized", scaled_by(0.5)),
        ("boxes-resized", scaled_by(2.0)),
    ],
)
def test_wrong_box_convention_is_detected(objects, code, change):
    assert codes(apply_convention(objects, change)) == [code]


def scaled_images(claims: list[BoxClaim], factor: float) -> list[BoxClaim]:
    """Boxes in the resized image of Qwen2.5-VL, of the same images at another size."""
    scaled = []
    for claim in claims:
        height, width = claim.image_size
        size = round(factor * height), round(factor * width)
        resized = smart_resize(size, RESIZE_LIMITS, 28)
        box = in_fixed_frame(*resized[::-1])(claim.coordinates, claim.image_size)
        scaled.append(replace(claim, image_size=size, coordinates=box))
    return scaled


def test_pixels_of_the_resized_image_are_detected(objects: list[BoxClaim]) -> None:
    reduced = find_convention_issues(scaled_images(objects, 20), get_image_evidence)
    assert [verdict.options for verdict in reduced] == ["--box-units resized"]
    assert reduced[0].code == "boxes-resized"
    assert "as Qwen2.5-VL resizes it" in reduced[0].description
    enlarged = scaled_images(objects, 0.12)  # below the minimum of 3136 pixels
    for open_image in (get_image_evidence, None):
        (verdict,) = find_convention_issues(enlarged, open_image)
        assert verdict.options == "--box-units resized"
    thousandths = [
        replace(claim, frame=get_frame("xyxy", "1000")) for claim in scaled_images(objects, 20)
    ]
    (verdict,) = find_convention_issues(thousandths, get_image_evidence)
    assert verdict.options == "--box-units resized"
    assert codes(scaled_images(objects, 5)) == []  # neither reduced nor enlarged


def test_verdict_becomes_check_issue_with_evidence(objects: list[BoxClaim]) -> None:
    (verdict,) = find_convention_issues(apply_convention(objects, xywh), get_image_evidence)
    finding = verdict.to_check_issue("boxes.jsonl")
    assert finding.code in ISSUE_TYPES
    assert finding.where == "boxes.jsonl"
    assert finding.remedy == "give --box-format xywh"
    assert f"{verdict.num_invalid} of {NUM_IMAGES} samples" in finding.evidence[0]
    assert (
        finding.evidence[-1]
        == f"{100 * verdict.undecided_fraction:.0f} % of the samples are undecided"
    )


def test_without_images_only_bounds_are_used(objects: list[BoxClaim]) -> None:
    def blind(change: BoxTransform) -> list[str]:
        return [
            verdict.code
            for verdict in find_convention_issues(apply_convention(objects, change), None)
        ]

    assert blind(xywh) == ["boxes-xywh"]
    assert blind(in_fixed_frame(1, 1)) == ["boxes-normalized"]
    assert blind(in_fixed_frame(1000, 1000)) == ["boxes-thousandths"]
    assert blind(scaled_by(0.5)) == []


def test_wrong_frames_of_points_are_detected(objects: list[BoxClaim]) -> None:
    def detect(change: BoxTransform) -> list[str]:
        points = apply_convention(objects, lambda box, size: (*box[2:], *box[2:]))
        return codes(apply_convention(points, change))

    assert detect(scaled_by(1)) == []
    assert detect(in_fixed_frame(1, 1)) == ["boxes-normalized"]
    assert detect(in_fixed_frame(1000, 1000)) == ["boxes-thousandths"]


def test_boxes_unrelated_to_images_raise_no_issue(objects):
    rng = random.Random(0)
    shuffled = [claim.coordinates for claim in objects if claim.image_size == (300, 300)]
    claims = [replace(claim, coordinates=rng.choice(shuffled)) for claim in objects]
    inside = [
        c
        for c in claims
        if c.coordinates[2] <= c.image_size[1] and c.coordinates[3] <= c.image_size[0]
    ]
    assert len(inside) > 100, "a source too small to say something about"
    assert codes(inside) == []


@pytest.mark.parametrize(
    ("declared", "change", "code"),
    [
        (BoxFrame("xywh"), xywh, []),
        (BoxFrame("xywh"), scaled_by(1.0), ["boxes-xyxy"]),
        (get_frame("xyxy", "1000"), scaled_by(1.0), ["boxes-pixels"]),
    ],
)
def test_declared_box_format_is_the_reference(objects, declared, change, code):
    claims = apply_convention(objects, change)
    assert codes([replace(claim, frame=declared) for claim in claims]) == code


def test_mixed_conventions_are_detected(objects: list[BoxClaim]) -> None:
    half = len(objects) // 2
    (verdict,) = find_convention_issues(
        [*apply_convention(objects[:half], xywh), *objects[half:]], get_image_evidence
    )
    assert verdict.code == "boxes-mixed"
    assert 0.2 * NUM_IMAGES < verdict.num_invalid < 0.6 * NUM_IMAGES


@pytest.mark.parametrize(
    ("change", "frame"),
    [
        (in_fixed_frame(224, 224), BoxFrame("xyxy", "fixed", 224, 224)),
        (in_fixed_frame(700, 420), BoxFrame("xyxy", "fixed", 700, 420)),
        (scaled_by(0.6), BoxFrame("xyxy", "factor", 0.6, 0.6)),
    ],
)
def test_resized_frame_size_is_estimated(objects, change, frame):
    table = BoxClaimTable(apply_convention(objects, change))
    found, _ = find_frame(table, ImageEvidence(table, get_image_evidence), "xyxy")
    assert found.base == frame.base
    assert found.width == pytest.approx(frame.width, rel=0.02)
    assert found.height == pytest.approx(frame.height, rel=0.02)


def test_longest_side_resize_differs_from_scale_factor(objects: list[BoxClaim]) -> None:
    changed = apply_convention(objects, lambda box, size: scaled_by(200 / max(size))(box, size))
    (verdict,) = find_convention_issues(changed, get_image_evidence)
    assert verdict.hypothesis.base == "longest"
    assert verdict.hypothesis.width == pytest.approx(200, rel=0.02)
    assert "the longest side about 20" in verdict.description


def test_longest_side_of_about_1000_is_not_thousandths(objects: list[BoxClaim]) -> None:
    changed = apply_convention(objects, lambda box, size: scaled_by(980 / max(size))(box, size))
    (verdict,) = find_convention_issues(changed, get_image_evidence)
    assert verdict.hypothesis.base == "longest"
    assert verdict.hypothesis.width == pytest.approx(980, rel=0.02)


@pytest.fixture(scope="module")
def exif_rotated(tmp_path_factory: pytest.TempPathFactory) -> list[BoxClaim]:
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
        claims.append(BoxClaim(path.name, path.name, path, size, turn, box))
    return claims


def test_boxes_before_exif_rotation_are_detected(exif_rotated: list[BoxClaim]) -> None:
    (verdict,) = find_convention_issues(exif_rotated)
    assert verdict.code == "boxes-before-exif-rotation"
    assert verdict.undecided_fraction < 0.3
    assert (
        "remove the rotation (EXIF tag Orientation)" in verdict.to_check_issue("boxes.jsonl").remedy
    )


def test_boxes_after_exif_rotation_raise_no_issue(exif_rotated: list[BoxClaim]) -> None:
    (verdict,) = find_convention_issues(exif_rotated)
    shares = normalize_boxes(verdict.hypothesis, BoxClaimTable(exif_rotated))
    upright = [
        replace(claim, coordinates=tuple(box * np.array(claim.image_size[::-1] * 2)))
        for claim, box in zip(exif_rotated, shares, strict=True)
    ]
    assert find_convention_issues(upright) == []


def test_exif_issue_is_found_among_upright_images(objects, exif_rotated):
    found = find_convention_issues(
        [*objects, *exif_rotated],
        lambda path: IMAGE_EVIDENCE[path] if path in IMAGE_EVIDENCE else open_edge_contrast(path),
    )
    assert [verdict.code for verdict in found] == ["boxes-before-exif-rotation"]


def real_claims(shared: Path, change: BoxTransform) -> list[BoxClaim]:
    folder = shared / "data" / "grounding"
    rows = [json.loads(line) for line in (folder / "grounding.jsonl").open(encoding="utf-8")]
    return [
        BoxClaim(
            row["id"],
            row["id"],
            folder / row["image"],
            (row["height"], row["width"]),
            1,
            change(tuple(row["bbox_xyxy"]), (row["height"], row["width"])),
        )
        for row in rows[::3]
    ]


@pytest.mark.parametrize(
    ("expected", "change"), [([], scaled_by(1.0)), (["boxes-resized"], scaled_by(0.5))]
)
def test_verdicts_on_real_word_and_receipt_boxes(shared, expected, change):
    claims = real_claims(shared, change)
    assert [verdict.code for verdict in find_convention_issues(claims)] == expected
