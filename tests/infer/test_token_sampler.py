from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from each_value import each
from torch import Tensor

from finesight.errors import UserError
from finesight.infer.request import DecodingConstraint, GenerationOptions, SamplingParams
from finesight.infer.structured_output import build_bitmask
from finesight.infer.token_sampler import TokenSampler, sample_tokens

VOCABULARY = 8
DRAWS, SEQUENCES = 4000, 16


def _make_sampler(sampling: SamplingParams, *, prompt: Sequence[int] = (), **given) -> TokenSampler:
    return TokenSampler(sampling, given.get("logprobs"), given.get("constraint"), prompt)


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
    choosers = [
        _make_sampler(replace(sampling, seed=20 * number + sampling.seed))
        for number in range(SEQUENCES)
    ]
    logits_SV = logits_1V.expand(SEQUENCES, -1)
    counts: Counter[int] = Counter()
    for _ in range(DRAWS // SEQUENCES):
        counts.update(sample_tokens(logits_SV, choosers).ids_S.tolist())
    wanted = _reference(logits_1V[0], sampling)
    assert set(counts) <= set(np.flatnonzero(wanted).tolist())
    likely = np.flatnonzero(wanted)
    expected = wanted[likely] * DRAWS
    seen = np.array([counts[token] for token in likely.tolist()])
    statistic = float(((seen - expected) ** 2 / expected).sum())
    freedom = len(likely) - 1
    if freedom:
        # Above it lies 1e-4 of the distribution, by Wilson and Hilferty's approximation.
        bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
        assert statistic < bound
    else:
        assert seen.tolist() == [DRAWS]


@each("top_k", [0, 1, 2, 5, 8, 50])
@each("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_top_k_and_top_p_match_reference(top_k, top_p):
    """Check that a batch with different logits samples every token that the filters allow."""
    sampling = SamplingParams(temperature=5.0, top_k=top_k, top_p=top_p, seed=0)
    logits_SV = _logits(4, seed=7)
    choosers = [_make_sampler(sampling) for _ in logits_SV]
    seen: list[set[int]] = [set() for _ in logits_SV]
    for _ in range(400):
        for row, token in enumerate(sample_tokens(logits_SV, choosers).ids_S.tolist()):
            seen[row].add(token)
    for row, logits_V in enumerate(logits_SV):
        wanted = _reference(logits_V, sampling)
        assert seen[row] <= set(np.flatnonzero(wanted).tolist())
        assert seen[row] >= set(np.flatnonzero(wanted > 0.03).tolist())


def test_ties_at_top_k_are_cut_to_k():
    sampling = SamplingParams(temperature=1.0, top_k=2, seed=0)
    chooser = _make_sampler(sampling)
    seen = {int(sample_tokens(torch.zeros(1, 6), [chooser]).ids_S) for _ in range(200)}
    assert seen == {0, 1}


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5])
@pytest.mark.parametrize("top_k", [0, 3])
def test_near_zero_temperature_is_greedy(temperature, top_k):
    logits_SV = 30 * _logits(5)
    choosers = [_make_sampler(SamplingParams(temperature=temperature, top_k=top_k, seed=0))] * 5
    assert sample_tokens(logits_SV, choosers).ids_S.tolist() == logits_SV.argmax(-1).tolist()


def _kinds() -> list[TokenSampler]:
    return [
        _make_sampler(SamplingParams(), logprobs=2),
        _make_sampler(SamplingParams(temperature=1.0, seed=5)),
        _make_sampler(SamplingParams(temperature=1.0, top_k=4, seed=6)),
        _make_sampler(
            SamplingParams(temperature=2.0, top_p=0.7, seed=7),
            constraint=FixedConstraint({1, 3, 4, 6}, 8),
        ),
        _make_sampler(SamplingParams(temperature=1.0, seed=8, repetition_penalty=1.5), prompt=[2]),
        _make_sampler(SamplingParams(repetition_penalty=1.5), logprobs=0),
        _make_sampler(SamplingParams(), constraint=FixedConstraint({0, 7}, 8)),
        _make_sampler(SamplingParams(temperature=1.0, seed=-3)),
    ]


def test_seeded_draws_are_independent_of_the_batch():
    steps = [_logits(8, seed=step) for step in range(30)]
    alone = []
    for row, chooser in enumerate(_kinds()):
        alone.append([int(sample_tokens(step[row : row + 1], [chooser]).ids_S) for step in steps])
    choosers = _kinds()
    batched = [sample_tokens(step, choosers).ids_S.tolist() for step in steps]
    assert [list(ids) for ids in zip(*batched, strict=True)] == alone
    # Others beside it, in another order, from step to step.
    choosers = _kinds()
    found: list[list[int]] = [[] for _ in choosers]
    for number, step in enumerate(steps):
        order = np.random.default_rng(number).permutation(8).tolist()
        for indices in (order[: number % 9], order[number % 9 :]):
            if indices:
                chosen = sample_tokens(step[indices], [choosers[row] for row in indices])
                for row, token in zip(indices, chosen.ids_S.tolist(), strict=True):
                    found[row].append(token)
    assert found == alone


def test_equal_seeds_give_equal_draws():
    logits_1V = torch.zeros(1, 1000)
    drawn = {}
    for seed in (0, 1, -1, 2**64 - 1, None):
        for again in (False, True):
            chooser = _make_sampler(SamplingParams(temperature=1.0, seed=seed))
            ids = tuple(int(sample_tokens(logits_1V, [chooser]).ids_S) for _ in range(10))
            drawn[seed, again] = ids
    assert drawn[0, False] == drawn[0, True] != drawn[1, False] == drawn[1, True]
    # The same 64 bits.
    assert drawn[-1, False] == drawn[2**64 - 1, False]
    assert drawn[None, False] != drawn[None, True]


@pytest.mark.parametrize("penalty", [0.5, 1.2, 4.0])
def test_repetition_penalty_matches_paper(penalty):
    """Logits of tokens that the prompt or the answer holds, by their sign (Keskar et al. 2019),
    once however often a token came."""
    chooser = _make_sampler(
        SamplingParams(repetition_penalty=penalty), logprobs=8, prompt=[1, 1, 5]
    )
    seen = {1, 5}
    for step in range(40):
        logits_V = _logits(seed=step)[0]
        lowered = [
            (value / penalty if value > 0 else value * penalty) if token in seen else value
            for token, value in enumerate(logits_V.tolist())
        ]
        chosen = sample_tokens(logits_V.unsqueeze(0), [chooser])
        assert int(chosen.ids_S) == int(np.argmax(lowered))
        seen.add(int(chosen.ids_S))
        # What is told is what the model said.
        assert chosen.logprobs_S is not None
        result = float(chosen.logprobs_S[0])
        assert result == pytest.approx(float(logits_V.log_softmax(-1)[int(chosen.ids_S)]))


def test_logprobs_are_of_the_unmodified_logits():
    """Before temperature, penalty, and what is cut; the chosen token may not be among the most
    probable ones."""
    logits_SV = _logits(3)
    choosers = [
        _make_sampler(SamplingParams(temperature=9.0, seed=0), logprobs=2),
        _make_sampler(SamplingParams(), logprobs=5),
        _make_sampler(SamplingParams()),
    ]
    chosen = sample_tokens(logits_SV, choosers)
    wanted_SV = logits_SV.log_softmax(-1)
    assert chosen.logprobs_S is not None
    own_S = wanted_SV.gather(1, chosen.ids_S.unsqueeze(1)).squeeze(1)
    assert torch.equal(chosen.logprobs_S, own_S)
    assert chosen.top_ids_SN is not None
    assert chosen.top_logprobs_SN is not None
    order_SV = wanted_SV.sort(descending=True)
    assert torch.equal(chosen.top_ids_SN, order_SV.indices[:, :5])
    assert torch.equal(chosen.top_logprobs_SN, order_SV.values[:, :5])


def test_top_logprobs_are_limited_to_vocab_size():
    chosen = sample_tokens(_logits(), [_make_sampler(SamplingParams(), logprobs=20)])
    assert chosen.top_ids_SN is not None
    assert sorted(chosen.top_ids_SN[0].tolist()) == list(range(VOCABULARY))


def test_logprobs_are_computed_only_on_request():
    chosen = sample_tokens(_logits(), [_make_sampler(SamplingParams(temperature=1.0))])
    assert chosen.logprobs_S is chosen.top_ids_SN is chosen.top_logprobs_SN is None


class FixedConstraint(DecodingConstraint):
    """A constraint that allows the same tokens always, of a tokenizer of so many."""

    def __init__(self, allowed: set[int], tokens: int) -> None:
        self._bits = build_bitmask(sorted(allowed), -(-tokens // 32))

    def compute_bitmask(self) -> np.ndarray:
        return self._bits

    def accept_token(self, token: int) -> None:
        """Nothing changes."""


@each("vocabulary", [1, 31, 32, 33, 63, 64, 65, 300])
@each("wider", [0, 1, 40])
def test_only_allowed_tokens_are_sampled(vocabulary, wider):
    """Each token has its own bit, the 32nd of a number too; a head may have rows for no token."""
    logits_1V = _logits(1, vocabulary + wider)
    logits_1V[0, vocabulary:] = 1e4
    for token in range(vocabulary):
        chosen = sample_tokens(
            logits_1V,
            [_make_sampler(SamplingParams(), constraint=FixedConstraint({token}, vocabulary))],
        )
        assert chosen.ids_S.tolist() == [token]
    allowed = set(range(0, vocabulary, 3))
    for sampling in (
        SamplingParams(temperature=50.0, seed=0),
        SamplingParams(temperature=50.0, top_k=500, seed=0),
    ):
        chooser = _make_sampler(sampling, constraint=FixedConstraint(allowed, vocabulary))
        seen = {int(sample_tokens(logits_1V, [chooser]).ids_S) for _ in range(30)}
        assert seen <= allowed


def test_constraint_affects_only_its_row():
    logits_SV = _logits(3)
    best = logits_SV.argmax(-1).tolist()
    other = {token for token in range(VOCABULARY) if token != best[1]}
    constrained = _make_sampler(SamplingParams(), constraint=FixedConstraint(other, VOCABULARY))
    found = sample_tokens(
        logits_SV, [_make_sampler(SamplingParams()), constrained, _make_sampler(SamplingParams())]
    ).ids_S
    assert found.tolist() == [best[0], int(logits_SV[1].topk(2).indices[1]), best[2]]


def test_top_p_is_applied_after_the_constraint():
    """Of what is allowed, and not of all, the most probable ones are kept."""
    logits_1V = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=0)
    chooser = _make_sampler(sampling, constraint=FixedConstraint({1, 2, 3}, 4))
    assert {int(sample_tokens(logits_1V, [chooser]).ids_S) for _ in range(100)} == {1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_fp32(dtype):
    logits_SV = _logits(8).to(dtype)
    wide, narrow = (sample_tokens(x, _kinds()) for x in (logits_SV.float(), logits_SV))
    assert torch.equal(wide.ids_S, narrow.ids_S)
    assert wide.logprobs_S is not None
    assert narrow.logprobs_S is not None
    assert torch.equal(wide.logprobs_S, narrow.logprobs_S)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 10**400),
        ("repetition_penalty", 0.0),
        ("seed", 2**64),
    ],
)
def test_invalid_sampling_params_are_rejected(name, value):
    with pytest.raises(UserError, match=f"{name} is"):
        SamplingParams(**{name: value})


def test_empty_stop_string_is_rejected():
    with pytest.raises(UserError, match="empty stop string"):
        GenerationOptions(stop_strings=("end", ""))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_draws_match_cpu_draws():
    on_cpu, on_card = _kinds(), _kinds()
    for step in range(30):
        logits_SV = _logits(8, seed=step)
        found = sample_tokens(logits_SV.cuda(), on_card)
        assert found.ids_S.tolist() == sample_tokens(logits_SV, on_cpu).ids_S.tolist()
