from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from speaking import random_adapter, shapes, speaking

from finesight.data.jsonl import Located, read_samples
from finesight.data.sample import BoxPart, TextPart
from finesight.errors import UserError
from finesight.infer.load import load_answerer
from finesight.infer.predict import Prediction, predict, questions
from finesight.infer.request import Options, Sampling
from finesight.infer.service import Service
from finesight.infer.talk import Talk, answer_parts
from finesight.vision.picture import open_picture

SHORT = [Options(max_new_tokens=60)]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with speaking("finesight-tiny") as started:
        yield started


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with speaking(str(random_adapter(tmp_path_factory.mktemp("run") / "tuned"))) as started:
        yield started


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return shapes(tmp_path_factory.mktemp("first"), 0)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return shapes(tmp_path_factory.mktemp("second"), 10)


def _said(talk: Talk, text: str, *pictures: Path, options: list[Options] = SHORT) -> str:
    return "".join(talk.ask(text, pictures, options).replies[0])


def test_an_answer_comes_in_pieces_and_is_that_of_predict(service, first):
    picture, question = first
    turn = Talk(service).ask(question, [picture], SHORT)
    pieces = list(turn.replies[0])
    alone = load_answerer("finesight-tiny", "cpu", "fp32")
    [expected] = predict(
        alone.model, alone.renderer, questions([picture], question), max_new_tokens=60, batch=1
    )
    assert len(pieces) > 3
    assert "".join(pieces) == turn.replies[0].text == expected.answer
    assert turn.replies[0].boxes == expected.boxes != ()
    assert turn.replies[0].finish == "stop"


def test_the_pieces_come_asynchronously_too(service, first):
    picture, question = first
    talk = Talk(service)

    async def listen() -> list[str]:
        return [piece async for piece in talk.ask(question, [picture], SHORT).replies[0]]

    assert "".join(asyncio.run(listen())) == _said(Talk(service), question, picture)
    assert talk.turns[0].replies[0].finish == "stop"


def test_a_saved_talk_asked_again_has_the_same_answer(service, first, second, tmp_path):
    talk = Talk(service)
    _said(talk, first[1], first[0])
    answer = _said(talk, second[1], second[0])
    assert talk.save(tmp_path / "talk.jsonl") == 1
    [sample] = read_samples(tmp_path / "talk.jsonl")
    assert [message.role for message in sample.messages] == ["user", "assistant"] * 2
    assert any(isinstance(part, BoxPart) for part in sample.messages[1].content)
    alone = load_answerer("finesight-tiny", "cpu", "fp32")
    located = [Located(sample, tmp_path)]
    [again] = predict(alone.model, alone.renderer, located, max_new_tokens=60, batch=1)
    assert again.answer == answer
    assert again.boxes == talk.turns[1].replies[0].boxes


def test_what_was_said_is_read_as_it_was_said(service, first):
    picture, question = first
    talk = Talk(service)
    turn = talk.ask(question, [picture], SHORT)
    list(turn.replies[0])
    [sample] = talk.samples(str)
    renderer = service.renderer
    outline = renderer.outline(Located(sample, Path()))
    learned = [int(token) for token in outline.ids_T[outline.learned_T]]
    assert turn.replies[0].prediction is not None
    assert renderer.tokenizer.decode(learned, skip_special=False) == turn.replies[0].prediction.raw


def test_boxes_are_in_the_picture_that_was_shown_last(service, first, second):
    talk = Talk(service)
    _said(talk, first[1], first[0])
    _said(talk, second[1], second[0])
    reply = talk.turns[1].replies[0]
    width, height = open_picture(second[0]).size
    assert reply.picture == second[0]
    assert width != open_picture(first[0]).size[0], "pictures of one size tell nothing apart"
    [numbers] = re.findall(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", reply.text)
    x1, y1, x2, y2 = map(int, numbers)
    assert reply.boxes[0].xyxy == pytest.approx(
        (x1 * width / 1000, y1 * height / 1000, x2 * width / 1000, y2 * height / 1000)
    )
    [sample] = talk.samples(str)
    assert {part.image for part in sample.messages[3].content if isinstance(part, BoxPart)} == {1}


def test_undo_takes_the_last_turn_back(service, first):
    talk = Talk(service)
    assert talk.undo() is None
    answer = _said(talk, first[1], first[0])
    _said(talk, "Why?")
    talk.undo()
    assert [turn.text for turn in talk.turns] == [first[1]]
    assert talk.turns[0].replies[0].text == answer


def test_again_asks_the_same_and_draws_another_answer(service, first):
    talk = Talk(service)
    warm = [Options(max_new_tokens=20, sampling=Sampling(temperature=5.0, seed=n)) for n in (1, 2)]
    one = _said(talk, first[1], first[0], options=warm[:1])
    two = "".join(talk.again(warm[1:]).replies[0])
    assert one != two
    assert len(talk.turns) == 1
    assert "".join(talk.again(warm[:1]).replies[0]) == one


def test_a_stopped_answer_stays_as_far_as_it_came(service, first, tmp_path):
    talk = Talk(service)
    hot = Options(max_new_tokens=900, sampling=Sampling(temperature=50.0, seed=3))
    turn = talk.ask(first[1], [first[0]], [hot])
    pieces = iter(turn.replies[0])
    next(pieces)
    turn.replies[0].cancel()
    list(pieces)
    reply = turn.replies[0]
    assert reply.finish == "cancelled"
    assert reply.prediction is not None
    assert 0 < reply.prediction.tokens < 900
    talk.save(tmp_path / "talk.jsonl")
    assert json.loads((tmp_path / "talk.jsonl").read_text())["meta"]["cut_off"] == [0]


def test_models_side_by_side_go_on_from_their_own_answers(pair, first):
    talk = Talk(pair)
    both = [Options(max_new_tokens=30), Options(max_new_tokens=30, model="base")]
    turn = talk.ask(first[1], [first[0]], both)
    tuned, base = ("".join(reply) for reply in turn.replies)
    assert tuned != base
    assert [reply.model for reply in turn.replies] == [pair.names[0], "base"]
    warm = Options(max_new_tokens=8, sampling=Sampling(temperature=9.0, seed=1))
    list(talk.ask("And now?", [], [warm]).replies[0])
    samples = {sample.meta["model"]: sample for sample in talk.samples(str)}
    assert _answers(samples["base"])[0] != _answers(samples[pair.names[0]])[0]
    assert _answers(samples["base"])[1] == _answers(samples[pair.names[0]])[1]


def _answers(sample) -> list[tuple[object, ...]]:
    return [message.content for message in sample.messages if message.role == "assistant"]


def test_what_is_refused_leaves_the_talk_as_it_was(service, first, tmp_path):
    talk = Talk(service)
    _said(talk, first[1], first[0])
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(UserError, match="the question is ' '"):
        talk.ask(" ", [], SHORT)
    with pytest.raises(UserError, match="not a picture"):
        talk.ask("What?", [tmp_path / "no.png"], SHORT)
    with pytest.raises(UserError, match="no model 'other'"):
        talk.ask("What?", [], [*SHORT, Options(model="other")])
    with pytest.raises(UserError, match="no model 'other'"):
        talk.again([Options(model="other")])
    assert len(talk.turns) == 1
    talk.save(tmp_path / "talk.jsonl")
    with pytest.raises(UserError, match="exists already"):
        talk.save(tmp_path / "talk.jsonl")
    with pytest.raises(UserError, match="nothing to save: 0 turns"):
        Talk(service).save(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="nothing has been asked yet"):
        Talk(service).again(SHORT)
    with pytest.raises(UserError, match="no picture in the last of 0 turns"):
        Talk(service).draw(tmp_path / "drawn.png")


def test_boxes_are_drawn_into_a_copy(service, first, tmp_path):
    talk = Talk(service)
    _said(talk, first[1], first[0])
    before = first[0].read_bytes()
    assert talk.draw(tmp_path / "drawn.png") == tmp_path / "drawn.png"
    assert first[0].read_bytes() == before
    assert open_picture(tmp_path / "drawn.png").tobytes() != open_picture(first[0]).tobytes()
    with pytest.raises(UserError, match="exists already"):
        talk.draw(tmp_path / "drawn.png")


def _prediction(answer: str, raw: str, *boxes: BoxPart, thought: str | None = None) -> Prediction:
    return Prediction("", (), "", answer, raw, boxes, 1, True, thought)


def _box(label: str | None, *xyxy: float) -> BoxPart:
    return BoxPart(label=label, xyxy=xyxy)


def test_boxes_of_answers_become_parts(first):
    picture = first[0]
    a, b = _box("a cat", 1, 2, 30, 40), _box(None, 5, 6, 70, 80)
    marked = "see <|object_ref_start|>a cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    raw = f"{marked}<|box_start|>(5,6),(7,8)<|box_end|>, so<|im_end|>"
    parts = answer_parts(_prediction("see a cat(1,2)...", raw, a, b), picture)
    assert parts == (TextPart(text="see "), a, b, TextPart(text=", so"))
    raw = "<ref>a cat</ref><box>(1,2),(3,4)</box><|im_end|>"
    assert answer_parts(_prediction("a cat(1,2),(3,4)", raw, a), picture) == (a,)
    said = '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a cat"}, {"bbox_2d": [5, 6, 7, 8]}]\n```'
    assert answer_parts(_prediction(said, said, a, b), picture) == (a, b)


def test_boxes_that_no_sample_can_hold_stay_text(first):
    picture = first[0]
    said = '{"bbox_2d": [1, 2, 3, 4], "label": "a cat", "sure": 0.5}'
    inside, outside = _box("a cat", 1, 2, 30, 40), _box("a cat", 1, 2, 9999, 40)
    for boxes in ((inside,), (outside,), (inside, inside)):
        assert answer_parts(_prediction(said, said, *boxes), picture) == (TextPart(text=said),)
    plain = '{"bbox_2d": [1, 2, 3, 4]}'
    turned = _box(None, 30, 2, 1, 40)
    assert answer_parts(_prediction(plain, plain, turned), picture) == (TextPart(text=plain),)
    assert answer_parts(_prediction(plain, plain, inside), None) == (TextPart(text=plain),)


def test_thoughts_are_kept_as_data_hold_them(first):
    parts = answer_parts(_prediction("Yes.", "Yes.", thought="Is it?"), None)
    assert "".join(part.text for part in parts) == "<think>\nIs it?\n</think>\n\nYes."
    assert answer_parts(_prediction(" ", "", thought="Is it?"), None) == ()
