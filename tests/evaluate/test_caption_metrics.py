from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from each_value import each

from finesight.evaluate.caption_metrics import (
    compute_cider_d,
    compute_rouge_l,
    count_bleu_statistics,
    estimate_bleu,
    score_captions,
    tokenize_caption,
)
from finesight.evaluate.eval_case import EvalCase


def compute_corpus_bleu(candidates, references):
    statistics = count_bleu_statistics(candidates, references)
    return [estimate_bleu(statistics, order).score for order in range(1, 5)]


def split(text: str) -> list[str]:
    return text.split()


def test_bleu_clips_repeated_words():
    # The example of Papineni et al. (2002), section 2.1: modified unigram precision 2/7.
    output = split("the the the the the the the")
    truths = [split("the cat is on the mat"), split("there is a cat on the mat")]
    assert compute_corpus_bleu([output], [truths]) == pytest.approx([2 / 7, 0, 0, 0], abs=1e-3)


def test_corpus_bleu_with_brevity_penalty():
    output = [split("a b c d"), split("a x")]
    truths = [[split("a b c d")], [split("a b c"), split("a b c d e")]]
    brevity = math.exp(1 - 7 / 6)
    expected = [
        brevity * 5 / 6,
        brevity * math.sqrt(5 / 6 * 3 / 4),
        brevity * (5 / 6 * 3 / 4 * 2 / 2) ** (1 / 3),
        brevity * (5 / 6 * 3 / 4 * 2 / 2 * 1 / 1) ** (1 / 4),
    ]
    assert compute_corpus_bleu(output, truths) == pytest.approx(expected)


def test_bleu_uses_closest_reference_length():
    # 4 words against 3 and 5: the reference of 3 counts, so there is no brevity penalty.
    found = compute_corpus_bleu([split("a b c d")], [[split("x y z"), split("a b c d e")]])
    assert found[0] == pytest.approx(1)


def test_scores_of_perfect_and_empty_answers():
    truth = [split("a dog runs on the beach")]
    assert compute_corpus_bleu(truth, [truth]) == pytest.approx([1, 1, 1, 1])
    assert compute_rouge_l(truth[0], truth) == pytest.approx(1)
    assert compute_corpus_bleu([[]], [truth]) == pytest.approx([0, 0, 0, 0], abs=1e-12)
    assert compute_rouge_l([], truth) == 0
    assert compute_cider_d([[], truth[0]], [truth, [["x"]]]) == [0, 0]


def test_rouge_l_hand_computed():
    precision, recall = 2 / 3, 2 / 5
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert compute_rouge_l(split("a b c"), [split("a c d e f")]) == pytest.approx(expected)


def test_rouge_l_uses_best_precision_and_recall():
    # Common subsequences: "a b" of 3 words (recall 2/3), "a b c" of 12 (precision 3/3).
    truths = [split("a b x"), split("a b c d e f g h i j k l")]
    precision, recall = 1.0, 2 / 3
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert compute_rouge_l(split("a b c"), truths) == pytest.approx(expected)


def test_cider_d_hand_computed():
    # Two images, each word in one of them: cosines 1 for 1- and 2-grams, no longer n-grams.
    truths = [[split("a b")], [split("c d")]]
    assert compute_cider_d([split("a b"), split("c d")], truths) == pytest.approx([5, 5])
    # Repeated: counts clipped, and a Gaussian of the difference of 2 in length.
    expected = 10 * (1 / 2 + 1 / math.sqrt(5)) / 4 * math.exp(-(2**2) / (2 * 6**2))
    assert compute_cider_d([split("a b a b"), []], truths) == pytest.approx([expected, 0])


def test_cider_d_ignores_words_in_every_image():
    truths = [[split("the a")], [split("the b")]]
    assert compute_cider_d([["the"], ["the"]], truths) == [0, 0]


def _agree(message: list[list[str]], truths: list[list[list[str]]]) -> None:
    """Every figure of the set and of each caption is that of the COCO evaluation's own scorers."""
    bleu_oracle = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider_oracle = pytest.importorskip("pycocoevalcap.cider.cider")
    rouge_oracle = pytest.importorskip("pycocoevalcap.rouge.rouge")
    gold = {i: [" ".join(truth) for truth in several] for i, several in enumerate(truths)}
    given = {i: [" ".join(sentence)] for i, sentence in enumerate(message)}
    total, _ = bleu_oracle.Bleu(4).compute_score(gold, given, verbose=0)
    assert compute_corpus_bleu(message, truths) == pytest.approx(total, abs=1e-9)
    _, each = rouge_oracle.Rouge().compute_score(gold, given)
    own = [compute_rouge_l(*pair) for pair in zip(message, truths, strict=True)]
    assert own == pytest.approx(each, abs=1e-9)
    _, each = cider_oracle.Cider().compute_score(gold, given)
    assert compute_cider_d(message, truths) == pytest.approx(each, abs=1e-9)


def _sentence(chance: random.Random, known: int, shortest: int) -> list[str]:
    length = chance.randint(shortest, 14)
    return [f"w{chance.randrange(known)}" for _ in range(length)]


@pytest.mark.parametrize("seed", range(12))
def test_corpus_scores_match_coco_evaluation(seed):
    """60 captions a set: frequent words and rare ones, short ones, empty ones, lone references."""
    chance = random.Random(seed)
    known, shortest = chance.choice([(4, 1), (12, 0), (60, 3), (400, 1)])
    truths = [
        [_sentence(chance, known, shortest) for _ in range(chance.randint(1, 5))] for _ in range(60)
    ]
    output = [
        chance.choice([_sentence(chance, known, shortest), [*truth[0][:-1], "w1"], truth[-1], []])
        for truth in truths
    ]
    _agree(output, truths)


@each("seed", range(200))
def test_single_caption_scores_match_coco_evaluation(seed):
    """BLEU of one caption, where whole orders of n-grams match nothing."""
    chance = random.Random(1000 + seed)
    # One at least has words: the reference cannot do without.
    truths = [_sentence(chance, 6, int(i == 0)) for i in range(chance.randint(1, 5))]
    _agree([_sentence(chance, 6, 0)], [truths])


def test_real_caption_scores_match_coco_evaluation(shared):
    lines = (shared / "data/captions/captions.jsonl").read_text().splitlines()
    captions = [[tokenize_caption(text) for text in json.loads(line)["captions"]] for line in lines]
    # Each person against the other four, and the captions of the next image as wrong answers.
    for i in range(5):
        _agree([own[i] for own in captions], [own[:i] + own[i + 1 :] for own in captions])
    _agree([captions[i - 1][0] for i in range(len(captions))], captions)


def test_resampled_scores_match_drawn_samples():
    """But for CIDEr-D, in which the rarity of n-grams stays that of the whole set."""
    chance = random.Random(5)
    cases = [
        EvalCase(" ".join(_sentence(chance, 9, 2)), (), (" ".join(_sentence(chance, 9, 2)),), ())
        for _ in range(20)
    ]
    scored = score_captions(cases)
    drawn = np.bincount(np.random.default_rng(0).integers(0, 20, 20), minlength=20)
    weights = drawn[None].astype(float)
    figures = {
        name: one.score_from_sums(one.weighted_sums(weights))
        for name, one in scored.estimators.items()
    }
    repeated = score_captions(
        [case for case, count in zip(cases, drawn, strict=True) for _ in range(count)]
    )
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"):
        assert figures[name][0] == pytest.approx(repeated.scores[name])
    cider = np.array([one["cider_d"] for one in scored.per_sample])
    assert figures["cider_d"][0] == pytest.approx((cider * drawn).sum() / 20)
