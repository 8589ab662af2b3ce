"""Qwen3-VL's box dialect there and back, times of videos, thoughts apart from answers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conversations import make_folder
from PIL import Image

from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart, VideoPart
from finesight.encode.dialect import Box, PlacedBox
from finesight.encode.qwen3_vl import Qwen3VL
from finesight.encode.render import Renderer
from finesight.encode.thought import apart, generated
from finesight.evaluate.answered import truths_of
from finesight.hub import ModelFolder

FAMILY = Qwen3VL()


def test_writes_thousandths_of_the_picture() -> None:
    box = PlacedBox('猫 "x"', (48, 36, 480, 359.9), (360, 480), (256, 320))
    alone = '{"bbox_2d": [100, 100, 1000, 1000], "label": "猫 \\"x\\""}'
    assert FAMILY.write_boxes([box]) == [alone]
    bare = PlacedBox(None, (-0.4, 0, 1.4, 3), (3, 3), (32, 32))
    assert FAMILY.write_boxes([box, bare]) == [f'[{alone}, {{"bbox_2d": [0, 0, 467, 1000]}}]']


def test_comes_back_within_half_a_thousandth() -> None:
    chance = random.Random(0)
    for _ in range(500):
        original = chance.randint(1, 3000), chance.randint(1, 3000)
        resized = chance.randint(1, 40) * 32, chance.randint(1, 40) * 32
        xs = sorted(chance.uniform(0, original[1]) for _ in range(2))
        ys = sorted(chance.uniform(0, original[0]) for _ in range(2))
        corners = (xs[0], ys[0], xs[1], ys[1])
        label = chance.choice((None, "cat", 'a "b" {"bbox_2d": [1, 2, 3, 4]}', "猫\\n"))
        (text,) = FAMILY.write_boxes([PlacedBox(label, corners, original, resized)])
        assert isinstance(text, str)
        (found,) = FAMILY.read_boxes(f"Here: {text}<|im_end|>", original, resized)
        assert found.label == label
        steps = [original[1] / 1000, original[0] / 1000] * 2
        for there, back, step in zip(corners, found.xyxy, steps, strict=True):
            assert abs(there - back) <= step / 2 + 1e-9


def test_reads_the_fenced_lists_that_the_model_writes() -> None:
    text = '```json\n[\n\t{"bbox_2d": [250, 500, 750, 1000], "label": "cat"}\n]\n```'
    assert FAMILY.read_boxes(text, (100, 200), (96, 192)) == [Box("cat", (50, 50, 150, 100))]


@pytest.mark.parametrize(
    ("frames", "fps", "captions"),
    [
        (1, 2.0, ["<0.0 seconds>"]),
        (4, 2.0, ["<0.2 seconds>", "<1.2 seconds>"]),
        (5, 1.0, ["<0.5 seconds>", "<2.5 seconds>", "<4.0 seconds>"]),
        (3, 0.1, ["<5.0 seconds>", "<20.0 seconds>"]),
    ],
)
def test_pairs_of_frames_say_the_time_between_them(
    frames: int, fps: float, captions: list[str]
) -> None:
    shots = FAMILY.shots(frames, fps, 2)
    assert [shot.caption for shot in shots] == captions
    assert [shot.frames for shot in shots] == [
        slice(first, min(first + 2, frames)) for first in range(0, frames, 2)
    ]


def test_a_video_is_a_span_for_each_pair_of_frames(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (70, 40), "red").save(tmp_path / f"{name}.png")
    renderer = Renderer(ModelFolder(make_folder(tmp_path / "model", "qwen3_vl")))
    film = VideoPart(frames=("a.png", "b.png", "c.png"), fps=2)
    message = Message(role="user", content=(TextPart(text="Watch: "), film))
    encoded = renderer.encode(Located(Sample(id="film", messages=(message,)), tmp_path))
    spans = encoded.outline.spans
    assert [[file.name for file in span.files] for span in spans] == [["a.png", "b.png"], ["c.png"]]
    assert [span.grid for span in spans] == [(1, 4, 6), (1, 4, 6)]
    assert len(encoded.patches_ND) == 48
    text = renderer.tokenizer.decode(encoded.outline.ids_T, skip_special=False)
    assert text.startswith("<|im_start|>user\nWatch: <0.2 seconds><|vision_start|><|video_pad|>")
    assert "<|vision_end|><1.0 seconds><|vision_start|>" in text
    # Every pair stands where it is met, in all three rows.
    starts = [encoded.outline.positions_3T[:, span.start] for span in spans]
    assert all(len(set(start.tolist())) == 1 for start in starts)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nIt is red.\n</think>\n\nRed.", "It is red.", "Red."),
        ("It is red.</think>Red.", "It is red.", "Red."),
        ("<think></think>Red.", "", "Red."),
        ("<think>\n\n</think>\n\n", "", ""),
        ("Red.", None, "Red."),
        ("<think>Never closed", None, "<think>Never closed"),
        ("a</think>b</think>c", "a</think>b", "c"),
        ("a <think> b</think>c", "a <think> b", "c"),
    ],
)
def test_thought_and_answer_of_data(text: str, thought: str | None, answer: str) -> None:
    spoken = apart([TextPart(text=text)])
    assert spoken.thought == (None if thought is None else (TextPart(text=thought),))
    assert spoken.answer == (TextPart(text=answer),)


def test_a_thought_and_an_answer_may_hold_boxes() -> None:
    box, other = BoxPart(xyxy=(1, 2, 3, 4)), BoxPart(label="cat", xyxy=(5, 6, 7, 8))
    texts = ("<think>\nIt is at ", ".\n</think>\n\n", "!")
    start, middle, end = (TextPart(text=text) for text in texts)
    spoken = apart((start, box, middle, other, end))
    assert spoken.thought == (TextPart(text="It is at "), box, TextPart(text="."))
    assert spoken.answer == (TextPart(text=""), other, end)


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("It is red.\n</think>\n\nRed.", ("It is red.", "Red.")),
        ("\n</think>\n\nRed.", ("", "Red.")),
        ("It is re", ("It is re", "")),
        ("a</think>b</think>c", ("a</think>b", "c")),
    ],
)
def test_thought_and_answer_of_what_was_generated(text: str, spoken: tuple[str, str]) -> None:
    assert generated(text) == spoken


THINKING = "{{ '<|im_start|>assistant\n<think>\n' }}"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = make_folder(tmp_path_factory.mktemp("thinking") / "model", "qwen3_vl")
    (folder / "chat_template.jinja").write_text(THINKING)
    return Renderer(ModelFolder(folder))


def conversation(*turns: str) -> Located:
    messages = [
        Message(role=("user", "assistant")[n % 2], content=(TextPart(text=text),))
        for n, text in enumerate(turns)
    ]
    return Located(Sample(id="talk", messages=tuple(messages)), Path())


def learned(renderer: Renderer, located: Located) -> tuple[str, str]:
    """The whole text of a sample, and what is learned of it."""
    outline = renderer.outline(located)
    decode = renderer.tokenizer.decode
    text = decode(outline.ids_T, skip_special=False)
    return text, decode(outline.ids_T[outline.learned_T], skip_special=False)


def test_the_last_answer_keeps_its_thought_and_earlier_ones_do_not(thinking: Renderer) -> None:
    first, second = (f"<think>\nthought {n}\n</think>\n\nanswer {n}" for n in (1, 2))
    text, said = learned(thinking, conversation("one?", first, "two?", second))
    assert text == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nanswer 1<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nthought 2\n</think>\n\nanswer 2<|im_end|>\n"
    )
    assert said == "answer 1<|im_end|>thought 2\n</think>\n\nanswer 2<|im_end|>"


def test_an_answer_without_a_thought_follows_an_empty_one(thinking: Renderer) -> None:
    text, said = learned(thinking, conversation("one?", "answer"))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nanswer<|im_end|>\n")
    assert said == "\n</think>\n\nanswer<|im_end|>"


@pytest.mark.parametrize("answer", ["<think>\na\n</think>\n\nb", "b", "\n\nthree", "<think>"])
def test_the_prompt_is_the_start_of_the_sample(thinking: Renderer, answer: str) -> None:
    located = conversation("one?", "<think>x</think>y", "two?", answer)
    whole, prompt = thinking.outline(located), thinking.prompt(located).outline
    np.testing.assert_array_equal(prompt.ids_T, whole.ids_T[: prompt.tokens])
    assert whole.learned_T[prompt.tokens :].tolist() == [
        *[True] * (whole.tokens - prompt.tokens - 1),
        False,
    ]


def test_boxes_stay_behind_the_thought(thinking: Renderer, tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    messages = (
        Message(role="user", content=(ImagePart(image="a.png"), TextPart(text="Where?"))),
        Message(role="assistant", content=(BoxPart(label="cat", xyxy=(10, 20, 30, 40)),)),
    )
    located = Located(Sample(id="box", messages=messages), tmp_path)
    outline = thinking.outline(located)
    ids = outline.ids_T[outline.learned_T].tolist()
    answer = thinking.answer(ids)
    assert answer.text == '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}'
    assert answer.raw == f"{answer.text}<|im_end|>"
    assert answer.thought == ""
    # A box in a thought is none of the answer.
    said = thinking.tokenizer.encode('[{"bbox_2d": [1, 2, 3, 4]}]\n</think>\n\nNothing.')
    spoken = thinking.answer([*said, thinking.end_ids[0]])
    assert thinking.boxes(spoken.raw, outline.spans) == []
    assert spoken.thought == '[{"bbox_2d": [1, 2, 3, 4]}]'


def test_a_box_in_a_thought_is_learned_there_and_not_wanted(
    thinking: Renderer, tmp_path: Path
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
    located = Located(Sample(id="box", messages=messages), tmp_path)
    _, said = learned(thinking, located)
    assert said == (
        'At {"bbox_2d": [10, 20, 30, 40]}\n</think>\n\n'
        '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}<|im_end|>'
    )
    assert truths_of(located.sample, thinks=True) == (("",), content[-1:])


def test_instruct_takes_thoughts_as_the_text_they_are(tmp_path: Path) -> None:
    renderer = Renderer(ModelFolder(make_folder(tmp_path / "model", "qwen3_vl")))
    _, said = learned(renderer, conversation("one?", "<think>a</think>b"))
    assert said == "<think>a</think>b<|im_end|>"
    assert not renderer.family.thinks


def test_boxes_are_the_same_whatever_the_picture_is_resized_to() -> None:
    box = PlacedBox("cat", (10, 20, 30, 40), (100, 100), (96, 96))
    (text,) = FAMILY.write_boxes([replace(box, resized=(320, 320))])
    assert [text] == FAMILY.write_boxes([box])
    assert json.loads(str(text))["bbox_2d"] == [100, 200, 300, 400]
