import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_fixture import run_service, write_random_adapter, write_shape_image

from finesight.errors import UserError
from finesight.infer.chat_session import ChatSession, build_answer_parts
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import Prediction, build_question, predict
from finesight.infer.request import GenerationOptions, SamplingParams
from finesight.samples.sample import BoxPart, LocatedSample, TextPart, read_samples
from finesight.vision.image_processing import load_image

SHORT = [GenerationOptions(max_new_tokens=60)]


def _sampled(tokens: int, temperature: float, seed: int) -> GenerationOptions:
    sampling = SamplingParams(temperature=temperature, seed=seed)
    return GenerationOptions(max_new_tokens=tokens, sampling_params=sampling)


@pytest.fixture(scope="module")
def service() -> Iterator[InferenceService]:
    with run_service("finesight-tiny") as started:
        yield started


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceService]:
    with run_service(
        str(write_random_adapter(tmp_path_factory.mktemp("run") / "tuned"))
    ) as started:
        yield started


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return write_shape_image(tmp_path_factory.mktemp("first"), 0)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return write_shape_image(tmp_path_factory.mktemp("second"), 10)


def _ask(
    chat: ChatSession, text: str, *images: Path, options: list[GenerationOptions] = SHORT
) -> str:
    return "".join(chat.send(text, images, options).replies[0])


def test_streamed_reply_matches_predict(service, first):
    image, question = first
    reply = ChatSession(service).send(question, [image], SHORT).replies[0]
    pieces = list(reply)
    alone = load_inference_model("finesight-tiny", "cpu", "fp32")
    questions = [build_question([image], question, str(image))]
    [expected] = predict(alone.model, alone.renderer, questions, max_new_tokens=60, batch_size=1)
    assert len(pieces) > 3
    assert "".join(pieces) == reply.text == expected.answer
    assert reply.boxes == expected.boxes != ()
    assert reply.finish_reason == "stop"

    async def listen() -> list[str]:
        return [
            piece async for piece in ChatSession(service).send(question, [image], SHORT).replies[0]
        ]

    assert "".join(asyncio.run(listen())) == reply.text


def test_boxes_refer_to_an_image_beside_a_video(service, first, tmp_path):
    clip = pytest.importorskip("video_fixtures").write_video(tmp_path / "clip.mp4")
    chat = ChatSession(service)
    _ask(chat, first[1], clip, first[0])
    reply = chat.turns[0].replies[0]
    assert (reply.image_path, {box.image for box in reply.boxes} <= {0}) == (first[0], True)
    _ask(chat, "Why?", clip)
    assert chat.turns[1].replies[0].image_path == first[0]
    [sample] = chat.to_samples(str)
    types = [part.type for part in sample.messages[0].content]
    assert types == ["video", "image", "text"]


def test_saved_session_gives_the_same_answer(service, first, second, tmp_path):
    """Its supervised tokens are those that were generated."""
    chat = ChatSession(service)
    _ask(chat, first[1], first[0])
    answer = _ask(chat, second[1], second[0])
    assert chat.save(tmp_path / "chat.jsonl") == 1
    [sample] = read_samples(tmp_path / "chat.jsonl")
    assert [message.role for message in sample.messages] == ["user", "assistant"] * 2
    alone = load_inference_model("finesight-tiny", "cpu", "fp32")
    saved = LocatedSample(sample, tmp_path)
    [again] = predict(alone.model, alone.renderer, [saved], max_new_tokens=60, batch_size=1)
    assert again.answer == answer
    assert again.boxes == chat.turns[1].replies[0].boxes
    tokenized = alone.renderer.tokenize(saved)
    supervised = tokenized.ids_T[tokenized.loss_mask_T].tolist()
    decoded = alone.renderer.tokenizer.decode(supervised, skip_special_tokens=False)
    assert decoded.startswith(chat.turns[0].replies[0].prediction.raw_text)


def test_boxes_refer_to_the_last_image(service, first, second):
    chat = ChatSession(service)
    for image, question in (first, second):
        _ask(chat, question, image)
    reply = chat.turns[1].replies[0]
    width, height = load_image(second[0]).size
    assert reply.image_path == second[0]
    assert width != load_image(first[0]).size[0], "images of one size cannot be distinguished"
    [values] = re.findall(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", reply.text)
    x1, y1, x2, y2 = (int(value) / 1000 for value in values)
    scaled = (x1 * width, y1 * height, x2 * width, y2 * height)
    assert reply.boxes[0].xyxy == pytest.approx(scaled)
    [sample] = chat.to_samples(str)
    assert {part.image for part in sample.messages[3].content if isinstance(part, BoxPart)} == {1}


def test_cancelled_reply_is_saved_partially(service, first, tmp_path):
    chat = ChatSession(service)
    [reply] = chat.send(first[1], [first[0]], [_sampled(900, 50.0, 3)]).replies
    next(iter(reply))
    reply.cancel()
    list(reply)
    assert reply.finish_reason == "cancelled"
    assert 0 < reply.prediction.num_tokens < 900
    chat.save(tmp_path / "chat.jsonl")
    assert json.loads((tmp_path / "chat.jsonl").read_text())["meta"]["truncated_turns"] == [0]


def test_parallel_models_use_their_own_history(pair, first):
    chat = ChatSession(pair)
    both = [GenerationOptions(max_new_tokens=30, model=name) for name in (None, "base")]
    turn = chat.send(first[1], [first[0]], both)
    tuned, base = ("".join(reply) for reply in turn.replies)
    assert tuned != base
    assert [reply.model for reply in turn.replies] == [pair.model_names[0], "base"]
    list(chat.send("And now?", [], [_sampled(8, 9.0, 1)]).replies[0])
    one, other = (
        [message.content for message in sample.messages if message.role == "assistant"]
        for sample in chat.to_samples(str)
    )
    assert one[0] != other[0]
    assert one[1] == other[1]


def test_history_omits_answers_about_an_image_of_an_unanswered_turn(pair, first):
    image, question = first
    both = [*SHORT, GenerationOptions(model=pair.model_names[1], max_new_tokens=60)]
    chat = ChatSession(pair)
    answered, cancelled = chat.send(question, [image], both).replies
    cancelled.cancel()
    assert ([*answered, *cancelled] != [], cancelled.content) == (True, ())
    _ask(chat, question)
    # The other model has no image in its history.
    reply = chat.send(question, [], both).replies[1]
    assert ("".join(reply) != "", reply.image_path) == (True, None)


def test_rejected_question_leaves_session_unchanged(service, first, tmp_path):
    chat, other = ChatSession(service), [GenerationOptions(model="other")]
    _ask(chat, first[1], first[0])
    turns = [*chat.turns]
    (tmp_path / "no.png").write_text("no image")
    (tmp_path / "file").write_text("of the user")
    for call, match in (
        (lambda: chat.send(" ", [], SHORT), "text is ' ' and no image"),
        (lambda: chat.send("What?", [tmp_path / "no.png"], SHORT), "not an image"),
        (lambda: chat.send("What?", [], [*SHORT, *other]), "unknown model 'other'"),
        (lambda: chat.regenerate(other), "unknown model 'other'"),
        (lambda: chat.save(tmp_path / "file"), "exists already"),
        (lambda: chat.save_annotated_image(tmp_path / "file"), "exists already"),
        (lambda: ChatSession(service).save(tmp_path / "empty"), "no conversation to save"),
        (lambda: ChatSession(service).regenerate(SHORT), "the conversation has 0 turns"),
        (lambda: ChatSession(service).save_annotated_image(tmp_path / "b"), "no image in 0 turns"),
    ):
        with pytest.raises(UserError, match=match):
            call()
        assert chat.turns == turns
    assert (tmp_path / "file").read_text() == "of the user"


CAT, BOX = BoxPart(label="a cat", xyxy=(1, 2, 30, 40)), BoxPart(label=None, xyxy=(5, 6, 70, 80))
SIZE = 500, 600
MARKED = (
    "see <|object_ref_start|>a cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    "<|box_start|>(5,6),(7,8)<|box_end|>, so<|im_end|>"
)
LISTED = '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a cat"}, {"bbox_2d": [5, 6, 7, 8]}]\n```'
WITH_SCORE, SINGLE = (
    '{"bbox_2d": [1, 2, 3, 4], "label": "a cat", "sure": 0.5}',
    '{"bbox_2d": [1, 2, 3, 4]}',
)


def test_boxes_in_answer_become_parts():
    for raw, boxes, parts, size in (
        (MARKED, (CAT, BOX), (TextPart(text="see "), CAT, BOX, TextPart(text=", so")), SIZE),
        ("<ref>a cat</ref><box>(1,2),(3,4)</box><|im_end|>", (CAT,), (CAT,), SIZE),
        (
            "<ref>a cat</ref><box>(1,2),(3,4)</box> or <box>(5,6),(7</box><|im_end|>",
            (CAT,),
            (CAT, TextPart(text=" or "), TextPart(text="(5,6),(7")),
            SIZE,
        ),
        (LISTED, (CAT, BOX), (CAT, BOX), SIZE),
        # Boxes that would not give the same text again stay text.
        (
            WITH_SCORE,
            (CAT,),
            (TextPart(text='{"bbox_2d": '), CAT, TextPart(text=', "label": "a cat", "sure": 0.5}')),
            SIZE,
        ),
        (WITH_SCORE, (CAT, CAT), None, SIZE),
        (SINGLE, (BoxPart(xyxy=(1, 2, 9999, 40)),), None, SIZE),
        (SINGLE, (BoxPart(xyxy=(30, 2, 1, 40)),), None, SIZE),
        (SINGLE, (CAT,), None, None),
    ):
        prediction = Prediction("", (), "", raw, raw, boxes, 1, "stop")
        assert build_answer_parts(prediction, size) == (parts or (TextPart(text=raw),))


def test_system_prompt_is_sent_and_saved(service, first, tmp_path, monkeypatch):
    submitted = []

    def submit(located_sample, *arguments, **options):
        submitted.append(located_sample.sample)
        return InferenceService.submit(service, located_sample, *arguments, **options)

    monkeypatch.setattr(service, "submit", submit)
    chat = ChatSession(service)
    chat.system_prompt = "Answer with one word."
    _ask(chat, first[1], first[0])
    chat.save(tmp_path / "chat.jsonl")
    [saved] = read_samples(tmp_path / "chat.jsonl")
    for sample in (saved, *submitted):
        assert sample.messages[0].role == "system"
        assert sample.messages[0].content == (TextPart(text="Answer with one word."),)
