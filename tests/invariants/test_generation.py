"""Cached generation = uncached; batched = single; streamed = at once (principle 6)."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from asking import (
    Forced,
    Grown,
    Told,
    generate_uncached,
    grow,
    listen,
    mixed_questions,
)

from finesight.data.jsonl import Located
from finesight.encode.encoded import Encoded
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer import engine as engine_area
from finesight.infer.engine import Engine
from finesight.infer.generate import generate
from finesight.infer.load import Answerer
from finesight.infer.request import Options, Request, Sampling
from finesight.infer.service import Service
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

STEPS = 9
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Asked(NamedTuple):
    model: VisionLanguageModel
    renderer: Renderer
    questions: list[Located]
    prompts: list[Encoded]


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A random model and prompts for it, with weights large enough that attention matters."""
    if request.param == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    # Of the others' seed an answer is one token again and again, by chance.
    seed = 2 if request.param == "qwen3_vl_moe" else 0
    tiny = ModelFolder(make_tiny(folder / "tiny", request.param, seed))
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.layers"):
                parameter.mul_(2)
    renderer = Renderer(tiny)
    questions = mixed_questions(folder)
    return Asked(model, renderer, questions, [renderer.prompt(one) for one in questions])


@pytest.fixture(scope="module")
def uncached(asked: Asked) -> list[Grown]:
    return [generate_uncached(asked.model, prompt, STEPS) for prompt in asked.prompts]


def _assert_equal(found: Grown, wanted: Grown) -> None:
    assert found.tokens == wanted.tokens
    for found_V, wanted_V in zip(found.logits, wanted.logits, strict=True):
        assert (found_V - wanted_V).abs().max() <= 1e-5 * wanted_V.abs().max()


def test_answers_differ_between_questions_and_steps(uncached):
    # Otherwise the equalities below would hold for a model that ignores what it is asked.
    answers = [tuple(grown.tokens) for grown in uncached]
    assert len(set(answers)) == len(answers)
    assert all(len(set(answer)) > 2 for answer in answers)


def test_cached_equals_uncached(asked, uncached):
    for prompt, wanted in zip(asked.prompts, uncached, strict=True):
        _assert_equal(grow(asked.model, [prompt], STEPS)[0], wanted)


def test_batched_equals_single(asked, uncached):
    for found, wanted in zip(grow(asked.model, asked.prompts, STEPS), uncached, strict=True):
        _assert_equal(found, wanted)


def test_rows_that_leave_the_batch_do_not_change_the_others(asked, uncached):
    grown = grow(asked.model, asked.prompts, STEPS, drop_after=3)
    for found, wanted in zip(grown[1::2], uncached[1::2], strict=True):
        _assert_equal(found, wanted)
    for found, wanted in zip(grown[::2], uncached[::2], strict=True):
        _assert_equal(found, Grown(wanted.tokens[:4], wanted.logits[:4]))


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 40])
def test_prompts_read_in_chunks_equal_prompts_read_at_once(asked, uncached, chunk):
    for found, wanted in zip(
        grow(asked.model, asked.prompts, STEPS, chunk=chunk), uncached, strict=True
    ):
        _assert_equal(found, wanted)


@pytest.mark.parametrize("budgets", [(1, 1), (7, 3), (40, 16), (64, 5), (200, 200)])
def test_every_budget_of_prompts_gives_the_same_answers(asked, uncached, budgets, monkeypatch):
    monkeypatch.setattr(engine_area, "PREFILL_TOKENS", budgets[0])
    monkeypatch.setattr(engine_area, "BESIDE_TOKENS", budgets[1])
    found = generate(asked.model, asked.prompts, max_new_tokens=STEPS, end_ids=())
    assert found == [grown.tokens for grown in uncached]


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_generate_gives_answers_in_order_whatever_the_batch(asked, uncached, batch):
    answers = [
        answer
        for start in range(0, len(asked.prompts), batch)
        for answer in generate(
            asked.model, asked.prompts[start : start + batch], max_new_tokens=STEPS, end_ids=()
        )
    ]
    assert answers == [grown.tokens for grown in uncached]


def test_one_token_is_enough(asked, uncached):
    found = generate(asked.model, asked.prompts, max_new_tokens=1, end_ids=())
    assert found == [grown.tokens[:1] for grown in uncached]


def test_answers_end_with_the_first_end_token(asked, uncached):
    # Tokens that really come, at different steps of different answers.
    end_ids = {uncached[n].tokens[step] for n, step in ((0, 0), (1, 2), (2, 4), (3, 6))}
    wanted = []
    for grown in uncached:
        tokens = grown.tokens
        stop = next((i for i, token in enumerate(tokens) if token in end_ids), STEPS - 1)
        wanted.append(tokens[: stop + 1])
    assert len({len(answer) for answer in wanted}) > 2, wanted
    found = generate(asked.model, asked.prompts, max_new_tokens=STEPS, end_ids=tuple(end_ids))
    assert found == wanted


def test_generation_in_bfloat16_runs_through_the_same_path(asked):
    narrow = copy.deepcopy(asked.model).to(torch.bfloat16)
    answers = generate(narrow, asked.prompts, max_new_tokens=3, end_ids=())
    assert [len(answer) for answer in answers] == [3] * len(asked.prompts)


def _requests(asked: Asked) -> list[Callable[[], Request]]:
    """Requests of every kind, made anew each time: a constraint is for one answer."""
    vocabulary = asked.model.geometry.language.vocabulary
    said = [5 * step % 300 + 40 for step in range(STEPS)]
    kinds: list[Callable[[], dict[str, Any]]] = [
        dict,
        lambda: {"sampling": Sampling(temperature=1.5, seed=3)},
        lambda: {"sampling": Sampling(temperature=2.0, top_k=9, top_p=0.8, seed=4)},
        lambda: {"sampling": Sampling(repetition_penalty=1.3), "logprobs": 3},
        lambda: {"constraint": Forced(said, vocabulary), "logprobs": 0},
        lambda: {
            "sampling": Sampling(temperature=1.0, repetition_penalty=1.2, seed=-1),
            "constraint": Forced(said[::-1], vocabulary),
        },
    ]
    return [
        lambda prompt=prompt, kind=kind, tokens=tokens: Request(
            prompt=prompt, max_new_tokens=tokens, **kind()
        )
        for n, prompt in enumerate(asked.prompts)
        for kind, tokens in ((kinds[n], STEPS), (kinds[(n + 1) % len(kinds)], 1 + n))
    ]


def _alone(model: VisionLanguageModel, request: Request) -> Told:
    engine = Engine(model, (), rows=1, tokens=1024)
    told: dict[int, Told] = {}
    ticket = engine.add(request)
    listen(engine, told)
    return told[ticket]


@pytest.mark.parametrize(("rows", "tokens", "late"), [(12, 4096, 0), (5, 512, 0), (12, 4096, 1)])
def test_answers_are_the_same_alone_as_among_mixed_requests(asked, rows, tokens, late):
    """Requests come one by one, while earlier ones grow, end, and are cancelled."""
    wanted = [_alone(asked.model, request()) for request in _requests(asked)]
    assert len({tuple(told.ids) for told in wanted if len(told.ids) == STEPS}) == 6
    engine = Engine(asked.model, (), rows=rows, tokens=tokens)
    engine._late = late
    told: dict[int, Told] = {}
    tickets = []
    for number, request in enumerate(_requests(asked)):
        gone = engine.add(_requests(asked)[(number + 4) % len(wanted)]())
        tickets.append(engine.add(request()))
        for _ in range(number % 3):
            for event in engine.step():
                told.setdefault(event.ticket, Told()).hear(event)
        engine.cancel(gone)
    listen(engine, told)
    for ticket, alone in zip(tickets, wanted, strict=True):
        found = told[ticket]
        assert (found.ids, found.finish) == (alone.ids, "length")
        for token, other in zip(found.tokens, alone.tokens, strict=True):
            assert (token.logprob is None) == (other.logprob is None)
            if token.logprob is not None:
                assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [id_ for id_, _ in token.top] == [id_ for id_, _ in other.top]
    assert engine.pages.free == engine.pages.number - 1


def test_answers_are_the_same_streamed_as_at_once(asked):
    """By the service, in text and tokens, all together, against one alone at once."""
    answerer = Answerer(asked.model, asked.renderer, {"tiny": None})
    service = Service(answerer, rows=4, cache_bytes=1 << 22)
    try:
        options = Options(max_new_tokens=STEPS)
        answering = [service.ask(question, options) for question in asked.questions]
        deltas = [list(answer) for answer in answering]
    finally:
        service.close()
    for prompt, answer, came in zip(asked.prompts, answering, deltas, strict=True):
        end_ids = asked.renderer.end_ids
        (ids,) = generate(asked.model, [prompt], max_new_tokens=STEPS, end_ids=end_ids)
        assert [token.id for delta in came for token in delta.tokens] == ids == answer.ids
        assert "".join(delta.text for delta in came) == asked.renderer.answer(ids).text


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
@pytest.mark.parametrize("chunk", [None, 17])
def test_batched_and_cached_on_a_card_equals_single_and_uncached(
    tmp_path, family, dtype, tolerance, chunk
):
    # The tokens of one are given to the other: in 16 bits near ties would lead them apart.
    # Recordings of several numbers of rows: half of them leave.
    tiny = ModelFolder(make_tiny(tmp_path / "tiny", family))
    model = load_model(tiny, dtype, torch.device("cuda")).eval()
    prompts = [Renderer(tiny).prompt(question) for question in mixed_questions(tmp_path)]
    single = [generate_uncached(model, prompt, STEPS) for prompt in prompts]
    spoken = [grown.tokens for grown in single]
    batched = grow(model, prompts, STEPS, chunk=chunk, drop_after=3, spoken=spoken)
    for found, wanted in zip(batched, single, strict=True):
        assert len(found.logits) in (4, STEPS)
        for found_V, wanted_V in zip(found.logits, wanted.logits, strict=False):
            difference = (found_V.float() - wanted_V.float()).abs().max()
            assert difference <= tolerance * wanted_V.abs().max()


def _on_card(asked: Asked, record: bool) -> list[Told]:
    """All requests at once, by an engine whose host is a step behind."""
    model = copy.deepcopy(asked.model).cuda()
    engine = Engine(model, (), rows=12, tokens=8192, record=record)
    tickets = [engine.add(request()) for request in _requests(asked)]
    told: dict[int, Told] = {}
    listen(engine, told)
    return [told[ticket] for ticket in tickets]


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("record", [False, True])
def test_mixed_requests_on_a_card_are_those_of_the_cpu(asked, record):
    """fp32, with and without CUDA graphs."""
    wanted = [_alone(asked.model, request()) for request in _requests(asked)]
    assert [told.ids for told in _on_card(asked, record)] == [told.ids for told in wanted]


@pytest.mark.gpu
@on_card
def test_a_generation_leaves_no_memory_behind(tmp_path):
    tiny = ModelFolder(make_tiny(tmp_path / "tiny"))
    model = load_model(tiny, torch.bfloat16, torch.device("cuda")).eval()
    prompts = [Renderer(tiny).prompt(question) for question in mixed_questions(tmp_path)]
    generate(model, prompts, max_new_tokens=STEPS, end_ids=())
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        generate(model, prompts, max_new_tokens=STEPS, end_ids=())
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
