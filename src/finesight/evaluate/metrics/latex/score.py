"""LaTeX formula metrics: token similarity, exact match, and visual equality.

Generated formulas may crash the renderer (ziamath), run forever or exhaust memory, so worker
processes with limits of time and memory render them.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib import import_module, util
from itertools import chain
from typing import Any

import numpy as np

from finesight.evaluate.bleu import MAX_NGRAM_ORDER, count_bleu_statistics, estimate_bleu
from finesight.evaluate.bootstrap import NON_NEGATIVE, estimate_ratio
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.evaluate.text_metrics import find_nearest_reference, strip_math_delimiters
from finesight.files.worker_pool import JobOutput, WorkerJobError, WorkerLimitError, WorkerPool

LatexTokens = list[str]

LatexGroup = list["str | LatexGroup"]
"""Tokens and brace groups; a brace group contains its braces."""

# A control word, a control symbol, the name of an environment, or one visible character.
_LATEX_TOKEN = re.compile(
    r"\\(?:begin|end)\s*\{\s*[A-Za-z]+\*?\s*\}|\\[A-Za-z]+|\\.|\s+|.", re.DOTALL
)
# Commands with a text argument, in which spaces are significant.
_TEXT_ARGUMENT = re.compile(r"\\(?:text(?:rm|bf|it|sf|tt)?|mbox|hbox)")


def score_latex(cases: Sequence[EvalCase], *, skips_slow_scores: bool = False) -> MetricResult:
    """Compute similarity, exact match, edit distance and corpus BLEU-4 of canonical tokens.

    Similarity is 1 - edits / length of the longer formula, for the nearest reference. If ziamath is
    installed, `rendered` is the share of answers that render like a reference, among formulas that
    can be rendered, and `rendered_share` is the share of these formulas. Renderings take most of
    the time, and `skips_slow_scores` omits both.
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
    bleu_counts = count_bleu_statistics(predictions, references)
    estimators["bleu"] = estimate_bleu(bleu_counts, MAX_NGRAM_ORDER)
    if not skips_slow_scores and is_ziamath_installed():
        render_matches = compare_renderings(cases, predictions, references)
        for scores, match in zip(per_sample, render_matches, strict=True):
            if match is not None:
                scores["rendered"] = match
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
    formulas: list[list[str]] = []
    for case, tokens, case_references in zip(cases, predictions, references, strict=True):
        answer, *truths = map(strip_math_delimiters, (case.answer, *case.references))
        if tokens in case_references:
            answer = truths[case_references.index(tokens)]
        formulas.append([answer, *truths])
    digests = render_digests(chain.from_iterable(formulas))
    render_matches: list[float | None] = []
    for answer, *truths in formulas:
        reference_digests = {digests[text] for text in truths} - {None}
        if not reference_digests:
            render_matches.append(None)
            continue
        is_match = answer in truths or digests[answer] in reference_digests
        render_matches.append(float(is_match))
    return render_matches


def tokenize_latex(formula: str) -> list[str]:
    r"""Split a formula into TeX tokens in canonical form.

    Removed: surrounding `$`, `\[ \]` and `\( \)`; whitespace outside `\text` and similar commands
    (inside, a run of whitespace is one token); braces around a single token, because `x^{2}`
    equals `x^2`. `x^2_i` becomes `x_i^2`. All other tokens, including `\left`, `\right` and
    explicit spaces such as `\,`, affect the output and are retained. Formulas with different
    tokens may render identically (`\frac12` and `{1\over 2}`), so exact match is a lower bound.
    """
    return _order_scripts(_parse_groups(_LATEX_TOKEN.findall(strip_math_delimiters(formula))))


def _parse_groups(pieces: Sequence[str]) -> LatexGroup:
    """Parse brace groups, without whitespace outside text and braces around a single token."""
    groups: list[LatexGroup] = [[]]
    is_text = [False]
    previous = ""
    for piece in pieces:
        if piece.isspace():
            if is_text[-1] and previous not in (" ", "{"):
                groups[-1].append(previous := " ")
            continue
        token = piece
        if len(piece) > 2:
            token = re.sub(r"\s", "", piece)
        if token == "{":
            groups.append(["{"])
            is_text.append(is_text[-1] or _TEXT_ARGUMENT.fullmatch(previous) is not None)
        elif token == "}" and len(groups) > 1:
            group = groups.pop()
            if is_text.pop() and previous == " ":
                group.pop()
            if len(group) == 2 and isinstance(group[1], str):
                groups[-1].append(group[1])
            else:
                groups[-1].append([*group, "}"])
        else:
            groups[-1].append(token)
        previous = token
    while len(groups) > 1:  # without a closing brace
        groups[-2].append(groups.pop())
    return groups[0]


def _order_scripts(formula: LatexGroup) -> LatexTokens:
    """Return the tokens of a formula with subscripts before superscripts."""
    ordered: LatexTokens = []
    # A stack instead of recursion, because nesting depth is unbounded.
    nodes: LatexGroup = [formula]
    while nodes:
        node = nodes.pop()
        if isinstance(node, str):
            ordered.append(node)
            continue
        i = 0
        while i < len(node):
            if node[i] == "^" and node[i + 2 : i + 3] == ["_"]:
                node[i : i + 4] = node[i + 2 : i + 4] + node[i : i + 2]
                i += 3
            i += 1
        nodes += reversed(node)
    return ordered


MAX_FORMULA_LENGTH = 4000
"""Maximum number of characters of a formula that is rendered.

Formulas of published datasets have at most about 1,000.
"""

RENDER_CPU_SECONDS = 2
"""CPU time limit per formula; typical formulas take 0.04 s."""

MAX_MEMORY_BYTES = 2 * 10**9
MAX_RENDER_PROCESSES = 4


def is_ziamath_installed() -> bool:
    """Return whether ziamath is installed (`pip install "finesight[latex]"`)."""
    return util.find_spec("ziamath") is not None


def render_digests(formulas: Iterable[str]) -> dict[str, str | None]:
    """Render formulas, and return digests, which are equal for equal images; None on failure."""
    requested = sorted(set(formulas))
    with ThreadPoolExecutor(min(MAX_RENDER_PROCESSES, os.cpu_count() or 1)) as threads:
        return dict(zip(requested, threads.map(_request_digest, requested), strict=True))


@cache
def _open_workers() -> WorkerPool:
    """Return the workers of this process. Rewards render a few formulas at a time."""
    workers = WorkerPool(
        import_module, "ziamath", num_idle=MAX_RENDER_PROCESSES, memory_bytes=MAX_MEMORY_BYTES
    )
    atexit.register(workers.close)
    return workers


@lru_cache(maxsize=200_000)
def _request_digest(formula: str) -> str | None:
    if len(formula) > MAX_FORMULA_LENGTH:
        return None
    try:
        with _open_workers().borrow_worker() as worker:
            reply = worker.call(_render_digest, formula, max_cpu_s=RENDER_CPU_SECONDS)
    except (WorkerJobError, WorkerLimitError):  # also without a usable ziamath
        return None
    if reply.value is None:
        return None
    return str(reply.value)


def _render_digest(ziamath: Any, formula: str) -> JobOutput:
    """Render a formula in a worker process."""
    try:
        svg = ziamath.Latex(formula).svg()
    except Exception:  # the parser raises various exceptions for generated formulas
        return JobOutput()
    return JobOutput(hashlib.sha256(svg.encode()).hexdigest()[:32])
