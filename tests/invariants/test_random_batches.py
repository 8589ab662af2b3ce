"""Random mixes of conversations in one batch are answered as each is alone."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from asking import Told, listen
from conversations import make_conversation, make_pictures
from tuned import TUNES, put

from finesight.data.jsonl import Located
from finesight.encode.encoded import Encoded
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer import engine as engine_area
from finesight.infer.engine import Engine
from finesight.infer.predict import predict
from finesight.infer.request import Request, Sampling
from finesight.model.bank import Bank
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import load_model

MIXES = 40
"""Of each family: 200 in all."""

FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"]
ROOM = 1 << 14
"""Tokens of the cache of a request alone."""


class Setting(NamedTuple):
    """What a request asks for, beside its conversation."""

    conversation: int
    adapter: int | None
    tokens: int
    sampling: Sampling


class Loaded(NamedTuple):
    model: VisionLanguageModel
    renderer: Renderer
    conversations: list[Located]
    prompts: list[Encoded]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A random model that carries two adapters, and forty conversations."""
    family: TinyFamily = request.param
    if family == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(family)
    tiny = ModelFolder(make_tiny(folder / "tiny", family, 2))
    renderer = Renderer(tiny)
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    bank = Bank(model)
    for seed, tune in enumerate((TUNES["all parts"], TUNES["merger, tower frozen"])):
        put(model, seed, tune)
        bank.take()
    model.readers = bank.install()
    (folder / "images").mkdir()
    pictures = make_pictures(folder / "images")
    conversations = [
        make_conversation(number, pictures, videos=family != "qwen") for number in range(40)
    ]
    return Loaded(model, renderer, conversations, [renderer.prompt(one) for one in conversations])


def _drawn(chance: random.Random, conversations: int) -> Setting:
    sampling = Sampling()
    if chance.random() < 0.3:
        sampling = Sampling(temperature=chance.choice([0.5, 1.5]), seed=chance.randrange(9))
    elif chance.random() < 0.2:
        sampling = Sampling(repetition_penalty=1.2)
    return Setting(
        conversation=chance.randrange(conversations),
        adapter=chance.choice([None, 0, 1]),
        tokens=chance.randint(1, 12),
        sampling=sampling,
    )


def _request(loaded: Loaded, setting: Setting) -> Request:
    return Request(
        prompt=loaded.prompts[setting.conversation],
        max_new_tokens=setting.tokens,
        sampling=setting.sampling,
        logprobs=1,
        adapter=setting.adapter,
    )


def _assert_equal(found: Told, alone: Told) -> None:
    assert (found.ids, found.finish) == (alone.ids, alone.finish)
    ours = [token.logprob for token in found.tokens]
    assert ours == pytest.approx([token.logprob for token in alone.tokens], abs=1e-4)


@pytest.mark.slow
def test_random_mixes_of_requests_equal_requests_alone(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any number of rows, any cache, any budget of prompt tokens, and late requests."""
    model, renderer = loaded.model, loaded.renderer
    answers: set[tuple[int, ...]] = set()
    for mix in range(MIXES):
        chance = random.Random(mix)
        settings = [_drawn(chance, len(loaded.prompts)) for _ in range(chance.randint(2, 8))]
        alone = []
        for setting in settings:
            engine = Engine(model, renderer.end_ids, rows=1, tokens=ROOM)
            told: dict[int, Told] = {}
            ticket = engine.add(_request(loaded, setting))
            listen(engine, told)
            alone.append(told[ticket])
        monkeypatch.setattr(engine_area, "PREFILL_TOKENS", chance.choice([64, 1000, 8192]))
        monkeypatch.setattr(engine_area, "BESIDE_TOKENS", chance.choice([17, 300, 2048]))
        needed = [len(loaded.prompts[s.conversation].outline.ids_T) + s.tokens for s in settings]
        room = int(max(needed) * chance.choice([1, 1.5, 8]))
        engine = Engine(model, renderer.end_ids, rows=chance.randint(1, 8), tokens=room)
        engine._late = chance.randint(0, 1)
        told, tickets = {}, []
        for setting in settings:
            tickets.append(engine.add(_request(loaded, setting)))
            for _ in range(chance.randint(0, 2)):
                for event in engine.step():
                    told.setdefault(event.ticket, Told()).hear(event)
        listen(engine, told)
        for ticket, expected in zip(tickets, alone, strict=True):
            _assert_equal(told[ticket], expected)
        answers |= {tuple(one.ids) for one in alone}
    assert len(answers) > MIXES, "a model whose answers hardly differ shows nothing"


@pytest.mark.slow
def test_random_mixes_of_samples_equal_samples_alone(loaded: Loaded) -> None:
    model, renderer = loaded.model, loaded.renderer
    alone: dict[tuple[int, int], object] = {}
    for mix in range(MIXES):
        chance = random.Random(1000 + mix)
        tokens = chance.choice([1, 5, 12])
        members = [chance.randrange(len(loaded.prompts)) for _ in range(chance.randint(2, 8))]
        for member in members:
            if (member, tokens) not in alone:
                one = [loaded.conversations[member]]
                made = predict(model, renderer, one, max_new_tokens=tokens, batch=1)
                alone[member, tokens] = made[0]
        together = predict(
            model,
            renderer,
            [loaded.conversations[member] for member in members],
            max_new_tokens=tokens,
            batch=chance.randint(1, 8),
        )
        assert together == [alone[member, tokens] for member in members]
