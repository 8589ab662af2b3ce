"""Qwen3-VL's box dialect there and back, times of videos, thoughts apart from answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from box_fixtures import image_boxes
from case_files import load_cases
from conversation_fixtures import make_folder
from hypothesis import given, settings
from PIL import Image

from finesight.data.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
)
from finesight.encode.family import ImageBox, PredictedBox
from finesight.encode.qwen3_vl import Qwen3VL
from finesight.encode.renderer import NativeRenderer, parse_reasoning, split_reasoning
from finesight.evaluate.eval_case import get_reference_answer
from finesight.model_folder import ModelFolder

CASES = load_cases("qwen3_vl")

FAMILY = Qwen3VL()


def test_boxes_are_written_in_thousandths() -> None:
    box = ImageBox('猫 "x"', (48, 36, 480, 359.9), (360, 480), (256, 320))
    alone = '{"bbox_2d": [100, 100, 1000, 1000], "label": "猫 \\"x\\""}'
    assert FAMILY.write_boxes([box]) == [alone]
    bare = ImageBox(None, (-0.4, 0, 1.4, 3), (3, 3), (32, 32))
    assert FAMILY.write_boxes([box, bare]) == [f'[{alone}, {{"bbox_2d": [0, 0, 467, 1000]}}]']


@settings(max_examples=500)
@given(image_boxes(32, (None, "cat", 'a "b" {"bbox_2d": [1, 2, 3, 4]}', "猫\\n")))
def test_roundtrip_error_is_below_half_a_thousandth(box: ImageBox) -> None:
    (text,) = FAMILY.write_boxes([box])
    assert isinstance(text, str)
    (found,) = FAMILY.read_boxes(f"Here: {text}<|im_end|>", box.original_size, box.resized_size)
    assert found.label == box.label
    sides = box.original_size[::-1] * 2
    for there, back, side in zip(box.xyxy, found.xyxy, sides, strict=True):
        assert abs(there - back) <= side / 2000 + 1e-9


def test_fenced_lists_are_parsed() -> None:
    text = '```json\n[\n\t{"bbox_2d": [250, 500, 750, 1000], "label": "cat"}\n]\n```'
    assert FAMILY.read_boxes(text, (100, 200), (96, 192)) == [
        PredictedBox("cat", (50, 50, 150, 100))
    ]


@pytest.mark.parametrize(("frames", "fps", "captions"), CASES["test_frame_pairs_have_timestamps"])
def test_frame_pairs_have_timestamps(frames: int, fps: float, captions: list[str]) -> None:
    shots = FAMILY.split_video([number / fps for number in range(frames)], fps, 2)
    assert [shot.timestamp_text for shot in shots] == captions
    assert [shot.frame_slice for shot in shots] == [
        slice(first, min(first + 2, frames)) for first in range(0, frames, 2)
    ]


def test_each_frame_pair_is_a_visual_span(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (70, 40), "red").save(tmp_path / f"{name}.png")
    renderer = NativeRenderer(ModelFolder(make_folder(tmp_path / "model", "qwen3_vl")))
    film = VideoPart(frames=("a.png", "b.png", "c.png"), fps=2)
    message = Message(role="user", content=(TextPart(text="Watch: "), film))
    encoded = renderer.encode(LocatedSample(Sample(id="film", messages=(message,)), tmp_path))
    spans = encoded.tokenized.spans
    assert [[file.name for file in span.files] for span in spans] == [["a.png", "b.png"], ["c.png"]]
    assert [span.grid_thw for span in spans] == [(1, 4, 6), (1, 4, 6)]
    assert len(encoded.patches_ND) == 48
    text = renderer.tokenizer.decode(encoded.tokenized.ids_T, skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\nWatch: <0.2 seconds><|vision_start|><|video_pad|>")
    assert "<|vision_end|><1.0 seconds><|vision_start|>" in text
    # Every pair stands where it is met, in all three rows.
    starts = [encoded.tokenized.position_ids_3T[:, span.start] for span in spans]
    assert all(len(set(start.tolist())) == 1 for start in starts)


@pytest.mark.parametrize(("text", "thought", "answer"), CASES["test_reasoning_and_answer_of_data"])
def test_reasoning_and_answer_of_data(text: str, thought: str | None, answer: str) -> None:
    parts = split_reasoning([TextPart(text=text)])
    assert parts.reasoning == (None if thought is None else (TextPart(text=thought),))
    assert parts.answer == (TextPart(text=answer),)


def test_reasoning_and_answer_may_contain_boxes() -> None:
    box, other = BoxPart(xyxy=(1, 2, 3, 4)), BoxPart(label="cat", xyxy=(5, 6, 7, 8))
    texts = ("<think>\nIt is at ", ".\n</think>\n\n", "!")
    start, middle, end = (TextPart(text=text) for text in texts)
    parts = split_reasoning((start, box, middle, other, end))
    assert parts.reasoning == (TextPart(text="It is at "), box, TextPart(text="."))
    assert parts.answer == (TextPart(text=""), other, end)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is red.\n</think>\n\nRed.", ("It is red.", "Red.")),
        ("\n</think>\n\nRed.", ("", "Red.")),
        ("It is re", ("It is re", "")),
        ("a</think>b</think>c", ("a", "b</think>c")),
    ],
)
def test_reasoning_and_answer_of_generation(text: str, answer: tuple[str, str]) -> None:
    assert parse_reasoning(text) == answer


THINKING = "{{ '<|im_start|>assistant\n<think>\n' }}"


@pytest.fixture(scope="module")
def reasoning_renderer(tmp_path_factory: pytest.TempPathFactory) -> NativeRenderer:
    folder = make_folder(tmp_path_factory.mktemp("thinking") / "model", "qwen3_vl")
    (folder / "chat_template.jinja").write_text(THINKING)
    return NativeRenderer(ModelFolder(folder))


def conversation(*turns: str) -> LocatedSample:
    messages = [
        Message(role=("user", "assistant")[n % 2], content=(TextPart(text=text),))
        for n, text in enumerate(turns)
    ]
    return LocatedSample(Sample(id="chat", messages=tuple(messages)), Path())


def decode_with_loss_mask(
    renderer: NativeRenderer, located_sample: LocatedSample
) -> tuple[str, str]:
    """Return the whole text of a sample, and its supervised text."""
    outline = renderer.tokenize(located_sample)
    decode = renderer.tokenizer.decode
    text = decode(outline.ids_T, skip_special_tokens=False)
    return text, decode(outline.ids_T[outline.loss_mask_T], skip_special_tokens=False)


def test_only_last_answer_keeps_its_reasoning(reasoning_renderer: NativeRenderer) -> None:
    first, second = (f"<think>\nthought {n}\n</think>\n\nanswer {n}" for n in (1, 2))
    text, output = decode_with_loss_mask(
        reasoning_renderer, conversation("one?", first, "two?", second)
    )
    assert text == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nanswer 1<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nthought 2\n</think>\n\nanswer 2<|im_end|>\n"
    )
    assert output == "answer 1<|im_end|>thought 2\n</think>\n\nanswer 2<|im_end|>"


def test_reasoning_before_tool_responses_is_kept(reasoning_renderer: NativeRenderer) -> None:
    """Qwen3-VL Thinking: without reasoning, only the last turn has a reasoning section."""
    tool = "<tool_response>\n7\n</tool_response>"
    _, output = decode_with_loss_mask(
        reasoning_renderer,
        conversation("one?", "<think>\na\n</think>\n\nb", tool, "\nc", tool, "\n\nd"),
    )
    assert output == "a\n</think>\n\nb<|im_end|>\nc<|im_end|>\n</think>\n\nd<|im_end|>"


def test_answer_without_reasoning_gets_empty_reasoning(reasoning_renderer: NativeRenderer) -> None:
    text, output = decode_with_loss_mask(reasoning_renderer, conversation("one?", "answer"))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nanswer<|im_end|>\n")
    assert output == "\n</think>\n\nanswer<|im_end|>"


@pytest.mark.parametrize("answer", ["<think>\na\n</think>\n\nb", "b", "\n\nthree", "<think>"])
def test_prompt_is_prefix_of_sample(reasoning_renderer: NativeRenderer, answer: str) -> None:
    located_sample = conversation("one?", "<think>x</think>y", "two?", answer)
    full, prompt = (
        reasoning_renderer.tokenize(located_sample),
        reasoning_renderer.encode_prompt(located_sample).tokenized,
    )
    np.testing.assert_array_equal(prompt.ids_T, full.ids_T[: prompt.num_tokens])
    assert full.loss_mask_T[prompt.num_tokens :].tolist() == [
        *[True] * (full.num_tokens - prompt.num_tokens - 1),
        False,
    ]


def test_boxes_follow_the_reasoning(reasoning_renderer: NativeRenderer, tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    messages = (
        Message(role="user", content=(ImagePart(image="a.png"), TextPart(text="Where?"))),
        Message(role="assistant", content=(BoxPart(label="cat", xyxy=(10, 20, 30, 40)),)),
    )
    located_sample = LocatedSample(Sample(id="box", messages=messages), tmp_path)
    outline = reasoning_renderer.tokenize(located_sample)
    ids = outline.ids_T[outline.loss_mask_T].tolist()
    answer = reasoning_renderer.decode_completion(ids)
    assert answer.text == '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}'
    assert answer.raw_text == f"{answer.text}<|im_end|>"
    assert answer.reasoning == ""
    # A box in a thought is none of the answer.
    output = reasoning_renderer.tokenizer.encode(
        '[{"bbox_2d": [1, 2, 3, 4]}]\n</think>\n\nNothing.'
    )
    answer = reasoning_renderer.decode_completion([*output, reasoning_renderer.end_ids[0]])
    assert reasoning_renderer.parse_boxes(answer.raw_text, outline.spans) == []
    assert answer.reasoning == '[{"bbox_2d": [1, 2, 3, 4]}]'


def test_box_in_reasoning_is_supervised_but_no_reference(
    reasoning_renderer: NativeRenderer, tmp_path: Path
) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    content = (
        TextPart(text="<think>\nAt "),
        BoxPart(xyxy=(1, 2, 3, 4)),
        TextPart(text="\n</think>\n\n"),
        BoxPart(label="cat", xyxy=(10, 20, 30, 40)),
    )
    messages = (
        Message(role="user", content=(ImagePart(image="a.png"), TextPart(text="Where?"))),
        Message(role="assistant", content=content),
    )
    located_sample = LocatedSample(Sample(id="box", messages=messages), tmp_path)
    _, output = decode_with_loss_mask(reasoning_renderer, located_sample)
    assert output == (
        'At {"bbox_2d": [10, 20, 30, 40]}\n</think>\n\n'
        '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}<|im_end|>'
    )
    assert get_reference_answer(located_sample.sample, has_reasoning=True) == (("",), content[-1:])


def test_instruct_model_treats_reasoning_as_text(tmp_path: Path) -> None:
    renderer = NativeRenderer(ModelFolder(make_folder(tmp_path / "model", "qwen3_vl")))
    _, output = decode_with_loss_mask(renderer, conversation("one?", "<think>a</think>b"))
    assert output == "<think>a</think>b<|im_end|>"
    assert not renderer.family.has_reasoning


def test_boxes_are_independent_of_image_resizing() -> None:
    box = ImageBox("cat", (10, 20, 30, 40), (100, 100), (96, 96))
    (text,) = FAMILY.write_boxes([replace(box, resized_size=(320, 320))])
    assert [text] == FAMILY.write_boxes([box])
    assert json.loads(str(text))["bbox_2d"] == [100, 200, 300, 400]
