"""CVAT for images 1.1: shapes, attributes, tags and invalid files."""

import json
from pathlib import Path

import pytest
from box_fixtures import check_export_roundtrip, import_samples, list_answers, write_box_image

from finesight.errors import UserError
from finesight.ingest.exporter import export_dataset
from finesight.samples.sample import LocatedSample

WHITE = (12, 3, 32, 17)
BOX = '<box label="dog" occluded="1" xtl="12" ytl="3" xbr="32.00" ybr="17.00" z_order="0">{}</box>'
ATTRIBUTE = '<attribute name="breed">Pug</attribute>'
LABELS = "<meta><task><labels><label><name>lawn</name></label><label><name>dog</name></label>"
META = f"{LABELS}</labels></task></meta>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_box_image(tmp_path / "set" / "images" / "day 1" / "a.png", WHITE)
    return tmp_path / "set"


def write_document(root: Path, shapes: str, meta: str = META) -> Path:
    image = f'<image id="0" name="day 1/a.png" width="40" height="20">{shapes}</image>'
    text = f"<?xml version='1.0'?><annotations><version>1.1</version>{meta}{image}</annotations>"
    (root / "annotations.xml").write_text(text, encoding="utf-8")
    return root


def test_shapes(root: Path, tmp_path: Path) -> None:
    # A box of 4 x 10 pixels around (30, 10), rotated by 90 degrees around its center.
    rotated = '<box label="lawn" xtl="28" ytl="5" xbr="32" ybr="15" rotation="90.0"/>'
    polygon = '<polygon label="lawn" points="4,2;20,2;10,18.5"/>'
    shapes = [BOX.format(ATTRIBUTE), rotated, polygon, '<polyline label="dog" points="1,2;3,4"/>']
    samples, summary = import_samples(write_document(root, "".join(shapes)), tmp_path / "out")
    lawns = [("lawn", (4, 2, 20, 18.5)), ("lawn", (25, 8, 35, 12))]
    assert list_answers(samples) == [[("dog", (1, 2, 3, 4)), ("dog", WHITE), *lawns]]
    assert samples[0].meta["boxes"] == [{}, {"breed": "Pug", "occluded": 1}, {}, {}]
    assert samples[0].meta["classes"] == ["lawn", "dog"]
    assert summary.source_notes == {
        "rotated rectangles (converted to bounding boxes)": 1,
        "polygons (converted to bounding boxes)": 1,
        "shapes of type polyline (converted to bounding boxes)": 1,
    }


def test_tags_are_classes(root: Path, tmp_path: Path) -> None:
    source = write_document(root, '<tag label="dog" source="manual"/>')
    samples, _ = import_samples(source, tmp_path / "out")
    assert list_answers(samples) == [["dog"]]
    tag = '<tag label="dog" frame="7"><attribute name="breed">Pug</attribute></tag>'
    other = write_document(root, f'{tag}<points label="dog" points="1,2"/>')
    samples, summary = import_samples(other, tmp_path / "other")
    assert list_answers(samples) == [["dog"]]
    assert summary.source_notes == {
        "attributes of tags (ignored)": 1,
        "points next to tags (ignored)": 1,
    }
    assert summary.other_keys == {
        "frame of tags, not imported": 1,
        "points of tags, not imported": 1,
    }
    source = write_document(root, '<tag label="dog" source="manual"/>')
    check_export_roundtrip(source, tmp_path)
    with pytest.raises(UserError, match="1 images without a tag"):
        import_samples(write_document(root, ""), tmp_path / "none")


def test_hidden_shapes_attributes_of_points_and_tracks_are_counted(root, tmp_path) -> None:
    hidden = '<box label="dog" outside="1" xtl="1" ytl="1" xbr="5" ybr="5"/>'
    point = f'<points label="eye" points="1,2" occluded="1">{ATTRIBUTE}</points>'
    skeleton = f'<skeleton label="dog">{point.replace("1,2", "3,4")}</skeleton>'
    shapes = [hidden, BOX.format(""), point, skeleton]
    source = write_document(root, "".join(shapes))
    file = source / "annotations.xml"
    file.write_text(file.read_text().replace("</annotations>", "<track/></annotations>"))
    samples, summary = import_samples(source, tmp_path / "out", box_task="points")
    assert samples[0].meta["boxes"] == [{}, {"breed": "Pug", "occluded": 1}]
    assert summary.source_notes["shapes that are outside (skipped)"] == 1
    assert summary.source_notes["attributes of points in skeletons (ignored)"] == 2
    assert summary.other_keys == {"track of files, not imported": 1}


@pytest.mark.parametrize(
    ("shapes", "meta", "what"),
    [
        (BOX.replace("12", "x"), META, "the box"),
        (BOX.replace('"dog"', '""'), META, "the box"),
        (BOX.replace("32.00", "320"), META, "outside its image"),
        ('<polygon label="dog" points="1,2;3"/>', META, "the shape"),
        (BOX, "<meta>", "broken XML"),
    ],
)
def test_invalid_documents(root: Path, tmp_path: Path, shapes: str, meta: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        import_samples(write_document(root, shapes, meta), tmp_path / "out")


def test_entities_and_videos_are_rejected(root: Path, tmp_path: Path) -> None:
    file = root / "annotations.xml"
    entity = '<!DOCTYPE annotations [<!ENTITY a "ha">]>'
    file.write_text(f"{entity}<annotations><version>&a;</version></annotations>")
    with pytest.raises(UserError, match="a DOCTYPE"):
        import_samples(root, tmp_path / "out")
    file.write_text('<annotations><track id="0" label="dog"/></annotations>')
    with pytest.raises(UserError, match="tracks of a video"):
        import_samples(root, tmp_path / "out")


def test_long_texts_are_not_labels(root: Path, tmp_path: Path) -> None:
    rows = [{"image": "images/day 1/a.png", "answer": "a " * 40}]
    (root / "rows.json").write_text(json.dumps(rows))
    columns = {"image": "image", "answer": "answer"}
    samples, _ = import_samples(root / "rows.json", tmp_path / "first", columns=columns, prompt="?")
    located_samples = [LocatedSample(sample, tmp_path / "first") for sample in samples]
    with pytest.raises(UserError, match="has 80 characters"):
        export_dataset(located_samples, tmp_path / "exported", "cvat", copy_images=True)
