"""Timestamps of videos and reasoning apart from answers in Qwen3-VL."""

import pytest
from case_files import load_cases
from conversation_fixtures import decode_supervised, make_folder, make_text_sample
from image_fixtures import make_sample
from PIL import Image

from finesight.encode.renderer import NativeRenderer, parse_reasoning, split_reasoning
from finesight.evaluate.eval_case import get_reference_answer
from finesight.families.qwen3_vl.renderer import Qwen3VL
from finesight.model_folder import ModelFolder
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
)

CASES = load_cases("qwen3_vl")
THINKING = "{{ '<|im_start|>assistant\n<think>\n' }}"


@pytest.fixture(scope="module")
def instruct_renderer(tmp_path_factory: pytest.TempPathFactory) -> NativeRenderer:
    folder = make_folder(tmp_path_factory.mktemp("instruct"), "qwen3_vl")
    return NativeRenderer(ModelFolder(folder))


@pytest.fixture(scope="module")
def thinking_renderer(tmp_path_factory: pytest.TempPathFactory) -> NativeRenderer:
    folder = make_folder(tmp_path_factory.mktemp("thinking"), "qwen3_vl")
    (folder / "chat_template.jinja").write_text(THINKING)
    return NativeRenderer(ModelFolder(folder))


@pytest.mark.parametrize(("frames", "fps", "captions"), CASES["test_frame_pairs_have_timestamps"])
def test_frame_pairs_have_timestamps(frames, fps, captions):
    shots = Qwen3VL().split_video([number / fps for number in range(frames)], fps, 2)
    assert [shot.timestamp_text for shot in shots] == captions
    assert [shot.frame_slice for shot in shots] == [
        slice(first, min(first + 2, frames)) for first in range(0, frames, 2)
    ]


def test_each_frame_pair_is_a_visual_span(instruct_renderer, tmp_path):
    for name in "abc":
        Image.new("RGB", (70, 40), "red").save(tmp_path / f"{name}.png")
    film = VideoPart(frames=("a.png", "b.png", "c.png"), fps=2)
    encoded = instruct_renderer.encode(make_sample("film", tmp_path, "Watch: ", film))
    spans = encoded.tokenized.spans
    assert [[file.name for file in span.files] for span in spans] == [["a.png", "b.png"], ["c.png"]]
    assert [span.grid_thw for span in spans] == [(1, 4, 6), (1, 4, 6)]
    assert len(encoded.patches_ND) == 48
    text = instruct_renderer.tokenizer.decode(encoded.tokenized.ids_T, skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\nWatch: <0.2 seconds><|vision_start|><|video_pad|>")
    assert "<|vision_end|><1.0 seconds><|vision_start|>" in text
    # The position of a pair is the next text position in all three rows.
    starts = [encoded.tokenized.position_ids_3T[:, span.start] for span in spans]
    assert all(len(set(start.tolist())) == 1 for start in starts)


@pytest.mark.parametrize(("text", "thought", "answer"), CASES["test_reasoning_and_answer_of_data"])
def test_reasoning_and_answer_of_data(text, thought, answer):
    parts = split_reasoning([TextPart(text=text)])
    assert parts.reasoning == (None if thought is None else (TextPart(text=thought),))
    assert parts.answer == (TextPart(text=answer),)


def test_reasoning_and_answer_of_generation():
    for text, answer in (
        ("It is red.\n</think>\n\nRed.", ("It is red.", "Red.")),
        ("\n</think>\n\nRed.", ("", "Red.")),
        ("It is re", ("It is re", "")),
        ("a</think>b</think>c", ("a", "b</think>c")),
    ):
        assert parse_reasoning(text) == answer


FIRST, SECOND = (f"<think>\nthought {n}\n</think>\n\nanswer {n}" for n in (1, 2))
TOOL = "<tool_response>\n7\n</tool_response>"


def test_only_last_answer_keeps_its_reasoning(thinking_renderer):
    for turns, supervised in (
        (
            ("one?", FIRST, "two?", SECOND),
            "answer 1<|im_end|>thought 2\n</think>\n\nanswer 2<|im_end|>",
        ),
        # Reasoning before tool responses is kept. Only the last turn gets an empty section.
        (
            ("one?", "<think>\na\n</think>\n\nb", TOOL, "\nc", TOOL, "\n\nd"),
            "a\n</think>\n\nb<|im_end|>\nc<|im_end|>\n</think>\n\nd<|im_end|>",
        ),
        (("one?", "answer"), "\n</think>\n\nanswer<|im_end|>"),
    ):
        located_sample = make_text_sample(*turns)
        assert decode_supervised(thinking_renderer, located_sample) == supervised
        ids_T = thinking_renderer.tokenize(located_sample).ids_T
        text = thinking_renderer.tokenizer.decode(ids_T, skip_special_tokens=False)
        last_answer = supervised.split("<|im_end|>")[-2]
        assert text.endswith(f"<|im_start|>assistant\n<think>\n{last_answer}<|im_end|>\n")
        assert text.count("<think>") == (2 if TOOL in turns else 1)


def test_boxes_in_reasoning_are_supervised_but_not_the_answer(thinking_renderer, tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    thought, cat = BoxPart(xyxy=(1, 2, 3, 4)), BoxPart(label="cat", xyxy=(10, 20, 30, 40))
    end = TextPart(text="\n</think>\n\n")
    content = (TextPart(text="<think>\nAt "), thought, end, cat)
    messages = (
        Message(role="user", content=(ImagePart(image="a.png"), TextPart(text="Where?"))),
        Message(role="assistant", content=content),
    )
    located_sample = LocatedSample(Sample(id="box", messages=messages), tmp_path)
    assert decode_supervised(thinking_renderer, located_sample) == (
        'At {"bbox_2d": [10, 20, 30, 40]}\n</think>\n\n'
        '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}<|im_end|>'
    )
    assert get_reference_answer(located_sample.sample, has_reasoning=True) == (("",), (cat,))
    only_box = (messages[0], Message(role="assistant", content=(cat,)))
    without = LocatedSample(Sample(id="box", messages=only_box), tmp_path)
    assert decode_supervised(thinking_renderer, without) == (
        '\n</think>\n\n{"bbox_2d": [100, 200, 300, 400], "label": "cat"}<|im_end|>'
    )
    outline = thinking_renderer.tokenize(located_sample)
    answer = thinking_renderer.decode_completion(outline.ids_T[outline.loss_mask_T].tolist())
    assert answer.text == '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}'
    assert answer.raw_text == f"{answer.text}<|im_end|>"
    assert answer.reasoning == 'At {"bbox_2d": [10, 20, 30, 40]}'
    (box,) = thinking_renderer.parse_boxes(answer.raw_text, outline.spans)
    assert box.label == "cat"


def test_instruct_model_treats_reasoning_as_text(instruct_renderer):
    sample = make_text_sample("one?", "<think>a</think>b")
    assert decode_supervised(instruct_renderer, sample) == "<think>a</think>b<|im_end|>"
    assert not instruct_renderer.family.has_reasoning
