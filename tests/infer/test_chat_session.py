from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_fixture import run_service, write_random_adapter, write_shape_image

from finesight.data.sample import BoxPart, LocatedSample, TextPart, read_samples
from finesight.errors import UserError
from finesight.infer.chat_session import ChatSession, build_answer_parts
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import Prediction, build_questions, predict
from finesight.infer.request import GenerationOptions, SamplingParams
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
    turn = ChatSession(service).send(question, [image], SHORT)
    pieces = list(turn.replies[0])
    alone = load_inference_model("finesight-tiny", "cpu", "fp32")
    questions = build_questions([image], question)
    [expected] = predict(alone.model, alone.renderer, questions, max_new_tokens=60, batch_size=1)
    assert len(pieces) > 3
    assert "".join(pieces) == turn.replies[0].text == expected.answer
    assert turn.replies[0].boxes == expected.boxes != ()
    assert turn.replies[0].finish_reason == "stop"


def test_reply_can_be_streamed_asynchronously(service, first):
    image, question = first
    chat = ChatSession(service)

    async def listen() -> list[str]:
        return [piece async for piece in chat.send(question, [image], SHORT).replies[0]]

    assert "".join(asyncio.run(listen())) == _ask(ChatSession(service), question, image)
    assert chat.turns[0].replies[0].finish_reason == "stop"


def test_saved_session_gives_the_same_answer(service, first, second, tmp_path):
    chat = ChatSession(service)
    _ask(chat, first[1], first[0])
    answer = _ask(chat, second[1], second[0])
    assert chat.save(tmp_path / "chat.jsonl") == 1
    [sample] = read_samples(tmp_path / "chat.jsonl")
    assert [message.role for message in sample.messages] == ["user", "assistant"] * 2
    assert any(isinstance(part, BoxPart) for part in sample.messages[1].content)
    alone = load_inference_model("finesight-tiny", "cpu", "fp32")
    located_sample = [LocatedSample(sample, tmp_path)]
    [again] = predict(alone.model, alone.renderer, located_sample, max_new_tokens=60, batch_size=1)
    assert again.answer == answer
    assert again.boxes == chat.turns[1].replies[0].boxes


def test_history_is_tokenized_as_generated(service, first):
    image, question = first
    chat = ChatSession(service)
    turn = chat.send(question, [image], SHORT)
    list(turn.replies[0])
    [sample] = chat.to_samples(str)
    renderer = service.renderer
    outline = renderer.tokenize(LocatedSample(sample, Path()))
    supervised = [int(token) for token in outline.ids_T[outline.loss_mask_T]]
    assert turn.replies[0].prediction is not None
    assert (
        renderer.tokenizer.decode(supervised, skip_special_tokens=False)
        == turn.replies[0].prediction.raw_text
    )


def test_boxes_refer_to_the_last_image(service, first, second):
    chat = ChatSession(service)
    _ask(chat, first[1], first[0])
    _ask(chat, second[1], second[0])
    reply = chat.turns[1].replies[0]
    width, height = load_image(second[0]).size
    assert reply.image_path == second[0]
    assert width != load_image(first[0]).size[0], "images of one size cannot be distinguished"
    [values] = re.findall(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", reply.text)
    x1, y1, x2, y2 = map(int, values)
    assert reply.boxes[0].xyxy == pytest.approx(
        (x1 * width / 1000, y1 * height / 1000, x2 * width / 1000, y2 * height / 1000)
    )
    [sample] = chat.to_samples(str)
    assert {part.image for part in sample.messages[3].content if isinstance(part, BoxPart)} == {1}


def test_undo_removes_the_last_turn(service, first):
    chat = ChatSession(service)
    assert chat.undo() is None
    answer = _ask(chat, first[1], first[0])
    _ask(chat, "Why?")
    chat.undo()
    assert [turn.text for turn in chat.turns] == [first[1]]
    assert chat.turns[0].replies[0].text == answer


def test_regenerate_replaces_the_last_reply(service, first):
    chat = ChatSession(service)
    warm = [_sampled(20, 5.0, seed) for seed in (1, 2)]
    one = _ask(chat, first[1], first[0], options=warm[:1])
    two = "".join(chat.regenerate(warm[1:]).replies[0])
    assert one != two
    assert len(chat.turns) == 1
    assert "".join(chat.regenerate(warm[:1]).replies[0]) == one


def test_cancelled_reply_is_saved_partially(service, first, tmp_path):
    chat = ChatSession(service)
    turn = chat.send(first[1], [first[0]], [_sampled(900, 50.0, 3)])
    pieces = iter(turn.replies[0])
    next(pieces)
    turn.replies[0].cancel()
    list(pieces)
    reply = turn.replies[0]
    assert reply.finish_reason == "cancelled"
    assert reply.prediction is not None
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
    samples = {sample.meta["model"]: sample for sample in chat.to_samples(str)}
    assert _answers(samples["base"])[0] != _answers(samples[pair.model_names[0]])[0]
    assert _answers(samples["base"])[1] == _answers(samples[pair.model_names[0]])[1]


def _answers(sample) -> list[tuple[object, ...]]:
    return [message.content for message in sample.messages if message.role == "assistant"]


def test_rejected_question_leaves_session_unchanged(service, first, tmp_path):
    chat = ChatSession(service)
    _ask(chat, first[1], first[0])
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(UserError, match="text is ' ' and no image"):
        chat.send(" ", [], SHORT)
    with pytest.raises(UserError, match="not an image"):
        chat.send("What?", [tmp_path / "no.png"], SHORT)
    with pytest.raises(UserError, match="unknown model 'other'"):
        chat.send("What?", [], [*SHORT, GenerationOptions(model="other")])
    with pytest.raises(UserError, match="unknown model 'other'"):
        chat.regenerate([GenerationOptions(model="other")])
    assert len(chat.turns) == 1
    chat.save(tmp_path / "chat.jsonl")
    with pytest.raises(UserError, match="exists already"):
        chat.save(tmp_path / "chat.jsonl")
    with pytest.raises(UserError, match="no conversation to save: 0 turns"):
        ChatSession(service).save(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="the conversation has 0 turns"):
        ChatSession(service).regenerate(SHORT)
    with pytest.raises(UserError, match="no image in 0 turns"):
        ChatSession(service).save_annotated_image(tmp_path / "drawn.png")


def test_boxes_are_drawn_into_a_copy(service, first, tmp_path):
    chat = ChatSession(service)
    _ask(chat, first[1], first[0])
    before = first[0].read_bytes()
    assert chat.save_annotated_image(tmp_path / "drawn.png") == tmp_path / "drawn.png"
    assert first[0].read_bytes() == before
    assert load_image(tmp_path / "drawn.png").tobytes() != load_image(first[0]).tobytes()
    with pytest.raises(UserError, match="exists already"):
        chat.save_annotated_image(tmp_path / "drawn.png")


def _prediction(answer: str, raw: str, *boxes: BoxPart, thought: str | None = None) -> Prediction:
    return Prediction("", (), "", answer, raw, boxes, 1, "stop", thought)


def _box(label: str | None, *xyxy: float) -> BoxPart:
    return BoxPart(label=label, xyxy=xyxy)


def test_boxes_in_answer_become_parts(first):
    size = load_image(first[0]).size[::-1]
    a, b = _box("a cat", 1, 2, 30, 40), _box(None, 5, 6, 70, 80)
    marked = "see <|object_ref_start|>a cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    raw = f"{marked}<|box_start|>(5,6),(7,8)<|box_end|>, so<|im_end|>"
    parts = build_answer_parts(_prediction("see a cat(1,2)...", raw, a, b), size)
    assert parts == (TextPart(text="see "), a, b, TextPart(text=", so"))
    raw = "<ref>a cat</ref><box>(1,2),(3,4)</box><|im_end|>"
    assert build_answer_parts(_prediction("a cat(1,2),(3,4)", raw, a), size) == (a,)
    output = (
        '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a cat"}, {"bbox_2d": [5, 6, 7, 8]}]\n```'
    )
    assert build_answer_parts(_prediction(output, output, a, b), size) == (a, b)


def test_unrepresentable_boxes_stay_text(first):
    size = load_image(first[0]).size[::-1]
    output = '{"bbox_2d": [1, 2, 3, 4], "label": "a cat", "sure": 0.5}'
    inside, outside = _box("a cat", 1, 2, 30, 40), _box("a cat", 1, 2, 9999, 40)
    for boxes in ((inside,), (outside,), (inside, inside)):
        assert build_answer_parts(_prediction(output, output, *boxes), size) == (
            TextPart(text=output),
        )
    baseline = '{"bbox_2d": [1, 2, 3, 4]}'
    turned = _box(None, 30, 2, 1, 40)
    assert build_answer_parts(_prediction(baseline, baseline, turned), size) == (
        TextPart(text=baseline),
    )
    assert build_answer_parts(_prediction(baseline, baseline, inside), None) == (
        TextPart(text=baseline),
    )


def test_reasoning_is_saved_in_data_format(first):
    parts = build_answer_parts(_prediction("Yes.", "Yes.", thought="Is it?"), None)
    assert "".join(part.text for part in parts) == "<think>\nIs it?\n</think>\n\nYes."
    assert build_answer_parts(_prediction(" ", "", thought="Is it?"), None) == ()


def test_edit_replaces_a_turn_and_removes_later_ones(service, first, second):
    chat = ChatSession(service)
    _ask(chat, "Describe it.", first[0])
    _ask(chat, "Which color?")
    _ask(chat, "Why?", second[0])
    with pytest.raises(UserError, match="turn 4 of 3"):
        chat.edit(3, "What?", SHORT)
    before = [*chat.turns]
    with pytest.raises(UserError):
        chat.edit(1, " ", SHORT)
    assert chat.turns == before
    turn = chat.edit(0, first[1], SHORT)
    list(turn.replies[0])
    assert chat.turns == [turn]
    assert turn.image_paths == (first[0],)
    assert turn.replies[0].text == _ask(ChatSession(service), first[1], first[0])


def test_system_prompt_is_sent_and_saved(service, first, tmp_path, monkeypatch):
    submitted = []

    def submit(located_sample, *arguments, **options):
        submitted.append(located_sample.sample)
        return InferenceService.submit(service, located_sample, *arguments, **options)

    monkeypatch.setattr(service, "submit", submit)
    chat = ChatSession(service)
    for chat.system_prompt in (None, "Answer with one word."):
        _ask(chat, first[1], first[0])
    assert [sample.messages[0].role for sample in submitted] == ["user", "system"]
    assert submitted[1].messages[0].content == (TextPart(text="Answer with one word."),)
    chat.save(tmp_path / "chat.jsonl")
    [saved] = read_samples(tmp_path / "chat.jsonl")
    assert saved.messages[0] == submitted[1].messages[0]
    assert [message.role for message in saved.messages[1:]] == ["user", "assistant"] * 2
