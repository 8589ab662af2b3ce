"""Random mixes of conversations in one batch are answered as each is alone."""

import random
from typing import NamedTuple, get_args

import pytest
from conversation_fixtures import make_conversation, make_images
from engine_fixtures import RequestEvents, make_random_model, run_engine, step_engine
from lora_fixtures import TUNE_SETTINGS, install_random_adapter
from tiny_model import TinyFamily

from finesight.data.sample import LocatedSample
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer import scheduler as scheduler_area
from finesight.infer.engine import Engine
from finesight.infer.prediction import predict
from finesight.infer.request import GenerationRequest, SamplingParams
from finesight.model.lora.multi import MultiLora
from finesight.model.vlm import VisionLanguageModel

MIXES = 40
"""Of each family."""

CACHE_TOKENS = 1 << 14
"""Tokens of the cache of a request alone."""


class LoadedModel(NamedTuple):
    model: VisionLanguageModel
    renderer: NativeRenderer
    conversations: list[LocatedSample]
    prompts: list[EncodedSample]


@pytest.fixture(scope="module", params=get_args(TinyFamily))
def loaded_model(request, tmp_path_factory) -> LoadedModel:
    """A random model that carries two adapters, and forty conversations."""
    folder = tmp_path_factory.mktemp(request.param)
    model, renderer = make_random_model(folder, request.param, seed=2)
    multi_lora = MultiLora(model)
    for seed, tune in enumerate(("all parts", "merger, vision encoder frozen")):
        install_random_adapter(model, seed, TUNE_SETTINGS[tune])
        multi_lora.collect_adapter()
    model.lora_routing = multi_lora.install()
    (folder / "images").mkdir()
    images, videos = make_images(folder / "images"), request.param != "qwen"
    conversations = [make_conversation(number, images, videos=videos) for number in range(40)]
    prompts = [renderer.encode_prompt(one) for one in conversations]
    return LoadedModel(model, renderer, conversations, prompts)


def draw_request(chance: random.Random, prompts: list[EncodedSample]) -> GenerationRequest:
    sampling = SamplingParams()
    if chance.random() < 0.3:
        sampling = SamplingParams(temperature=chance.choice([0.5, 1.5]), seed=chance.randrange(9))
    elif chance.random() < 0.2:
        sampling = SamplingParams(repetition_penalty=1.2)
    return GenerationRequest(
        prompt=chance.choice(prompts),
        max_new_tokens=chance.randint(1, 12),
        sampling_params=sampling,
        logprobs=1,
        adapter_index=chance.choice([None, 0, 1]),
    )


@pytest.mark.fuzz
def test_random_request_mixes_equal_single_requests(loaded_model, monkeypatch):
    """Check any batch size, cache size and prefill budget, with late requests."""
    model, end_ids = loaded_model.model, loaded_model.renderer.end_ids
    answers: set[tuple[int, ...]] = set()
    for mix in range(MIXES):
        chance = random.Random(mix)
        requests = [draw_request(chance, loaded_model.prompts) for _ in range(chance.randint(2, 8))]
        alone = []
        for request in requests:
            engine = Engine(model, end_ids, max_num_seqs=1, num_cache_tokens=CACHE_TOKENS)
            ticket = engine.add_request(request)
            alone.append(run_engine(engine)[ticket])
        budget, mixed_budget = chance.choice([64, 1000, 8192]), chance.choice([17, 300, 2048])
        monkeypatch.setattr(scheduler_area, "MAX_PREFILL_TOKENS", budget)
        monkeypatch.setattr(scheduler_area, "MAX_MIXED_PREFILL_TOKENS", mixed_budget)
        longest = max(len(one.prompt.tokenized.ids_T) + one.max_new_tokens for one in requests)
        engine = Engine(
            model,
            end_ids,
            max_num_seqs=chance.randint(1, 8),
            num_cache_tokens=int(longest * chance.choice([1, 1.5, 8])),
        )
        engine._max_pending = chance.randint(0, 1)
        result: dict[int, RequestEvents] = {}
        tickets = []
        for request in requests:
            tickets.append(engine.add_request(request))
            for _ in range(chance.randint(0, 2)):
                step_engine(engine, result)
        run_engine(engine, result)
        for ticket, expected in zip(tickets, alone, strict=True):
            found = result[ticket]
            assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
            logprobs = [token.logprob for token in expected.tokens]
            assert [token.logprob for token in found.tokens] == pytest.approx(logprobs, abs=1e-4)
        answers |= {tuple(one.ids) for one in alone}
    assert len(answers) > MIXES, "a model whose answers hardly differ shows nothing"


@pytest.mark.fuzz
def test_random_sample_mixes_equal_single_samples(loaded_model):
    model, renderer = loaded_model.model, loaded_model.renderer
    alone: dict[tuple[int, int], object] = {}
    for mix in range(MIXES):
        chance = random.Random(1000 + mix)
        tokens = chance.choice([1, 5, 12])
        members = [chance.randrange(len(loaded_model.prompts)) for _ in range(chance.randint(2, 8))]
        for member in members:
            if (member, tokens) not in alone:
                one = [loaded_model.conversations[member]]
                made = predict(model, renderer, one, max_new_tokens=tokens, batch_size=1)
                alone[member, tokens] = made[0]
        mixed = [loaded_model.conversations[member] for member in members]
        size = chance.randint(1, 8)
        batched = predict(model, renderer, mixed, max_new_tokens=tokens, batch_size=size)
        assert batched == [alone[member, tokens] for member in members]
