"""Pascal VOC's XML files as its development kit describes them."""

from pathlib import Path

import pytest
from box_fixtures import import_samples, list_answers, write_box_image

from finesight.errors import UserError
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.mapping_draft import detect_roles

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
    write_box_image(root / "JPEGImages" / "2007_000027.png", WHITE)
    write_box_image(root / "JPEGImages" / "b.png", WHITE)
    annotate(root, ANNOTATION)
    (root / "Annotations" / "b.xml").write_text(EMPTY, encoding="utf-8")
    return root


def annotate(root: Path, text: str) -> None:
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / "2007_000027.xml").write_text(text, encoding="utf-8")


def test_detection(root: Path, tmp_path: Path) -> None:
    samples, summary = import_samples(root, tmp_path / "out")
    assert list_answers(samples) == [
        [("dog", (0, 0.5, 40, 20)), ("person", (12, 3, 31, 17))],
        ["none"],
    ]
    assert samples[0].meta["boxes"] == [{}, {"difficult": 1, "truncated": 0}]
    assert samples[0].id == "2007_000027"
    assert summary.detected_by == "XML files with <annotation>: Pascal VOC, 2 classes"
    assert summary.source_notes == {"parts of objects (ignored)": 1}


def test_zero_based_coordinates(root: Path, tmp_path: Path) -> None:
    annotate(root, ANNOTATION.replace("<xmin>1<", "<xmin>0<"))
    samples, summary = import_samples(root, tmp_path / "kit")
    assert list_answers(samples)[0][0] == ("dog", (0, 0.5, 40, 20))
    assert summary.num_clipped_boxes == 1
    samples, _ = import_samples(root, tmp_path / "declared", box_format="xyxy")
    assert list_answers(samples)[0][1] == ("person", (13, 4, 31, 17))


@pytest.mark.parametrize("location", ["Annotations", "images", "VOC2012"])
def test_image_folders(root: Path, tmp_path: Path, location: str) -> None:
    (root / location).mkdir(exist_ok=True)
    for image in (root / "JPEGImages").iterdir():
        image.rename(root / location / image.name)
    assert len(import_samples(root, tmp_path / "out")[0]) == 2


def test_error_lists_searched_image_folder(root: Path, tmp_path: Path) -> None:
    (root / "JPEGImages" / "2007_000027.png").unlink()
    with pytest.raises(UserError, match=r"no image '2007_000027.png'") as caught:
        import_samples(root, tmp_path / "out")
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
        (ANNOTATION.replace("<xmin>13<", "<xmin>32<"), "inverted"),
        (ANNOTATION.replace("<name>dog</name>", ""), "an object without a name"),
        (ANNOTATION.replace("<name>dog<", "<name>dog</name><name>cat<"), "several names or boxes"),
        (ANNOTATION.replace("<width>40<", "<width>80.0<"), "80 x 20 pixels, the image has 40 x 20"),
        (ANNOTATION.replace("<width>40<", "<width>80<"), "80 x 20 pixels, the image has 40 x 20"),
    ],
)
def test_invalid_xml_is_rejected(root: Path, tmp_path: Path, text: str, what: str) -> None:
    annotate(root, text)
    with pytest.raises(UserError, match=what) as caught:
        import_samples(root, tmp_path / "out")
    assert "2007_000027.xml" in caught.value.what
    assert caught.value.remedy


def test_unknown_size_name_and_object_without_box(root: Path, tmp_path: Path) -> None:
    text = ANNOTATION.replace("<width>40<", "<width>0<").replace("2007_000027.png", "")
    annotate(root, text.replace("</annotation>", "<object><name>cat</name></object></annotation>"))
    samples, summary = import_samples(root, tmp_path / "out")
    assert samples[0].id == "2007_000027"
    assert len(list_answers(samples)[0]) == 2
    assert summary.source_notes["objects without a bndbox (skipped)"] == 1


@pytest.mark.parametrize("encoding", ["GBK", "gb2312", "big5", "shift_jis", "UTF-8"])
def test_declared_encodings(root: Path, tmp_path: Path, encoding: str) -> None:
    write_box_image(root / "JPEGImages" / "犬.png", WHITE)
    text = ANNOTATION.replace("2007_000027.png", "犬.png").replace("dog", "犬")
    content = f'<?xml version="1.0" encoding="{encoding}"?>\n{text}'.encode(encoding)
    (root / "Annotations" / "2007_000027.xml").write_bytes(content)
    samples, _ = import_samples(root, tmp_path / "out")
    assert list_answers(samples)[0][1] == ("犬", (0, 0.5, 40, 20))


SHAPES = (
    "<objects><object><name>ship</name><points><p>1,2</p><p>3,4</p></points></object></objects>"
)


@pytest.mark.parametrize(
    "foreign",
    [
        SHAPES,
        SHAPES.replace("object", "item"),
        f"<layer><group>{SHAPES}</group></layer>",
        "<object><name>tug</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
        f"</bndbox></object>{SHAPES}",
    ],
)
@pytest.mark.parametrize("prompt", [None, "Find all ships."])
def test_objects_of_another_format_are_not_left_out(
    root: Path, tmp_path: Path, foreign: str, prompt: str | None
) -> None:
    content = EMPTY.replace("</annotation>", f"{foreign}</annotation>")
    (root / "Annotations" / "b.xml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="perhaps the objects of another format") as caught:
        import_samples(root, tmp_path / "out", prompt=prompt)
    assert "xmin,ymin,xmax,ymax,label" in str(caught.value.remedy)


def test_nested_metadata_beside_objects_is_listed(root: Path, tmp_path: Path) -> None:
    metadata = "<source><image><url>x</url></image></source>"
    annotate(root, ANNOTATION.replace("<segmented>", f"{metadata}<segmented>"))
    _, summary = import_samples(root, tmp_path / "out")
    assert any(key.startswith("source of annotation") for key in summary.other_keys)


@pytest.mark.parametrize("tag", ["description", "text"])
def test_texts_of_objects_need_consent(root: Path, tmp_path: Path, tag: str) -> None:
    text = f"<name>dog</name><{tag}>the dog on the left</{tag}>"
    annotate(root, ANNOTATION.replace("<name>dog</name>", text))
    with pytest.raises(UserError, match=f"objects have texts.*{tag}") as caught:
        detect_roles(root, ImportOptions(), tmp_path / "out")
    assert "--format voc" in str(caught.value.remedy)
    detect_roles(root, ImportOptions(format="voc"), tmp_path / "out")


def test_texts_of_images_need_consent(root: Path, tmp_path: Path) -> None:
    annotate(root, ANNOTATION.replace("<object>", "<caption>Two dogs.</caption><object>", 1))
    with pytest.raises(UserError, match=r"images have texts.*caption"):
        detect_roles(root, ImportOptions(), tmp_path / "out")


def test_objects_without_texts_need_no_consent(root: Path, tmp_path: Path) -> None:
    assert detect_roles(root, ImportOptions(), tmp_path / "out").proposal is None
