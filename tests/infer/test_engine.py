import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_fixtures import (
    ForcedTokens,
    RequestEvents,
    encode_mixed_questions,
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
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError
from finesight.infer import model_runner as model_runner_module
from finesight.infer import scheduler as scheduler_area
from finesight.infer.block_manager import append_tokens
from finesight.infer.engine import CPU_BLOCK_SIZE, Engine
from finesight.infer.prediction import generate
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


def limit_positions(model: VisionLanguageModel, num_positions: int) -> None:
    language = replace(model.config.decoder, max_position_embeddings=num_positions)
    model.config = replace(model.config, decoder=language)


def test_requests_beyond_cache_or_positions_are_rejected(loaded_model, tmp_path):
    model, renderer = loaded_model
    prompt, long = (
        renderer.encode_prompt(make_sample("s", tmp_path, "Why? " * count)) for count in (1, 40)
    )
    tokens = prompt.tokenized.num_tokens
    engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=64)
    assert engine.get_max_new_tokens(prompt) == 64 - tokens
    with pytest.raises(AssertionError, match=f"not 1 to {64 - tokens}"):
        engine.add_request(make_request(prompt, 65 - tokens))
    (result,) = run_requests(engine, prompt, tokens=64 - tokens)
    assert len(result.ids) == 64 - tokens
    with pytest.raises(UserError, match="fewer than 64 tokens, the size of the KV cache"):
        engine.get_max_new_tokens(long)
    for num_positions, available in ((tokens + 5, 5), (tokens, 1)):
        limit_positions(model, num_positions)
        assert engine.get_max_new_tokens(prompt) == available
    limit_positions(model, tokens - 1)
    with pytest.raises(UserError, match=f"positions below {tokens - 1}"):
        engine.get_max_new_tokens(prompt)


def test_overflow_does_not_affect_other_requests(loaded_model, tmp_path, monkeypatch):
    """Includes later requests, which get the KV-cache blocks of the failed one."""
    model, renderer = loaded_model
    questions = encode_mixed_questions(renderer, tmp_path)
    wanted = generate(model, questions, max_new_tokens=STEPS, end_ids=())
    too_much = renderer.tokenizer.encode("§")[0]
    embed = model.model.embed
    monkeypatch.setattr(
        model.model,
        "embed",
        lambda ids_T: embed(ids_T).masked_fill((ids_T == too_much)[:, None], float("inf")),
    )
    bad = renderer.encode_prompt(make_sample("bad", tmp_path, "§" * 30))
    engine = Engine(model, (), max_num_seqs=8, num_cache_tokens=512)
    for _ in range(3):
        failed, *others = run_requests(engine, bad, *questions)
        assert "overflow" in str(failed.error)
        assert [told.ids for told in others] == wanted
    with pytest.raises(UserError, match="overflow in float32"):
        generate(model, [*questions, bad], max_new_tokens=1, end_ids=())


@pytest.fixture
def answers(loaded_model: Loaded, prompts: list[EncodedSample]) -> list[Sequence[int]]:
    """Answers of prompts alone, without end tokens."""
    return [run_alone(loaded_model[0], prompt).ids for prompt in prompts]


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_random_requests_leak_no_blocks(loaded_model, prompts, answers, seed, late, monkeypatch):
    """Random requests and cancellations, in a cache too small for all, are answered as alone."""
    model, rng = loaded_model[0], random.Random(seed)
    monkeypatch.setattr(scheduler_area, "MAX_PREFILL_TOKENS", rng.choice([8, 50, 8192]))
    monkeypatch.setattr(scheduler_area, "MAX_MIXED_PREFILL_TOKENS", rng.choice([1, 20, 2048]))
    end_ids = {token for token in range(400) if rng.random() < 0.1}
    engine = Engine(model, tuple(end_ids), max_num_seqs=rng.choice([1, 2, 4]), num_cache_tokens=176)
    engine._max_pending = late
    result: dict[int, RequestEvents] = {}
    requested: dict[int, tuple[int, int]] = {}
    cancelled: set[int] = set()
    for _ in range(120):
        if rng.random() < 0.3:
            which, tokens = rng.randrange(len(prompts)), rng.randrange(1, STEPS + 1)
            requested[engine.add_request(make_request(prompts[which], tokens))] = which, tokens
        if requested and rng.random() < 0.15:
            cancelled.add(rng.choice(list(requested)))
            for ticket in (*cancelled, 10**6):
                engine.cancel(ticket)
        step_engine(engine, result)
        running = [*engine._scheduler.prefilling, *engine._scheduler.decoding]
        used = {block for sequence in running for block in sequence.prompt.block_ids}
        assert engine.num_free_blocks == engine.num_blocks - len(used)
    run_engine(engine, result)
    assert engine.num_free_blocks == engine.num_blocks
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert not engine._runner.cache.seq_lens_R.any()
    assert not engine._runner.cache.block_table_RB.any()
    assert set(result) == set(requested)
    for ticket, (which, tokens) in requested.items():
        ends = [n for n, token in enumerate(answers[which], 1) if token in end_ids]
        full, found = answers[which][: min([tokens, *ends])], result[ticket]
        if found.finish_reason == "cancelled":
            assert ticket in cancelled
            assert found.ids == full[: len(found.ids)]
        else:
            assert found.ids == full
            assert found.finish_reason == ("stop" if full[-1] in end_ids else "length")


def test_repeated_prompt_reuses_its_full_blocks(loaded_model, prompts):
    """All but that of the last token, also among equal prompts that start together."""
    model, _ = loaded_model
    engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=1024)
    for prompt in prompts:
        first, other = run_requests(engine, prompt, prompt)
        (again,) = run_requests(engine, prompt)
        assert first.ids == other.ids == again.ids
        known = (prompt.tokenized.num_tokens - 1) // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE
        assert again.num_cached_tokens == other.num_cached_tokens == known
        assert first.num_cached_tokens < known
    assert engine.num_free_blocks == engine.num_blocks


def test_equal_prompts_share_linear_attention_states(tmp_path):
    """A snapshot is taken for waiting prompts only, and replaced after the last used one."""
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny", "qwen3_5"))
    model, renderer = load_model(folder, torch.float32, CPU).eval(), NativeRenderer(folder)
    texts = ["Name the colours. " * count for count in (3, 4, 5)]
    prompts = [renderer.encode_prompt(make_sample("s", tmp_path, text)) for text in texts]
    engine = Engine(model, (), max_num_seqs=3, num_cache_tokens=2048, num_snapshots=2)
    for prompt in (*prompts, prompts[0]):
        known = (prompt.tokenized.num_tokens - 1) // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE
        first, *others = run_requests(engine, prompt, prompt, prompt)
        assert [one.num_cached_tokens for one in (first, *others)] == [0, known, known]
        assert first.ids == others[0].ids == others[1].ids == run_alone(model, prompt).ids
    engine.clear_caches()
    (alone,) = run_requests(engine, prompts[0])
    assert (alone.num_cached_tokens, alone.ids) == (0, run_alone(model, prompts[0]).ids)
    assert engine.num_free_blocks == engine.num_blocks


@pytest.mark.parametrize("tokens", range(33, 33 + CPU_BLOCK_SIZE))
def test_answer_is_cached_for_next_turn(loaded_model, prompts, tokens):
    """All but the last token of the answer, whose keys and values are not computed."""
    model, prompt = loaded_model[0], prompts[0]
    engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=1024)
    (result,) = run_requests(engine, prompt, tokens=tokens)
    following = replace(prompt, tokenized=append_tokens(prompt.tokenized, [*result.ids, 5, 6, 7]))
    (found,) = run_requests(engine, following)
    known = prompt.tokenized.num_tokens + tokens - 1
    assert found.num_cached_tokens == known // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE
    assert found.ids == run_alone(model, following).ids


@pytest.mark.parametrize("change", ["pixels", "system prompt"])
def test_different_prompt_shares_only_the_common_prefix(loaded_model, tiny, tmp_path, change):
    model, renderer = loaded_model
    write_noise_image(tmp_path / "a.png", 84, 56, 0)
    sample = make_sample("one", tmp_path, "a.png", "What is in the picture? " * 3)
    engine = Engine(model, (), max_num_seqs=2, num_cache_tokens=1024)
    first = renderer.encode_prompt(sample)
    (result,) = run_requests(engine, first)
    if change == "pixels":
        write_noise_image(tmp_path / "a.png", 84, 56, 1)
        other = renderer.encode_prompt(sample)
        equal = first.tokenized.spans[0].start
    else:
        other = NativeRenderer(tiny, system_prompt="Answer briefly.").encode_prompt(sample)
        pairs = zip(first.tokenized.ids_T, other.tokenized.ids_T, strict=False)
        equal = next(n for n, (mine, yours) in enumerate(pairs) if mine != yours)
    (found,) = run_requests(engine, other)
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


def test_overflow_during_decoding_ends_only_that_request(loaded_model, prompts, monkeypatch):
    model, _ = loaded_model
    engine = Engine(model, (), max_num_seqs=2, num_cache_tokens=400)
    logits, calls = model.compute_logits, []

    def overflowing(h_RW: torch.Tensor) -> torch.Tensor:
        found = logits(h_RW).clone()
        calls.append(len(found))
        if len(calls) == 4:
            found[0, 7] = torch.nan
        return found

    monkeypatch.setattr(model, "compute_logits", overflowing)
    failed, other = run_requests(engine, *prompts[:2])
    assert "overflow" in str(failed.error)
    assert other.finish_reason == "length"
    assert engine.num_free_blocks == engine.num_blocks


@pytest.mark.parametrize("failing", ["compute_bitmask", "accept_token"])
@pytest.mark.parametrize("late", [0, 1])
def test_failing_constraint_ends_only_its_request(
    loaded_model, prompts, failing, late, monkeypatch
):
    model, _ = loaded_model
    wanted = run_alone(model, prompts[1]).ids
    engine = Engine(model, (), max_num_seqs=3, num_cache_tokens=2000)
    engine._max_pending = late
    constraint = ForcedTokens(range(STEPS), model.config.decoder.vocab_size)
    working = getattr(constraint, failing)

    def fail_later(*token: int) -> object:
        if len(constraint.accepted) == 2:
            raise ZeroDivisionError("a fault of the grammar")
        return working(*token)

    monkeypatch.setattr(constraint, failing, fail_later)
    request = GenerationRequest(prompt=prompts[0], max_new_tokens=STEPS, constraint=constraint)
    tickets = [engine.add_request(one) for one in (request, make_request(prompts[1]))]
    events = run_engine(engine)
    assert isinstance(events[tickets[0]].error, ZeroDivisionError)
    assert events[tickets[1]].ids == wanted
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
    model, _ = loaded_model
    vocabulary, output = model.config.decoder.vocab_size, range(7, 7 + STEPS)
    rng, answers = random.Random(seed), []
    for late_masks in (False, True):
        engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=2000)
        engine._max_pending = late
        tickets = []
        for number, prompt in enumerate(prompts):
            constraint: DecodingConstraint | None = None
            if number % 2 and late_masks:
                constraint = Late(output, vocabulary, rng)
            elif number % 2:
                constraint = ForcedTokens(output, vocabulary)
            request = GenerationRequest(
                prompt=prompt,
                max_new_tokens=STEPS,
                constraint=constraint,
                sampling_params=SamplingParams(
                    temperature=1.0, seed=number, repetition_penalty=1.1
                ),
                logprobs=2,
            )
            tickets.append(engine.add_request(request))
        events_by_id = run_engine(engine)
        assert engine.num_free_blocks == engine.num_blocks
        answers.append([events_by_id[ticket] for ticket in tickets])
    for in_time, paused in zip(*answers, strict=True):
        assert (paused.ids, paused.finish_reason) == (in_time.ids, in_time.finish_reason)
        logprobs = [token.logprob for token in in_time.tokens]
        assert [token.logprob for token in paused.tokens] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("late", [0, 1])
def test_missing_mask_does_not_block_others(loaded_model, prompts, late):
    model, _ = loaded_model
    wanted = run_alone(model, prompts[1]).ids
    engine = Engine(model, (), max_num_seqs=2, num_cache_tokens=2000)
    engine._max_pending = late
    never = Late([7], model.config.decoder.vocab_size, None)
    request = GenerationRequest(prompt=prompts[0], max_new_tokens=STEPS, constraint=never)
    stuck = engine.add_request(request)
    others = [engine.add_request(make_request(prompts[1])) for _ in range(2)]
    output: dict[int, RequestEvents] = {}
    for _ in range(60):
        step_engine(engine, output)
    assert [output[ticket].ids for ticket in others] == [wanted] * 2
    assert (never.started, stuck in output, engine.num_running) == (1, False, 1)
    engine.cancel(stuck)
    step_engine(engine, output)
    assert (output[stuck].finish_reason, engine.has_work) == ("cancelled", False)
    assert engine.num_free_blocks == engine.num_blocks


def test_generation_stops_at_max_positions(loaded_model, tmp_path):
    """Check that no KV cache is reserved for tokens that are never generated."""
    model, renderer = loaded_model
    texts = ("Why?", "Why? Why?")
    prompts = [renderer.encode_prompt(make_sample("s", tmp_path, text)) for text in texts]
    lengths = [prompt.tokenized.num_tokens for prompt in prompts]
    limit_positions(model, max(lengths) + 3)
    answers = generate(model, prompts, max_new_tokens=10**12, end_ids=())
    assert [max(lengths) + 3 - tokens for tokens in lengths] == list(map(len, answers))


def test_image_is_encoded_once(loaded_model, tmp_path, monkeypatch):
    """Also in several prompts, and not if the cache contains its tokens."""
    model, renderer = loaded_model
    make_mixed_questions(tmp_path)
    texts = [("What?", "a.png"), ("a.png", "Where?"), ("a.png", "b.png", "Why?", "b.png")]
    prompts = [renderer.encode_prompt(make_sample("s", tmp_path, *text)) for text in texts]
    wanted = [run_alone(model, prompt).ids for prompt in prompts]
    calls = record_encoder_calls(model, monkeypatch)
    engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=1024)
    assert [told.ids for told in run_requests(engine, *prompts)] == wanted
    assert [told.ids for told in run_requests(engine, *reversed(prompts))] == wanted[::-1]
    assert [call.num_images for call in calls] == [2]


def test_vision_feature_cache_is_bounded(loaded_model, tmp_path, monkeypatch):
    """Check that the least recently used features are evicted and computed again on demand."""
    model, renderer = loaded_model
    prompts = []
    for seed in range(3):
        name = write_noise_image(tmp_path / f"{seed}.png", 56, 56, seed).name
        prompts.append(renderer.encode_prompt(make_sample("s", tmp_path, f"x{seed}", name)))
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
        outcome.append(len(calls) > before)
    assert outcome == [True, True, False, True, False, True]


def test_images_are_encoded_in_bounded_batches(loaded_model, prompts, monkeypatch):
    model, _ = loaded_model
    calls = record_encoder_calls(model, monkeypatch)
    wanted = generate(model, prompts, max_new_tokens=5, end_ids=())
    assert len(calls) == 1
    largest = max(
        len(model_runner_module.get_span_patches(prompt, number))
        for prompt in prompts
        for number in range(len(prompt.tokenized.spans))
    )
    monkeypatch.setattr(model_runner_module, "MAX_ENCODER_PATCHES", largest)
    assert generate(model, prompts, max_new_tokens=5, end_ids=()) == wanted
    assert len(calls) > 2
    assert max(call.num_patches for call in calls[1:]) <= largest
