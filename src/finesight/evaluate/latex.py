"""Formulas in LaTeX: compared as the tokens that TeX would read, and as they look."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from finesight.evaluate import drawing
from finesight.evaluate.answered import Case, Scored, Scores, means
from finesight.evaluate.bootstrap import NON_NEGATIVE, ratio
from finesight.evaluate.captions import LONGEST_GRAM, bleu_counts, bleu_estimator
from finesight.evaluate.text import nearest

Tokens = list[str]

# A control word, a control symbol, the name of an environment, or one visible character.
_LATEX = re.compile(r"\\(?:begin|end)\s*\{\s*[A-Za-z]+\*?\s*\}|\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
# Where spaces are part of what is typeset: the argument of these is text, not mathematics.
_TEXT_ARGUMENT = re.compile(r"\\(?:text(?:rm|bf|it|sf|tt)?|mbox|hbox)")


def score(cases: Sequence[Case]) -> Scored:
    """Similarity (1 - edits / the longer formula), exact matches and edits, in canonical tokens and
    of the nearest reference, and corpus BLEU-4 of the tokens.

    With ziamath also `rendered`, the share of answers that look like a truth, among the formulas
    that can be drawn, and `rendered_share`, how many of all these are.
    """
    said = [latex_tokens(case.answer) for case in cases]
    truths = [[latex_tokens(truth) for truth in case.truths] for case in cases]
    each: list[Scores] = []
    for tokens, several in zip(said, truths, strict=True):
        edits, longest, _ = nearest(tokens, several)
        each.append(
            {
                "similarity": 1.0 - edits / max(1, longest),
                "exact": float(edits == 0),
                "edit_distance": float(edits),
            }
        )
    estimators = means(each, bounds={"edit_distance": NON_NEGATIVE})
    estimators["bleu"] = bleu_estimator(bleu_counts(said, truths), LONGEST_GRAM)
    if drawing.available():
        looks = rendered(cases, said, truths)
        each = [s if a is None else s | {"rendered": a} for s, a in zip(each, looks, strict=True)]
        alike = np.array([alike or 0.0 for alike in looks])
        covered = np.array([float(alike is not None) for alike in looks])
        estimators["rendered"] = ratio(alike, covered)
        estimators["rendered_share"] = ratio(covered, np.ones(len(cases)))
    return Scored(each, estimators)


def rendered(
    cases: Sequence[Case], said: Sequence[Tokens], truths: Sequence[Sequence[Tokens]]
) -> list[float | None]:
    """Whether each answer looks like one of its truths: 1 or 0, None where no truth can be drawn.

    Equal drawings look the same, and so do formulas of the same tokens (`said` and `truths`),
    which are not drawn again. An answer that cannot be drawn looks like nothing.
    """
    bare = [[bare_formula(text) for text in (case.answer, *case.truths)] for case in cases]
    wanted = {truth for _, *several in bare for truth in several}
    same = [tokens in several for tokens, several in zip(said, truths, strict=True)]
    wanted |= {answer for (answer, *_), equal in zip(bare, same, strict=True) if not equal}
    looks = drawing.drawings(wanted)
    found: list[float | None] = []
    for (answer, *several), equal in zip(bare, same, strict=True):
        right = {looks[truth] for truth in several} - {None}
        found.append(float(equal or looks[answer] in right) if right else None)
    return found


def latex_tokens(formula: str) -> list[str]:
    r"""A formula as the tokens that TeX would read, in one canonical form.

    Surrounding dollar signs or `\[ \]`, `\( \)` are taken off; white space is dropped, since TeX
    ignores it in mathematics (inside `\text` and its kin a run of it counts as one token); braces
    around a single token are dropped, for `x^{2}` and `x^2` are the same; `x^2_i` is written
    `x_i^2`. Everything else, `\left` and `\right` and explicit spaces such as `\,` included, is
    kept: it changes what is typeset. Two formulas that differ here may still look alike
    (`\frac12` against `{1\over 2}`): the exact match is a lower bound.
    """
    return _ordered_scripts(
        _without_needless_braces(_visible(_LATEX.findall(bare_formula(formula))))
    )


def bare_formula(formula: str) -> str:
    """Without the signs that tell a formula from the text around it."""
    formula = formula.strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)")):
        inner = formula[len(left) : len(formula) - len(right)]
        whole = len(formula) >= len(left) + len(right)
        if whole and formula.startswith(left) and formula.endswith(right) and left not in inner:
            return inner.strip()
    return formula


def _visible(pieces: list[str]) -> list[str]:
    """Without white space, save within the braces of a text argument."""
    tokens: list[str] = []
    depth = text_from = 0
    for piece in pieces:
        if piece.isspace():
            if text_from and tokens[-1] not in (" ", "{"):
                tokens.append(" ")
            continue
        if piece == "{":
            depth += 1
            if not text_from and tokens and _TEXT_ARGUMENT.fullmatch(tokens[-1]):
                text_from = depth
        elif piece == "}":
            if text_from and tokens[-1] == " ":
                tokens.pop()
            if depth == text_from:
                text_from = 0
            depth = max(0, depth - 1)
        tokens.append(re.sub(r"\s", "", piece) if len(piece) > 2 else piece)
    return tokens


def _without_needless_braces(tokens: list[str]) -> list[str]:
    kept: list[str] = []
    opened: list[int] = []
    for token in tokens:
        if token == "{":
            opened.append(len(kept))
        elif token == "}" and opened:
            start = opened.pop()
            if len(kept) - start == 2:
                kept.pop(start)
                continue
        kept.append(token)
    return kept


def _ordered_scripts(tokens: list[str]) -> list[str]:
    ends = _ends_of_arguments(tokens)
    ordered: list[str] = []
    # Ranges still to be written, the next one last: models nest scripts deeper than Python calls.
    ranges = [(0, len(tokens))]
    while ranges:
        start, stop = ranges.pop()
        for i in range(start, stop):
            lower = ends[i + 1] if tokens[i] == "^" and i + 1 < stop else stop
            if lower < stop and tokens[lower] == "_":
                end = ends[lower + 1] if lower + 1 < stop else stop
                ranges += [(end, stop), (i + 1, lower), (i, i + 1), (lower + 1, end)]
                ranges.append((lower, lower + 1))
                break
            ordered.append(tokens[i])
    return ordered


def _ends_of_arguments(tokens: list[str]) -> list[int]:
    """Of each token the index after it or, where it opens a group, after that group."""
    ends = list(range(1, len(tokens) + 1))
    opened: list[int] = []
    for i, token in enumerate(tokens):
        if token == "{":
            opened.append(i)
        elif token == "}" and opened:
            ends[opened.pop()] = i + 1
    for i in opened:
        ends[i] = len(tokens)
    return ends
