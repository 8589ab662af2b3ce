"""Scores of transcribed text: formulas in LaTeX and plain text (OCR), by edit distance."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# A control word, a control symbol, the name of an environment, or one visible character.
_LATEX = re.compile(r"\\(?:begin|end)\s*\{\s*[A-Za-z]+\*?\s*\}|\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
# Where spaces are part of what is typeset: the argument of these is text, not mathematics.
_TEXT_ARGUMENT = re.compile(r"\\(?:text(?:rm|bf|it|sf|tt)?|mbox|hbox)")


def latex_tokens(formula: str) -> list[str]:
    r"""A formula as the tokens that TeX would read, in one canonical form.

    Surrounding dollar signs or `\[ \]`, `\( \)` are taken off; white space is dropped, since TeX
    ignores it in mathematics (inside `\text` and its kin a run of it counts as one token); braces
    around a single token are dropped, for `x^{2}` and `x^2` are the same; `x^2_i` is written
    `x_i^2`. Everything else, `\left` and `\right` and explicit spaces such as `\,` included, is
    kept: it changes what is typeset. Two formulas that differ here may still look alike
    (`\frac12` against `{1\over 2}`): the exact match is a lower bound.
    """
    return _ordered_scripts(_without_needless_braces(_visible(_LATEX.findall(_bare(formula)))))


def plain_text(text: str) -> str:
    """Text with its characters in Unicode's composed form and runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def folded_text(text: str) -> str:
    """`plain_text` without regard to case, width variants and punctuation at its ends."""
    text = unicodedata.normalize("NFKC", plain_text(text)).casefold()
    punctuation = "".join(c for c in set(text) if unicodedata.category(c).startswith("P"))
    return text.strip(punctuation + " ")


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


def _bare(formula: str) -> str:
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
    ordered: list[str] = []
    i = 0
    while i < len(tokens):
        middle = _after_argument(tokens, i + 1) if tokens[i] == "^" else i
        if middle > i and middle < len(tokens) and tokens[middle] == "_":
            stop = _after_argument(tokens, middle + 1)
            lower, upper = tokens[middle:stop], tokens[i:middle]
            ordered += [lower[0], *_ordered_scripts(lower[1:])]
            ordered += [upper[0], *_ordered_scripts(upper[1:])]
            i = stop
        else:
            ordered.append(tokens[i])
            i += 1
    return ordered


def _after_argument(tokens: list[str], start: int) -> int:
    """The index after the token or the braced group at `start`."""
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i] == "{") - (tokens[i] == "}")
        if depth <= 0:
            return i + 1
    return len(tokens)
