from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import Forced, Told, ask, listen, mixed_questions, noise, request_for, told_of

from finesight.encode.encoded import Encoded
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer import engine as area
from finesight.infer.engine import SMALL_PAGE, Engine, cache_tokens
from finesight.infer.generate import generate
from finesight.infer.pages import grown
from finesight.infer.request import Constraint, Request, Sampling
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

CPU = torch.device("cpu")
STEPS = 9
Loaded = tuple[VisionLanguageModel, Renderer]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(make_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def loaded(tiny: ModelFolder) -> Loaded:
    return load_model(tiny, torch.float32, CPU).eval(), Renderer(tiny)


def test_the_cache_is_bound_in_bytes(tiny):
    """As many tokens of the published 2B model as ever, and of the first Qwen-VL far fewer."""
    model = load_model(tiny, torch.bfloat16, CPU)
    language = model.geometry.language
    for depth, kv_heads, tokens in ((28, 2, 1 << 18), (32, 32, 14336)):
        sizes = replace(language, depth=depth, kv_heads=kv_heads, head_width=128)
        model.geometry = replace(model.geometry, language=sizes)
        assert cache_tokens(model) == tokens
    assert cache_tokens(model.float()) == 14336 // 2


def test_a_prompt_beyond_the_models_positions_is_refused(loaded, tmp_path):
    model, renderer = loaded
    prompts = [renderer.prompt(ask(name, tmp_path, text)) for name, text in (("s", "Why?"),) * 2]
    last = prompts[0].outline.tokens - 1
    model.geometry = replace(
        model.geometry, language=replace(model.geometry.language, positions=last + 1)
    )
    assert generate(model, prompts, max_new_tokens=1, end_ids=())
    longer = [*prompts, renderer.prompt(ask("long", tmp_path, "Why? Why?"))]
    with pytest.raises(UserError, match=f"(?s)long: .*below {last + 1}"):
        generate(model, longer, max_new_tokens=1, end_ids=())


def test_what_the_cache_has_no_room_for_is_refused(loaded, tmp_path):
    model, renderer = loaded
    prompt = renderer.prompt(ask("s", tmp_path, "Why?"))
    tokens = prompt.outline.tokens
    engine = Engine(model, (), rows=1, tokens=64)
    assert engine.room_for(prompt) == 64 - tokens
    with pytest.raises(UserError, match=f"an answer of up to {64 - tokens} tokens"):
        engine.add(request_for(prompt, 65 - tokens))
    (told,) = told_of(engine, prompt, tokens=64 - tokens)
    assert len(told.ids) == 64 - tokens
    long = renderer.prompt(ask("long", tmp_path, "Why? " * 40))
    with pytest.raises(UserError, match="fewer than 64, the room of the cache"):
        engine.room_for(long)
    language = replace(model.geometry.language, positions=tokens + 5)
    model.geometry = replace(model.geometry, language=language)
    assert engine.room_for(prompt) == 5


def test_less_than_one_new_token_is_refused(loaded, tmp_path):
    with pytest.raises(AssertionError, match="max_new_tokens is 0"):
        generate(None, [], max_new_tokens=0, end_ids=())
    engine = Engine(loaded[0], (), rows=1, tokens=64)
    with pytest.raises(AssertionError, match="max_new_tokens is 0"):
        engine.add(request_for(loaded[1].prompt(ask("s", tmp_path, "Why?")), 0))


def test_numbers_that_overflow_are_told(tiny, tmp_path):
    model = load_model(tiny, torch.float16, CPU)
    prompts = [Renderer(tiny).prompt(ask("s", tmp_path, "Why?"))]
    assert generate(model, prompts, max_new_tokens=1, end_ids=())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(60000)
    with pytest.raises(UserError, match="overflow in float16"):
        generate(model, prompts, max_new_tokens=1, end_ids=())


def test_an_answer_that_overflows_harms_no_other(loaded, tmp_path, monkeypatch):
    """Neither beside it nor after it, in the pages that it leaves."""
    model, renderer = loaded
    questions = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    wanted = [told.ids for told in told_of(Engine(model, (), rows=8, tokens=1024), *questions)]
    too_much = renderer.tokenizer.encode("§")[0]
    assert all(too_much not in prompt.outline.ids_T for prompt in questions)
    embed = model.model.embed
    monkeypatch.setattr(
        model.model,
        "embed",
        lambda ids_T: embed(ids_T).masked_fill((ids_T == too_much)[:, None], float("inf")),
    )
    bad = renderer.prompt(ask("bad", tmp_path, "§" * 30))
    engine = Engine(model, (), rows=8, tokens=512)
    (failed, *others) = told_of(engine, bad, *questions)
    assert failed.error is not None
    assert "overflow" in str(failed.error)
    assert [told.ids for told in others] == wanted
    for _ in range(3):
        assert [told.ids for told in told_of(engine, *questions)] == wanted
        (again,) = told_of(engine, bad)
        assert again.error is not None


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_comes_and_goes_no_page_is_lost(loaded, tmp_path, seed, late, monkeypatch):
    """Random requests, cancelled at random, in a cache that is too small for all of them; what is
    not cancelled is answered as alone."""
    model, renderer = loaded
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    rng = random.Random(seed)
    monkeypatch.setattr(area, "PREFILL_TOKENS", rng.choice([8, 50, 8192]))
    monkeypatch.setattr(area, "BESIDE_TOKENS", rng.choice([1, 20, 2048]))
    end_ids = {token for token in range(400) if rng.random() < 0.1}
    alone = [
        told_of(Engine(model, tuple(end_ids), rows=1, tokens=512), prompt)[0] for prompt in prompts
    ]
    engine = Engine(model, tuple(end_ids), rows=rng.choice([1, 2, 4]), tokens=176)
    engine._late = late
    told: dict[int, Told] = {}
    asked: dict[int, tuple[int, int]] = {}
    gone: set[int] = set()
    for _ in range(120):
        if rng.random() < 0.3:
            which, tokens = rng.randrange(len(prompts)), rng.randrange(1, STEPS + 1)
            asked[engine.add(request_for(prompts[which], tokens))] = which, tokens
        if asked and rng.random() < 0.15:
            ticket = rng.choice(list(asked))
            engine.cancel(ticket)
            gone.add(ticket)
        for event in engine.step():
            told.setdefault(event.ticket, Told()).hear(event)
        held = {page for a in [*engine._reading, *engine._growing] for page in a.prompt.pages}
        assert engine.pages_free == engine.pages_in_all - len(held)
    listen(engine, told)
    assert engine.pages_free == engine.pages_in_all
    assert (engine.running, engine.waiting) == (0, 0)
    assert set(told) == set(asked)
    assert not engine._rows.cache.lengths_R.any()
    assert not engine._rows.cache.table_RB.any()
    for ticket, (which, tokens) in asked.items():
        whole, found = alone[which].ids[:tokens], told[ticket]
        if found.finish == "cancelled":
            assert ticket in gone
            assert found.ids == whole[: len(found.ids)]
        else:
            assert found.ids == whole
            assert found.finish == ("stop" if whole[-1] in end_ids else "length")


def test_a_question_asked_again_is_not_read_again(loaded, tmp_path):
    """Every full page but that of its last token."""
    model, renderer = loaded
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    engine = Engine(model, (), rows=4, tokens=1024)
    for prompt in prompts:
        first, again = told_of(engine, prompt)[0], told_of(engine, prompt)[0]
        assert first.ids == again.ids
        known = (prompt.outline.tokens - 1) // SMALL_PAGE * SMALL_PAGE
        assert again.known == known >= first.known


def test_two_that_come_together_are_read_apart_and_share_later(loaded, tmp_path):
    model, renderer = loaded
    prompt = renderer.prompt(mixed_questions(tmp_path)[0])
    engine = Engine(model, (), rows=4, tokens=1024)
    one, other = told_of(engine, prompt, prompt)
    assert one.ids == other.ids
    assert (one.known, other.known) == (0, 0)
    three = told_of(engine, prompt, prompt, prompt)
    assert [told.ids for told in three] == [one.ids] * 3
    assert all(told.known > 0 for told in three)
    assert engine.pages_free == engine.pages_in_all


@pytest.mark.parametrize("tokens", range(33, 33 + SMALL_PAGE))
def test_what_was_said_is_known_to_the_next_turn(loaded, tmp_path, tokens):
    """All but the last token of the answer, which is nowhere read; with the same answer as if they
    were not."""
    model, renderer = loaded
    prompt = renderer.prompt(mixed_questions(tmp_path)[0])
    engine = Engine(model, (), rows=4, tokens=1024)
    (told,) = told_of(engine, prompt, tokens=tokens)
    following = replace(prompt, outline=grown(prompt.outline, [*told.ids, 5, 6, 7]))
    (found,) = told_of(engine, following)
    assert found.known == (prompt.outline.tokens + tokens - 1) // SMALL_PAGE * SMALL_PAGE
    (fresh,) = told_of(Engine(model, (), rows=1, tokens=1024), following)
    assert (fresh.ids, fresh.known) == (found.ids, 0)


def test_a_cancelled_question_that_was_read_halfway_is_not_known(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(area, "PREFILL_TOKENS", 20)
    model, renderer = loaded
    prompt = renderer.prompt(mixed_questions(tmp_path)[4])
    engine = Engine(model, (), rows=1, tokens=512)
    ticket = engine.add(request_for(prompt))
    assert engine.step() == []
    engine.cancel(ticket)
    told = told_of(engine, prompt)[0]
    assert (told.known, told.ids) == (0, told_of(engine, prompt)[0].ids)


@pytest.mark.parametrize("change", ["pixels", "system", "text"])
def test_another_question_shares_no_more_than_is_alike(loaded, tiny, tmp_path, change):
    """And is answered as without the cache."""
    model, renderer = loaded
    noise(tmp_path / "a.png", 84, 56, 0)
    texts = ("a.png", "What is in the picture? " * 3)
    engine = Engine(model, (), rows=2, tokens=1024)
    first = renderer.prompt(ask("one", tmp_path, *texts))
    (told,) = told_of(engine, first)
    if change == "pixels":
        noise(tmp_path / "a.png", 84, 56, 1)
    elif change == "system":
        renderer = Renderer(tiny, system="Answer briefly and in English, please.")
    else:
        texts = (texts[0], "And what " + texts[1])
    other = renderer.prompt(ask("one", tmp_path, *texts))
    (found,) = told_of(engine, other)
    alike = first.outline.spans[0].start
    if change != "pixels":
        pairs = zip(first.outline.ids_T, other.outline.ids_T, strict=False)
        alike = next(n for n, (mine, yours) in enumerate(pairs) if mine != yours)
    assert found.known == alike // SMALL_PAGE * SMALL_PAGE
    assert found.ids == told_of(Engine(model, (), rows=1, tokens=1024), other)[0].ids
    assert told.ids == told_of(engine, first)[0].ids


def test_the_first_family_shares_nothing_across_its_trained_length(tmp_path):
    """A longer prompt is read with another rotary base from its first token on."""
    pytest.importorskip("tiktoken")
    folder = ModelFolder(make_tiny(tmp_path / "tiny", "qwen"))
    model, renderer = load_model(folder, torch.float32, CPU).eval(), Renderer(folder)
    text = "Read it. " * 30
    prompts = [renderer.prompt(ask("s", tmp_path, text + "Why? " * n)) for n in (0, 8, 16)]
    lengths = [prompt.outline.tokens for prompt in prompts]
    language = replace(model.geometry.language, trained=lengths[0] + 1)
    model.geometry = replace(model.geometry, language=language)
    model.model.geometry = language
    assert lengths[0] < language.trained < lengths[1]
    engine = Engine(model, (), rows=2, tokens=4096)
    told = [told_of(engine, prompt)[0] for prompt in prompts]
    assert told[0].known == told[1].known == 0
    # Of one base again.
    assert told[2].known >= lengths[0] // SMALL_PAGE * SMALL_PAGE
    for prompt, found in zip(prompts, told, strict=True):
        assert found.ids == told_of(Engine(model, (), rows=1, tokens=4096), prompt)[0].ids


def _cancelled_after(engine: Engine, requests: Sequence[Request], steps: int) -> dict[int, Told]:
    """The second request cancelled after so many steps."""
    told: dict[int, Told] = {}
    tickets = [engine.add(request) for request in requests]
    for _ in range(steps):
        for event in engine.step():
            told.setdefault(event.ticket, Told()).hear(event)
    engine.cancel(tickets[1])
    engine.cancel(10**6)
    listen(engine, told)
    return told


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("steps", range(12))
def test_an_answer_cancelled_at_any_step_ends_there(loaded, tmp_path, steps, late, monkeypatch):
    """While it waits, is read in chunks, grows, and after its end."""
    monkeypatch.setattr(area, "PREFILL_TOKENS", 30)
    monkeypatch.setattr(area, "BESIDE_TOKENS", 30)
    model, renderer = loaded
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)[:3]]
    wanted = [told_of(Engine(model, (), rows=1, tokens=512), p, tokens=5)[0] for p in prompts]
    engine = Engine(model, (), rows=3, tokens=512)
    engine._late = late
    requests = [request_for(prompt, 5) for prompt in prompts]
    found = _cancelled_after(engine, requests, steps)
    for ticket in (0, 2):
        assert (found[ticket].ids, found[ticket].finish) == (wanted[ticket].ids, "length")
    assert found[1].ids == wanted[1].ids[: len(found[1].ids)]
    assert (found[1].finish == "length") == (len(found[1].ids) == 5)
    assert engine.pages_free == engine.pages_in_all


def test_sampled_answers_do_not_hold_plain_ones_up(loaded, tmp_path):
    """Rows of every kind in one step: each is told a token with every step."""
    model, renderer = loaded
    prompt: Encoded = renderer.prompt(ask("s", tmp_path, "Why?"))
    engine = Engine(model, (), rows=3, tokens=512)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=0), Sampling()):
        engine.add(Request(prompt=prompt, max_new_tokens=6, sampling=sampling))
    engine.step()
    for _ in range(4):
        assert sorted(event.ticket for event in engine.step()) == [0, 1, 2]


def test_random_weights_of_the_path_are_there(tmp_path: Path, loaded):
    """The tests above hold for a model whose answers depend on what is asked."""
    model, renderer = loaded
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    answers = generate(model, prompts, max_new_tokens=STEPS, end_ids=())
    assert len({tuple(answer) for answer in answers}) == len(prompts)


def test_numbers_that_overflow_in_the_middle_of_an_answer_end_it(loaded, tmp_path, monkeypatch):
    """And not the answers beside it."""
    model, renderer = loaded
    prompts = [
        renderer.prompt(ask(name, tmp_path, text)) for name, text in (("a", "Why?"), ("b", "How?"))
    ]
    engine = Engine(model, (), rows=2, tokens=400)
    tickets = [engine.add(Request(prompt=prompt, max_new_tokens=6)) for prompt in prompts]
    logits, calls = model.logits, []

    def overflowing(h_RW: torch.Tensor) -> torch.Tensor:
        found = logits(h_RW).clone()
        calls.append(len(found))
        if len(calls) == 4:
            found[0, 7] = torch.nan
        return found

    monkeypatch.setattr(model, "logits", overflowing)
    ends = {}
    while engine.busy:
        for event in engine.step():
            if event.finish is not None or event.error is not None:
                ends[event.ticket] = event
    assert "overflow" in str(ends[tickets[0]].error)
    assert ends[tickets[1]].finish == "length"
    assert engine.pages_free == engine.pages_in_all


class Broken(Constraint):
    """A constraint that allows everything, and fails at one of its calls."""

    def __init__(self, vocabulary: int, failing: str) -> None:
        self._bits = np.full(-(-vocabulary // 32), -1, dtype=np.int32)
        self._failing, self._calls = failing, 0

    def allow(self) -> np.ndarray:
        self._calls += 1
        if self._failing == "allow" and self._calls == 3:
            raise ZeroDivisionError("a fault of the grammar")
        return self._bits

    def take(self, token: int) -> None:
        if self._failing == "take" and self._calls == 3:
            raise ZeroDivisionError("a fault of the grammar")


@pytest.mark.parametrize("failing", ["allow", "take"])
@pytest.mark.parametrize("late", [0, 1])
def test_a_constraint_that_fails_ends_its_own_answer_alone(loaded, tmp_path, failing, late):
    model, renderer = loaded
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    (wanted,) = generate(model, prompts[1:2], max_new_tokens=STEPS, end_ids=())
    engine = Engine(model, (), rows=3, tokens=2000)
    engine._late = late
    broken = Broken(model.geometry.language.vocabulary, failing)
    requests = [
        Request(prompt=prompts[0], max_new_tokens=STEPS, constraint=broken),
        request_for(prompts[1]),
    ]
    tickets = [engine.add(request) for request in requests]
    told: dict[int, Told] = {}
    errors = {}
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                errors[event.ticket] = event.error
            if event.token is not None:
                told.setdefault(event.ticket, Told()).tokens.append(event.token)
    assert isinstance(errors.pop(tickets[0]), ZeroDivisionError)
    assert not errors
    assert told[tickets[1]].ids == wanted
    assert engine.pages_free == engine.pages_in_all


class Late(Forced):
    """A constraint whose masks are ready when they have been asked for so many times, or never."""

    def __init__(self, tokens: Sequence[int], vocabulary: int, rng: random.Random | None) -> None:
        super().__init__(tokens, vocabulary)
        self._rng, self._left_asks = rng, 0
        self.begun = 0

    def begin(self) -> None:
        self.begun += 1

    def ready(self, seconds: float) -> bool:
        self._left_asks -= 1
        return self._rng is not None and self._left_asks <= 0

    def take(self, token: int) -> None:
        super().take(token)
        self._left_asks = 0 if self._rng is None else self._rng.choice([0, 1, 2, 5])


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_answers_whose_masks_are_late_are_paused_and_equal(loaded, tmp_path, seed, late):
    """They say what they would say in time; the others do not wait for them."""
    model, renderer = loaded
    vocabulary = model.geometry.language.vocabulary
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    said = [7, 8, 9, 10, 11, 12, 13, 14, 15]
    rng = random.Random(seed)

    def requests(late_masks: bool) -> list[Request]:
        made = []
        for number, prompt in enumerate(prompts):
            constraint: Constraint | None = None
            if number % 2:
                kind = rng if late_masks else None
                constraint = Late(said, vocabulary, kind) if kind else Forced(said, vocabulary)
            sampling = Sampling(temperature=1.0, seed=number, repetition_penalty=1.1)
            made.append(
                Request(
                    prompt=prompt,
                    max_new_tokens=STEPS,
                    constraint=constraint,
                    sampling=sampling,
                    logprobs=2,
                )
            )
        return made

    answers = []
    for late_masks in (False, True):
        engine = Engine(model, (), rows=4, tokens=2000)
        engine._late = late
        tickets = [engine.add(request) for request in requests(late_masks)]
        told: dict[int, Told] = {}
        listen(engine, told)
        assert engine.pages_free == engine.pages_in_all
        answers.append([told[ticket] for ticket in tickets])
    for in_time, paused in zip(*answers, strict=True):
        assert paused.ids == in_time.ids
        assert paused.finish == in_time.finish
        for token, other in zip(paused.tokens, in_time.tokens, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("late", [0, 1])
def test_an_answer_whose_mask_never_comes_holds_no_other_up(loaded, tmp_path, late):
    model, renderer = loaded
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    (wanted,) = generate(model, prompts[1:2], max_new_tokens=STEPS, end_ids=())
    engine = Engine(model, (), rows=2, tokens=2000)
    engine._late = late
    never = Late([7], model.geometry.language.vocabulary, None)
    stuck = engine.add(Request(prompt=prompts[0], max_new_tokens=STEPS, constraint=never))
    other = engine.add(request_for(prompts[1]))
    waiting = engine.add(request_for(prompts[1]))
    told: dict[int, Told] = {}
    for _ in range(60):
        for event in engine.step():
            told.setdefault(event.ticket, Told()).hear(event)
    assert told[other].ids == told[waiting].ids == wanted
    assert (never.begun, stuck in told, engine.busy, engine.running) == (1, False, True, 1)
    engine.cancel(stuck)
    assert [(event.ticket, event.finish) for event in engine.step()] == [(stuck, "cancelled")]
    assert not engine.busy
    assert engine.pages_free == engine.pages_in_all
