from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from each_value import each
from engine_fixtures import (
    ForcedTokens,
    Generated,
    RequestEvents,
    encode_mixed_questions,
    generate_cached,
    generate_uncached,
    make_mixed_questions,
    make_request,
    make_sample,
    record_encoder_calls,
    run_alone,
    run_engine,
    run_requests,
    step_engine,
    write_noise_image,
)
from tiny_model import TinyFamily, create_tiny_model

from finesight.data.sample import LocatedSample
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError
from finesight.infer import model_runner as model_runner_module
from finesight.infer import scheduler as scheduler_area
from finesight.infer.engine import CPU_BLOCK_SIZE, Engine, compute_cache_capacity, generate
from finesight.infer.kv_cache import append_tokens
from finesight.infer.prediction import predict
from finesight.infer.request import DecodingConstraint, GenerationRequest, SamplingParams
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

CPU = torch.device("cpu")
STEPS = 9
Loaded = tuple[VisionLanguageModel, NativeRenderer]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(create_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def loaded_model(tiny: ModelFolder) -> Loaded:
    return load_model(tiny, torch.float32, CPU).eval(), NativeRenderer(tiny)


@pytest.fixture
def prompts(loaded_model: Loaded, tmp_path: Path) -> list[EncodedSample]:
    return encode_mixed_questions(loaded_model[1], tmp_path)


def test_cache_size_is_bounded_in_bytes(tiny):
    """As many tokens of the published 2B model as ever, and of the first Qwen-VL far fewer."""
    model = load_model(tiny, torch.bfloat16, CPU)
    language = model.config.decoder
    for depth, kv_heads, tokens in ((28, 2, 1 << 18), (32, 32, 14336)):
        sizes = replace(language, num_layers=depth, num_kv_heads=kv_heads, head_dim=128)
        model.config = replace(model.config, decoder=sizes)
        assert compute_cache_capacity(model) == tokens
    assert compute_cache_capacity(model.float()) == 14336 // 2


def test_prompt_longer_than_max_positions_is_rejected(loaded_model, tmp_path):
    model, renderer = loaded_model
    prompts = [
        renderer.encode_prompt(make_sample(name, tmp_path, text))
        for name, text in (("s", "Why?"),) * 2
    ]
    last = prompts[0].tokenized.num_tokens - 1
    model.config = replace(
        model.config,
        decoder=replace(model.config.decoder, max_position_embeddings=last + 1),
    )
    assert generate(model, prompts, max_new_tokens=1, end_ids=())
    longer = [*prompts, renderer.encode_prompt(make_sample("long", tmp_path, "Why? Why?"))]
    with pytest.raises(UserError, match=f"(?s)long: .*below {last + 1}"):
        generate(model, longer, max_new_tokens=1, end_ids=())


def test_request_exceeding_the_cache_is_rejected(loaded_model, tmp_path):
    model, renderer = loaded_model
    prompt = renderer.encode_prompt(make_sample("s", tmp_path, "Why?"))
    tokens = prompt.tokenized.num_tokens
    engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=64)
    assert engine.get_max_new_tokens(prompt) == 64 - tokens
    with pytest.raises(UserError, match=f"max_new_tokens of at most {64 - tokens}"):
        engine.add_request(make_request(prompt, 65 - tokens))
    (result,) = run_requests(engine, prompt, tokens=64 - tokens)
    assert len(result.ids) == 64 - tokens
    long = renderer.encode_prompt(make_sample("long", tmp_path, "Why? " * 40))
    with pytest.raises(UserError, match="fewer than 64 tokens, the size of the KV cache"):
        engine.get_max_new_tokens(long)
    language = replace(model.config.decoder, max_position_embeddings=tokens + 5)
    model.config = replace(model.config, decoder=language)
    assert engine.get_max_new_tokens(prompt) == 5


def test_zero_max_new_tokens_is_rejected(loaded_model, tmp_path):
    with pytest.raises(AssertionError, match="max_new_tokens is 0"):
        generate(None, [], max_new_tokens=0, end_ids=())
    engine = Engine(loaded_model[0], (), max_num_seqs=1, num_cache_tokens=64)
    with pytest.raises(AssertionError, match="max_new_tokens is 0"):
        engine.add_request(
            make_request(loaded_model[1].encode_prompt(make_sample("s", tmp_path, "Why?")), 0)
        )


def test_float16_overflow_is_reported(tiny, tmp_path):
    model = load_model(tiny, torch.float16, CPU)
    prompts = [NativeRenderer(tiny).encode_prompt(make_sample("s", tmp_path, "Why?"))]
    assert generate(model, prompts, max_new_tokens=1, end_ids=())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(60000)
    with pytest.raises(UserError, match="overflow in float16"):
        generate(model, prompts, max_new_tokens=1, end_ids=())


def test_overflow_does_not_affect_other_requests(loaded_model, tmp_path, monkeypatch):
    """Check the KV cache blocks of concurrent and later requests."""
    model, renderer = loaded_model
    questions = encode_mixed_questions(renderer, tmp_path)
    engine = Engine(model, (), max_num_seqs=8, num_cache_tokens=1024)
    wanted = [told.ids for told in run_requests(engine, *questions)]
    too_much = renderer.tokenizer.encode("§")[0]
    assert all(too_much not in prompt.tokenized.ids_T for prompt in questions)
    embed = model.model.embed
    monkeypatch.setattr(
        model.model,
        "embed",
        lambda ids_T: embed(ids_T).masked_fill((ids_T == too_much)[:, None], float("inf")),
    )
    bad = renderer.encode_prompt(make_sample("bad", tmp_path, "§" * 30))
    engine = Engine(model, (), max_num_seqs=8, num_cache_tokens=512)
    (failed, *others) = run_requests(engine, bad, *questions)
    assert failed.error is not None
    assert "overflow" in str(failed.error)
    assert [told.ids for told in others] == wanted
    for _ in range(3):
        assert [told.ids for told in run_requests(engine, *questions)] == wanted
        (again,) = run_requests(engine, bad)
        assert again.error is not None


@pytest.mark.parametrize("late", [0, 1])
@each("seed", range(12))
def test_random_requests_leak_no_blocks(loaded_model, prompts, seed, late, monkeypatch):
    """Random requests, cancelled at random, in a cache that is too small for all of them; what is
    not cancelled is answered as alone."""
    model, _ = loaded_model
    rng = random.Random(seed)
    monkeypatch.setattr(scheduler_area, "MAX_PREFILL_TOKENS", rng.choice([8, 50, 8192]))
    monkeypatch.setattr(scheduler_area, "MAX_MIXED_PREFILL_TOKENS", rng.choice([1, 20, 2048]))
    end_ids = {token for token in range(400) if rng.random() < 0.1}
    alone = [run_alone(model, prompt, end_ids=tuple(end_ids)) for prompt in prompts]
    engine = Engine(model, tuple(end_ids), max_num_seqs=rng.choice([1, 2, 4]), num_cache_tokens=176)
    engine._max_pending = late
    result: dict[int, RequestEvents] = {}
    requested: dict[int, tuple[int, int]] = {}
    gone: set[int] = set()
    for _ in range(120):
        if rng.random() < 0.3:
            which, tokens = rng.randrange(len(prompts)), rng.randrange(1, STEPS + 1)
            requested[engine.add_request(make_request(prompts[which], tokens))] = which, tokens
        if requested and rng.random() < 0.15:
            ticket = rng.choice(list(requested))
            engine.cancel(ticket)
            engine.cancel(10**6)
            gone.add(ticket)
        step_engine(engine, result)
        running = [*engine._scheduler.prefilling, *engine._scheduler.decoding]
        used = {block for sequence in running for block in sequence.prompt.block_ids}
        assert engine.num_free_blocks == engine.num_blocks - len(used)
    run_engine(engine, result)
    assert engine.num_free_blocks == engine.num_blocks
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert set(result) == set(requested)
    assert not engine._runner.cache.seq_lens_R.any()
    assert not engine._runner.cache.block_table_RB.any()
    for ticket, (which, tokens) in requested.items():
        full, found = alone[which].ids[:tokens], result[ticket]
        if found.finish_reason == "cancelled":
            assert ticket in gone
            assert found.ids == full[: len(found.ids)]
        else:
            assert found.ids == full
            assert found.finish_reason == ("stop" if full[-1] in end_ids else "length")


def test_repeated_prompt_reuses_cached_blocks(loaded_model, prompts):
    """Count the full blocks without that of the last token."""
    model, _ = loaded_model
    engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=1024)
    for prompt in prompts:
        first, again = run_requests(engine, prompt)[0], run_requests(engine, prompt)[0]
        assert first.ids == again.ids
        known = (prompt.tokenized.num_tokens - 1) // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE
        assert again.num_cached_tokens == known >= first.num_cached_tokens


def test_concurrent_equal_prompts_share_cache_later(loaded_model, tmp_path):
    model, renderer = loaded_model
    prompt = renderer.encode_prompt(make_mixed_questions(tmp_path)[0])
    engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=1024)
    one, other = run_requests(engine, prompt, prompt)
    assert one.ids == other.ids
    assert (one.num_cached_tokens, other.num_cached_tokens) == (0, 0)
    three = run_requests(engine, prompt, prompt, prompt)
    assert [told.ids for told in three] == [one.ids] * 3
    assert all(told.num_cached_tokens > 0 for told in three)
    assert engine.num_free_blocks == engine.num_blocks


@each("tokens", range(33, 33 + CPU_BLOCK_SIZE))
def test_answer_is_cached_for_next_turn(loaded_model, tmp_path, tokens):
    """All but the last token of the answer, which is nowhere read; with the same answer as if they
    were not."""
    model, renderer = loaded_model
    prompt = renderer.encode_prompt(make_mixed_questions(tmp_path)[0])
    engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=1024)
    (result,) = run_requests(engine, prompt, tokens=tokens)
    following = replace(prompt, tokenized=append_tokens(prompt.tokenized, [*result.ids, 5, 6, 7]))
    (found,) = run_requests(engine, following)
    assert (
        found.num_cached_tokens
        == (prompt.tokenized.num_tokens + tokens - 1) // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE
    )
    fresh = run_alone(model, following)
    assert (fresh.ids, fresh.num_cached_tokens) == (found.ids, 0)


def test_cancelled_partial_prefill_is_not_cached(loaded_model, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler_area, "MAX_PREFILL_TOKENS", 20)
    model, renderer = loaded_model
    prompt = renderer.encode_prompt(make_mixed_questions(tmp_path)[4])
    engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=512)
    ticket = engine.add_request(make_request(prompt))
    assert engine.step() == []
    engine.cancel(ticket)
    result = run_requests(engine, prompt)[0]
    assert (result.num_cached_tokens, result.ids) == (0, run_requests(engine, prompt)[0].ids)


@pytest.mark.parametrize("change", ["pixels", "system", "text"])
def test_different_prompt_shares_only_the_common_prefix(loaded_model, tiny, tmp_path, change):
    """And is answered as without the cache."""
    model, renderer = loaded_model
    write_noise_image(tmp_path / "a.png", 84, 56, 0)
    texts = ("a.png", "What is in the picture? " * 3)
    engine = Engine(model, (), max_num_seqs=2, num_cache_tokens=1024)
    first = renderer.encode_prompt(make_sample("one", tmp_path, *texts))
    (result,) = run_requests(engine, first)
    if change == "pixels":
        write_noise_image(tmp_path / "a.png", 84, 56, 1)
    elif change == "system":
        renderer = NativeRenderer(tiny, system_prompt="Answer briefly and in English, please.")
    else:
        texts = (texts[0], "And what " + texts[1])
    other = renderer.encode_prompt(make_sample("one", tmp_path, *texts))
    (found,) = run_requests(engine, other)
    equal = first.tokenized.spans[0].start
    if change != "pixels":
        pairs = zip(first.tokenized.ids_T, other.tokenized.ids_T, strict=False)
        equal = next(n for n, (mine, yours) in enumerate(pairs) if mine != yours)
    assert found.num_cached_tokens == equal // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE
    assert found.ids == run_alone(model, other).ids
    assert result.ids == run_requests(engine, first)[0].ids


def test_qwen_vl_shares_no_cache_across_trained_length(tmp_path):
    """A longer prompt is read with another rotary base from its first token on."""
    pytest.importorskip("tiktoken")
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny", "qwen"))
    model, renderer = load_model(folder, torch.float32, CPU).eval(), NativeRenderer(folder)
    text = "Read it. " * 30
    prompts = [
        renderer.encode_prompt(make_sample("s", tmp_path, text + "Why? " * n)) for n in (0, 8, 16)
    ]
    lengths = [prompt.tokenized.num_tokens for prompt in prompts]
    language = replace(model.config.decoder, train_length=lengths[0] + 1)
    model.config = replace(model.config, decoder=language)
    model.model.config = language
    assert lengths[0] < language.train_length < lengths[1]
    engine = Engine(model, (), max_num_seqs=2, num_cache_tokens=4096)
    result = [run_requests(engine, prompt)[0] for prompt in prompts]
    assert result[0].num_cached_tokens == result[1].num_cached_tokens == 0
    # Of one base again.
    assert result[2].num_cached_tokens >= lengths[0] // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE
    for prompt, found in zip(prompts, result, strict=True):
        assert found.ids == run_alone(model, prompt).ids


def test_sampled_requests_do_not_delay_greedy_ones(loaded_model, tmp_path):
    """Rows of every kind in one step: each is told a token with every step."""
    model, renderer = loaded_model
    prompt: EncodedSample = renderer.encode_prompt(make_sample("s", tmp_path, "Why?"))
    engine = Engine(model, (), max_num_seqs=3, num_cache_tokens=512)
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0, seed=0), SamplingParams()):
        engine.add_request(
            GenerationRequest(prompt=prompt, max_new_tokens=6, sampling_params=sampling)
        )
    engine.step()
    for _ in range(4):
        assert sorted(event.request_id for event in engine.step()) == [0, 1, 2]


def test_overflow_during_decoding_ends_only_that_request(loaded_model, tmp_path, monkeypatch):
    """And not the answers beside it."""
    model, renderer = loaded_model
    samples = [make_sample(text, tmp_path, text) for text in ("Why?", "How?")]
    engine = Engine(model, (), max_num_seqs=2, num_cache_tokens=400)
    requests = [make_request(renderer.encode_prompt(sample), 6) for sample in samples]
    tickets = [engine.add_request(request) for request in requests]
    logits, calls = model.compute_logits, []

    def overflowing(h_RW: torch.Tensor) -> torch.Tensor:
        found = logits(h_RW).clone()
        calls.append(len(found))
        if len(calls) == 4:
            found[0, 7] = torch.nan
        return found

    monkeypatch.setattr(model, "compute_logits", overflowing)
    ends = run_engine(engine)
    assert "overflow" in str(ends[tickets[0]].error)
    assert ends[tickets[1]].finish_reason == "length"
    assert engine.num_free_blocks == engine.num_blocks


class FailingConstraint(DecodingConstraint):
    """A constraint that allows everything, and fails at one of its calls."""

    def __init__(self, vocabulary: int, failing: str) -> None:
        self._bits = np.full(-(-vocabulary // 32), -1, dtype=np.int32)
        self._failing, self._calls = failing, 0

    def compute_bitmask(self) -> np.ndarray:
        self._calls += 1
        if self._failing == "compute_bitmask" and self._calls == 3:
            raise ZeroDivisionError("a fault of the grammar")
        return self._bits

    def accept_token(self, token: int) -> None:
        if self._failing == "accept_token" and self._calls == 3:
            raise ZeroDivisionError("a fault of the grammar")


@pytest.mark.parametrize("failing", ["compute_bitmask", "accept_token"])
@pytest.mark.parametrize("late", [0, 1])
def test_failing_constraint_ends_only_its_request(loaded_model, prompts, failing, late):
    model, _ = loaded_model
    (wanted,) = generate(model, prompts[1:2], max_new_tokens=STEPS, end_ids=())
    engine = Engine(model, (), max_num_seqs=3, num_cache_tokens=2000)
    engine._max_pending = late
    broken = FailingConstraint(model.config.decoder.vocab_size, failing)
    requests = [
        GenerationRequest(prompt=prompts[0], max_new_tokens=STEPS, constraint=broken),
        make_request(prompts[1]),
    ]
    tickets = [engine.add_request(request) for request in requests]
    result = run_engine(engine)
    assert isinstance(result[tickets[0]].error, ZeroDivisionError)
    assert (result[tickets[1]].error, result[tickets[1]].ids) == (None, wanted)
    assert engine.num_free_blocks == engine.num_blocks


class Late(ForcedTokens):
    """A constraint whose masks are ready when they have been asked for so many times, or never."""

    def __init__(self, tokens: Sequence[int], vocabulary: int, rng: random.Random | None) -> None:
        super().__init__(tokens, vocabulary)
        self._rng, self._left_asks = rng, 0
        self.started = 0

    def start(self) -> None:
        self.started += 1

    def wait_bitmask(self, timeout_s: float) -> bool:
        self._left_asks -= 1
        return self._rng is not None and self._left_asks <= 0

    def accept_token(self, token: int) -> None:
        super().accept_token(token)
        self._left_asks = 0 if self._rng is None else self._rng.choice([0, 1, 2, 5])


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_answers_whose_masks_are_late_are_paused_and_equal(loaded_model, prompts, seed, late):
    """They say what they would say in time; the others do not wait for them."""
    model, _ = loaded_model
    vocabulary = model.config.decoder.vocab_size
    output = [7, 8, 9, 10, 11, 12, 13, 14, 15]
    rng = random.Random(seed)

    def requests(late_masks: bool) -> list[GenerationRequest]:
        made = []
        for number, prompt in enumerate(prompts):
            constraint: DecodingConstraint | None = None
            if number % 2:
                constraint = ForcedTokens(output, vocabulary)
                if late_masks:
                    constraint = Late(output, vocabulary, rng)
            sampling = SamplingParams(temperature=1.0, seed=number, repetition_penalty=1.1)
            options = {"constraint": constraint, "sampling_params": sampling, "logprobs": 2}
            made.append(GenerationRequest(prompt=prompt, max_new_tokens=STEPS, **options))
        return made

    answers = []
    for late_masks in (False, True):
        engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=2000)
        engine._max_pending = late
        tickets = [engine.add_request(request) for request in requests(late_masks)]
        events_by_id = run_engine(engine)
        assert engine.num_free_blocks == engine.num_blocks
        answers.append([events_by_id[ticket] for ticket in tickets])
    for in_time, paused in zip(*answers, strict=True):
        assert paused.ids == in_time.ids
        assert paused.finish_reason == in_time.finish_reason
        for token, other in zip(paused.tokens, in_time.tokens, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("late", [0, 1])
def test_missing_mask_does_not_block_others(loaded_model, prompts, late):
    model, _ = loaded_model
    (wanted,) = generate(model, prompts[1:2], max_new_tokens=STEPS, end_ids=())
    engine = Engine(model, (), max_num_seqs=2, num_cache_tokens=2000)
    engine._max_pending = late
    never = Late([7], model.config.decoder.vocab_size, None)
    stuck = engine.add_request(
        GenerationRequest(prompt=prompts[0], max_new_tokens=STEPS, constraint=never)
    )
    other = engine.add_request(make_request(prompts[1]))
    waiting = engine.add_request(make_request(prompts[1]))
    output: dict[int, RequestEvents] = {}
    for _ in range(60):
        step_engine(engine, output)
    assert output[other].ids == output[waiting].ids == wanted
    assert (never.started, stuck in output, engine.num_running) == (1, False, 1)
    engine.cancel(stuck)
    step_engine(engine, output)
    assert (output[stuck].finish_reason, engine.has_work) == ("cancelled", False)
    assert engine.num_free_blocks == engine.num_blocks


def test_progress_callback_counts_finished_answers(loaded_model, prompts):
    model, _ = loaded_model
    result: list[int] = []
    answers = generate(model, prompts, max_new_tokens=4, end_ids=(), on_progress=result.append)
    assert sum(result) == len(prompts) == len(answers)
    assert generate(model, [], max_new_tokens=4, end_ids=()) == []


def test_generation_stops_at_max_positions(loaded_model, tmp_path):
    """Check that no KV cache is reserved for tokens that are never generated."""
    model, renderer = loaded_model
    requested = [make_sample(name, tmp_path, name) for name in ("Why?", "Why? Why?")]
    prompts = [renderer.encode_prompt(question) for question in requested]
    lengths = [prompt.tokenized.num_tokens for prompt in prompts]
    language = replace(model.config.decoder, max_position_embeddings=max(lengths) + 3)
    model.config = replace(model.config, decoder=language)
    answers = generate(model, prompts, max_new_tokens=10**12, end_ids=())
    full = [tokens + len(answer) for tokens, answer in zip(lengths, answers, strict=True)]
    assert full == [language.max_position_embeddings] * 2
    ended = generate(model, prompts, max_new_tokens=10**12, end_ids=renderer.end_ids)
    found = predict(model, renderer, requested, max_new_tokens=10**12, batch_size=1)
    assert [prediction.num_tokens for prediction in found] == [len(answer) for answer in ended]


def test_image_is_encoded_once(loaded_model, tmp_path, monkeypatch):
    """Beside others, in one prompt and in many, before another text; not where all of it is known
    from the cache."""
    model, renderer = loaded_model
    make_mixed_questions(tmp_path)
    texts = [("What?", "a.png"), ("a.png", "Where?"), ("a.png", "b.png", "Why?", "b.png")]
    prompts = [
        renderer.encode_prompt(make_sample(f"{n}", tmp_path, *text)) for n, text in enumerate(texts)
    ]
    wanted = [run_alone(model, prompt).ids for prompt in prompts]
    calls = record_encoder_calls(model, monkeypatch)
    engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=1024)
    assert [told.ids for told in run_requests(engine, *prompts)] == wanted
    assert [call.num_images for call in calls] == [2]
    assert [told.ids for told in run_requests(engine, *reversed(prompts))] == wanted[::-1]
    assert [call.num_images for call in calls] == [2]


def test_vision_feature_cache_is_bounded(loaded_model, tmp_path, monkeypatch):
    """Check that the least recently used features are evicted and computed again on demand."""
    model, renderer = loaded_model
    prompts = []
    for seed in range(4):
        write_noise_image(tmp_path / f"{seed}.png", 56, 56, seed)
        prompts.append(
            renderer.encode_prompt(make_sample("s", tmp_path, f"x{seed}", f"{seed}.png"))
        )
    (span,) = prompts[0].tokenized.spans
    image = (span.stop - span.start) * model.config.decoder.hidden_size * 4
    monkeypatch.setattr(model_runner_module, "CPU_FEATURE_CACHE_BYTES", 2 * image)
    calls = record_encoder_calls(model, monkeypatch)
    # Blocks for one request only: prefix cache entries are soon evicted.
    engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=80)
    outcome = []
    for number in (0, 1, 0, 2, 0, 1):
        before = len(calls)
        run_requests(engine, prompts[number], tokens=80 - prompts[number].tokenized.num_tokens)
        assert engine._runner._feature_cache._num_bytes <= 2 * image
        outcome.append(len(calls) > before)
    assert outcome == [True, True, False, True, False, True]


def test_images_are_encoded_in_bounded_batches(loaded_model, prompts, monkeypatch):
    model, _ = loaded_model
    wanted = generate(model, prompts, max_new_tokens=5, end_ids=())
    calls = record_encoder_calls(model, monkeypatch)
    generate(model, prompts, max_new_tokens=1, end_ids=())
    assert len(calls) == 1
    largest = max(
        len(model_runner_module.get_span_patches(p, n))
        for p in prompts
        for n in range(len(p.tokenized.spans))
    )
    monkeypatch.setattr(model_runner_module, "MAX_ENCODER_PATCHES", largest)
    calls.clear()
    assert generate(model, prompts, max_new_tokens=5, end_ids=()) == wanted
    assert len(calls) > 1
    assert max(call.num_patches for call in calls) <= largest


NUM_STEPS = 4
VIDEO_FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]


def _load_video_model(folder: Path, family: TinyFamily) -> Loaded:
    """A random model whose weights are large enough that attention matters."""
    tiny = ModelFolder(create_tiny_model(folder / "tiny", family, 2))
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.layers"):
                parameter.mul_(2)
    return model, NativeRenderer(tiny)


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def video_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return _load_video_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, LocatedSample]:
    """Text, images, and videos of one, two, three and five frames, alone and in one sample."""
    for seed, (width, height) in enumerate([(84, 56), (112, 84)]):
        write_noise_image(tmp_path / f"image{seed}.png", width, height, seed)
    frames = [
        write_noise_image(tmp_path / f"frame{seed}.png", 84, 84, 10 + seed).name
        for seed in range(5)
    ]
    contents: dict[str, tuple[str | tuple[str, ...], ...]] = {
        "text": ("Why is the sky blue?",),
        "image": ("image0.png", "What is it?"),
        "one frame": (tuple(frames[:1]), "What happens?"),
        "two frames": (tuple(frames[1:3]), "Who is there?"),
        "five frames": (tuple(frames), "Count them."),
        "both": ("image1.png", tuple(frames[:3]), "image0.png", "Which one moves?"),
    }
    return {name: make_sample(name, tmp_path, *content) for name, content in contents.items()}


def _assert_equal(found: Sequence[Generated], wanted: Sequence[Generated]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens
        for found_V, wanted_V in zip(one.logits, other.logits, strict=True):
            assert (found_V - wanted_V).abs().max() <= 1e-5 * wanted_V.abs().max()


def test_mixed_batch_matches_single_samples(video_model, questions, tmp_path):
    model, renderer = video_model
    prompts = {name: renderer.encode_prompt(one) for name, one in questions.items()}
    alone = {name: generate_uncached(model, one, NUM_STEPS) for name, one in prompts.items()}
    assert len({tuple(grown.tokens) for grown in alone.values()}) == len(alone)
    for size in range(2, len(prompts) + 1):
        for mix in combinations(prompts, size):
            found = generate_cached(model, [prompts[name] for name in mix], NUM_STEPS)
            _assert_equal(found, [alone[name] for name in mix])


def test_engine_and_predict_match_single_samples(video_model, questions):
    model, renderer = video_model
    located_sample = [*questions.values()]
    prompts = [renderer.encode_prompt(one) for one in located_sample]
    alone = [run_alone(model, one, NUM_STEPS) for one in prompts]
    batched = run_requests(
        Engine(model, (), max_num_seqs=len(prompts), num_cache_tokens=4096),
        *prompts,
        tokens=NUM_STEPS,
    )
    assert [told.ids for told in batched] == [told.ids for told in alone]
    single = [
        predict(model, renderer, [one], max_new_tokens=NUM_STEPS, batch_size=1)[0]
        for one in located_sample
    ]
    options = {"max_new_tokens": NUM_STEPS, "batch_size": len(located_sample)}
    assert predict(model, renderer, located_sample, **options) == single


def test_image_only_batch_uploads_one_frame_per_patch(video_model, questions, monkeypatch):
    """Only a batch with a video of several frames uploads the temporal repetition."""
    model, renderer = video_model
    calls = record_encoder_calls(model, monkeypatch)
    prompts = {name: renderer.encode_prompt(one) for name, one in questions.items()}
    values = renderer.patch_config.patch_dim
    generate_cached(model, [prompts["image"], prompts["one frame"], prompts["text"]], 1)
    generate_cached(model, [prompts["image"], prompts["two frames"]], 1)
    assert [call.patch_width for call in calls] == [
        values // renderer.patch_config.temporal_patch_size,
        values,
    ]


def test_cached_image_is_reused_with_a_later_video(video_model, questions, tmp_path, monkeypatch):
    """Its features are reused, and so are the tokens up to the video of a later turn."""
    model, renderer = video_model
    frames = tuple(f"frame{number}.png" for number in range(4))
    first = renderer.encode_prompt(make_sample("one", tmp_path, "image0.png", "What is it? " * 3))
    later = renderer.encode_prompt(
        make_sample("two", tmp_path, "image0.png", "What is it? " * 3, frames, "Now?")
    )
    alone = run_alone(model, later, NUM_STEPS)
    engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=1024)
    run_requests(engine, first, tokens=NUM_STEPS)
    calls = record_encoder_calls(model, monkeypatch)
    (found,) = run_requests(engine, later, tokens=NUM_STEPS)
    assert found.ids == alone.ids
    assert [call.num_images for call in calls] == [len(later.tokenized.spans) - 1]
    image = first.tokenized.spans[0]
    assert found.num_cached_tokens > image.stop
