"""Transcribed text (OCR): characters and words that differ, and exact matches."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from finesight.evaluate.answered import Case, Scored, Scores, means
from finesight.evaluate.bootstrap import NON_NEGATIVE, Estimator, ratio


def score(cases: Sequence[Case]) -> Scored:
    """Similarity (1 - edits / the longer text) and exact matches, as they stand and folded, of the
    nearest reference; character and word error rates of the whole set, its texts end to end."""
    each: list[Scores] = []
    characters, spelled = [], []
    for case in cases:
        said, truths = plain_text(case.answer), [plain_text(truth) for truth in case.truths]
        edits, longest, length = nearest(said, truths)
        word_edits, _, word_count = nearest(said.split(), [truth.split() for truth in truths])
        folded = {folded_text(truth) for truth in case.truths}
        each.append(
            {
                "similarity": 1.0 - edits / max(1, longest),
                "exact": float(edits == 0),
                "exact_folded": float(folded_text(case.answer) in folded),
                "cer": edits / max(1, length),
                "wer": word_edits / max(1, word_count),
            }
        )
        characters.append((edits, length))
        spelled.append((word_edits, word_count))
    rates = {"cer": _rate(characters), "wer": _rate(spelled)}
    return Scored(each, means(each) | rates)


def plain_text(text: str) -> str:
    """Text with its characters in Unicode's composed form and runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def folded_text(text: str) -> str:
    """`plain_text` without regard to case, width variants and punctuation at its ends, save where
    it is nothing but punctuation."""
    text = unicodedata.normalize("NFKC", plain_text(text)).casefold()
    punctuation = "".join(c for c in set(text) if unicodedata.category(c).startswith("P"))
    return text.strip(punctuation + " ") or text


def nearest(said: Sequence[str], truths: Sequence[Sequence[str]]) -> tuple[int, int, int]:
    """The truth that differs least: edits, length of the longer of the two, and its own length."""
    found = [(edit_distance(said, t), max(len(said), len(t)), len(t)) for t in truths]
    return min(found, key=lambda edits: edits[0] / max(1, edits[1]))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance: the least number of insertions, deletions and replacements.

    Hyyrö's (2003) form of Myers' (1999) bit-vector algorithm: a column of the table is two
    integers of len(a) bits, so the work is len(b) operations on them.
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    rises, falls, distance = full, 0, len(a)
    for token in b:
        equal = places.get(token, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        across_up = falls | (~(diagonal | rises) & full)
        across_down = rises & diagonal
        distance += bool(across_up & last) - bool(across_down & last)
        # The table's top row grows by one with each column: hence the 1 shifted in.
        across_up = (across_up << 1 | 1) & full
        across_down = across_down << 1 & full
        rises = across_down | (~(diagonal | across_up) & full)
        falls = across_up & diagonal
    return distance


def _rate(edits: Sequence[tuple[int, int]]) -> Estimator:
    """Edits over lengths, both summed; a set without anything to read has a length of 1."""
    above, below = np.array(edits, np.float64).T
    below = below if below.any() else np.full_like(below, 1 / len(below))
    return ratio(above, below, NON_NEGATIVE)
