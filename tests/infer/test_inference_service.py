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
from engine_fixtures import make_mixed_questions, make_sample
from thinking_fixtures import train_run
from tiny_model import create_tiny_model

from finesight.data.sample import LocatedSample
from finesight.encode.family import ThinkingOptions
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.infer import inference_service as area
from finesight.infer.engine import Engine, generate
from finesight.infer.inference_service import GenerationStream, InferenceService, ServiceBusyError
from finesight.infer.kv_cache import KVCache, get_kv_bytes_per_token
from finesight.infer.model_loader import InferenceModel, load_multi_adapter_model
from finesight.infer.model_runner import ModelRunner
from finesight.infer.prediction import build_question, predict
from finesight.infer.request import CompletionDelta, GenerationOptions, SamplingParams
from finesight.model.config import DecoderConfig, LinearAttentionConfig
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

TOKENS = 12
OPTIONS = GenerationOptions(max_new_tokens=TOKENS)
LONG = GenerationOptions(max_new_tokens=4000)


class QuestionSet(NamedTuple):
    answerer: InferenceModel
    questions: list[LocatedSample]
    answers: list[list[int]]


@pytest.fixture(scope="module")
def question_set(tmp_path_factory: pytest.TempPathFactory) -> QuestionSet:
    """A model that generates up to the limit, with prompts and their single answers."""
    folder = tmp_path_factory.mktemp("service")
    tiny = ModelFolder(create_tiny_model(folder / "tiny"))
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    renderer = NativeRenderer(tiny)
    questions = make_mixed_questions(folder)
    with torch.no_grad():
        model.lm_head_weight[list(renderer.end_ids)] = 0.0
    prompts = [renderer.encode_prompt(question) for question in questions]
    options = {"max_new_tokens": TOKENS, "end_ids": renderer.end_ids}
    answers = [generate(model, [prompt], **options)[0] for prompt in prompts]
    assert all(len(answer) == TOKENS for answer in answers)
    return QuestionSet(InferenceModel(model, renderer, {"tiny": None}), questions, answers)


@pytest.fixture
def service(question_set: QuestionSet) -> Iterator[InferenceService]:
    service = InferenceService(question_set.answerer, max_num_seqs=4, kv_cache_bytes=1 << 23)
    try:
        yield service
    finally:
        service.close()


def ids_of(deltas: list[CompletionDelta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


def text_of(deltas: list[CompletionDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def answer_ids(service: InferenceService, question: LocatedSample) -> list[int]:
    return ids_of(list(service.submit(question, OPTIONS)))


def assert_idle(service: InferenceService) -> None:
    """Check that no request runs, waits or holds a block after all have finished.

    The thread of the service may still be in its last step.
    """
    service.close()
    facts = service.get_stats()
    assert (facts.num_running, facts.num_waiting) == (0, 0)
    assert facts.num_free_blocks == facts.num_blocks > 0


def test_streamed_answer_matches_predict(service, question_set):
    model, renderer = question_set.answerer.model, question_set.answerer.renderer
    predictions = predict(
        model, renderer, question_set.questions, max_new_tokens=TOKENS, batch_size=1
    )
    for question, prediction, ids in zip(
        question_set.questions, predictions, question_set.answers, strict=True
    ):
        answering = service.submit(question, OPTIONS)
        deltas = list(answering)
        assert ids_of(deltas) == answering.output_ids == ids
        assert len([delta for delta in deltas if delta.tokens]) == TOKENS
        assert text_of(deltas) == answering.text == prediction.answer
        assert answering.finish_reason == "length"
        assert answering.build_prediction() == prediction
        assert answering.usage.completion_tokens == TOKENS
        # It is told once.
        assert list(answering) == []


def test_concurrent_threads_get_their_own_answers(question_set):
    service = InferenceService(question_set.answerer, max_num_seqs=3, kv_cache_bytes=1 << 23)

    def matches_reference(number: int) -> bool:
        which = number % len(question_set.questions)
        answering = service.submit(question_set.questions[which], OPTIONS)
        return ids_of(list(answering)) == question_set.answers[which]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(matches_reference, range(60)))
    facts = service.get_stats()
    assert (facts.num_completed, facts.completion_tokens) == (60, 60 * TOKENS)
    renderer = question_set.answerer.renderer
    tokens = [renderer.tokenize_prompt(question).num_tokens for question in question_set.questions]
    assert facts.prompt_tokens == 10 * sum(tokens)
    assert 0 < facts.cached_tokens < facts.prompt_tokens
    assert_idle(service)


async def _collect_stream(answering: GenerationStream) -> list[CompletionDelta]:
    return [delta async for delta in answering]


def test_concurrent_streams_in_one_event_loop(service, question_set):
    async def generate_all() -> list[list[CompletionDelta]]:
        answering = [
            await asyncio.to_thread(service.submit, question, OPTIONS)
            for question in question_set.questions * 3
        ]
        return await asyncio.gather(*map(_collect_stream, answering))

    found = asyncio.run(generate_all())
    assert [ids_of(deltas) for deltas in found] == question_set.answers * 3


def test_late_event_loop_gets_the_same_answer(service, question_set):
    answering = service.submit(question_set.questions[0], OPTIONS)
    service.close(wait_for_running=True)
    # Deltas that have arrived together are merged.
    (delta,) = asyncio.run(_collect_stream(answering))
    assert ids_of([delta]) == question_set.answers[0]
    assert delta.text == answering.text


def test_closed_event_loop_does_not_affect_others(service, question_set):
    async def begin() -> GenerationStream:
        answering = service.submit(question_set.questions[0], LONG)
        async for _ in answering:
            break
        return answering

    left = asyncio.run(begin())
    assert answer_ids(service, question_set.questions[1]) == question_set.answers[1]
    left.cancel()
    assert list(left)
    assert left.finish_reason == "cancelled"


def test_cancelled_request_frees_its_blocks(service, question_set):
    answering = service.submit(question_set.questions[0], LONG)
    came = iter(answering)
    first = [next(came) for _ in range(3)]
    answering.cancel()
    ids = ids_of(first + list(came))
    assert ids[:3] == question_set.answers[0][:3]
    assert answering.finish_reason == "cancelled"
    assert len(ids) < 4000
    assert answering.build_prediction().num_tokens == len(ids) == answering.usage.completion_tokens
    answering.cancel()
    assert_idle(service)


@pytest.mark.parametrize("seed", range(6))
def test_cancelling_at_any_stage_frees_blocks(question_set, seed):
    """Cancel requests in all states: submitted, waiting, in prefill, decoding and finished."""
    rng = random.Random(seed)
    service = InferenceService(
        question_set.answerer, max_num_seqs=rng.choice([1, 2, 5]), kv_cache_bytes=1 << 22
    )
    retained: list[tuple[int, GenerationStream]] = []
    gone: list[GenerationStream] = []
    for _ in range(30):
        which = rng.randrange(len(question_set.questions))
        if rng.random() < 0.5:
            retained.append((which, service.submit(question_set.questions[which], OPTIONS)))
        else:
            gone.append(service.submit(question_set.questions[which], rng.choice([OPTIONS, LONG])))
        for answering in gone:
            if rng.random() < 0.3:
                answering.cancel()
    for which, answering in retained:
        assert ids_of(list(answering)) == question_set.answers[which]
    for answering in gone:
        answering.cancel()
        list(answering)
        assert answering.finish_reason in ("cancelled", "length")
    assert_idle(service)


def test_stop_string_ends_the_answer(service, question_set):
    renderer = question_set.answerer.renderer
    full = renderer.decode_completion(question_set.answers[0]).text
    stop = full[len(full) // 2 :][:3]
    answering = service.submit(question_set.questions[0], replace(LONG, stop_strings=(stop,)))
    assert (
        text_of(list(answering)) == full[: full.index(stop)] == answering.build_prediction().answer
    )
    assert answering.finish_reason == "stop"
    assert answering.build_prediction().finish_reason == "stop"
    assert answering.usage.completion_tokens <= TOKENS
    assert_idle(service)


def test_end_token_is_not_in_the_text(question_set):
    model, renderer = question_set.answerer.model, question_set.answerer.renderer
    end = question_set.answers[0][4]
    ending = _EndTokenRenderer(renderer, end)
    service = InferenceService(
        InferenceModel(model, ending, {"tiny": None}), max_num_seqs=2, kv_cache_bytes=1 << 22
    )
    answering = service.submit(question_set.questions[0], LONG)
    deltas = list(answering)
    until = question_set.answers[0].index(end)
    assert ids_of(deltas) == question_set.answers[0][: until + 1]
    assert text_of(deltas) == renderer.decode_completion(question_set.answers[0][:until]).text
    assert answering.finish_reason == answering.build_prediction().finish_reason == "stop"
    assert_idle(service)


class _EndTokenRenderer(NativeRenderer):
    """The renderer of a model that ends its answers with another token."""

    def __init__(self, renderer: NativeRenderer, end: int) -> None:
        self.__dict__.update(renderer.__dict__)
        self.end_ids = (end,)


def test_repeated_question_uses_prefix_cache(service, question_set):
    first, again = (service.submit(question_set.questions[4], OPTIONS) for _ in range(2))
    assert ids_of(list(first)) == question_set.answers[4]
    list(again)
    third = service.submit(question_set.questions[4], OPTIONS)
    assert ids_of(list(third)) == question_set.answers[4]
    assert 0 < third.usage.cached_tokens < third.usage.prompt_tokens


def test_full_queue_rejects_requests(question_set):
    service = InferenceService(
        question_set.answerer, max_num_seqs=1, max_waiting=3, kv_cache_bytes=1 << 23
    )
    running = service.submit(question_set.questions[0], LONG)
    next(iter(running))
    waiting = [service.submit(question_set.questions[1], OPTIONS) for _ in range(3)]
    with pytest.raises(ServiceBusyError, match="3 requests are already waiting"):
        service.submit(question_set.questions[2], OPTIONS)
    assert service.get_stats().num_waiting == 3
    waiting[0].cancel()
    assert list(waiting[0]) == []
    another = service.submit(question_set.questions[2], OPTIONS)
    running.cancel()
    assert ids_of(list(another)) == question_set.answers[2]
    assert [ids_of(list(answering)) for answering in waiting[1:]] == [question_set.answers[1]] * 2
    assert_idle(service)


def test_invalid_request_raises_in_caller_thread(service, question_set, tmp_path):
    with pytest.raises(UserError, match="unknown model 'other'"):
        service.submit(question_set.questions[0], GenerationOptions(model="other"))
    with pytest.raises(UserError, match="limited by the KV cache"):
        service.submit(question_set.questions[0], GenerationOptions(max_new_tokens=10**6))
    with pytest.raises(UserError, match=r"missing\.png"):
        service.submit(make_sample("m", tmp_path, "missing.png", "What?"), OPTIONS)
    assert service.model_names == ("tiny",)
    assert answer_ids(service, question_set.questions[0]) == question_set.answers[0]


def test_graceful_close_finishes_running_requests(question_set):
    service = InferenceService(question_set.answerer, max_num_seqs=2, kv_cache_bytes=1 << 23)
    answering = [service.submit(question, OPTIONS) for question in question_set.questions]
    service.close(wait_for_running=True)
    assert [ids_of(list(one)) for one in answering] == question_set.answers
    with pytest.raises(ServiceBusyError, match="no more requests"):
        service.submit(question_set.questions[0], OPTIONS)
    assert_idle(service)


@pytest.mark.parametrize("wait", [False, True])
def test_immediate_close_cancels_all_requests(question_set, wait):
    """Those that run, that wait, and that came this moment; also after it was to finish them."""
    service = InferenceService(question_set.answerer, max_num_seqs=2, kv_cache_bytes=1 << 23)
    answering = [service.submit(question, LONG) for question in question_set.questions]
    if wait:
        next(iter(answering[0]))
        finishing = threading.Thread(target=service.close, args=(True,))
        finishing.start()
    service.close()
    for one in answering:
        assert len(ids_of(list(one))) < 4000
        assert one.finish_reason == "cancelled"
    if wait:
        finishing.join()
    assert_idle(service)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets one step fail: the one after so many, from the call on."""

    def fail(after: int = 0, error: type[Exception] = ZeroDivisionError) -> None:
        steps, full = itertools.count(), ModelRunner.decode

        def step(self: ModelRunner, *rest: int) -> torch.Tensor:
            if next(steps) == after:
                raise error("a step fails")
            return full(self, *rest)

        monkeypatch.setattr(ModelRunner, "decode", step)

    return fail


@pytest.mark.parametrize("after", [0, 1, 5])
def test_step_error_reaches_running_requests_only(question_set, after, fail):
    service = InferenceService(question_set.answerer, max_num_seqs=8, kv_cache_bytes=1 << 23)
    running = [service.submit(question, LONG) for question in question_set.questions[:2]]
    for one in running:
        next(iter(one))
    fail(after)
    with pytest.raises(ZeroDivisionError, match="a step fails"):
        list(running[0])
    with pytest.raises(ZeroDivisionError, match="a step fails"):
        asyncio.run(_collect_stream(running[1]))
    assert running[0].finish_reason is None
    assert answer_ids(service, question_set.questions[3]) == question_set.answers[3]
    assert_idle(service)


def test_failed_engine_frees_its_cache(question_set, fail):
    """Check that the error does not keep the engine alive: memory may not suffice for two."""
    service = InferenceService(question_set.answerer, max_num_seqs=2, kv_cache_bytes=1 << 22)
    cache = weakref.ref(service._engine._runner.cache)
    gc.disable()
    try:
        fail(2)
        broken = service.submit(question_set.questions[0], OPTIONS)
        with pytest.raises(ZeroDivisionError):
            list(broken)
        list(service.submit(question_set.questions[0], OPTIONS))
        assert cache() is None
    finally:
        gc.enable()
        service.close()


def _limit_engine_size(most: int) -> Callable[..., Engine]:
    """Make engines of a few sequences; the requested size fails after `most` engines."""
    made: list[int] = []

    def make(*args: object, max_num_seqs: int, num_cache_tokens: int) -> Engine:
        made.append(max_num_seqs)
        if made.count(max_num_seqs) > most:
            raise torch.OutOfMemoryError("out of memory")
        return Engine(*args, max_num_seqs=max_num_seqs, num_cache_tokens=num_cache_tokens)

    return make


def test_service_without_engine_rejects_requests(question_set, monkeypatch, fail):
    monkeypatch.setattr(area, "Engine", _limit_engine_size(1))
    service = InferenceService(question_set.answerer, max_num_seqs=2, kv_cache_bytes=1 << 22)
    fail()
    broken = service.submit(question_set.questions[0], OPTIONS)
    with pytest.raises(ZeroDivisionError):
        list(broken)
    service._thread.join()
    with pytest.raises(ServiceBusyError, match="no more requests"):
        service.submit(question_set.questions[0], OPTIONS)
    assert service.get_stats().num_running == 0
    service.close()


def test_requests_end_if_no_engine_can_be_created(question_set, monkeypatch, fail):
    """After a persistent CUDA error, not even a small engine can be created."""
    service = InferenceService(question_set.answerer, max_num_seqs=2, kv_cache_bytes=1 << 22)
    is_failing, is_queued = threading.Event(), threading.Event()

    def raise_cuda_error(*_: object, **__: object) -> Engine:
        is_failing.set()
        assert is_queued.wait(60)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(area, "Engine", raise_cuda_error)
    fail()
    # The service holds its lock while it creates an engine: queue the second request directly.
    running = service.submit(question_set.questions[0], OPTIONS)
    assert is_failing.wait(60)
    other = GenerationStream(service, question_set.questions[1], running._tokenized, OPTIONS)
    service._new_requests.append((other, None))
    is_queued.set()
    service._thread.join(60)
    assert not service._thread.is_alive()
    assert other._is_finished
    with pytest.raises(ZeroDivisionError):
        list(running)
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(other)
    with pytest.raises(ServiceBusyError, match="no more requests"):
        service.submit(question_set.questions[0], OPTIONS)
    service.close()


def test_gpu_out_of_memory_is_a_user_error(service, question_set, fail):
    fail(1, torch.OutOfMemoryError)
    answering = service.submit(question_set.questions[0], OPTIONS)
    with pytest.raises(UserError, match="out of GPU memory"):
        list(answering)


def test_seeds_and_logprobs_are_passed_through(service, question_set):
    options = replace(OPTIONS, sampling_params=SamplingParams(temperature=2.0, seed=7), logprobs=3)
    one, other = (list(service.submit(question_set.questions[0], options)) for _ in range(2))
    assert ids_of(one) == ids_of(other) != question_set.answers[0]
    for token in (token for delta in one for token in delta.tokens):
        assert token.logprob is not None
        assert token.logprob <= token.top_logprobs[0][1]
        assert len(token.top_logprobs) == 3


def test_closed_service_leaves_no_thread(question_set):
    before = threading.active_count()
    for _ in range(3):
        service = InferenceService(question_set.answerer, max_num_seqs=1, kv_cache_bytes=1 << 22)
        list(service.submit(question_set.questions[0], OPTIONS))
        service.close()
    assert threading.active_count() == before


def test_adapters_keep_the_thinking_mode_of_their_runs(tmp_path):
    lora = {"language": "lora", "lora": {"rank": 2}}
    first = train_run(tmp_path / "first", steps=1, tune=lora)
    base = tmp_path / "first" / "qwen3_8"
    second = train_run(tmp_path / "second", model=base, num_thoughts=0, steps=1, tune=lora)
    for options, expected in (
        (ThinkingOptions(), {"run-6": True, "run-0": False, "base": True}),
        (ThinkingOptions(enable_thinking=False), dict.fromkeys(("run-6", "run-0", "base"), False)),
    ):
        model = load_multi_adapter_model(str(first), [str(second)], "cpu", "fp32", thinking=options)
        service = InferenceService(model, max_num_seqs=2, kv_cache_bytes=1 << 22)
        try:
            question = build_question((), "Which colour?", "s")
            found = {}
            for name in expected:
                stream = service.submit(question, GenerationOptions(max_new_tokens=2, model=name))
                list(stream)
                found[name] = stream.build_prediction().reasoning is not None
        finally:
            service.close()
        assert found == expected


def test_kv_cache_leaves_memory_to_linear_states() -> None:
    """Use the sizes of Qwen3.5-27B: 154 MB of states per sequence."""
    linear = LinearAttentionConfig(tuple(range(3, 64, 4)), 16, 48, 128, 128, 4)
    config = DecoderConfig(
        vocab_size=248320,
        hidden_size=5120,
        intermediate_size=17408,
        num_layers=64,
        num_heads=24,
        num_kv_heads=4,
        head_dim=256,
        use_qk_norm=True,
        rms_norm_eps=1e-6,
        rope_theta=1e7,
        mrope_axes=(0,) * 32,
        max_position_embeddings=262144,
        tie_word_embeddings=False,
        linear_attention=linear,
    )
    bf16, free_bytes = torch.bfloat16, 24 << 30
    for max_num_seqs in (1, 64):
        size = area.compute_kv_cache_bytes(config, bf16, free_bytes, max_num_seqs)
        num_blocks = size // (64 * get_kv_bytes_per_token(config, bf16))
        cache = KVCache(
            config,
            num_blocks=num_blocks,
            block_size=64,
            max_num_seqs=max_num_seqs,
            dtype=bf16,
            device=torch.device("meta"),
        )
        assert cache.linear_states is not None
        states = cache.linear_states.get_layer(0)
        num_bytes = 48 * sum(state.nbytes for state in states)
        num_bytes += cache.keys_LPSKD.nbytes + cache.values_LPSKD.nbytes
        assert 0.59 * free_bytes < num_bytes <= 0.6 * free_bytes
    with pytest.raises(UserError, match="at most 9 sequences, with 154 MB each"):
        area.compute_kv_cache_bytes(config, bf16, 5 << 29, 64)
    assert area.compute_kv_cache_bytes(config, bf16, 5 << 29, 9) > 0
    num_tokens = 1024 + area.DEFAULT_MAX_NEW_TOKENS
    for free_gb, expected in ((1, 1), (8, 10), (16, 20), (200, 64)):
        num_seqs = area.compute_num_seqs(config, bf16, free_gb << 30, 64)
        assert num_seqs == expected
        if num_seqs > 1:
            size = area.compute_kv_cache_bytes(config, bf16, free_gb << 30, num_seqs)
            assert size >= num_seqs * num_tokens * get_kv_bytes_per_token(config, bf16)
