"""The page of `data show` says what the model is given, and nothing that it is not."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import DESK, PAYLOADS, PHONE, Browser
from conversations import make_conversation, make_folder, make_pictures
from PIL import Image, ImageDraw

from finesight.config import ExactSize
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Part, Sample, TextPart
from finesight.encode.render import Renderer
from finesight.encode.show import rows
from finesight.hub import ModelFolder
from finesight.report.sample_page import sample_page


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def renderer(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Renderer:
    folder = make_folder(tmp_path_factory.mktemp("model"), request.param)
    return Renderer(ModelFolder(folder), ExactSize(height=224, width=448))


def records_of(page: str) -> Any:
    text = page.partition('<script type="application/json" id="data">')[2]
    return json.loads(text.partition("</script>")[0])


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))


def striped(path: Path, width: int, height: int) -> Path:
    """A picture of few colours, which PNG holds smaller than JPEG: pixels come back exactly."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).rectangle((width // 4, 0, width // 2, height), fill=(200, 30, 90))
    image.save(path)
    return path


def asked(folder: Path, question: list[Part], answer: list[Part], name: str = "one") -> Located:
    messages = (
        Message(role="user", content=tuple(question)),
        Message(role="assistant", content=tuple(answer)),
    )
    return Located(Sample(id=name, messages=messages), folder)


def test_tokens_are_those_of_the_outline(renderer: Renderer, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    samples = [make_conversation(number, pictures, videos=True) for number in range(12)]
    page = sample_page(renderer, samples, "a source of samples")
    outlines = [renderer.outline(located) for located in samples]
    for record, located, outline in zip(records_of(page), samples, outlines, strict=True):
        assert (record["tokens"], record["learned"]) == (outline.tokens, outline.supervised)
        assert record["patches"] == outline.patches
        told = [row for turn in record["turns"] for row in turn["rows"]]
        for row, found in zip(rows(outline, renderer.tokenizer), told, strict=True):
            assert (found["at"], found["id"], found["text"]) == (row.start, row.id, row.text)
            assert found.get("learned", False) == row.learned
            assert tuple(found["place"]) == row.first
            if row.span is not None:
                assert outline.spans[found["picture"]] == row.span
                assert (found["to"] + 1, tuple(found["last"])) == (row.stop, row.last)
        roles = [message.role for message in located.sample.messages]
        assert [turn["role"] for turn in record["turns"]][-len(roles) :] == roles
        kinds = {row["kind"] for row in told}
        assert {"special", "text"} <= kinds <= {"special", "text", "bytes", "picture"}
    for total in (sum(outline.tokens for outline in outlines), len(outlines)):
        assert f"<dd>{total:,}</dd>" in page


def test_the_picture_is_what_the_model_gets(renderer: Renderer, tmp_path: Path) -> None:
    file = striped(tmp_path / "a.png", 300, 100)
    located = asked(tmp_path, [ImagePart(image=file.name)], [TextPart(text="x")])
    (record,) = records_of(sample_page(renderer, [located], "here"))
    (told,) = record["pictures"]
    patch = renderer.geometry.patch
    assert (told["original"], told["resized"]) == ([100, 300], [224, 448])
    assert told["grid"] == [1, 224 // patch, 448 // patch]
    with Image.open(file) as image:
        resized = image.resize((448, 224), Image.Resampling.BICUBIC)
    (frame,) = told["frames"]
    assert np.array_equal(np.asarray(opened(frame["src"])), np.asarray(resized))


def test_boxes_are_read_back_from_the_tokens(renderer: Renderer, tmp_path: Path) -> None:
    striped(tmp_path / "a.png", 300, 100)
    striped(tmp_path / "b.png", 60, 400)
    corners = [(30.0, 10.0, 90.0, 50.0), (6.0, 100.0, 30.0, 300.0), (0.0, 0.0, 300.0, 100.0)]
    boxes = [
        BoxPart(image=image, label=label, xyxy=xyxy)
        for image, label, xyxy in zip((0, 1, 0), ("cat", None, "猫"), corners, strict=True)
    ]
    question: list[Part] = [ImagePart(image="a.png"), ImagePart(image="b.png")]
    (record,) = records_of(sample_page(renderer, [asked(tmp_path, question, [*boxes])], "here"))
    assert record["written"] == len(record["boxes"]) == 3
    assert [box["picture"] for box in record["boxes"]] == [0, 1, 0]
    for box, (width, height), original in zip(
        record["boxes"], ((300, 100), (60, 400), (300, 100)), corners, strict=True
    ):
        across, down = 448 / width, 224 / height
        x1, y1, x2, y2 = original
        seen = (x1 * across, y1 * down, x2 * across, y2 * down)
        assert box["xyxy"] == pytest.approx(seen, abs=0.51), "whole pixels or thousandths"
        assert box["original"] == pytest.approx(original, abs=2)


def test_a_box_typed_as_text_is_seen(renderer: Renderer, tmp_path: Path) -> None:
    striped(tmp_path / "a.png", 300, 100)
    typed = '{"bbox_2d": [5, 6, 70, 80]} (50,60),(700,800)'
    located = asked(tmp_path, [ImagePart(image="a.png")], [TextPart(text=typed)])
    (record,) = records_of(sample_page(renderer, [located], "here"))
    assert record["written"] == 0
    (box,) = record["boxes"]
    expected = {
        "qwen2_vl": (22.4, 13.44, 313.6, 179.2),
        "qwen2_5_vl": (5, 6, 70, 80),
        "qwen3_vl": (2.24, 1.344, 31.36, 17.92),
    }[renderer.family.name]
    assert box["xyxy"] == pytest.approx(expected)


@pytest.fixture
def page(renderer: Renderer, tmp_path: Path) -> Path:
    """A page of three samples: a box, a text with invisible characters, and payloads."""
    striped(tmp_path / "a.png", 300, 100)
    picture = ImagePart(image="a.png")
    box = BoxPart(label="cat", xyxy=(30, 20, 150, 60))
    samples = [
        asked(tmp_path, [picture, TextPart(text="Where?")], [box], "first"),
        asked(tmp_path, [TextPart(text="a\tb \n😀")], [TextPart(text="x y")], "second"),
        *(
            asked(tmp_path, [picture, TextPart(text=payload)], [TextPart(text=payload)], payload)
            for payload in PAYLOADS
        ),
    ]
    labelled = [BoxPart(label=payload, xyxy=(1, 2, 90, 90)) for payload in PAYLOADS]
    samples.append(asked(tmp_path, [picture], [*labelled], "labels"))
    file = tmp_path / "page.html"
    file.write_text(sample_page(renderer, samples, PAYLOADS[0]))
    return file


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_in_a_browser(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.messages() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.overflow() == 0
    assert browser.nameless() == []
    assert browser.run("return document.querySelector('h2').textContent;") == "Sample first"
    (corners,) = browser.run(
        """const frame = document.querySelector('.picture img').getBoundingClientRect();
        return [...document.querySelectorAll('.picture .box')].map((box) => {
          const at = box.getBoundingClientRect();
          return [(at.left - frame.left) / frame.width, (at.top - frame.top) / frame.height,
            (at.right - frame.left) / frame.width, (at.bottom - frame.top) / frame.height];
        });"""
    )
    assert corners == pytest.approx([0.1, 0.2, 0.5, 0.6], abs=0.01)
    learned = "".join(
        browser.run(
            "return [...document.querySelectorAll('.turn .learned')].map((at) => at.textContent);"
        )
    )
    assert "cat" in learned
    assert learned.endswith("<|im_end|>")
    assert "Where" not in learned


def test_by_keyboard_and_pointer(browser: Browser, page: Path) -> None:
    browser.open(page)
    where = "return document.querySelector('.where').textContent;"
    total = len(PAYLOADS) + 3
    seen = []
    for key in ("j", "ArrowRight", "k", "ArrowLeft", "ArrowLeft"):
        browser.press(key)
        seen.append(browser.run(where))
    assert seen == [f"{number} of {total}" for number in (2, 3, 2, 1, 1)]
    detail = "return document.querySelector('.detail').textContent;"
    assert browser.run(detail).startswith("Token 0 · id ")
    browser.run("document.querySelector('.token').focus();")
    browser.press("ArrowRight", "ArrowRight")
    assert browser.run(detail).startswith("Token 2 · id ")
    assert browser.run(where) == f"1 of {total}", "arrows among the tokens stay in the sample"
    browser.press("End")
    last = browser.run("return DATA[0].tokens - 1;")
    assert browser.run(detail).startswith(f"Token {last} · id ")
    block = "document.querySelector('.picture-block')"
    browser.run(
        f"{block}.dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}));"
        f" document.querySelector('.detail').scrollIntoView();"
    )
    told = browser.run(detail)
    assert told.startswith("Tokens ")
    assert "<|image_pad|> · not learned" in told
    assert "up to time" in told
    browser.run(f"{block}.focus();")
    assert browser.run(detail) == told, "focus and tap tell what pointing tells"


def test_invisible_characters_show(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("j")
    turns = "[...document.querySelectorAll('.turn')].map((turn) => turn.textContent)"
    # Not every family puts a system turn before the user's.
    (asked,) = browser.run(f"return {turns}.filter((text) => text.startsWith('user'));")
    assert "a⇥b·↵\n" in asked
    told = browser.run(
        "return visible('a\\u00a0\\u200b\\u202e\\rb').map((sign) => sign.textContent || sign);"
    )
    assert told == ["a", "U+00A0", "U+200B", "U+202E", "U+000D", "b"]


def test_payloads_stay_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("j")
    heading = "return document.querySelector('h2').textContent;"
    for payload in PAYLOADS:
        browser.press("j")
        assert browser.run(heading) == f"Sample {payload}"
    browser.press("j")
    labels = browser.run(
        "return [...document.querySelectorAll('.box b')].map((label) => label.textContent);"
    )
    assert len(labels) == len(PAYLOADS)
    assert labels[0].startswith("1 ")
    browser.settle()
    assert browser.ran() == []
    assert browser.messages() == []
    assert browser.requests() == [page.as_uri()]
