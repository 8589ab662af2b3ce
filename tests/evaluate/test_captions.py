from __future__ import annotations

import math
import random

import pytest

from finesight.evaluate.captions import bleu, cider_d, rouge_l, words


def split(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's dog doesn't bark.", ["a", "man", "'s", "dog", "does", "n't", "bark"]),
        ("She can't - or won't -- go!", ["she", "ca", "n't", "or", "wo", "n't", "go"]),
        ("It’s 3.5 years old, 1,000 km", ["it", "'s", "3.5", "years", "old", "1,000", "km"]),
        ("two well-dressed ladies' hats", ["two", "well-dressed", "ladies", "hats"]),
        ("«Café» & $5 (in Zürich)…", ["café", "&", "$", "5", "in", "zürich"]),
        (
            "The 2nd 10-year-old's 1950s TV, at 5pm (10:30)",
            ["the", "2nd", "10-year-old", "'s", "1950s", "tv", "at", "5pm", "10:30"],
        ),
        (' "..." ', []),
    ],
)
def test_words(caption, expected):
    assert words(caption) == expected


def test_bleu_clips_repeated_words():
    # The example of Papineni et al. (2002), section 2.1: modified unigram precision 2/7.
    said = split("the the the the the the the")
    truths = [split("the cat is on the mat"), split("there is a cat on the mat")]
    assert bleu([said], [truths]) == pytest.approx([2 / 7, 0, 0, 0])


def test_bleu_counts_over_the_corpus_and_punishes_brevity():
    said = [split("a b c d"), split("a x")]
    truths = [[split("a b c d")], [split("a b c"), split("a b c d e")]]
    brevity = math.exp(1 - 7 / 6)
    expected = [
        brevity * 5 / 6,
        brevity * math.sqrt(5 / 6 * 3 / 4),
        brevity * (5 / 6 * 3 / 4 * 2 / 2) ** (1 / 3),
        brevity * (5 / 6 * 3 / 4 * 2 / 2 * 1 / 1) ** (1 / 4),
    ]
    assert bleu(said, truths) == pytest.approx(expected)


def test_bleu_takes_the_closest_length_and_of_two_the_shorter():
    # 4 words against 3 and 5: the reference of 3 counts, so there is no brevity penalty.
    assert bleu([split("a b c d")], [[split("x y z"), split("a b c d e")]])[0] == 1.0


def test_scores_of_a_perfect_and_an_empty_answer():
    truth = [split("a dog runs on the beach")]
    assert bleu(truth, [truth]) == pytest.approx([1, 1, 1, 1])
    assert rouge_l(truth[0], truth) == pytest.approx(1)
    assert bleu([[]], [truth]) == [0, 0, 0, 0]
    assert rouge_l([], truth) == 0
    assert cider_d([[], truth[0]], [truth, [["x"]]]) == [0, 0]


def test_rouge_l_by_hand():
    precision, recall = 2 / 3, 2 / 5
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(split("a b c"), [split("a c d e f")]) == pytest.approx(expected)


def test_rouge_l_takes_the_best_precision_and_the_best_recall_of_different_references():
    # Common subsequences: "a b" of 3 words (recall 2/3), "a b c" of 12 (precision 3/3).
    truths = [split("a b x"), split("a b c d e f g h i j k l")]
    precision, recall = 1.0, 2 / 3
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(split("a b c"), truths) == pytest.approx(expected)


def test_cider_d_by_hand():
    # Two pictures, each word in one of them: cosines 1 for 1- and 2-grams, no longer n-grams.
    truths = [[split("a b")], [split("c d")]]
    assert cider_d([split("a b"), split("c d")], truths) == pytest.approx([5, 5])
    # Repeated: counts clipped, and a Gaussian of the difference of 2 in length.
    expected = 10 * (1 / 2 + 1 / math.sqrt(5)) / 4 * math.exp(-(2**2) / (2 * 6**2))
    assert cider_d([split("a b a b"), []], truths) == pytest.approx([expected, 0])


def test_cider_d_gives_nothing_for_words_that_every_picture_has():
    truths = [[split("the a")], [split("the b")]]
    assert cider_d([["the"], ["the"]], truths) == [0, 0]


def test_agrees_with_the_coco_evaluation():
    bleu_oracle = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider_oracle = pytest.importorskip("pycocoevalcap.cider.cider")
    rouge_oracle = pytest.importorskip("pycocoevalcap.rouge.rouge")
    random_word = random.Random(0)
    vocabulary = [f"w{i}" for i in range(12)]

    def sentence() -> list[str]:
        return [random_word.choice(vocabulary) for _ in range(random_word.randint(1, 14))]

    truths = [[sentence() for _ in range(random_word.randint(1, 5))] for _ in range(60)]
    said = [random_word.choice([sentence(), [*truth[0][:-1], "w1"]]) for truth in truths]
    gold = {i: [" ".join(truth) for truth in several] for i, several in enumerate(truths)}
    given = {i: [" ".join(sentence)] for i, sentence in enumerate(said)}
    total, _ = bleu_oracle.Bleu(4).compute_score(gold, given, verbose=0)
    assert bleu(said, truths) == pytest.approx(total, rel=1e-6)
    _, each = rouge_oracle.Rouge().compute_score(gold, given)
    assert [rouge_l(*pair) for pair in zip(said, truths, strict=True)] == pytest.approx(each)
    _, each = cider_oracle.Cider().compute_score(gold, given)
    assert cider_d(said, truths) == pytest.approx(each)
