"""Adapters chosen by request = each installed alone = each merged (principle 6)."""

import copy
import random
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import pytest
from engine_fixtures import (
    RequestEvents,
    answer_alone,
    make_mixed_questions,
    make_random_model,
    run_engine,
    step_engine,
)
from lora_fixtures import TUNE_SETTINGS, install_random_adapter
from tiny_model import TinyFamily

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer.engine import Engine
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import InferenceModel, load_multi_adapter_model
from finesight.infer.request import GenerationOptions, GenerationRequest
from finesight.model.linear import FusedLinear, iter_adapters
from finesight.model.lora.merge import merge_adapters
from finesight.model.lora.multi import detach_adapter, install_lora_routing
from finesight.model.lora.peft_io import save_adapter
from finesight.model.vlm import VisionLanguageModel
from finesight.samples.sample import LocatedSample

STEPS = 7
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, TUNE_SETTINGS["all parts"]),
    "two": (2, {"language": "lora", "lora": {"rank": 3, "alpha": 9}}),
    "three": (3, TUNE_SETTINGS["merger, vision encoder frozen"]),
}
"""Of different parts, ranks and scales, each with a seed for its numbers."""

INDICES: dict[str | None, int | None] = {"one": 0, "two": 1, "three": 2, None: None}


class MultiLoraSetup(NamedTuple):
    renderer: NativeRenderer
    questions: list[LocatedSample]
    prompts: list[EncodedSample]
    base: VisionLanguageModel
    multi_lora_model: VisionLanguageModel
    alone: Mapping[str, VisionLanguageModel]


@pytest.fixture(scope="module", params=get_args(TinyFamily))
def setup(request, tmp_path_factory) -> MultiLoraSetup:
    folder = tmp_path_factory.mktemp(request.param)
    base, renderer = make_random_model(folder, request.param)
    questions = make_mixed_questions(folder)
    alone = {
        name: install_random_adapter(copy.deepcopy(base), *how) for name, how in ADAPTERS.items()
    }
    prompts = [renderer.encode_prompt(question) for question in questions]
    return MultiLoraSetup(renderer, questions, prompts, base, join_adapters(base, alone), alone)


def join_adapters(
    base: VisionLanguageModel, alone: Mapping[str, VisionLanguageModel], device: str = "cpu"
) -> VisionLanguageModel:
    model = copy.deepcopy(base).to(device)
    layers = []
    for name in ADAPTERS:
        for path, _, adapter in iter_adapters(alone[name]):
            group = model.get_submodule(path)
            assert isinstance(group, FusedLinear), path
            group.adapter = copy.deepcopy(adapter).to(device)
        layers.append(detach_adapter(model))
    model.lora_routing = install_lora_routing(model, layers)
    return model.eval()


def make_request(prompt: EncodedSample, adapter: int | None = None) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, max_new_tokens=STEPS, logprobs=1, adapter_index=adapter)


@pytest.fixture(scope="module")
def expected(setup: MultiLoraSetup) -> dict[str | None, list[RequestEvents]]:
    """What each adapter answers where it is the only one, and the base without any."""
    models = {None: setup.base, **setup.alone}
    requests = [make_request(prompt) for prompt in setup.prompts]
    return {name: answer_alone(model, requests) for name, model in models.items()}


def assert_equal_events(found: RequestEvents, wanted: RequestEvents) -> None:
    assert found.ids == wanted.ids
    for token, other in zip(found.tokens, wanted.tokens, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_adapters_give_different_answers(expected):
    # Otherwise the equalities below would hold for a model that knows no adapter.
    for answers in zip(*expected.values(), strict=True):
        assert len({tuple(told.ids) for told in answers}) >= 3


def test_merged_model_answers_like_its_adapter(setup, expected):
    for name, model in setup.alone.items():
        merged = copy.deepcopy(model)
        assert merge_adapters(merged) > 0
        answers = answer_alone(merged, [make_request(prompt) for prompt in setup.prompts])
        for found, wanted in zip(answers, expected[name], strict=True):
            assert_equal_events(found, wanted)


@pytest.mark.parametrize(("max_num_seqs", "late", "seed"), [(1, 0, 0), (5, 0, 1), (24, 1, 2)])
def test_mixed_adapter_batch_matches_single_adapters(setup, expected, max_num_seqs, late, seed):
    """All adapters and the base in one batch, twice: then with cached blocks of each adapter."""
    engine = Engine(setup.multi_lora_model, (), max_num_seqs=max_num_seqs, num_cache_tokens=1 << 14)
    engine._max_pending = late
    order = [(name, n) for name in INDICES for n in range(len(setup.prompts))]
    random.Random(seed).shuffle(order)
    known: list[dict[str | None, int]] = []
    for _ in range(2):
        result: dict[int, RequestEvents] = {}
        tickets = {}
        for name, n in order:
            request = make_request(setup.prompts[n], INDICES[name])
            tickets[engine.add_request(request)] = name, n
            step_engine(engine, result)
        run_engine(engine, result)
        known.append(dict.fromkeys(INDICES, 0))
        for ticket, (name, n) in tickets.items():
            assert_equal_events(result[ticket], expected[name][n])
            known[-1][name] += result[ticket].num_cached_tokens
    full = sum((prompt.tokenized.num_tokens - 1) // 16 * 16 for prompt in setup.prompts)
    if setup.multi_lora_model.config.decoder.linear_attention is not None:
        # States of linear attention are not cached.
        full = 0
    assert set(known[1].values()) == {full}
    assert max(known[0].values()) <= full
    assert engine.num_free_blocks == engine.num_blocks


def test_service_selects_adapter_by_name(setup, expected):
    names = {name or "base": index for name, index in INDICES.items()}
    options = {name: GenerationOptions(max_new_tokens=STEPS, model=name) for name in names}
    model = InferenceModel(setup.multi_lora_model, setup.renderer, names)
    service = InferenceService(model, max_num_seqs=6, kv_cache_bytes=1 << 24)
    end_ids = setup.renderer.end_ids
    try:
        assert service.model_names == tuple(names)
        asked = [
            (service.submit(question, options[name or "base"]), expected[name][n].ids)
            for n, question in enumerate(setup.questions)
            for name in INDICES
        ]
        first = service.submit(setup.questions[0], GenerationOptions(max_new_tokens=STEPS))
        for answering, ids in [*asked, (first, expected["one"][0].ids)]:
            list(answering)
            ends = [at for at, token in enumerate(ids) if token in end_ids]
            assert answering.output_ids == (ids[: ends[0] + 1] if ends else ids)
    finally:
        service.close()


def test_adapters_from_files_match_written_ones(tmp_path):
    """By their folders' names, whatever order they are given in, and the base beside them."""
    base, renderer = make_random_model(tmp_path, "qwen2_vl")
    models = {"base": base}
    for name in ("two", "one"):
        models[name] = install_random_adapter(copy.deepcopy(base), *ADAPTERS[name])
        (tmp_path / name).mkdir()
        save_adapter(tmp_path / name, models[name], base_model=str(tmp_path / "tiny"))
    folders = str(tmp_path / "two"), (str(tmp_path / "one"),)
    choice = load_multi_adapter_model(*folders, "cpu", "fp32")
    assert dict(choice.adapters) == {"two": 0, "one": 1, "base": None}
    prompts = [renderer.encode_prompt(question) for question in make_mixed_questions(tmp_path)]
    for name, index in choice.adapters.items():
        engine = Engine(choice.model, (), max_num_seqs=6, num_cache_tokens=1024)
        tickets = [engine.add_request(make_request(prompt, index)) for prompt in prompts]
        result = run_engine(engine)
        alone = answer_alone(models[name], [make_request(prompt) for prompt in prompts])
        for ticket, wanted in zip(tickets, alone, strict=True):
            assert_equal_events(result[ticket], wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("use_cuda_graphs", [False, True])
def test_multi_lora_on_gpu(setup, expected, use_cuda_graphs):
    """Check that graph replay uses the adapters of the current step."""
    model = join_adapters(setup.base, setup.alone, "cuda")
    options = {"num_cache_tokens": 1 << 14, "use_cuda_graphs": use_cuda_graphs}
    engine = Engine(model, (), max_num_seqs=24, **options)
    tickets = {
        engine.add_request(make_request(prompt, index)): (name, n)
        for name, index in INDICES.items()
        for n, prompt in enumerate(setup.prompts)
    }
    result = run_engine(engine)
    for ticket, (name, n) in tickets.items():
        assert_equal_events(result[ticket], expected[name][n])
