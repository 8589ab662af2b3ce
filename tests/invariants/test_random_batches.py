"""Random mixes of conversations in one batch are answered as each is alone."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from conversation_fixtures import make_conversation, make_images
from engine_fixtures import RequestEvents, run_engine, step_engine
from lora_fixtures import TUNE_SETTINGS, install_random_adapter
from tiny_model import TinyFamily, create_tiny_model

from finesight.data.sample import LocatedSample
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer import scheduler as scheduler_area
from finesight.infer.engine import Engine
from finesight.infer.prediction import predict
from finesight.infer.request import GenerationRequest, SamplingParams
from finesight.model.lora.multi import MultiLora
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

MIXES = 40
"""Of each family: 200 in all."""

FAMILIES: list[TinyFamily] = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen",
]
CACHE_BYTES = 1 << 14
"""Tokens of the cache of a request alone."""


class RequestSetting(NamedTuple):
    """What a request asks for, beside its conversation."""

    conversation: int
    adapter: int | None
    tokens: int
    sampling: SamplingParams


class LoadedModel(NamedTuple):
    model: VisionLanguageModel
    renderer: NativeRenderer
    conversations: list[LocatedSample]
    prompts: list[EncodedSample]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    """A random model that carries two adapters, and forty conversations."""
    family: TinyFamily = request.param
    if family == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(family)
    tiny = ModelFolder(create_tiny_model(folder / "tiny", family, 2))
    renderer = NativeRenderer(tiny)
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    multi_lora = MultiLora(model)
    for seed, tune in enumerate(
        (TUNE_SETTINGS["all parts"], TUNE_SETTINGS["merger, vision encoder frozen"])
    ):
        install_random_adapter(model, seed, tune)
        multi_lora.collect_adapter()
    model.lora_routing = multi_lora.install()
    (folder / "images").mkdir()
    images = make_images(folder / "images")
    conversations = [
        make_conversation(number, images, videos=family != "qwen") for number in range(40)
    ]
    return LoadedModel(
        model, renderer, conversations, [renderer.encode_prompt(one) for one in conversations]
    )


def _draw_setting(chance: random.Random, conversations: int) -> RequestSetting:
    sampling = SamplingParams()
    if chance.random() < 0.3:
        sampling = SamplingParams(temperature=chance.choice([0.5, 1.5]), seed=chance.randrange(9))
    elif chance.random() < 0.2:
        sampling = SamplingParams(repetition_penalty=1.2)
    return RequestSetting(
        conversation=chance.randrange(conversations),
        adapter=chance.choice([None, 0, 1]),
        tokens=chance.randint(1, 12),
        sampling=sampling,
    )


def _request(loaded: LoadedModel, setting: RequestSetting) -> GenerationRequest:
    return GenerationRequest(
        prompt=loaded.prompts[setting.conversation],
        max_new_tokens=setting.tokens,
        sampling_params=setting.sampling,
        logprobs=1,
        adapter_index=setting.adapter,
    )


def _assert_equal(found: RequestEvents, alone: RequestEvents) -> None:
    assert (found.ids, found.finish_reason) == (alone.ids, alone.finish_reason)
    ours = [token.logprob for token in found.tokens]
    assert ours == pytest.approx([token.logprob for token in alone.tokens], abs=1e-4)


@pytest.mark.fuzz
def test_random_request_mixes_equal_single_requests(
    loaded_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check any batch size, cache size and prefill budget, with late requests."""
    model, renderer = loaded_model.model, loaded_model.renderer
    answers: set[tuple[int, ...]] = set()
    for mix in range(MIXES):
        chance = random.Random(mix)
        settings = [
            _draw_setting(chance, len(loaded_model.prompts)) for _ in range(chance.randint(2, 8))
        ]
        alone = []
        for setting in settings:
            engine = Engine(model, renderer.end_ids, max_num_seqs=1, num_cache_tokens=CACHE_BYTES)
            ticket = engine.add_request(_request(loaded_model, setting))
            alone.append(run_engine(engine)[ticket])
        monkeypatch.setattr(scheduler_area, "MAX_PREFILL_TOKENS", chance.choice([64, 1000, 8192]))
        monkeypatch.setattr(
            scheduler_area, "MAX_MIXED_PREFILL_TOKENS", chance.choice([17, 300, 2048])
        )
        needed = [
            len(loaded_model.prompts[s.conversation].tokenized.ids_T) + s.tokens for s in settings
        ]
        buffer = int(max(needed) * chance.choice([1, 1.5, 8]))
        engine = Engine(
            model, renderer.end_ids, max_num_seqs=chance.randint(1, 8), num_cache_tokens=buffer
        )
        engine._max_pending = chance.randint(0, 1)
        result: dict[int, RequestEvents] = {}
        tickets = []
        for setting in settings:
            tickets.append(engine.add_request(_request(loaded_model, setting)))
            for _ in range(chance.randint(0, 2)):
                step_engine(engine, result)
        run_engine(engine, result)
        for ticket, expected in zip(tickets, alone, strict=True):
            _assert_equal(result[ticket], expected)
        answers |= {tuple(one.ids) for one in alone}
    assert len(answers) > MIXES, "a model whose answers hardly differ shows nothing"


@pytest.mark.fuzz
def test_random_sample_mixes_equal_single_samples(loaded_model: LoadedModel) -> None:
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
        batched = predict(
            model,
            renderer,
            [loaded_model.conversations[member] for member in members],
            max_new_tokens=tokens,
            batch_size=chance.randint(1, 8),
        )
        assert batched == [alone[member, tokens] for member in members]
