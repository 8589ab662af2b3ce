from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from finesight.errors import UserError
from finesight.infer.request import (
    DecodingConstraint,
    GenerationOptions,
    GenerationRequest,
    SamplingParams,
)
from finesight.infer.structured_output import build_bitmask
from finesight.infer.token_sampler import TokenSampler, sample_tokens

VOCABULARY = 8
DRAWS, SEQUENCES = 4000, 16


def _make_sampler(
    *, logprobs=None, constraint=None, prompt=(), processed_logprobs=False, **sampling
) -> TokenSampler:
    request = GenerationRequest(
        prompt=SimpleNamespace(tokenized=SimpleNamespace(ids_T=np.array(prompt, dtype=np.int32))),
        max_new_tokens=1,
        sampling_params=SamplingParams(**sampling),
        logprobs=logprobs,
        processed_logprobs=processed_logprobs,
        constraint=constraint,
    )
    return TokenSampler(request)


def _draw(logits_SV: Tensor, *samplers: TokenSampler) -> list[int]:
    return sample_tokens(logits_SV, samplers)[0].tolist()


def _logits(num_seqs: int = 1, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_seqs, vocabulary, generator=generator)


def _reference(logits_V: Tensor, sampling: SamplingParams) -> np.ndarray:
    """Probabilities by the definition, token by token."""
    scaled = logits_V.double().numpy() / sampling.temperature
    shares = np.exp(scaled - scaled.max())
    order = sorted(range(len(shares)), key=lambda token: -shares[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    full, so_far, retained = sum(shares[token] for token in order), 0.0, []
    for token in order:
        retained.append(token)
        so_far += shares[token] / full
        if so_far >= sampling.top_p:
            break
    found = np.zeros(len(shares))
    found[retained] = shares[retained]
    return found / found.sum()


SAMPLINGS = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.5, seed=2),
    SamplingParams(temperature=3.0, seed=3),
    SamplingParams(temperature=1.0, top_k=1, seed=4),
    SamplingParams(temperature=2.0, top_k=3, seed=5),
    SamplingParams(temperature=1.0, top_p=0.6, seed=6),
    SamplingParams(temperature=2.0, top_p=0.95, seed=7),
    SamplingParams(temperature=1.0, top_p=1e-9, seed=8),
    SamplingParams(temperature=4.0, top_k=5, top_p=0.7, seed=9),
    SamplingParams(temperature=4.0, top_k=4, top_p=0.9, seed=10),
    SamplingParams(temperature=1.0, top_k=100, seed=11),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_sampling_frequencies_match_probabilities(sampling):
    """Pearson's chi-square over sequences with seeds of their own; probability 0 never comes."""
    logits_1V = _logits()
    samplers = [
        _make_sampler(**asdict(sampling) | {"seed": 20 * number + sampling.seed})
        for number in range(SEQUENCES)
    ]
    logits_SV = logits_1V.expand(SEQUENCES, -1)
    counts: Counter[int] = Counter()
    for _ in range(DRAWS // SEQUENCES):
        counts.update(_draw(logits_SV, *samplers))
    wanted = _reference(logits_1V[0], sampling)
    likely = np.flatnonzero(wanted)
    assert set(counts) <= set(likely.tolist())
    expected = wanted[likely] * DRAWS
    seen = np.array([counts[token] for token in likely.tolist()])
    statistic = float(((seen - expected) ** 2 / expected).sum())
    # Above it lies 1e-4 of the distribution, by Wilson and Hilferty's approximation.
    freedom = max(1, len(likely) - 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5])
@pytest.mark.parametrize("top_k", [0, 3])
def test_near_zero_temperature_is_greedy(temperature, top_k):
    logits_SV = 30 * _logits(5)
    samplers = [_make_sampler(temperature=temperature, top_k=top_k, seed=0)] * 5
    assert _draw(logits_SV, *samplers) == logits_SV.argmax(-1).tolist()


def test_banned_tokens_have_no_probability():
    """Processed log probabilities are those of the distribution that is sampled from."""
    logits_SV, banned = _logits(2), (1, 4)
    samplers = [
        _make_sampler(
            temperature=temperature, seed=0, banned_ids=banned, logprobs=0, processed_logprobs=True
        )
        for temperature in (100.0, 0.5)
    ]
    drawn = [sample_tokens(logits_SV, samplers) for _ in range(200)]
    ids = torch.stack([ids_S for ids_S, _ in drawn])
    assert set(ids[:, 0].tolist()) == set(range(VOCABULARY)) - set(banned)
    allowed = logits_SV.clone()
    allowed[:, banned] = -torch.inf
    expected = (allowed / torch.tensor([[100.0], [0.5]])).log_softmax(-1)
    for ids_S, logprobs in drawn:
        torch.testing.assert_close(logprobs.logprobs_S, expected.gather(1, ids_S[:, None])[:, 0])
    greedy = _make_sampler(banned_ids=tuple(logits_SV.argmax(-1).tolist()))
    assert not greedy.is_argmax_only
    assert _draw(logits_SV, greedy, greedy)[0] not in greedy.sampling_params.banned_ids


def _kinds() -> list[TokenSampler]:
    some, few = FixedConstraint({1, 3, 4, 6}, 8), FixedConstraint({0, 7}, 8)
    return [
        _make_sampler(logprobs=2),
        _make_sampler(temperature=1.0, seed=5),
        _make_sampler(temperature=1.0, top_k=4, seed=6),
        _make_sampler(temperature=2.0, top_p=0.7, seed=7, constraint=some),
        _make_sampler(temperature=1.0, seed=8, repetition_penalty=1.5, prompt=[2]),
        _make_sampler(repetition_penalty=1.5, logprobs=0),
        _make_sampler(constraint=few),
        _make_sampler(temperature=1.0, seed=-3),
    ]


def test_seeded_draws_are_independent_of_the_batch():
    steps = [_logits(8, seed=step) for step in range(30)]
    alone = [
        [_draw(step[row : row + 1], sampler)[0] for step in steps]
        for row, sampler in enumerate(_kinds())
    ]
    samplers = _kinds()
    batched = [_draw(step, *samplers) for step in steps]
    assert [list(ids) for ids in zip(*batched, strict=True)] == alone
    # In two batches and another order at each step.
    samplers = _kinds()
    found: list[list[int]] = [[] for _ in samplers]
    for number, step in enumerate(steps):
        order = np.random.default_rng(number).permutation(8).tolist()
        for indices in filter(None, (order[: number % 9], order[number % 9 :])):
            ids = _draw(step[indices], *(samplers[row] for row in indices))
            for row, token in zip(indices, ids, strict=True):
                found[row].append(token)
    assert found == alone


@pytest.mark.parametrize("penalty", [0.5, 1.2, 4.0])
def test_repetition_penalty_matches_paper(penalty):
    """By the sign of the logit, once per token (Keskar et al. 2019); log probabilities stay."""
    sampler = _make_sampler(repetition_penalty=penalty, logprobs=8, prompt=[1, 1, 5])
    seen = {1, 5}
    for step in range(40):
        logits_1V = _logits(seed=step)
        lowered = [
            (value / penalty if value > 0 else value * penalty) if token in seen else value
            for token, value in enumerate(logits_1V[0].tolist())
        ]
        ids_1, logprobs = sample_tokens(logits_1V, [sampler])
        token = int(ids_1)
        assert token == int(np.argmax(lowered))
        seen.add(token)
        assert float(logprobs.logprobs_S) == pytest.approx(
            float(logits_1V.log_softmax(-1)[0, token])
        )


def test_logprobs_are_of_the_unmodified_logits():
    """The sampled token may not be among the most probable ones."""
    logits_SV = _logits(3)
    ids_S, sampled = sample_tokens(
        logits_SV,
        [
            _make_sampler(temperature=9.0, seed=0, logprobs=2),
            _make_sampler(logprobs=5),
            _make_sampler(),
        ],
    )
    logprobs_SV = logits_SV.log_softmax(-1)
    sorted_SV = logprobs_SV.sort(descending=True)
    own_S1 = logprobs_SV.gather(1, ids_S.unsqueeze(1))
    assert torch.equal(sampled.logprobs_S, own_S1.squeeze(1))
    assert torch.equal(sampled.top_ids_SN, sorted_SV.indices[:, :5])
    assert torch.equal(sampled.top_logprobs_SN, sorted_SV.values[:, :5])
    _, all_tokens = sample_tokens(logits_SV[:1], [_make_sampler(logprobs=20)])
    assert torch.equal(all_tokens.top_ids_SN, sorted_SV.indices[:1])
    assert sample_tokens(logits_SV[:1], [_make_sampler(temperature=1.0)])[1] is None


class FixedConstraint(DecodingConstraint):
    def __init__(self, allowed: set[int], vocabulary: int) -> None:
        self._bits = build_bitmask(sorted(allowed), -(-vocabulary // 32))

    def compute_bitmask(self) -> np.ndarray:
        return self._bits

    def accept_token(self, token: int) -> None:
        """Nothing changes."""


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 63, 64, 65, 300])
@pytest.mark.parametrize("wider", [0, 1, 40])
def test_only_allowed_tokens_are_sampled(vocabulary, wider):
    """Each token has its own bit; a head may have rows for no token. Other rows are unaffected."""
    logits_2V = _logits(2, vocabulary + wider)
    logits_2V[0, vocabulary:] = 1e4
    best = int(logits_2V[1].argmax())
    for token in range(vocabulary):
        sampler = _make_sampler(constraint=FixedConstraint({token}, vocabulary))
        assert _draw(logits_2V, sampler, _make_sampler()) == [token, best]
    allowed = set(range(0, vocabulary, 3))
    for top_k in (0, 500):
        sampler = _make_sampler(
            temperature=50.0, top_k=top_k, seed=0, constraint=FixedConstraint(allowed, vocabulary)
        )
        assert {_draw(logits_2V[:1], sampler)[0] for _ in range(30)} <= allowed


def test_top_p_is_applied_after_the_constraint():
    logits_1V = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
    constraint = FixedConstraint({1, 2, 3}, 4)
    sampler = _make_sampler(temperature=1.0, top_p=0.9, seed=0, constraint=constraint)
    assert {_draw(logits_1V, sampler)[0] for _ in range(100)} == {1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_fp32(dtype):
    logits_SV = _logits(8).to(dtype)
    wide, narrow = (sample_tokens(x, _kinds()) for x in (logits_SV.float(), logits_SV))
    assert torch.equal(wide[0], narrow[0])
    assert torch.equal(wide[1].logprobs_S, narrow[1].logprobs_S)


def test_invalid_sampling_params_are_rejected():
    for name, value in (
        ("temperature", -0.1),
        ("temperature", 101.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 10**400),
        ("repetition_penalty", 0.0),
        ("seed", 2**64),
    ):
        with pytest.raises(UserError, match=f"{name} is"):
            SamplingParams(**{name: value})
        with pytest.raises(UserError, match="empty stop string"):
            GenerationOptions(stop_strings=("end", ""))


@pytest.mark.gpu
def test_gpu_draws_match_cpu_draws():
    on_cpu, on_card = _kinds(), _kinds()
    for step in range(30):
        logits_SV = _logits(8, seed=step)
        assert _draw(logits_SV.cuda(), *on_card) == _draw(logits_SV, *on_cpu)
