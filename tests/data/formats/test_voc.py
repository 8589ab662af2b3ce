"""Pascal VOC's XML files as its development kit describes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from box_scenes import answers, imported, there_and_back, white_at, white_in

from finesight.errors import UserError

# The first white pixel is the 13th from the left and 4th from the top, the last the 31st and 17th.
WHITE = (12, 3, 31, 17)
ANNOTATION = """\
<annotation>
	<folder>VOC2012</folder>
	<filename>2007_000027.png</filename>
	<source><database>The VOC2007 Database</database><image>flickr</image></source>
	<size><width>40</width><height>20</height><depth>3</depth></size>
	<segmented>0</segmented>
	<object>
		<name>person</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>1</difficult>
		<bndbox><xmin>13</xmin><ymin>4</ymin><xmax>31</xmax><ymax>17</ymax></bndbox>
		<part><name>head</name>
			<bndbox><xmin>14</xmin><ymin>5</ymin><xmax>16</xmax><ymax>8</ymax></bndbox>
		</part>
	</object>
	<object>
		<name>dog</name>
		<bndbox><xmax>40</xmax><xmin>1</xmin><ymax>20</ymax><ymin>1.5</ymin></bndbox>
	</object>
</annotation>
"""
EMPTY = "<annotation><folder>VOC2012</folder><filename>b.png</filename></annotation>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    white_at(root / "JPEGImages" / "2007_000027.png", WHITE)
    white_at(root / "JPEGImages" / "b.png", WHITE)
    annotate(root, ANNOTATION)
    (root / "Annotations" / "b.xml").write_text(EMPTY, encoding="utf-8")
    return root


def annotate(root: Path, text: str) -> None:
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / "2007_000027.xml").write_text(text, encoding="utf-8")


def test_detection(root: Path, tmp_path: Path) -> None:
    samples, summary = imported(root, tmp_path / "out")
    assert answers(samples) == [
        [("dog", (0, 0.5, 40, 20)), ("person", (12, 3, 31, 17))],
        ["none"],
    ]
    assert samples[0].meta["boxes"] == [{}, {"difficult": 1, "truncated": 0}]
    assert samples[0].id == "2007_000027"
    assert summary.known_by == "XML files with <annotation>: Pascal VOC, 2 classes"
    assert summary.noted == {"parts of objects, not read": 1}


def test_known_pixels(root: Path, tmp_path: Path) -> None:
    samples, _ = imported(root, tmp_path / "out")
    white = white_in(root / "JPEGImages" / "2007_000027.png")
    assert answers(samples)[0][1] == ("person", white)


@pytest.mark.parametrize("ask", ["detection", "grounding"])
def test_there_and_back(root: Path, tmp_path: Path, ask: str) -> None:
    there_and_back(root, tmp_path, ask=ask)
    written = (tmp_path / "exported" / "Annotations" / "2007_000027.xml").read_text("utf-8")
    assert "<xmin>13</xmin>" in written
    assert "<xmax>31</xmax>" in written
    assert "<difficult>1</difficult>" in written


def test_counted_from_0(root: Path, tmp_path: Path) -> None:
    annotate(root, ANNOTATION.replace("<xmin>1<", "<xmin>0<"))
    samples, summary = imported(root, tmp_path / "kit")
    assert answers(samples)[0][0] == ("dog", (0, 0.5, 40, 20))
    assert summary.clipped_boxes == 1
    samples, _ = imported(root, tmp_path / "declared", box_format="xyxy")
    assert answers(samples)[0][1] == ("person", (13, 4, 31, 17))


@pytest.mark.parametrize("place", ["Annotations", "images", "VOC2012", "."])
def test_places_of_pictures(root: Path, tmp_path: Path, place: str) -> None:
    (root / place).mkdir(exist_ok=True)
    for picture in (root / "JPEGImages").iterdir():
        target = root / place if place != "." else root / "Annotations"
        picture.rename(target / picture.name)
    assert len(imported(root, tmp_path / "out")[0]) == 2


def test_says_where_a_picture_was_looked_for(root: Path, tmp_path: Path) -> None:
    (root / "JPEGImages" / "2007_000027.png").unlink()
    with pytest.raises(UserError, match=r"no picture '2007_000027.png'") as caught:
        imported(root, tmp_path / "out")
    assert str(root / "JPEGImages") in caught.value.expected


LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><filename>&b;</filename></annotation>
"""
OUTSIDE = '<!DOCTYPE x SYSTEM "file:///etc/passwd"><annotation><filename>b</filename></annotation>'


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LAUGHS, "a DOCTYPE, 'annotation'"),
        (OUTSIDE, "a DOCTYPE, 'x'"),
        ("<annotation><object>", "broken XML"),
        ("", "broken XML"),
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "broken XML"),
        ("<html/>", "an XML file of <html>"),
        (ANNOTATION.replace("<xmax>31</xmax>", ""), "the box"),
        (ANNOTATION.replace("<xmin>13<", "<xmin>32<"), "reversed"),
        (ANNOTATION.replace("<name>dog</name>", ""), "an object without a name"),
        (ANNOTATION.replace("<width>40<", "<width>80<"), "80 x 20 pixels, the picture has 40 x 20"),
    ],
)
def test_bad_files(root: Path, tmp_path: Path, text: str, what: str) -> None:
    annotate(root, text)
    with pytest.raises(UserError, match=what) as caught:
        imported(root, tmp_path / "out")
    assert "2007_000027.xml" in caught.value.what
    assert caught.value.remedy


def test_unknown_size_and_objects_without_a_box(root: Path, tmp_path: Path) -> None:
    text = ANNOTATION.replace("<width>40<", "<width>0<").replace(
        "</annotation>", "<object><name>cat</name></object></annotation>"
    )
    annotate(root, text)
    samples, summary = imported(root, tmp_path / "out")
    assert len(answers(samples)[0]) == 2
    assert summary.noted["objects without a bndbox, left out"] == 1


def test_a_set_that_cannot_be_parsed_is_told_why(root: Path, tmp_path: Path) -> None:
    for file in (root / "Annotations").iterdir():
        text = file.read_text(encoding="utf-8")
        file.write_text(f"<!DOCTYPE annotation>{text}", encoding="utf-8")
    with pytest.raises(UserError, match="a DOCTYPE, 'annotation'") as caught:
        imported(root, tmp_path / "out")
    assert "take the DOCTYPE out" in caught.value.remedy
