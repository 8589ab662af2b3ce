import asyncio
import contextlib
import gc
import itertools
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from decoder_fixtures import SMALL_DECODER
from engine_fixtures import make_mixed_questions, make_sample
from tiny_model import create_tiny_model
from tiny_task import train_run

from finesight.encode.family import ThinkingOptions
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.infer import inference_service as area
from finesight.infer.engine import Engine
from finesight.infer.inference_service import GenerationStream, InferenceService, ServiceBusyError
from finesight.infer.kv_cache import KVCache, get_kv_bytes_per_token
from finesight.infer.model_loader import InferenceModel, load_multi_adapter_model
from finesight.infer.model_runner import ModelRunner
from finesight.infer.prediction import build_question, generate
from finesight.infer.request import CompletionDelta, GenerationOptions
from finesight.model.config import LinearAttentionConfig
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample

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
def start_service(question_set: QuestionSet) -> Iterator[Callable[..., InferenceService]]:
    with contextlib.ExitStack() as stack:

        def start(max_num_seqs: int = 4, **options: int) -> InferenceService:
            options = {"kv_cache_bytes": 1 << 23} | options
            service = InferenceService(question_set.answerer, max_num_seqs=max_num_seqs, **options)
            stack.callback(service.close)
            return service

        yield start


@pytest.fixture
def service(start_service: Callable[..., InferenceService]) -> InferenceService:
    return start_service()


def fail_decoding(
    monkeypatch: pytest.MonkeyPatch, after: int = 0, error: type[Exception] = ZeroDivisionError
) -> None:
    """Let one decoding step fail: the one after so many from now on."""
    steps, decode = itertools.count(), ModelRunner.decode

    def step(self: ModelRunner, *sizes: int) -> torch.Tensor:
        if next(steps) == after:
            raise error("a step fails")
        return decode(self, *sizes)

    monkeypatch.setattr(ModelRunner, "decode", step)


def ids_of(deltas: Iterable[CompletionDelta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


def assert_idle(service: InferenceService) -> None:
    """Check that nothing runs, waits or holds a block after the last step of the thread."""
    service.close()
    facts = service.get_stats()
    assert (facts.num_running, facts.num_waiting) == (0, 0)
    assert facts.num_free_blocks == facts.num_blocks > 0


def test_concurrent_threads_get_their_own_answers(start_service, question_set):
    service, (answerer, questions, answers) = start_service(max_num_seqs=3), question_set

    def matches_reference(number: int) -> bool:
        which = number % len(questions)
        return ids_of(service.submit(questions[which], OPTIONS)) == answers[which]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(matches_reference, range(60)))
    facts = service.get_stats()
    assert (facts.num_completed, facts.completion_tokens) == (60, 60 * TOKENS)
    tokens = [answerer.renderer.tokenize_prompt(question).num_tokens for question in questions]
    assert facts.prompt_tokens == 10 * sum(tokens)
    assert 0 < facts.cached_tokens < facts.prompt_tokens
    assert_idle(service)


async def _collect_stream(answering: GenerationStream) -> list[CompletionDelta]:
    return [delta async for delta in answering]


def test_late_event_loop_gets_the_same_answer(service, question_set):
    answering = service.submit(question_set.questions[0], OPTIONS)
    service.close(wait_for_running=True)
    # Deltas that have arrived together are merged.
    (delta,) = asyncio.run(_collect_stream(answering))
    assert ids_of([delta]) == question_set.answers[0]
    assert delta.text == answering.text


def test_closed_event_loop_does_not_affect_others(service, question_set):
    async def begin() -> GenerationStream:
        stream = service.submit(question_set.questions[0], LONG)
        async for _ in stream:
            break
        return stream

    left = asyncio.run(begin())
    other = service.submit(question_set.questions[1], OPTIONS)
    assert ids_of(other) == question_set.answers[1]
    left.cancel()
    assert list(left)
    assert left.finish_reason == "cancelled"


@pytest.mark.parametrize("seed", range(4))
def test_cancelling_at_any_stage_frees_blocks(start_service, question_set, seed):
    """Cancel requests in all states: submitted, waiting, in prefill, decoding and finished."""
    rng, (_, questions, answers) = random.Random(seed), question_set
    service = start_service(rng.choice([1, 2, 5]), kv_cache_bytes=1 << 22)
    retained: list[tuple[int, GenerationStream]] = []
    cancelled: list[GenerationStream] = []
    for _ in range(20):
        which = rng.randrange(len(questions))
        if rng.random() < 0.5:
            retained.append((which, service.submit(questions[which], OPTIONS)))
        else:
            cancelled.append(service.submit(questions[which], rng.choice([OPTIONS, LONG])))
        for stream in cancelled:
            if rng.random() < 0.3:
                stream.cancel()
    for which, stream in retained:
        assert ids_of(stream) == answers[which]
    for stream in cancelled:
        stream.cancel()
        list(stream)
        assert stream.finish_reason in ("cancelled", "length")
    assert_idle(service)


def test_full_queue_rejects_requests(start_service, question_set):
    service, (_, questions, answers) = start_service(max_num_seqs=1, max_waiting=3), question_set
    running = service.submit(questions[0], LONG)
    next(iter(running))
    waiting = [service.submit(questions[1], OPTIONS) for _ in range(3)]
    with pytest.raises(ServiceBusyError, match="4 requests are running or waiting"):
        service.submit(questions[2], OPTIONS)
    assert service.get_stats().num_waiting == 3
    waiting[0].cancel()
    assert list(waiting[0]) == []
    another = service.submit(questions[2], OPTIONS)
    running.cancel()
    assert ids_of(another) == answers[2]
    assert [ids_of(stream) for stream in waiting[1:]] == [answers[1]] * 2
    assert_idle(service)


def test_requests_that_can_run_do_not_count_as_waiting(start_service, question_set):
    """Also before the thread of the engine has taken them: without a queue, none was accepted."""
    service = start_service(max_num_seqs=2, max_waiting=0)
    for _ in range(20):
        running = [service.submit(question_set.questions[0], LONG) for _ in range(2)]
        with pytest.raises(ServiceBusyError):
            service.submit(question_set.questions[1], OPTIONS)
        for stream in running:
            stream.cancel()
            list(stream)
    assert_idle(service)


def test_invalid_request_raises_in_caller_thread(service, question_set, tmp_path):
    question, missing = question_set.questions[0], make_sample("m", tmp_path, "missing.png")
    for sample, options, match in (
        (question, GenerationOptions(model="other"), "unknown model 'other'"),
        (question, GenerationOptions(max_new_tokens=10**6), "limited by the KV cache"),
        (missing, OPTIONS, r"missing\.png"),
    ):
        with pytest.raises(UserError, match=match):
            service.submit(sample, options)
    assert ids_of(service.submit(question, OPTIONS)) == question_set.answers[0]
    shortest = service.submit(question, GenerationOptions(max_new_tokens=1))
    assert ids_of(shortest) == question_set.answers[0][:1]


def test_graceful_close_finishes_running_requests(start_service, question_set):
    service = start_service(max_num_seqs=2)
    streams = [service.submit(question, OPTIONS) for question in question_set.questions]
    service.close(wait_for_running=True)
    assert [ids_of(stream) for stream in streams] == question_set.answers
    with pytest.raises(ServiceBusyError, match="no more requests"):
        service.submit(question_set.questions[0], OPTIONS)
    assert_idle(service)


@pytest.mark.parametrize("wait", [False, True])
def test_immediate_close_cancels_all_requests(start_service, question_set, wait):
    """Running, waiting and new requests; also after a graceful close."""
    service = start_service(max_num_seqs=2)
    streams = [service.submit(question, LONG) for question in question_set.questions]
    finishing = threading.Thread(target=service.close, args=(True,))
    if wait:
        next(iter(streams[0]))
        finishing.start()
    service.close()
    for stream in streams:
        assert len(ids_of(stream)) < 4000
        assert stream.finish_reason == "cancelled"
    if wait:
        finishing.join()
    assert_idle(service)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_step_error_reaches_running_requests_only(service, question_set, after, monkeypatch):
    running = [service.submit(question, LONG) for question in question_set.questions[:2]]
    for stream in running:
        next(iter(stream))
    fail_decoding(monkeypatch, after)
    with pytest.raises(ZeroDivisionError, match="a step fails"):
        list(running[0])
    with pytest.raises(ZeroDivisionError, match="a step fails"):
        asyncio.run(_collect_stream(running[1]))
    assert running[0].finish_reason is None
    later = service.submit(question_set.questions[3], OPTIONS)
    assert ids_of(later) == question_set.answers[3]
    assert_idle(service)


def test_failed_engine_frees_its_cache(service, question_set, monkeypatch):
    """Check that the error does not keep the engine alive: memory may not suffice for two."""
    cache = weakref.ref(service._engine._runner.cache)
    gc.disable()
    try:
        fail_decoding(monkeypatch, after=2)
        with pytest.raises(ZeroDivisionError):
            list(service.submit(question_set.questions[0], OPTIONS))
        list(service.submit(question_set.questions[0], OPTIONS))
        assert cache() is None
    finally:
        gc.enable()


def test_requests_end_if_no_engine_can_be_created(service, question_set, monkeypatch):
    """After a persistent CUDA error, not even a small engine can be created."""
    is_failing, is_queued = threading.Event(), threading.Event()

    def raise_cuda_error(*_: object, **__: object) -> Engine:
        is_failing.set()
        assert is_queued.wait(60)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(area, "create_engine", raise_cuda_error)
    fail_decoding(monkeypatch)
    # The service holds its lock while it creates an engine: queue the second request directly.
    running = service.submit(question_set.questions[0], OPTIONS)
    assert is_failing.wait(60)
    other = GenerationStream(service, question_set.questions[1], running._tokenized, OPTIONS)
    service._new_requests.append((other, None))
    is_queued.set()
    service._thread.join(60)
    assert not service.is_alive
    for stream, error in ((running, ZeroDivisionError), (other, RuntimeError)):
        with pytest.raises(error):
            list(stream)
    with pytest.raises(ServiceBusyError, match="no more requests"):
        service.submit(question_set.questions[0], OPTIONS)


def test_gpu_out_of_memory_is_a_user_error(service, question_set, monkeypatch):
    fail_decoding(monkeypatch, 1, torch.OutOfMemoryError)
    with pytest.raises(UserError, match="out of GPU memory"):
        list(service.submit(question_set.questions[0], OPTIONS))


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
        question = build_question((), "Which colour?", "s")
        service = InferenceService(model, max_num_seqs=2, kv_cache_bytes=1 << 22)
        with contextlib.closing(service):
            for name, is_thinking in expected.items():
                stream = service.submit(question, GenerationOptions(max_new_tokens=2, model=name))
                list(stream)
                assert (stream.build_prediction().reasoning is not None) == is_thinking


def test_kv_cache_leaves_memory_to_linear_states():
    """Use the sizes of Qwen3.5-27B: 154 MB of states per sequence."""
    config = replace(
        SMALL_DECODER,
        num_layers=64,
        num_kv_heads=4,
        head_dim=256,
        linear_attention=LinearAttentionConfig(tuple(range(3, 64, 4)), 16, 48, 128, 128, 4),
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
        num_bytes = 48 * sum(state.nbytes for state in cache.linear_states.get_layer(0))
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
