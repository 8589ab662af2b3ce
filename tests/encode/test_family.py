"""Detection of families, and their box formats there and back."""

import json
import random
import re
from pathlib import Path

import pytest
from box_strategies import image_boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from finesight.encode.family import PromptPiece, SpecialToken, ThinkingOptions
from finesight.encode.renderer import load_family
from finesight.errors import UserError
from finesight.families.qwen.renderer import QwenVL
from finesight.families.qwen2_5_vl.renderer import Qwen25VL
from finesight.families.qwen2_vl.renderer import Qwen2VL
from finesight.families.qwen3_vl.renderer import Qwen3VL
from finesight.family_components import FAMILIES
from finesight.model import vlm
from finesight.model_folder import ModelFolder
from finesight.samples.boxes import split_at_boxes
from finesight.samples.frames import ImageSizes
from finesight.samples.sample import BoxPart, create_region

ONE, TWO = (20.0, 10.0, 60.0, 20.0), (0.0, 0.0, 200.0, 50.0)
DOT = create_region((20.0, 10.0, 20.0, 10.0), "cat", is_point=True)
CAT, BARE = BoxPart(label="cat", xyxy=ONE), BoxPart(label=None, xyxy=ONE)


def write_config(path: Path, family: str, **config: object) -> ModelFolder:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": family, **config}))
    return ModelFolder(path)


def join(pieces: list[PromptPiece]) -> str:
    return "".join(one.token if isinstance(one, SpecialToken) else one for one in pieces)


def test_family_is_detected_from_config(tmp_path):
    found = {name: load_family(write_config(tmp_path / name, name, visual={})) for name in FAMILIES}
    assert {name: family.name for name, family in found.items()} == {n: n for n in FAMILIES}
    assert found["qwen2_vl"] == Qwen2VL()
    assert found["qwen3_vl"] == Qwen3VL(has_reasoning=False)
    vision = {"tokens_per_second": 25}
    fast = load_family(write_config(tmp_path / "fast", "qwen2_5_vl", vision_config=vision))
    assert fast == Qwen25VL(tokens_per_second=25)
    assert all(map(vlm.load_architecture, FAMILIES)), "a family without a model"


@pytest.mark.parametrize("value", ["2", 0, True, None])
def test_invalid_tokens_per_second_is_rejected(value, tmp_path):
    vision = {"tokens_per_second": value}
    with pytest.raises(UserError, match=f"tokens_per_second is {value!r}"):
        load_family(write_config(tmp_path / "wrong", "qwen2_5_vl", vision_config=vision))
    # The model checks vision_config itself.
    none = write_config(tmp_path / "none", "qwen2_5_vl", vision_config=None)
    assert load_family(none) == Qwen25VL()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ '<think>' }}"),
        ("chat_template.json", json.dumps({"chat_template": "<think>"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "<think>"})),
    ],
)
def test_thinking_edition_is_detected_from_template(tmp_path, name, content):
    folder = write_config(tmp_path / "model", "qwen3_vl")
    (folder.path / name).write_text(content)
    assert load_family(folder) == Qwen3VL(has_reasoning=True)


@pytest.mark.parametrize("has_reasoning", [False, True])
def test_single_mode_cannot_be_changed(has_reasoning):
    family = Qwen3VL(has_reasoning=has_reasoning)
    assert family.with_thinking(ThinkingOptions(enable_thinking=has_reasoning)) == family
    with pytest.raises(UserError, match="the only mode of this model"):
        family.with_thinking(ThinkingOptions(enable_thinking=not has_reasoning))
    with pytest.raises(UserError, match="no reasoning effort"):
        family.with_thinking(ThinkingOptions(reasoning_effort="low"))


@pytest.mark.parametrize("name", ["qwen3_next", "llama", ""])
def test_unknown_family_is_rejected(tmp_path, name):
    # The name of the folder does not matter.
    folder = write_config(tmp_path / "Qwen2-VL-2B-Instruct", name)
    with pytest.raises(UserError, match=f"family {name}") as raised:
        load_family(folder)
    assert raised.value.where == str(folder.path / "config.json")


def test_json_boxes_are_in_resized_pixels_or_thousandths():
    for family, resized, bare in (
        (Qwen25VL(), (28, 28), [0, 0, 13, 28]),
        (Qwen3VL(), (32, 32), [0, 0, 467, 1000]),
        (Qwen3VL(), (320, 320), [0, 0, 467, 1000]),
    ):
        box = BoxPart(label='猫 "x"', xyxy=(48, 36, 480, 361))
        images = [ImageSizes((360, 480), (252, 336)), ImageSizes((3, 3), resized)]
        corners = [100, 100, 1000, 1000] if isinstance(family, Qwen3VL) else [34, 25, 336, 252]
        alone = f'{{"bbox_2d": {corners}, "label": "猫 \\"x\\""}}'
        assert family.write_boxes([box], images) == [alone]
        other = BoxPart(image=1, xyxy=(-0.4, 0, 1.4, 3))
        assert family.write_boxes([box, other], images) == [f'[{alone}, {{"bbox_2d": {bare}}}]']


@pytest.mark.parametrize("family", [Qwen2VL(), QwenVL()])
def test_boxes_between_special_tokens(family):
    start, end, box_start, box_end = map(SpecialToken, family.box_tokens or ())
    most = family.max_box_coordinate
    box = BoxPart(label="猫 <|box_end|>", xyxy=(48, 36, 480, 359.9))
    other = BoxPart(image=1, xyxy=(0, 0, 10.005, 10.004))
    images = [ImageSizes((360, 480), (364, 476)), ImageSizes((20000, 20000), (28, 28))]
    assert family.write_boxes([box, other], images) == [
        *(start, "猫 <|box_end|>", end, box_start, f"(100,100),({most},{most})", box_end),
        *(box_start, "(0,0),(1,1)", box_end),
    ]


LABELS = (None, "cat", 'a "b" {"bbox_2d": [1, 2, 3, 4]}', "猫\\n", "a (1,2),(3,4)", "two\nlines")


@pytest.mark.parametrize("family", [QwenVL(), Qwen2VL(), Qwen25VL(), Qwen3VL()])
@pytest.mark.parametrize("is_point", [False, True])
@settings(max_examples=500)
@given(drawn=image_boxes(28, LABELS), count=st.integers(1, 3))
def test_roundtrip_error_is_below_half_a_unit(family, is_point, drawn, count):
    box, image = drawn
    if is_point:
        box = create_region(box.xyxy[:2] * 2, box.label, is_point=True)
    text = f"Here: {join(family.write_boxes([box] * count, [image]))}<|im_end|>"
    found = family.read_boxes(text, image.original, image.resized)
    assert [(one.label, one.is_point) for one in found] == [(box.label, is_point)] * count
    frame = family.box_frame(image.resized)
    steps = [side / units for side, units in zip(image.original, frame, strict=True)][::-1] * 2
    for there, back, step in zip(box.xyxy, found[0].xyxy, steps, strict=True):
        assert abs(min(there, family.max_box_coordinate * step) - back) <= step / 2 + 1e-9


MARK = re.compile(r'"box ([0-9]+)"')


def build_structure(
    rng: random.Random, boxes: list[BoxPart], name: str | None = None, depth: int = 3
) -> dict[str, object]:
    """Build random JSON data with marks instead of coordinates, and add their boxes to the list."""
    value: dict[str, object] = {"text": rng.choice(LABELS), "n": rng.choice([None, 1.5, [1, 2]])}
    if rng.random() < 0.5:
        name = value["label"] = rng.choice(LABELS[1:])
    key = rng.choice(["bbox_2d", "point_2d", "polygon_2d"])
    marks = []
    for _ in range(3 if key == "polygon_2d" else 1):
        (x1, x2), (y1, y2) = (sorted(rng.uniform(0, side) for _ in "ab") for side in (480, 360))
        xyxy = (x1, y1, x2, y2) if key == "bbox_2d" else (x1, y1, x1, y1)
        marks.append(f"box {len(boxes)}")
        boxes.append(create_region(xyxy, name, is_point=key != "bbox_2d"))
    value[key] = marks if len(marks) > 1 else marks[0]
    for child in rng.sample(["total", "items", "a b"], rng.randint(0, depth)):
        inner = [build_structure(rng, boxes, child, depth - 1) for _ in range(rng.randint(1, 2))]
        value[child] = inner[0] if len(inner) == 1 else inner
    return dict(rng.sample([*value.items()], len(value)))


@pytest.mark.parametrize("family", [QwenVL(), Qwen2VL(), Qwen25VL(), Qwen3VL()])
def test_boxes_in_json_have_an_error_below_half_a_unit(family):
    rng = random.Random(1)
    images = [ImageSizes((360, 480), (252, 336))]
    for _ in range(500):
        boxes: list[BoxPart] = []
        written = json.dumps(build_structure(rng, boxes))
        pieces: list[str] = MARK.split(written)
        expected = [boxes[int(one)] for one in pieces[1::2]]
        segments = [[boxes[int(one)]] if n % 2 else one for n, one in enumerate(pieces)]
        text = join(family.write_segments(segments, images))
        assert json.loads(text)
        _, [*split], _ = split_at_boxes(text)
        assert split[::2] == pieces[::2], "the structure of an answer"
        found = family.read_boxes(f"{text}<|im_end|>", (360, 480), (252, 336))
        assert [(b.label, b.is_point) for b in found] == [(b.label, b.is_point) for b in expected]
        height, width = family.box_frame((252, 336))
        steps = (480 / width, 360 / height) * 2
        for box, back in zip(expected, found, strict=True):
            for there, here, step in zip(box.xyxy, back.xyxy, steps, strict=True):
                assert abs(min(there, family.max_box_coordinate * step) - here) <= step / 2 + 1e-9


def test_lenient_parsing_of_json_boxes():
    for text, boxes in (
        ('{"bbox_2d": [10, 20, 30, 40], "label": "cat"}', [CAT]),
        ('```json\n[\n\t{"bbox_2d": [10, 20, 30.0, 40], "label": "cat"}\n]\n```<|im_end|>', [CAT]),
        ('I see {"label": "cat", "bbox_2d": [10, 20, 30, 40]} there', [CAT]),
        ('{"bbox_2d": [10, 20, 30, 40], "text_content": "cat"}', [CAT]),
        ('{"bbox_2d": ["10", "20", "30", "40"]}', [BARE]),
        ('{"objects": [{"bbox_2d": [10, 20, 30, 40], "label": "cat"}]}', [CAT]),
        ('[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}, {"bbox_2d": [1, 2', [CAT]),
        ("{'bbox_2d': [10, 20, 30, 40]}", [BARE]),
        ("[10, 20, 30, 40]", [BARE]),
        ("```json\n[10, 20, 30, 40]\n```", [BARE]),
        ("the list [10, 20, 30, 40] of numbers", []),
        (r'{"bbox_2d": [10, 20, 30, 40], "label": "\ud83d"}', [BoxPart(label="?", xyxy=ONE)]),
        ('[{"point_2d": ["10", "20"], "label": "cat"}]', [DOT]),
        ('{"bbox_2d": [10, 20, 30]}', []),
        ('{"bbox_2d": [10, 20, 30, NaN]}', []),
        ('{"bbox_2d": [10, 20, 30, {}]}', []),
        ('{"bbox_2d": 7, "label": 5}', []),
        (r"\frac { a } { b } [ 1 ]", []),
        ('{"a":' + "[" * 100_000, []),
        (" " * 400_000 + "x", []),
    ):
        assert Qwen25VL().read_boxes(text, (100, 200), (200, 100)) == boxes


PIECES = ['{"bbox_2d": ', "[", "]", "{", "}", '"', ",", "1", "9" * 400, "-", ".5", "null", " "]


@settings(max_examples=1000)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=30))
def test_any_text_is_parsed_without_errors(pieces):
    for box in Qwen25VL().read_boxes("".join(pieces), (100, 200), (200, 100)):
        json.dumps(box.xyxy, allow_nan=False)


REF, REF_END, BOX, BOX_END = Qwen2VL.box_tokens


def test_lenient_parsing_of_boxes_between_tokens():
    for text, boxes in (
        (f"{BOX}(100,200),(300,400){BOX_END}", [BARE]),
        ("(100, 200) , ( 300.0,400 )", [BARE]),
        ("cat(100,200),(300,400)<|im_end|>", [BARE]),
        (
            f"{REF}cat{REF_END}{BOX}(100,200),(300,400){BOX_END}{BOX}(0,0),(1000,1000){BOX_END}",
            [CAT, BoxPart(label="cat", xyxy=TWO)],
        ),
        (
            f"{REF}cat{REF_END}(100,200),(300,400) and (0,0),(1000,1000)",
            [CAT, BoxPart(label=None, xyxy=TWO)],
        ),
        (f"{REF}sky{REF_END} over {REF}cat{REF_END}{BOX}(100,200),(300,400){BOX_END}", [CAT]),
        (f"{BOX}(100,200),(300{BOX_END}", []),
        (f"({'9' * 400},1),(2,3) (100,200),(300,400)", [BARE]),
        (f"{REF}cat{REF_END}{BOX}(100,200){BOX_END}", [DOT]),
        ("no box (1, 2)", []),
        (" \n" * 200_000, []),
    ):
        assert Qwen2VL().read_boxes(text, (50, 200), (28, 28)) == boxes
        for old, new in zip(Qwen2VL.box_tokens, QwenVL.box_tokens, strict=True):
            text = text.replace(old, new)
        assert QwenVL().read_boxes(text, (50, 200), (448, 448)) == boxes


@pytest.mark.parametrize("family", [QwenVL(), Qwen2VL(), Qwen25VL(), Qwen3VL()])
@pytest.mark.parametrize(
    "texts",
    [
        ('{"place": "', '", "colour": "grey"}'),
        ('Report: [{"a": ["', '", "', '"]}]'),
        ('{"note": "the car at ', ' in front of \\"', '\\""}'),
        ('{"', '": 1}'),
    ],
)
def test_boxes_in_json_strings_leave_valid_json(family, texts):
    boxes = [
        [BoxPart(label='a "b"', xyxy=(20.0, 30.0, 40.0, 50.0))] * n for n in range(1, len(texts))
    ]
    segments = [piece for pair in zip(texts, [*boxes, []], strict=True) for piece in pair if piece]
    text = join(family.write_segments(segments, [ImageSizes((200, 300), (196, 308))]))
    value = json.loads(text.removeprefix("Report: "))
    assert ("bbox_2d" in str(value)) == (not family.box_tokens)
    if texts[0] == '{"place": "' and not family.box_tokens:
        assert value["place"].keys() == {"bbox_2d", "label"}
