from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from asking import ask, mixed_questions

from finesight.data.jsonl import Located
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer import service as area
from finesight.infer.engine import Engine
from finesight.infer.generate import generate
from finesight.infer.load import Answerer
from finesight.infer.predict import predict
from finesight.infer.request import Delta, Options, Sampling
from finesight.infer.rows import Rows
from finesight.infer.service import Answering, Busy, Service
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

TOKENS = 12
OPTIONS = Options(max_new_tokens=TOKENS)
LONG = Options(max_new_tokens=4000)


class Asked(NamedTuple):
    answerer: Answerer
    questions: list[Located]
    answers: list[list[int]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A model that goes on as long as it may, questions, and what it answers to each alone."""
    folder = tmp_path_factory.mktemp("service")
    tiny = ModelFolder(make_tiny(folder / "tiny"))
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    renderer = Renderer(tiny)
    questions = mixed_questions(folder)
    with torch.no_grad():
        model.head_weight[list(renderer.end_ids)] = 0.0
    answers = [
        generate(model, [renderer.prompt(q)], max_new_tokens=TOKENS, end_ids=renderer.end_ids)[0]
        for q in questions
    ]
    assert all(len(answer) == TOKENS for answer in answers)
    return Asked(Answerer(model, renderer, {"tiny": None}), questions, answers)


@pytest.fixture
def service(asked: Asked) -> Iterator[Service]:
    service = Service(asked.answerer, rows=4, cache_bytes=1 << 23)
    try:
        yield service
    finally:
        service.close()


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def assert_idle(service: Service) -> None:
    """Nothing runs, waits or holds a page: what a service tells once all have been heard out. Its
    own thread may be in its last step still."""
    service.close()
    facts = service.facts()
    assert (facts.running, facts.waiting) == (0, 0)
    assert facts.pages_free == facts.pages > 0


def test_an_answer_comes_in_pieces_and_ends_as_predict_says(service, asked):
    model, renderer = asked.answerer.model, asked.answerer.renderer
    predictions = predict(model, renderer, asked.questions, max_new_tokens=TOKENS, batch=1)
    for question, prediction, ids in zip(asked.questions, predictions, asked.answers, strict=True):
        answering = service.ask(question, OPTIONS)
        deltas = list(answering)
        assert ids_of(deltas) == answering.ids == ids
        assert len([delta for delta in deltas if delta.tokens]) == TOKENS
        assert text_of(deltas) == answering.text == prediction.answer
        assert answering.finish == "length"
        assert answering.prediction() == prediction
        assert answering.usage.answer == TOKENS
        # It is told once.
        assert list(answering) == []


def test_many_threads_get_their_own_answers(asked):
    service = Service(asked.answerer, rows=3, cache_bytes=1 << 23)

    def talk(number: int) -> bool:
        which = number % len(asked.questions)
        answering = service.ask(asked.questions[which], OPTIONS)
        return ids_of(list(answering)) == asked.answers[which]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(talk, range(60)))
    facts = service.facts()
    assert (facts.answers, facts.answer_tokens) == (60, 60 * TOKENS)
    renderer = asked.answerer.renderer
    tokens = [renderer.prompt_outline(question).tokens for question in asked.questions]
    assert facts.prompt_tokens == 10 * sum(tokens)
    assert 0 < facts.known_tokens < facts.prompt_tokens
    assert_idle(service)


async def _listen(answering: Answering) -> list[Delta]:
    return [delta async for delta in answering]


def test_many_answers_in_one_loop(service, asked):
    async def talk() -> list[list[Delta]]:
        answering = [
            await asyncio.to_thread(service.ask, question, OPTIONS)
            for question in asked.questions * 3
        ]
        return await asyncio.gather(*map(_listen, answering))

    found = asyncio.run(talk())
    assert [ids_of(deltas) for deltas in found] == asked.answers * 3


def test_an_answer_is_the_same_in_a_loop_that_comes_late(service, asked):
    answering = service.ask(asked.questions[0], OPTIONS)
    service.close(finish=True)
    assert ids_of(asyncio.run(_listen(answering))) == asked.answers[0]


def test_a_loop_that_is_gone_harms_nobody(service, asked):
    async def begin() -> Answering:
        answering = service.ask(asked.questions[0], LONG)
        async for _ in answering:
            break
        return answering

    left = asyncio.run(begin())
    assert ids_of(list(service.ask(asked.questions[1], OPTIONS))) == asked.answers[1]
    left.cancel()
    assert list(left)
    assert left.finish == "cancelled"


def test_a_cancelled_answer_ends_and_frees_its_pages(service, asked):
    answering = service.ask(asked.questions[0], LONG)
    came = iter(answering)
    first = [next(came) for _ in range(3)]
    answering.cancel()
    ids = ids_of(first + list(came))
    assert ids[:3] == asked.answers[0][:3]
    assert answering.finish == "cancelled"
    assert len(ids) < 4000
    assert answering.prediction().tokens == len(ids) == answering.usage.answer
    answering.cancel()
    assert_idle(service)


@pytest.mark.parametrize("seed", range(6))
def test_answers_cancelled_at_any_stage_free_their_pages(asked, seed):
    """Right away, while they wait, are read and grow, after the end; the others go on."""
    rng = random.Random(seed)
    service = Service(asked.answerer, rows=rng.choice([1, 2, 5]), cache_bytes=1 << 22)
    kept: list[tuple[int, Answering]] = []
    gone: list[Answering] = []
    for _ in range(30):
        which = rng.randrange(len(asked.questions))
        if rng.random() < 0.5:
            kept.append((which, service.ask(asked.questions[which], OPTIONS)))
        else:
            gone.append(service.ask(asked.questions[which], rng.choice([OPTIONS, LONG])))
        for answering in gone:
            if rng.random() < 0.3:
                answering.cancel()
    for which, answering in kept:
        assert ids_of(list(answering)) == asked.answers[which]
    for answering in gone:
        answering.cancel()
        list(answering)
        assert answering.finish in ("cancelled", "length")
    assert_idle(service)


def test_stop_texts_end_an_answer_before_them(service, asked):
    renderer = asked.answerer.renderer
    whole = renderer.answer(asked.answers[0]).text
    stop = whole[len(whole) // 2 :][:3]
    answering = service.ask(asked.questions[0], replace(LONG, stop=(stop,)))
    assert text_of(list(answering)) == whole[: whole.index(stop)] == answering.prediction().answer
    assert answering.finish == "stop"
    assert answering.prediction().stopped
    assert answering.usage.answer <= TOKENS
    assert_idle(service)


def test_the_end_token_stops_and_is_not_said(asked):
    model, renderer = asked.answerer.model, asked.answerer.renderer
    end = asked.answers[0][4]
    ending = _Ending(renderer, end)
    service = Service(Answerer(model, ending, {"tiny": None}), rows=2, cache_bytes=1 << 22)
    answering = service.ask(asked.questions[0], LONG)
    deltas = list(answering)
    until = asked.answers[0].index(end)
    assert ids_of(deltas) == asked.answers[0][: until + 1]
    assert text_of(deltas) == renderer.answer(asked.answers[0][:until]).text
    assert (answering.finish, answering.prediction().stopped) == ("stop", True)
    assert_idle(service)


class _Ending(Renderer):
    """The renderer of a model that ends its answers with another token."""

    def __init__(self, renderer: Renderer, end: int) -> None:
        self.__dict__.update(renderer.__dict__)
        self.end_ids = (end,)


def test_a_question_is_known_the_second_time(service, asked):
    first, again = (service.ask(asked.questions[4], OPTIONS) for _ in range(2))
    assert ids_of(list(first)) == asked.answers[4]
    list(again)
    third = service.ask(asked.questions[4], OPTIONS)
    assert ids_of(list(third)) == asked.answers[4]
    assert 0 < third.usage.known < third.usage.prompt


def test_too_many_questions_are_refused_until_some_have_gone(asked):
    service = Service(asked.answerer, rows=1, waiting=3, cache_bytes=1 << 23)
    running = service.ask(asked.questions[0], LONG)
    next(iter(running))
    waiting = [service.ask(asked.questions[1], OPTIONS) for _ in range(3)]
    with pytest.raises(Busy, match="3 questions wait"):
        service.ask(asked.questions[2], OPTIONS)
    assert service.facts().waiting == 3
    waiting[0].cancel()
    assert list(waiting[0]) == []
    another = service.ask(asked.questions[2], OPTIONS)
    running.cancel()
    assert ids_of(list(another)) == asked.answers[2]
    assert [ids_of(list(answering)) for answering in waiting[1:]] == [asked.answers[1]] * 2
    assert_idle(service)


def test_what_can_not_be_answered_is_refused_in_the_askers_thread(service, asked, tmp_path):
    with pytest.raises(UserError, match="no model 'other'"):
        service.ask(asked.questions[0], Options(model="other"))
    with pytest.raises(UserError, match="so much room is left"):
        service.ask(asked.questions[0], Options(max_new_tokens=10**6))
    with pytest.raises(UserError, match=r"missing\.png"):
        service.ask(ask("m", tmp_path, "missing.png", "What?"), OPTIONS)
    assert service.names == ("tiny",)
    assert ids_of(list(service.ask(asked.questions[0], OPTIONS))) == asked.answers[0]


def test_closing_lets_running_answers_finish_where_it_should(asked):
    service = Service(asked.answerer, rows=2, cache_bytes=1 << 23)
    answering = [service.ask(question, OPTIONS) for question in asked.questions]
    service.close(finish=True)
    assert [ids_of(list(one)) for one in answering] == asked.answers
    with pytest.raises(Busy, match="no more questions"):
        service.ask(asked.questions[0], OPTIONS)
    assert_idle(service)


@pytest.mark.parametrize("wait", [False, True])
def test_closing_ends_all_at_once_otherwise(asked, wait):
    """Those that run, that wait, and that came this moment; also after it was to finish them."""
    service = Service(asked.answerer, rows=2, cache_bytes=1 << 23)
    answering = [service.ask(question, LONG) for question in asked.questions]
    if wait:
        next(iter(answering[0]))
        finishing = threading.Thread(target=service.close, args=(True,))
        finishing.start()
    service.close()
    for one in answering:
        assert len(ids_of(list(one))) < 4000
        assert one.finish == "cancelled"
    if wait:
        finishing.join()
    assert_idle(service)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets one step fail: the one after so many, from the call on."""

    def fail(after: int = 0, error: type[Exception] = ZeroDivisionError) -> None:
        steps, whole = itertools.count(), Rows.step

        def step(self: Rows, *rest: int) -> torch.Tensor:
            if next(steps) == after:
                raise error("a step fails")
            return whole(self, *rest)

        monkeypatch.setattr(Rows, "step", step)

    return fail


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_error_in_a_step_reaches_all_that_run_and_the_next_is_answered(asked, after, fail):
    service = Service(asked.answerer, rows=8, cache_bytes=1 << 23)
    running = [service.ask(question, LONG) for question in asked.questions[:2]]
    for one in running:
        next(iter(one))
    fail(after)
    with pytest.raises(ZeroDivisionError, match="a step fails"):
        list(running[0])
    with pytest.raises(ZeroDivisionError, match="a step fails"):
        asyncio.run(_listen(running[1]))
    assert running[0].finish is None
    assert ids_of(list(service.ask(asked.questions[3], OPTIONS))) == asked.answers[3]
    assert_idle(service)


def test_a_failed_engine_leaves_no_cache_behind(asked, fail):
    """There may be no room for both: the error that is told must not keep it alive."""
    service = Service(asked.answerer, rows=2, cache_bytes=1 << 22)
    cache = weakref.ref(service._engine._rows.cache)
    gc.disable()
    try:
        fail(2)
        broken = service.ask(asked.questions[0], OPTIONS)
        with pytest.raises(ZeroDivisionError):
            list(broken)
        list(service.ask(asked.questions[0], OPTIONS))
        assert cache() is None
    finally:
        gc.enable()
        service.close()


def _made_at_most(most: int) -> Callable[..., Engine]:
    """Engines of few rows; none of the size that is wanted, once `most` were made."""
    made: list[int] = []

    def make(*args: object, rows: int, tokens: int) -> Engine:
        made.append(rows)
        if made.count(rows) > most:
            raise torch.OutOfMemoryError("no room")
        return Engine(*args, rows=rows, tokens=tokens)

    return make


def test_a_service_that_can_not_go_on_says_so(asked, monkeypatch, fail):
    monkeypatch.setattr(area, "Engine", _made_at_most(1))
    service = Service(asked.answerer, rows=2, cache_bytes=1 << 22)
    fail()
    broken = service.ask(asked.questions[0], OPTIONS)
    with pytest.raises(ZeroDivisionError):
        list(broken)
    service._thread.join()
    with pytest.raises(Busy, match="no more questions"):
        service.ask(asked.questions[0], OPTIONS)
    assert service.facts().running == 0
    service.close()


def test_a_full_card_is_told_as_the_users(service, asked, fail):
    fail(1, torch.OutOfMemoryError)
    answering = service.ask(asked.questions[0], OPTIONS)
    with pytest.raises(UserError, match="no memory left"):
        list(answering)


def test_seeds_and_logprobs_reach_the_answer(service, asked):
    options = replace(OPTIONS, sampling=Sampling(temperature=2.0, seed=7), logprobs=3)
    one, other = (list(service.ask(asked.questions[0], options)) for _ in range(2))
    assert ids_of(one) == ids_of(other) != asked.answers[0]
    for token in (token for delta in one for token in delta.tokens):
        assert token.logprob is not None
        assert token.logprob <= token.top[0][1]
        assert len(token.top) == 3


def test_a_service_leaves_no_thread_behind(asked):
    before = threading.active_count()
    for _ in range(3):
        service = Service(asked.answerer, rows=1, cache_bytes=1 << 22)
        list(service.ask(asked.questions[0], OPTIONS))
        service.close()
    assert threading.active_count() == before
