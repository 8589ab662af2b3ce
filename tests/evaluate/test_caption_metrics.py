"""Caption scores by hand and against the scorers of the COCO evaluation."""

import random
from itertools import count

import numpy as np
import pytest
from case_files import load_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from finesight.evaluate.bleu import count_bleu_statistics, estimate_bleu
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metrics.captions.score import (
    compute_cider_d,
    compute_rouge_l,
    score_captions,
    tokenize_caption,
)

Words = list[str]


def compute_corpus_bleu(candidates: list[Words], references: list[list[Words]]) -> list[float]:
    statistics = count_bleu_statistics(candidates, references)
    return [estimate_bleu(statistics, order).score for order in range(1, 5)]


# The tokens of these texts by the tokenizer of the COCO evaluation (pycocoevalcap 1.2).
@pytest.mark.parametrize(("caption", "expected"), load_cases("ptb_tokens"), ids=count())
def test_tokens_match_ptb_reference(caption: str, expected: str) -> None:
    assert tokenize_caption(caption) == expected.split()


def test_abbreviation_state_does_not_leak() -> None:
    assert tokenize_caption("No. 5") == ["no.", "5"]
    assert tokenize_caption("No. Five") == ["no", "five"]
    assert tokenize_caption("No. 5") == ["no.", "5"]


@pytest.mark.parametrize("text", ["", " ", "\n", "\x00", "\ud800", "<", "<<<<>>>>", "'" * 300])
def test_any_text_is_tokenized(text: str) -> None:
    assert all(word and word == word.lower() for word in tokenize_caption(text))


@pytest.mark.parametrize("piece", ["a,", "@", "\\", "a/", "=D", "\u0e2a\u0e38\u0e19", "\u0967"])
def test_long_text_without_spaces_is_tokenized(piece: str) -> None:
    """Runs are split, because some rules would take minutes; Thai has no spaces."""
    count = 20_000 // len(piece)
    assert tokenize_caption("".join(piece + f"{i % 7}" * (i % 50 == 0) for i in range(count)))


def assert_agreement(message: list[Words], truths: list[list[Words]]) -> None:
    """Compare all scores with those of the COCO evaluation."""
    bleu_oracle = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider_oracle = pytest.importorskip("pycocoevalcap.cider.cider")
    rouge_oracle = pytest.importorskip("pycocoevalcap.rouge.rouge")
    gold = {i: [" ".join(truth) for truth in several] for i, several in enumerate(truths)}
    given = {i: [" ".join(sentence)] for i, sentence in enumerate(message)}
    total, _ = bleu_oracle.Bleu(4).compute_score(gold, given, verbose=0)
    assert compute_corpus_bleu(message, truths) == pytest.approx(total, abs=1e-9)
    _, scores = rouge_oracle.Rouge().compute_score(gold, given)
    own = [compute_rouge_l(*pair) for pair in zip(message, truths, strict=True)]
    assert own == pytest.approx(scores, abs=1e-9)
    _, scores = cider_oracle.Cider().compute_score(gold, given)
    assert compute_cider_d(message, truths) == pytest.approx(scores, abs=1e-9)


def make_sentence(chance: random.Random, known: int, shortest: int) -> Words:
    length = chance.randint(shortest, 14)
    return [f"w{chance.randrange(known)}" for _ in range(length)]


@pytest.mark.parametrize("seed", range(12))
def test_corpus_scores_match_coco_evaluation(seed: int) -> None:
    """60 captions a set: frequent words and rare ones, short ones, empty ones, lone references."""
    chance = random.Random(seed)
    size = chance.choice([(4, 1), (12, 0), (60, 3), (400, 1)])
    truths = [
        [make_sentence(chance, *size) for _ in range(chance.randint(1, 5))] for _ in range(60)
    ]
    output = [
        chance.choice([make_sentence(chance, *size), [*truth[0][:-1], "w1"], truth[-1], []])
        for truth in truths
    ]
    assert_agreement(output, truths)


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32 - 1))
def test_single_caption_scores_match_coco_evaluation(seed: int) -> None:
    """BLEU of one caption, where whole orders of n-grams match nothing."""
    chance = random.Random(seed)
    # The reference implementation needs a caption with words.
    truths = [make_sentence(chance, 6, int(i == 0)) for i in range(chance.randint(1, 5))]
    assert_agreement([make_sentence(chance, 6, 0)], [truths])


def test_resampled_scores_match_drawn_samples() -> None:
    """But for CIDEr-D, in which the rarity of n-grams stays that of the whole set."""
    chance = random.Random(5)
    cases = [
        EvalCase(answer, (), (truth,), ())
        for answer, truth in (
            (" ".join(make_sentence(chance, 9, 2)) for _ in range(2)) for _ in range(20)
        )
    ]
    scored = score_captions(cases)
    drawn = np.bincount(np.random.default_rng(0).integers(0, 20, 20), minlength=20)
    repeated = score_captions(
        [case for case, count in zip(cases, drawn, strict=True) for _ in range(count)]
    )
    cider = np.array([one["cider_d"] for one in scored.per_sample])
    expected = repeated.scores | {"cider_d": (cider * drawn).sum() / 20}
    for name, one in scored.estimators.items():
        (found,) = one.score_from_sums(one.weighted_sums(drawn[None].astype(float)))
        assert found == pytest.approx(expected[name]), name
