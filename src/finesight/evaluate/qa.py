"""Questions about pictures: exact match, F1 of words, and ANLS, each with the best reference.

Exact match and F1 as SQuAD defines them (Rajpurkar et al. 2016), ANLS as ST-VQA and DocVQA do
(Biten et al. 2019): 1 - edits / the longer text, 0 where that is below 0.5, without regard to case.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from finesight.evaluate.answered import Case, Scored, Scores, means
from finesight.evaluate.text import edit_distance

ANLS_THRESHOLD = 0.5

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(cases: Sequence[Case]) -> Scored:
    """ANLS, exact match and F1 of every answer; the set's are means."""
    each: list[Scores] = [
        {
            "anls": max(anls(case.answer, truth) for truth in case.truths),
            "exact": max(float(bare(case.answer) == bare(truth)) for truth in case.truths),
            "f1": max(word_f1(case.answer, truth) for truth in case.truths),
        }
        for case in cases
    ]
    return Scored(each, means(each))


def bare(text: str) -> str:
    """Text in lower case without ASCII punctuation, English articles and superfluous spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def word_f1(answer: str, truth: str) -> float:
    """Harmonic mean of the shares of words, in `bare` text, that both have; 1 if both are empty."""
    said, wanted = bare(answer).split(), bare(truth).split()
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def anls(answer: str, truth: str) -> float:
    """Normalised Levenshtein similarity of characters, in {0} and [0.5, 1]; 1 if both are empty."""
    said, wanted = (" ".join(text.lower().split()) for text in (answer, truth))
    similarity = 1.0 - edit_distance(said, wanted) / max(1, len(said), len(wanted))
    return similarity if similarity >= ANLS_THRESHOLD else 0.0
