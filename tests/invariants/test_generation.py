"""Cached generation = uncached; batched = single; streamed = at once (principle 6)."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from engine_fixtures import (
    ForcedTokens,
    Generated,
    RequestEvents,
    encode_mixed_questions,
    generate_cached,
    generate_uncached,
    make_mixed_questions,
    run_engine,
    step_engine,
)
from tiny_model import create_tiny_model

from finesight.data.sample import LocatedSample
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer import scheduler as scheduler_area
from finesight.infer.engine import Engine, generate
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import InferenceModel
from finesight.infer.request import GenerationOptions, GenerationRequest, SamplingParams
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

STEPS = 9
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen"]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class GenerationSetup(NamedTuple):
    model: VisionLanguageModel
    renderer: NativeRenderer
    questions: list[LocatedSample]
    prompts: list[EncodedSample]


@pytest.fixture(scope="module", params=FAMILIES)
def setup(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> GenerationSetup:
    """A random model and prompts for it, with weights large enough that attention matters."""
    if request.param == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    # Of the others' seed an answer is one token again and again, by chance.
    seed = {"qwen3_vl_moe": 2, "qwen3_5_moe": 3}.get(request.param, 0)
    tiny = ModelFolder(create_tiny_model(folder / "tiny", request.param, seed))
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.layers"):
                parameter.mul_(2)
    renderer = NativeRenderer(tiny)
    questions = make_mixed_questions(folder)
    return GenerationSetup(
        model, renderer, questions, [renderer.encode_prompt(one) for one in questions]
    )


@pytest.fixture(scope="module")
def uncached(setup: GenerationSetup) -> list[Generated]:
    return [generate_uncached(setup.model, prompt, STEPS) for prompt in setup.prompts]


def _assert_equal(found: Generated, wanted: Generated) -> None:
    assert found.tokens == wanted.tokens
    for found_V, wanted_V in zip(found.logits, wanted.logits, strict=True):
        assert (found_V - wanted_V).abs().max() <= 1e-5 * wanted_V.abs().max()


def test_answers_differ_between_questions_and_steps(uncached):
    # Otherwise the equalities below would hold for a model that ignores what it is asked.
    answers = [tuple(grown.tokens) for grown in uncached]
    assert len(set(answers)) == len(answers)
    assert all(len(set(answer)) > 2 for answer in answers)


def test_cached_equals_uncached(setup, uncached):
    for prompt, wanted in zip(setup.prompts, uncached, strict=True):
        _assert_equal(generate_cached(setup.model, [prompt], STEPS)[0], wanted)


def test_batched_equals_single(setup, uncached):
    for found, wanted in zip(
        generate_cached(setup.model, setup.prompts, STEPS), uncached, strict=True
    ):
        _assert_equal(found, wanted)


def test_finished_sequences_do_not_affect_others(setup, uncached):
    generated = generate_cached(setup.model, setup.prompts, STEPS, drop_after=3)
    for found, wanted in zip(generated[1::2], uncached[1::2], strict=True):
        _assert_equal(found, wanted)
    for found, wanted in zip(generated[::2], uncached[::2], strict=True):
        _assert_equal(found, Generated(wanted.tokens[:4], wanted.logits[:4]))


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 40])
def test_chunked_prefill_equals_full_prefill(setup, uncached, chunk):
    for found, wanted in zip(
        generate_cached(setup.model, setup.prompts, STEPS, chunk=chunk), uncached, strict=True
    ):
        _assert_equal(found, wanted)


@pytest.mark.parametrize("budgets", [(1, 1), (7, 3), (40, 16), (64, 5), (200, 200)])
def test_prefill_budget_does_not_change_answers(setup, uncached, budgets, monkeypatch):
    monkeypatch.setattr(scheduler_area, "MAX_PREFILL_TOKENS", budgets[0])
    monkeypatch.setattr(scheduler_area, "MAX_MIXED_PREFILL_TOKENS", budgets[1])
    found = generate(setup.model, setup.prompts, max_new_tokens=STEPS, end_ids=())
    assert found == [grown.tokens for grown in uncached]


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_generate_is_ordered_for_any_batch_size(setup, uncached, batch):
    answers = [
        answer
        for start in range(0, len(setup.prompts), batch)
        for answer in generate(
            setup.model, setup.prompts[start : start + batch], max_new_tokens=STEPS, end_ids=()
        )
    ]
    assert answers == [grown.tokens for grown in uncached]


def test_single_new_token(setup, uncached):
    found = generate(setup.model, setup.prompts, max_new_tokens=1, end_ids=())
    assert found == [grown.tokens[:1] for grown in uncached]


def test_answers_end_at_first_end_token(setup, uncached):
    # Tokens that really come, at different steps of different answers.
    end_ids = {uncached[n].tokens[step] for n, step in ((0, 0), (1, 2), (2, 4), (3, 6))}
    wanted = []
    for generated in uncached:
        tokens = generated.tokens
        stop = next((i for i, token in enumerate(tokens) if token in end_ids), STEPS - 1)
        wanted.append(tokens[: stop + 1])
    assert len({len(answer) for answer in wanted}) > 2, wanted
    found = generate(setup.model, setup.prompts, max_new_tokens=STEPS, end_ids=tuple(end_ids))
    assert found == wanted


def test_bfloat16_generation(setup):
    narrow = copy.deepcopy(setup.model).to(torch.bfloat16)
    answers = generate(narrow, setup.prompts, max_new_tokens=3, end_ids=())
    assert [len(answer) for answer in answers] == [3] * len(setup.prompts)


def _requests(overrides: GenerationSetup) -> list[Callable[[], GenerationRequest]]:
    """Requests of every kind, made anew each time: a constraint is for one answer."""
    vocabulary = overrides.model.config.decoder.vocab_size
    output = [5 * step % 300 + 40 for step in range(STEPS)]
    kinds: list[Callable[[], dict[str, Any]]] = [
        dict,
        lambda: {"sampling_params": SamplingParams(temperature=1.5, seed=3)},
        lambda: {"sampling_params": SamplingParams(temperature=2.0, top_k=9, top_p=0.8, seed=4)},
        lambda: {"sampling_params": SamplingParams(repetition_penalty=1.3), "logprobs": 3},
        lambda: {"constraint": ForcedTokens(output, vocabulary), "logprobs": 0},
        lambda: {
            "sampling_params": SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=-1),
            "constraint": ForcedTokens(output[::-1], vocabulary),
        },
    ]
    return [
        lambda prompt=prompt, kind=kind, tokens=tokens: GenerationRequest(
            prompt=prompt, max_new_tokens=tokens, **kind()
        )
        for n, prompt in enumerate(overrides.prompts)
        for kind, tokens in ((kinds[n], STEPS), (kinds[(n + 1) % len(kinds)], 1 + n))
    ]


def _alone(model: VisionLanguageModel, request: GenerationRequest) -> RequestEvents:
    engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=1024)
    ticket = engine.add_request(request)
    return run_engine(engine)[ticket]


@pytest.mark.parametrize(
    ("max_num_seqs", "tokens", "late"), [(12, 4096, 0), (5, 512, 0), (12, 4096, 1)]
)
def test_mixed_requests_match_single_requests(setup, max_num_seqs, tokens, late):
    """Requests come one by one, while earlier ones grow, end, and are cancelled."""
    wanted = [_alone(setup.model, request()) for request in _requests(setup)]
    assert len({tuple(told.ids) for told in wanted if len(told.ids) == STEPS}) == 6
    engine = Engine(setup.model, (), max_num_seqs=max_num_seqs, num_cache_tokens=tokens)
    engine._max_pending = late
    output: dict[int, RequestEvents] = {}
    tickets = []
    for number, request in enumerate(_requests(setup)):
        gone = engine.add_request(_requests(setup)[(number + 4) % len(wanted)]())
        tickets.append(engine.add_request(request()))
        for _ in range(number % 3):
            step_engine(engine, output)
        engine.cancel(gone)
    run_engine(engine, output)
    for ticket, alone in zip(tickets, wanted, strict=True):
        found = output[ticket]
        assert (found.ids, found.finish_reason) == (alone.ids, "length")
        for token, other in zip(found.tokens, alone.tokens, strict=True):
            assert (token.logprob is None) == (other.logprob is None)
            if token.logprob is not None:
                assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [id_ for id_, _ in token.top_logprobs] == [
                    id_ for id_, _ in other.top_logprobs
                ]
    assert engine.num_free_blocks == engine.num_blocks


def test_streamed_equals_non_streamed(setup):
    """Compare concurrent streamed answers, as text and tokens, with single generation."""
    answerer = InferenceModel(setup.model, setup.renderer, {"tiny": None})
    service = InferenceService(answerer, max_num_seqs=4, kv_cache_bytes=1 << 22)
    try:
        options = GenerationOptions(max_new_tokens=STEPS)
        answering = [service.submit(question, options) for question in setup.questions]
        deltas = [list(answer) for answer in answering]
    finally:
        service.close()
    for prompt, answer, came in zip(setup.prompts, answering, deltas, strict=True):
        end_ids = setup.renderer.end_ids
        (ids,) = generate(setup.model, [prompt], max_new_tokens=STEPS, end_ids=end_ids)
        assert [token.id for delta in came for token in delta.tokens] == ids == answer.output_ids
        assert "".join(delta.text for delta in came) == setup.renderer.decode_completion(ids).text


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
@pytest.mark.parametrize("chunk", [None, 17])
def test_gpu_batched_and_cached_equals_uncached(tmp_path, family, dtype, tolerance, chunk):
    # Both get the same tokens, because near ties differ in 16 bits. CUDA graphs of several batch
    # sizes are used, because half of the sequences are removed.
    tiny = ModelFolder(create_tiny_model(tmp_path / "tiny", family))
    model = load_model(tiny, dtype, torch.device("cuda")).eval()
    prompts = encode_mixed_questions(NativeRenderer(tiny), tmp_path)
    single = [generate_uncached(model, prompt, STEPS) for prompt in prompts]
    forced = [grown.tokens for grown in single]
    batched = generate_cached(
        model, prompts, STEPS, chunk=chunk, drop_after=3, forced_tokens=forced
    )
    for found, wanted in zip(batched, single, strict=True):
        assert len(found.logits) in (4, STEPS)
        for found_V, wanted_V in zip(found.logits, wanted.logits, strict=False):
            difference = (found_V.float() - wanted_V.float()).abs().max()
            assert difference <= tolerance * wanted_V.abs().max()


def _on_card(overrides: GenerationSetup, record: bool) -> list[RequestEvents]:
    """All requests at once, by an engine whose host is a step behind."""
    model = copy.deepcopy(overrides.model).cuda()
    engine = Engine(model, (), max_num_seqs=12, num_cache_tokens=8192, use_cuda_graphs=record)
    tickets = [engine.add_request(request()) for request in _requests(overrides)]
    result = run_engine(engine)
    return [result[ticket] for ticket in tickets]


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("record", [False, True])
def test_gpu_mixed_requests_match_cpu(setup, record):
    """fp32, with and without CUDA graphs."""
    wanted = [_alone(setup.model, request()) for request in _requests(setup)]
    assert [told.ids for told in _on_card(setup, record)] == [told.ids for told in wanted]


@pytest.mark.gpu
@on_card
def test_generation_frees_gpu_memory(tmp_path):
    tiny = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    model = load_model(tiny, torch.bfloat16, torch.device("cuda")).eval()
    prompts = encode_mixed_questions(NativeRenderer(tiny), tmp_path)
    generate(model, prompts, max_new_tokens=STEPS, end_ids=())
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        generate(model, prompts, max_new_tokens=STEPS, end_ids=())
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
