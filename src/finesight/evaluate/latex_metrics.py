"""LaTeX formula metrics: token similarity, exact match, and visual equality."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from finesight.evaluate import latex_rendering
from finesight.evaluate.bootstrap import NON_NEGATIVE, estimate_ratio
from finesight.evaluate.caption_metrics import MAX_NGRAM_ORDER, count_bleu_statistics, estimate_bleu
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.evaluate.text_metrics import find_nearest_reference

LatexTokens = list[str]

# A control word, a control symbol, the name of an environment, or one visible character.
_LATEX_TOKEN = re.compile(
    r"\\(?:begin|end)\s*\{\s*[A-Za-z]+\*?\s*\}|\\[A-Za-z]+|\\.|\s+|.", re.DOTALL
)
# Commands with a text argument, in which spaces are significant.
_TEXT_ARGUMENT = re.compile(r"\\(?:text(?:rm|bf|it|sf|tt)?|mbox|hbox)")


def score_latex(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute similarity, exact match, edit distance and corpus BLEU-4 of canonical tokens.

    Similarity is 1 - edits / length of the longer formula, for the nearest reference. If ziamath
    is installed, `rendered` is the share of answers that render like a reference, among formulas
    that can be rendered, and `rendered_share` is the share of these formulas.
    """
    predictions = [tokenize_latex(case.answer) for case in cases]
    references = [[tokenize_latex(reference) for reference in case.references] for case in cases]
    per_sample: list[MetricValues] = []
    for tokens, case_references in zip(predictions, references, strict=True):
        edits, max_length, _ = find_nearest_reference(tokens, case_references)
        per_sample.append(
            {
                "similarity": 1.0 - edits / max(1, max_length),
                "exact": float(edits == 0),
                "edit_distance": float(edits),
            }
        )
    estimators = mean_metrics(per_sample, bounds={"edit_distance": NON_NEGATIVE})
    estimators["bleu"] = estimate_bleu(
        count_bleu_statistics(predictions, references), MAX_NGRAM_ORDER
    )
    if latex_rendering.is_ziamath_installed():
        render_matches = compare_renderings(cases, predictions, references)
        per_sample = [
            s if a is None else s | {"rendered": a}
            for s, a in zip(per_sample, render_matches, strict=True)
        ]
        match_values = np.array([match or 0.0 for match in render_matches])
        is_renderable = np.array([float(match is not None) for match in render_matches])
        estimators["rendered"] = estimate_ratio(match_values, is_renderable)
        estimators["rendered_share"] = estimate_ratio(is_renderable, np.ones(len(cases)))
    return MetricResult(per_sample, estimators)


def compare_renderings(
    cases: Sequence[EvalCase],
    predictions: Sequence[LatexTokens],
    references: Sequence[Sequence[LatexTokens]],
) -> list[float | None]:
    """Return whether each answer renders like one of its references: 1, 0 or None.

    None means that no reference can be rendered. An answer that cannot be rendered counts as 0. An
    answer with the same tokens as a reference is not rendered.
    """
    formulas = [
        [strip_math_delimiters(text) for text in (case.answer, *case.references)] for case in cases
    ]
    has_same_tokens = [
        tokens in case_references
        for tokens, case_references in zip(predictions, references, strict=True)
    ]
    digests = latex_rendering.render_digests(
        text
        for texts, is_same in zip(formulas, has_same_tokens, strict=True)
        for text in texts[1 if is_same else 0 :]
    )
    render_matches: list[float | None] = []
    for (answer, *several), is_same in zip(formulas, has_same_tokens, strict=True):
        reference_digests = {digests[truth] for truth in several} - {None}
        is_match = is_same or digests[answer] in reference_digests
        render_matches.append(float(is_match) if reference_digests else None)
    return render_matches


def tokenize_latex(formula: str) -> list[str]:
    r"""Split a formula into TeX tokens in canonical form.

    Removed: surrounding `$`, `\[ \]` and `\( \)`; whitespace outside `\text` and similar commands
    (inside, a run of whitespace is one token); braces around a single token, because `x^{2}`
    equals `x^2`. `x^2_i` becomes `x_i^2`. All other tokens, including `\left`, `\right` and
    explicit spaces such as `\,`, affect the output and are retained. Formulas with different
    tokens may render identically (`\frac12` and `{1\over 2}`), so exact match is a lower bound.
    """
    tokens = _drop_whitespace(_LATEX_TOKEN.findall(strip_math_delimiters(formula)))
    return _order_scripts(_drop_redundant_braces(tokens))


def strip_math_delimiters(formula: str) -> str:
    """Remove the math delimiters around a formula, such as `$` and `$$`."""
    formula = formula.strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)")):
        inner = formula[len(left) : len(formula) - len(right)]
        if f"{left}{inner}{right}" == formula and left not in inner:
            return inner.strip()
    return formula


def _drop_whitespace(pieces: list[str]) -> list[str]:
    """Remove whitespace tokens outside the arguments of text commands."""
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


def _drop_redundant_braces(tokens: list[str]) -> list[str]:
    result: list[str] = []
    open_positions: list[int] = []
    for token in tokens:
        if token == "{":
            open_positions.append(len(result))
        elif token == "}" and open_positions:
            start = open_positions.pop()
            if len(result) - start == 2:
                result.pop(start)
                continue
        result.append(token)
    return result


def _order_scripts(tokens: list[str]) -> list[str]:
    ends = _find_argument_ends(tokens)
    ordered: list[str] = []
    # Stack of remaining ranges instead of recursion, because nesting depth is unbounded.
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


def _find_argument_ends(tokens: list[str]) -> list[int]:
    """Return the end index of the argument that starts at each token.

    The argument is the token itself, or the brace group that it opens.
    """
    ends = list(range(1, len(tokens) + 1))
    open_positions: list[int] = []
    for i, token in enumerate(tokens):
        if token == "{":
            open_positions.append(i)
        elif token == "}" and open_positions:
            ends[open_positions.pop()] = i + 1
    for i in open_positions:
        ends[i] = len(tokens)
    return ends
