"""Cached generation = uncached; batched = single; streamed = at once (principle 6)."""

import copy
import gc
import random
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import engine_fixtures
import pytest
import torch
from conversation_fixtures import make_conversation, make_images
from lora_fixtures import TUNE_SETTINGS, install_random_adapter
from tiny_model import TinyFamily, create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer import scheduler as scheduler_area
from finesight.infer.engine import Engine
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import InferenceModel
from finesight.infer.model_runner import supports_fused_decode
from finesight.infer.prediction import generate
from finesight.infer.request import GenerationOptions, GenerationRequest, SamplingParams
from finesight.model.lora.multi import detach_adapter, install_lora_routing
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample

STEPS = 9


class GenerationSetup(NamedTuple):
    model: VisionLanguageModel
    renderer: NativeRenderer
    questions: list[LocatedSample]
    prompts: list[EncodedSample]


@pytest.fixture(scope="module", params=get_args(TinyFamily))
def setup(request, tmp_path_factory) -> GenerationSetup:
    """A random model and prompts for it, with weights large enough that attention matters."""
    folder = tmp_path_factory.mktemp(request.param)
    # Of the others' seed an answer is one token again and again, by chance.
    seed = {"qwen3_vl_moe": 2, "qwen3_5_moe": 3}.get(request.param, 0)
    model, renderer = engine_fixtures.make_random_model(folder, request.param, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.layers"):
                parameter.mul_(2)
    questions = engine_fixtures.make_mixed_questions(folder)
    if request.param != "qwen":
        frames = tuple(f"frame{number}.png" for number in range(5))
        for seed, name in enumerate(frames):
            engine_fixtures.write_noise_image(folder / name, 84, 84, 10 + seed)
        parts = "a.png", frames[:3], "Which one moves?", frames[3:4], frames
        questions.append(engine_fixtures.make_sample("videos", folder, *parts))
    prompts = [renderer.encode_prompt(one) for one in questions]
    return GenerationSetup(model, renderer, questions, prompts)


@pytest.fixture(scope="module")
def uncached(setup: GenerationSetup) -> list[engine_fixtures.Generated]:
    return [
        engine_fixtures.generate_uncached(setup.model, prompt, STEPS) for prompt in setup.prompts
    ]


def assert_equal(
    found: Sequence[engine_fixtures.Generated], wanted: Sequence[engine_fixtures.Generated]
) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens
        for found_V, wanted_V in zip(one.logits, other.logits, strict=True):
            assert (found_V - wanted_V).abs().max() <= 1e-5 * wanted_V.abs().max()


def test_answers_differ_between_questions_and_steps(uncached):
    # Otherwise the equalities below would hold for a model that ignores what it is asked.
    answers = [tuple(grown.tokens) for grown in uncached]
    assert len(set(answers)) == len(answers)
    assert sum(len(set(answer)) > 2 for answer in answers) >= 6


def test_cached_and_batched_equal_uncached(setup, uncached):
    single = [
        engine_fixtures.generate_cached(setup.model, [prompt], STEPS)[0] for prompt in setup.prompts
    ]
    assert_equal(single, uncached)
    assert_equal(engine_fixtures.generate_cached(setup.model, setup.prompts, STEPS), uncached)


def test_finished_sequences_do_not_affect_others(setup, uncached):
    generated = engine_fixtures.generate_cached(setup.model, setup.prompts, STEPS, drop_after=3)
    dropped = [engine_fixtures.Generated(one.tokens[:4], one.logits[:4]) for one in uncached[::2]]
    assert_equal(generated[1::2], uncached[1::2])
    assert_equal(generated[::2], dropped)


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 40])
def test_chunked_prefill_equals_full_prefill(setup, uncached, chunk):
    assert_equal(
        engine_fixtures.generate_cached(setup.model, setup.prompts, STEPS, chunk=chunk), uncached
    )


@pytest.mark.parametrize("budgets", [(1, 1), (7, 3), (40, 16), (64, 5), (200, 200)])
def test_prefill_budget_does_not_change_answers(setup, uncached, budgets, monkeypatch):
    monkeypatch.setattr(scheduler_area, "MAX_PREFILL_TOKENS", budgets[0])
    monkeypatch.setattr(scheduler_area, "MAX_MIXED_PREFILL_TOKENS", budgets[1])
    found = generate(setup.model, setup.prompts, max_new_tokens=STEPS, end_ids=())
    assert found == [grown.tokens for grown in uncached]


def make_requests(setup: GenerationSetup) -> list[GenerationRequest]:
    """Requests of every kind; a constraint is for one answer, so each engine needs new ones."""
    vocabulary = setup.model.config.decoder.vocab_size
    output = [5 * step % 300 + 40 for step in range(STEPS)]

    def make_options() -> list[dict[str, Any]]:
        greedy, warm = (
            SamplingParams(repetition_penalty=1.3),
            SamplingParams(temperature=1.5, seed=3),
        )
        narrow = SamplingParams(temperature=2.0, top_k=9, top_p=0.8, seed=4)
        penalized = SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=-1)
        backwards = engine_fixtures.ForcedTokens(output[::-1], vocabulary)
        return [
            {},
            {"sampling_params": warm},
            {"sampling_params": narrow},
            {"sampling_params": greedy, "logprobs": 3},
            {"constraint": engine_fixtures.ForcedTokens(output, vocabulary), "logprobs": 0},
            {"sampling_params": penalized, "constraint": backwards},
        ]

    requests = []
    for n, prompt in enumerate(setup.prompts):
        for options, tokens in ((n, STEPS), (n + 1, 1 + n)):
            options = make_options()[options % 6]
            requests.append(GenerationRequest(prompt=prompt, max_new_tokens=tokens, **options))
    return requests


@pytest.mark.parametrize(
    ("max_num_seqs", "tokens", "late"), [(12, 4096, 0), (5, 512, 0), (12, 4096, 1)]
)
def test_mixed_requests_match_single_requests(setup, max_num_seqs, tokens, late):
    """Requests come one by one, while earlier ones grow, end, and are cancelled."""
    wanted = engine_fixtures.answer_alone(setup.model, make_requests(setup))
    assert len({tuple(told.ids) for told in wanted if len(told.ids) == STEPS}) >= 6
    engine = Engine(setup.model, (), max_num_seqs=max_num_seqs, num_cache_tokens=tokens)
    engine._max_pending = late
    output: dict[int, engine_fixtures.RequestEvents] = {}
    tickets = []
    cancelled = make_requests(setup)
    for number, request in enumerate(make_requests(setup)):
        gone = engine.add_request(cancelled[(number + 4) % len(wanted)])
        tickets.append(engine.add_request(request))
        for _ in range(number % 3):
            engine_fixtures.step_engine(engine, output)
        engine.cancel(gone)
    engine_fixtures.run_engine(engine, output)
    for ticket, alone in zip(tickets, wanted, strict=True):
        found = output[ticket]
        assert (found.ids, found.finish_reason) == (alone.ids, "length")
        for token, other in zip(found.tokens, alone.tokens, strict=True):
            assert (token.logprob is None) == (other.logprob is None)
            if token.logprob is not None:
                assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
                best, other_best = dict(token.top_logprobs), dict(other.top_logprobs)
                assert list(best) == list(other_best)
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
@pytest.mark.parametrize("family", get_args(TinyFamily))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
@pytest.mark.parametrize("chunk", [None, 17])
def test_gpu_batched_and_cached_equals_uncached(tmp_path, family, dtype, tolerance, chunk):
    # Both get the same tokens, because near ties differ in 16 bits. CUDA graphs of several batch
    # sizes are used, because half of the sequences are removed.
    tiny = ModelFolder(create_tiny_model(tmp_path / "tiny", family))
    model = load_model(tiny, dtype, torch.device("cuda")).eval()
    assert supports_fused_decode(model) == (dtype != torch.float32 and family != "qwen")
    prompts = engine_fixtures.encode_mixed_questions(NativeRenderer(tiny), tmp_path)
    single = [engine_fixtures.generate_uncached(model, prompt, STEPS) for prompt in prompts]
    forced = [grown.tokens for grown in single]
    for count in (2, len(prompts)):
        batched = engine_fixtures.generate_cached(
            model, prompts[:count], STEPS, chunk=chunk, drop_after=3, forced_tokens=forced[:count]
        )
        for found, wanted in zip(batched, single[:count], strict=True):
            assert len(found.logits) in (4, STEPS)
            for found_V, wanted_V in zip(found.logits, wanted.logits, strict=False):
                difference = (found_V.float() - wanted_V.float()).abs().max()
                assert difference <= tolerance * wanted_V.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("use_cuda_graphs", [False, True])
def test_gpu_mixed_requests_match_cpu(setup, use_cuda_graphs):
    """All fp32 requests at once, by an engine whose host is a step behind."""
    model = copy.deepcopy(setup.model).cuda()
    options = {"num_cache_tokens": 8192, "use_cuda_graphs": use_cuda_graphs}
    engine = Engine(model, (), max_num_seqs=12, **options)
    tickets = [engine.add_request(request) for request in make_requests(setup)]
    found = engine_fixtures.run_engine(engine)
    alone = engine_fixtures.answer_alone(setup.model, make_requests(setup))
    assert [found[ticket].ids for ticket in tickets] == [one.ids for one in alone]


@pytest.mark.gpu
def test_generation_frees_gpu_memory(tmp_path):
    tiny = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    model = load_model(tiny, torch.bfloat16, torch.device("cuda")).eval()
    prompts = engine_fixtures.encode_mixed_questions(NativeRenderer(tiny), tmp_path)
    generate(model, prompts, max_new_tokens=STEPS, end_ids=())
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        generate(model, prompts, max_new_tokens=STEPS, end_ids=())
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


MIXES = 40
"""Of each family."""


@pytest.fixture(scope="module", params=get_args(TinyFamily))
def loaded_model(request, tmp_path_factory) -> GenerationSetup:
    """A random model that carries two adapters, and forty conversations."""
    folder = tmp_path_factory.mktemp(request.param)
    model, renderer = engine_fixtures.make_random_model(folder, request.param, seed=2)
    layers = []
    for seed, tune in enumerate(("all parts", "merger, vision encoder frozen")):
        install_random_adapter(model, seed, TUNE_SETTINGS[tune])
        layers.append(detach_adapter(model))
    model.lora_routing = install_lora_routing(model, layers)
    (folder / "images").mkdir()
    images, videos = make_images(folder / "images"), request.param != "qwen"
    conversations = [make_conversation(number, images, videos=videos) for number in range(40)]
    prompts = [renderer.encode_prompt(one) for one in conversations]
    return GenerationSetup(model, renderer, conversations, prompts)


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
        alone = engine_fixtures.answer_alone(model, requests, end_ids)
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
        result: dict[int, engine_fixtures.RequestEvents] = {}
        tickets = []
        for request in requests:
            tickets.append(engine.add_request(request))
            for _ in range(chance.randint(0, 2)):
                engine_fixtures.step_engine(engine, result)
        engine_fixtures.run_engine(engine, result)
        for ticket, expected in zip(tickets, alone, strict=True):
            found = result[ticket]
            assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
            logprobs = [token.logprob for token in expected.tokens]
            assert [token.logprob for token in found.tokens] == pytest.approx(logprobs, abs=1e-4)
        answers |= {tuple(one.ids) for one in alone}
    assert len(answers) > MIXES, "a model whose answers hardly differ shows nothing"
