"""Adapters chosen by request = each installed alone = each merged (principle 6)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from asking import Told, listen, mixed_questions
from tuned import TUNES, put

from finesight.data.jsonl import Located
from finesight.encode.encoded import Encoded
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer.engine import Engine
from finesight.infer.load import Answerer, load_choice
from finesight.infer.request import Options, Request
from finesight.infer.service import Service
from finesight.model.adapter import write_adapter
from finesight.model.bank import Bank
from finesight.model.linear import GroupedLinear
from finesight.model.lora import adapters
from finesight.model.merge import merge_into
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

STEPS = 7
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"]
WIDE = {"language": "lora", "lora": {"rank": 3, "alpha": 9}}
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, TUNES["all parts"]),
    "two": (2, WIDE),
    "three": (3, TUNES["merger, tower frozen"]),
}
"""Of different parts, ranks and scales, each with a seed for its numbers."""


class Asked(NamedTuple):
    renderer: Renderer
    questions: list[Located]
    prompts: list[Encoded]
    base: VisionLanguageModel
    banked: VisionLanguageModel
    alone: Mapping[str, VisionLanguageModel]


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    if request.param == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    tiny = ModelFolder(make_tiny(folder / "tiny", request.param))
    renderer, questions = Renderer(tiny), mixed_questions(folder)
    base = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    alone = {name: put(copy.deepcopy(base), *how) for name, how in ADAPTERS.items()}
    banked = copy.deepcopy(base)
    bank = Bank(banked)
    for how in ADAPTERS.values():
        put(banked, *how)
        bank.take()
    banked.readers = bank.install()
    prompts = [renderer.prompt(question) for question in questions]
    return Asked(renderer, questions, prompts, base, banked, alone)


def _answers(model: VisionLanguageModel, prompts: list[Encoded]) -> list[Told]:
    """Each alone, with log probabilities."""
    found = []
    for prompt in prompts:
        engine = Engine(model, (), rows=1, tokens=1024)
        ticket = engine.add(Request(prompt=prompt, max_new_tokens=STEPS, logprobs=1))
        told: dict[int, Told] = {}
        listen(engine, told)
        found.append(told[ticket])
    return found


@pytest.fixture(scope="module")
def alone(asked: Asked) -> dict[str | None, list[Told]]:
    """What each adapter answers where it is the only one, and the base without any."""
    models = {None: asked.base, **asked.alone}
    return {name: _answers(model, asked.prompts) for name, model in models.items()}


def _assert_alike(found: Told, wanted: Told) -> None:
    assert found.ids == wanted.ids
    for token, other in zip(found.tokens, wanted.tokens, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_adapters_answer_differently(alone):
    # Otherwise the equalities below would hold for a model that knows no adapter.
    for answers in zip(*alone.values(), strict=True):
        assert len({tuple(told.ids) for told in answers}) >= 3


def test_merged_answers_as_its_adapter(asked, alone):
    for name, model in asked.alone.items():
        merged = copy.deepcopy(model)
        assert merge_into(merged) > 0
        for found, wanted in zip(_answers(merged, asked.prompts), alone[name], strict=True):
            _assert_alike(found, wanted)


@pytest.mark.parametrize(("rows", "late", "seed"), [(1, 0, 0), (5, 0, 1), (24, 1, 2)])
def test_adapters_by_request_answer_as_alone(asked, alone, rows, late, seed):
    """All adapters and the base side by side, in any order, twice: the second time from pages and
    features that each has for itself."""
    numbers = {None: None, **{name: n for n, name in enumerate(ADAPTERS)}}
    engine = Engine(asked.banked, (), rows=rows, tokens=1 << 14)
    engine._late = late
    order = [(name, n) for name in numbers for n in range(len(asked.prompts))]
    random.Random(seed).shuffle(order)
    known: list[dict[str | None, int]] = []
    for _ in range(2):
        told: dict[int, Told] = {}
        tickets = {}
        for name, n in order:
            request = Request(
                prompt=asked.prompts[n],
                max_new_tokens=STEPS,
                logprobs=1,
                adapter=numbers[name],
            )
            tickets[engine.add(request)] = name, n
            for event in engine.step():
                told.setdefault(event.ticket, Told()).hear(event)
        listen(engine, told)
        known.append(dict.fromkeys(numbers, 0))
        for ticket, (name, n) in tickets.items():
            _assert_alike(told[ticket], alone[name][n])
            known[-1][name] += told[ticket].known
    full = sum((prompt.outline.tokens - 1) // 16 * 16 for prompt in asked.prompts)
    assert set(known[1].values()) == {full}
    assert max(known[0].values()) < full
    assert engine.pages_free == engine.pages_in_all


def test_the_service_chooses_by_name(asked, alone):
    names = {name: number for number, name in enumerate(ADAPTERS)} | {"base": None}
    service = Service(Answerer(asked.banked, asked.renderer, names), rows=6, cache_bytes=1 << 24)
    wanted = {**{name: alone[name] for name in ADAPTERS}, "base": alone[None]}
    end_ids = asked.renderer.end_ids
    try:
        assert service.names == (*ADAPTERS, "base")
        options = {name: Options(max_new_tokens=STEPS, model=name) for name in names}
        asked_of = [
            (service.ask(question, options[name]), wanted[name][n].ids)
            for n, question in enumerate(asked.questions)
            for name in names
        ]
        first = service.ask(asked.questions[0], Options(max_new_tokens=STEPS))
        for answering, ids in [*asked_of, (first, wanted["one"][0].ids)]:
            list(answering)
            ends = [at for at, token in enumerate(ids) if token in end_ids]
            assert answering.ids == (ids[: ends[0] + 1] if ends else ids)
    finally:
        service.close()


@pytest.fixture
def published(tmp_path: Path) -> Callable[[str], Path]:
    """Adapters in files, beside their base."""
    tiny = make_tiny(tmp_path / "tiny")

    def publish(name: str) -> Path:
        model = load_model(ModelFolder(tiny), torch.float32, torch.device("cpu"))
        folder = tmp_path / name
        folder.mkdir()
        write_adapter(folder, put(model, *ADAPTERS[name]), base=str(tiny))
        return folder

    return publish


def test_adapters_from_files_are_those_that_were_written(published, tmp_path):
    """By their folders' names, whatever order they are given in, and the base beside them."""
    folders = {name: published(name) for name in ("two", "one")}
    choice = load_choice(str(folders["two"]), (str(folders["one"]),), "cpu", "fp32")
    assert dict(choice.adapters) == {"two": 0, "one": 1, "base": None}
    prompts = [choice.renderer.prompt(question) for question in mixed_questions(tmp_path)]
    base = load_model(ModelFolder(tmp_path / "tiny"), torch.float32, torch.device("cpu")).eval()
    for name, number in choice.adapters.items():
        alone = copy.deepcopy(base)
        if number is not None:
            put(alone, *ADAPTERS[name])
        engine = Engine(choice.model, (), rows=6, tokens=1024)
        told: dict[int, Told] = {}
        for prompt in prompts:
            engine.add(Request(prompt=prompt, max_new_tokens=STEPS, logprobs=1, adapter=number))
        listen(engine, told)
        wanted = _answers(alone, prompts)
        for ticket, found in told.items():
            _assert_alike(found, wanted[ticket])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("record", [False, True])
def test_adapters_by_request_on_a_card(asked, alone, record):
    """With and without CUDA graphs: what a recording reads by is what the step says."""
    model = _moved(asked, torch.device("cuda"))
    engine = Engine(model, (), rows=24, tokens=1 << 14, record=record)
    numbers = {None: None, **{name: n for n, name in enumerate(ADAPTERS)}}
    tickets = {}
    for name, number in numbers.items():
        for n, prompt in enumerate(asked.prompts):
            request = Request(prompt=prompt, max_new_tokens=STEPS, logprobs=1, adapter=number)
            tickets[engine.add(request)] = name, n
    told: dict[int, Told] = {}
    listen(engine, told)
    for ticket, (name, n) in tickets.items():
        _assert_alike(told[ticket], alone[name][n])


def _moved(asked: Asked, device: torch.device) -> VisionLanguageModel:
    """The bank is made where the model is."""
    model = copy.deepcopy(asked.base).to(device)
    bank = Bank(model)
    for name in ADAPTERS:
        for path, _, adapter in adapters(asked.alone[name]):
            group = model.get_submodule(path)
            assert isinstance(group, GroupedLinear), path
            group.adapter = copy.deepcopy(adapter).to(device)
        bank.take()
    model.readers = bank.install()
    return model.eval()
