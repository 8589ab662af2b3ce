"""Comparison of texts, for several metrics: normalization, edit distance and F1."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any


def normalize_text(text: str) -> str:
    """Normalize Unicode to NFC and whitespace to single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def fold_text(text: str) -> str:
    """Normalize text for comparison without case, Unicode width and outer punctuation.

    Text that is only punctuation is retained.
    """
    text = unicodedata.normalize("NFKC", normalize_text(text)).casefold()
    punctuation = "".join(c for c in set(text) if unicodedata.category(c).startswith("P"))
    return text.strip(punctuation + " ") or text


def strip_math_delimiters(formula: str) -> str:
    """Remove the math delimiters around a formula, such as `$` and `$$`."""
    formula = formula.strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)")):
        inner = formula[len(left) : len(formula) - len(right)]
        if f"{left}{inner}{right}" == formula and left not in inner:
            return inner.strip()
    return formula


def find_nearest_reference(
    candidate: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[int, int, int]:
    """Find the reference with the smallest edit distance, relative to the longer text.

    Returns:
        Edit distance, length of the longer text, and length of the reference.
    """
    rows = []
    for reference in references:
        distance = compute_edit_distance(candidate, reference)
        max_length = max(len(candidate), len(reference))
        rows.append((distance, max_length, len(reference)))
    return min(rows, key=lambda row: row[0] / max(1, row[1]))


def compute_edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Compute the Levenshtein distance of two token sequences.

    Hyyrö's (2003) version of the bit-vector algorithm of Myers (1999): a column of the table is two
    integers of len(a) bits, so the cost is len(b) operations on them. The names are those of the
    paper: `vp` and `hp` mark vertical and horizontal differences of 1, `vn` and `hn` those of -1.
    """
    if not a:
        return len(b)
    position_masks: dict[str, int] = {}
    for i, token in enumerate(a):
        position_masks[token] = position_masks.get(token, 0) | 1 << i
    full_mask = (1 << len(a)) - 1
    last_bit = 1 << (len(a) - 1)
    vp = full_mask
    vn = 0
    distance = len(a)
    for token in b:
        equal = position_masks.get(token, 0)
        d0 = (((equal & vp) + vp) ^ vp) | equal | vn
        hp = vn | (~(d0 | vp) & full_mask)
        hn = vp & d0
        distance += bool(hp & last_bit) - bool(hn & last_bit)
        # The first row of the table increases by 1 per column, so a 1 is shifted in.
        hp = (hp << 1 | 1) & full_mask
        hn = hn << 1 & full_mask
        vp = hn | (~(d0 | hp) & full_mask)
        vn = hp & d0
    return distance


def compute_f1(predicted: Counter[Any], reference: Counter[Any]) -> float:
    """Compute the F1 of counted values; 1 if both are empty."""
    num_total = predicted.total() + reference.total()
    if not num_total:
        return 1.0
    return 2 * (predicted & reference).total() / num_total
