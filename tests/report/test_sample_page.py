"""Tests that the sample page shows exactly the model input."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import (
    DESKTOP_WIDTH,
    PHONE_WIDTH,
    XSS_PAYLOADS,
    Browser,
    assert_nothing_executed,
    open_page,
    read_texts,
)
from conversation_fixtures import make_conversation, make_folder, make_images
from html_text import read_script_data
from image_fixtures import make_sample
from PIL import Image, ImageDraw

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import iter_token_rows
from finesight.model_folder import ModelFolder
from finesight.report.data_pages import render_sample_page
from finesight.samples.sample import BoxPart, ImagePart, LocatedSample, TextPart
from finesight.settings.config import ExactSize

ONE_FAMILY = pytest.mark.parametrize("renderer", ["qwen2_5_vl"], indirect=True)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def renderer(tmp_path_factory, request):
    folder = make_folder(tmp_path_factory.mktemp("model"), request.param)
    return NativeRenderer(ModelFolder(folder), ExactSize(height=224, width=448))


def render(renderer: NativeRenderer, *samples: LocatedSample) -> Any:
    """Return the data of a page with samples."""
    return read_script_data(render_sample_page(renderer, samples, "here"))["samples"]


def write_striped_image(path: Path, width: int, height: int) -> Path:
    """Write an image with few colors, which is embedded as lossless PNG."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).rectangle((width // 4, 0, width // 2, height), fill=(200, 30, 90))
    image.save(path)
    return path


def test_tokens_match_the_tokenized_sample(renderer: NativeRenderer, tmp_path: Path) -> None:
    images = make_images(tmp_path)
    samples = [make_conversation(number, images, videos=True) for number in range(6)]
    page = render_sample_page(renderer, samples, "a source of samples")
    outlines = [renderer.tokenize(located_sample) for located_sample in samples]
    records = read_script_data(page)["samples"]
    for record, located_sample, outline in zip(records, samples, outlines, strict=True):
        for name in ("num_tokens", "num_supervised_tokens", "num_patches"):
            assert record[name] == getattr(outline, name)
        result = [row for turn in record["turns"] for row in turn["rows"]]
        for row, found in zip(iter_token_rows(outline, renderer.tokenizer), result, strict=True):
            assert (found["start"], found["id"], found["text"]) == (row.start, row.id, row.text)
            assert found.get("is_supervised", False) == row.is_supervised
            assert tuple(found["first_position"]) == row.first_position
            if row.span is not None:
                assert outline.spans[found["image_index"]] == row.span
                assert found["end"] + 1 == row.stop
                assert tuple(found["last_position"]) == row.last_position
        roles = [message.role for message in located_sample.sample.messages]
        assert [turn["role"] for turn in record["turns"]][-len(roles) :] == roles
        kinds = {row["kind"] for row in result}
        assert {"special", "text"} <= kinds <= {"special", "text", "bytes", "image"}
    for total in (sum(outline.num_tokens for outline in outlines), len(outlines)):
        assert f"<dd>{total:,}</dd>" in page


def test_image_is_the_model_input(renderer: NativeRenderer, tmp_path: Path) -> None:
    file = write_striped_image(tmp_path / "a.png", 300, 100)
    located_sample = make_sample("one", tmp_path, file.name, answer="x")
    (record,) = render(renderer, located_sample)
    (result,) = record["images"]
    patch = renderer.patch_config.patch_size
    assert (result["original_size"], result["resized_size"]) == ([100, 300], [224, 448])
    assert result["grid_thw"] == [1, 224 // patch, 448 // patch]
    with Image.open(file) as image:
        resized = image.resize((448, 224), Image.Resampling.BICUBIC)
    (frame,) = result["frames"]
    pixels = Image.open(io.BytesIO(base64.b64decode(frame["src"].partition(",")[2])))
    assert np.array_equal(np.asarray(pixels), np.asarray(resized))


def test_box_typed_as_text_is_detected(renderer: NativeRenderer, tmp_path: Path) -> None:
    write_striped_image(tmp_path / "a.png", 300, 100)
    typed = '{"bbox_2d": [5, 6, 70, 80]} (50,60),(700,800)'
    located_sample = make_sample("one", tmp_path, "a.png", answer=typed)
    (record,) = render(renderer, located_sample)
    assert record["num_sample_boxes"] == 0
    (box,) = record["boxes"]
    expected = {
        "qwen2_vl": (22.4, 13.44, 313.6, 179.2),
        "qwen2_5_vl": (5, 6, 70, 80),
        "qwen3_vl": (2.24, 1.344, 31.36, 17.92),
    }[renderer.family.name]
    assert box["xyxy"] == pytest.approx(expected)


@pytest.fixture
def page(renderer: NativeRenderer, tmp_path: Path) -> Path:
    """Page of three kinds of samples: a box, invisible characters, and XSS payloads."""
    write_striped_image(tmp_path / "a.png", 300, 100)
    image = ImagePart(image="a.png")
    box = BoxPart(label="cat", xyxy=(30, 20, 150, 60))
    samples = [
        make_sample("first", tmp_path, image, "Where?", answer=box),
        make_sample("second", tmp_path, "a\tb \n😀", answer="x y"),
    ]
    for payload in XSS_PAYLOADS:
        text = TextPart(text=payload)
        samples.append(make_sample(payload, tmp_path, image, text, answer=[text]))
    labelled = [BoxPart(label=payload, xyxy=(1, 2, 90, 90)) for payload in XSS_PAYLOADS]
    samples.append(make_sample("labels", tmp_path, image, answer=labelled))
    file = tmp_path / "page.html"
    file.write_text(render_sample_page(renderer, samples, XSS_PAYLOADS[0]))
    return file


@ONE_FAMILY
@pytest.mark.parametrize("width", [PHONE_WIDTH, DESKTOP_WIDTH])
def test_page_in_browser(browser: Browser, page: Path, width: int) -> None:
    open_page(browser, page, width)
    assert read_texts(browser, "h2")[0] == "Sample first"
    (corners,) = browser.run(
        """const frame = document.querySelector('.image img').getBoundingClientRect();
        return [...document.querySelectorAll('.image .box')].map((box) => {
          const at = box.getBoundingClientRect();
          return [(at.left - frame.left) / frame.width, (at.top - frame.top) / frame.height,
            (at.right - frame.left) / frame.width, (at.bottom - frame.top) / frame.height];
        });"""
    )
    assert corners == pytest.approx([0.1, 0.2, 0.5, 0.6], abs=0.01)
    supervised = "".join(read_texts(browser, ".turn .supervised"))
    assert "cat" in supervised
    assert supervised.endswith("<|im_end|>")
    assert "Where" not in supervised


@ONE_FAMILY
def test_keyboard_and_pointer(browser: Browser, page: Path) -> None:
    browser.open(page)
    where = "return document.querySelector('.position').textContent;"
    total = len(XSS_PAYLOADS) + 3
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
    last = browser.run("return DATA.samples[0].num_tokens - 1;")
    assert browser.run(detail).startswith(f"Token {last} · id ")
    block = "document.querySelector('.image-block')"
    browser.run(
        f"{block}.dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}));"
        f" document.querySelector('.detail').scrollIntoView();"
    )
    result = browser.run(detail)
    assert result.startswith("Tokens ")
    assert "<|image_pad|> · not supervised" in result
    assert "to time" in result
    browser.run(f"{block}.focus();")
    assert browser.run(detail) == result, "focus and tap tell what pointing tells"


@ONE_FAMILY
def test_invisible_characters_are_shown(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("j")
    (requested,) = (text for text in read_texts(browser, ".turn") if text.startswith("user"))
    assert "a⇥b·↵\n" in requested
    result = browser.run(
        "return showInvisible('a\\u00a0\\u200b\\u202e\\rb').map((at) => at.textContent || at);"
    )
    assert result == ["a", "U+00A0", "U+200B", "U+202E", "U+000D", "b"]


@ONE_FAMILY
def test_html_payloads_are_escaped(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("j")
    for payload in XSS_PAYLOADS:
        browser.press("j")
        assert read_texts(browser, "h2")[0] == f"Sample {payload}"
    browser.press("j")
    labels = read_texts(browser, ".box b")
    assert len(labels) == len(XSS_PAYLOADS)
    assert labels[0].startswith("1 ")
    assert_nothing_executed(browser, page)
