r"""Random formulas, as space-separated LaTeX tokens in canonical form.

Formulas that look identical have identical LaTeX: subscripts precede superscripts, every argument
and only arguments have braces, symbols have one name (`\rightarrow`, never `\to`), brackets stretch
(`\left (`) only around tall content, and letters that fonts draw identically (o, O, I) are
excluded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Tokens = list[str]

MIN_TOKENS, MAX_TOKENS = 3, 40
"""Minimum and maximum number of LaTeX tokens of a formula, including braces."""

LETTERS = tuple("abcdefghijklmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ")
BOLD_LETTERS = tuple("abdefhkprxyzABCDEFGHKLMNPRSTXYZ")
CALLIGRAPHIC_LETTERS = tuple("ABCDEFGHLMNPRSTZ")
COMMON_LETTERS = tuple("xyzabnkmptfgr")
INDEX_LETTERS = tuple("ijkmnabqs")
GREEK_LETTERS = tuple(
    rf"\{name}"
    for name in (
        *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa"),
        *("lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "phi", "varphi", "chi"),
        *("psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Phi", "Psi", "Omega"),
    )
)
TENSOR_INDICES = (r"\mu", r"\nu", r"\alpha", r"\beta", r"\rho", r"\sigma", r"\lambda")
OPERATORS = ("+", "+", "-", "-", r"\pm", r"\cdot", r"\times", r"\otimes", "/")
RELATIONS = (
    *("=", "=", "=", "=", "=", "<", ">", r"\leq", r"\geq", r"\neq", r"\approx", r"\equiv"),
    *(r"\sim", r"\rightarrow", r"\in", r"\subset"),
)
CONSTANTS = (r"\infty", r"\hbar", r"\ell", r"\nabla", r"\partial")
FUNCTIONS = (r"\sin", r"\cos", r"\tan", r"\log", r"\ln", r"\exp", r"\cosh", r"\sinh", r"\det")
LIMIT_FUNCTIONS = (r"\lim", r"\max", r"\min", r"\sup")
ACCENTS = (r"\hat", r"\bar", r"\tilde", r"\dot", r"\vec")
INTEGRALS = (r"\int", r"\int", r"\int", r"\oint")
SUMS = (r"\sum", r"\sum", r"\prod")
BRACKETS = (
    *(("(", ")"), ("(", ")"), ("(", ")"), ("[", "]"), (r"\{", r"\}"), ("|", "|")),
    (r"\langle", r"\rangle"),
)
DOTS = (r"\ldots", r"\cdots")
SYMBOLS = tuple(
    dict.fromkeys(
        (
            *(
                *LETTERS,
                *"0123456789",
                *GREEK_LETTERS,
                *OPERATORS,
                *RELATIONS,
                *CONSTANTS,
                *FUNCTIONS,
            ),
            *(*LIMIT_FUNCTIONS, *INTEGRALS, *SUMS, *DOTS, r"\prime", "*", ",", "."),
            *(sign for pair in BRACKETS for sign in pair),
        )
    )
)
"""All symbols that are a single LaTeX token."""

_TALL_COMMANDS = {r"\frac", r"\sum", r"\prod", r"\int", r"\oint"}
_MAX_DEPTH = 3


def sample_formula(rng: random.Random) -> str:
    """Sample a formula as LaTeX tokens, separated by spaces.

    It has MIN_TOKENS to MAX_TOKENS tokens.
    """
    target_length = rng.choice((4, 6, 8, 10, 12, 15, 18, 22, 26, 32))
    while True:
        tokens = _sample_expression(rng, _MAX_DEPTH, target_length)
        if target_length > 6 and rng.random() < 0.55:
            left = _sample_expression(rng, _MAX_DEPTH - 1, target_length // 3)
            tokens = [
                *left,
                rng.choice(RELATIONS),
                *_sample_expression(rng, _MAX_DEPTH, target_length * 2 // 3),
            ]
        if rng.random() < 0.08:
            tokens.append(rng.choice(",."))
        if MIN_TOKENS <= len(tokens) <= MAX_TOKENS:
            return " ".join(tokens)


def wrap_braces(tokens: Sequence[str]) -> Tokens:
    return ["{", *tokens, "}"]


def wrap_brackets(tokens: Sequence[str], left: str, right: str) -> Tokens:
    r"""Enclose LaTeX tokens in brackets.

    The brackets stretch (`\left`, `\right`) around tall content only.
    """
    if _TALL_COMMANDS.intersection(tokens):
        return [r"\left", left, *tokens, r"\right", right]
    return [left, *tokens, right]


def _sample_expression(rng: random.Random, depth: int, target_length: int) -> Tokens:
    """Sample terms that are joined by operators, with about `target_length` LaTeX tokens."""
    tokens = ["-"] if rng.random() < 0.08 else []
    tokens += _sample_term(rng, depth, target_length)
    while len(tokens) < target_length - 1 and rng.random() < 0.9:
        tokens += [rng.choice(OPERATORS), *_sample_term(rng, depth, target_length - len(tokens))]
    return tokens


def _sample_term(rng: random.Random, depth: int, target_length: int) -> Tokens:
    """Sample a number, or a product of one to three factors."""
    tokens = _sample_number(rng) if rng.random() < 0.22 else []
    if tokens and rng.random() < 0.4:
        return tokens
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        tokens += _sample_factor(rng, depth if target_length > 4 else 0)
        if len(tokens) >= target_length:
            break
    return tokens


def _sample_factor(rng: random.Random, depth: int) -> Tokens:
    productions = _NESTED_PRODUCTIONS if depth > 0 else _LEAF_PRODUCTIONS
    chosen = rng.choices(
        [production for production, _ in productions], [weight for _, weight in productions]
    )[0]
    return chosen(rng, depth - 1)


def _sample_subexpression(rng: random.Random, depth: int) -> Tokens:
    """Sample the content of a root, a fraction or brackets."""
    return _sample_expression(rng, depth, rng.choice((1, 1, 3, 3, 5, 7)))


def _pick_symbol(rng: random.Random) -> str:
    share = rng.random()
    if share < 0.4:
        return rng.choice(COMMON_LETTERS)
    if share < 0.62:
        return rng.choice(LETTERS)
    return rng.choice(GREEK_LETTERS) if share < 0.93 else rng.choice(CONSTANTS)


def _sample_symbol(rng: random.Random, depth: int) -> Tokens:
    return [_pick_symbol(rng)]


def _sample_number(rng: random.Random) -> Tokens:
    share = rng.random()
    if share < 0.75:
        return [str(rng.randint(1, 9))]
    if share < 0.95:
        return list(str(rng.randint(10, 256)))
    return [*str(rng.randrange(10)), ".", *str(rng.randrange(1, 100))]


def _sample_subscript(rng: random.Random) -> Tokens:
    """Sample a subscript: an index, two indices, a number, or an expression."""
    share = rng.random()
    if share < 0.4:
        return [rng.choice(INDEX_LETTERS)]
    if share < 0.65:
        return [str(rng.randrange(10))]
    if share < 0.9:
        return rng.sample(
            TENSOR_INDICES if rng.random() < 0.6 else INDEX_LETTERS, rng.choice((1, 2))
        )
    return [rng.choice(INDEX_LETTERS), rng.choice("+-"), "1"]


def _sample_superscript(rng: random.Random, depth: int) -> Tokens:
    """Sample a superscript: a power, a prime, or an expression."""
    share = rng.random()
    if share < 0.45:
        return [str(rng.randint(2, 4))]
    if share < 0.6:
        return [rng.choice((r"\prime", "*", "+", "-"))]
    if share < 0.75:
        return [rng.choice(TENSOR_INDICES + INDEX_LETTERS)]
    if share < 0.85:
        return ["-", *rng.choice((_sample_number(rng), [_pick_symbol(rng)]))]
    return _sample_subexpression(rng, depth) if depth > 0 else [_pick_symbol(rng)]


def _sample_scripts(rng: random.Random, depth: int) -> Tokens:
    share = rng.random()
    subscript = ["_", *wrap_braces(_sample_subscript(rng))] if share < 0.6 else []
    superscript = ["^", *wrap_braces(_sample_superscript(rng, depth))] if share > 0.4 else []
    return subscript + superscript


def _sample_scripted_symbol(rng: random.Random, depth: int) -> Tokens:
    return [_pick_symbol(rng), *_sample_scripts(rng, depth)]


def _sample_accent(rng: random.Random, depth: int) -> Tokens:
    letter = rng.choice(COMMON_LETTERS + TENSOR_INDICES + (r"\psi", r"\phi"))
    return [
        rng.choice(ACCENTS),
        *wrap_braces([letter]),
        *(_sample_scripts(rng, 0) if rng.random() < 0.4 else []),
    ]


def _sample_styled_letter(rng: random.Random, depth: int) -> Tokens:
    """Sample a letter in another font style."""
    if rng.random() < 0.5:
        return [r"\mathbf", *wrap_braces([rng.choice(BOLD_LETTERS)])]
    return [r"\mathcal", *wrap_braces([rng.choice(CALLIGRAPHIC_LETTERS)])]


def _sample_fraction(rng: random.Random, depth: int) -> Tokens:
    share = rng.random()
    if share < 0.25:
        numerator, denominator = _sample_number(rng), _sample_number(rng)
    elif share < 0.4:
        sign = rng.choice(("d", r"\partial"))
        numerator, denominator = [sign, *_sample_symbol(rng, 0)], [sign, rng.choice(COMMON_LETTERS)]
        numerator = numerator if rng.random() < 0.6 else [sign]
    else:
        numerator, denominator = (
            _sample_subexpression(rng, depth),
            _sample_subexpression(rng, depth),
        )
    return [r"\frac", *wrap_braces(numerator), *wrap_braces(denominator)]


def _sample_root(rng: random.Random, depth: int) -> Tokens:
    degree = ["[", rng.choice("345n"), "]"] if rng.random() < 0.2 else []
    return [r"\sqrt", *degree, *wrap_braces(_sample_subexpression(rng, depth))]


def _sample_brackets(rng: random.Random, depth: int) -> Tokens:
    inner = _sample_expression(rng, depth, rng.choice((3, 3, 5, 7)))
    tokens = wrap_brackets(inner, *rng.choice(BRACKETS))
    return (
        [*tokens, "^", *wrap_braces(_sample_superscript(rng, 0))] if rng.random() < 0.35 else tokens
    )


def _sample_call(rng: random.Random, depth: int) -> Tokens:
    """Sample a function of one or two arguments, or a commutator."""
    first, second = _sample_subexpression(rng, 0), _sample_symbol(rng, 0)
    inner = [*first, ",", *second] if rng.random() < 0.4 else first
    if rng.random() < 0.12:
        return ["[", *_sample_symbol(rng, 0), ",", *second, "]"]
    name = [rng.choice(("f", "g", "F", "h", "P", r"\phi", r"\Gamma", r"\psi", r"\delta"))]
    name += _sample_scripts(rng, 0) if rng.random() < 0.2 else []
    return [*name, *wrap_brackets(inner, "(", ")")]


def _sample_named_function(rng: random.Random, depth: int) -> Tokens:
    """Sample a named function and its argument."""
    if rng.random() < 0.2:
        target = rng.choice((["0"], [r"\infty"], [rng.choice(COMMON_LETTERS)]))
        subscript = [rng.choice(COMMON_LETTERS), r"\rightarrow", *target]
        return [
            rng.choice(LIMIT_FUNCTIONS),
            "_",
            *wrap_braces(subscript),
            *_sample_scripted_symbol(rng, 0),
        ]
    name = [rng.choice(FUNCTIONS)]
    name += ["^", *wrap_braces(["2"])] if rng.random() < 0.2 else []
    if rng.random() < 0.5:
        return [*name, *_sample_symbol(rng, 0)]
    return [*name, *wrap_brackets(_sample_subexpression(rng, depth), "(", ")")]


def _sample_sum(rng: random.Random, depth: int) -> Tokens:
    index = rng.choice("ijkmn")
    subscript = [index, "=", rng.choice("01")] if rng.random() < 0.7 else [index]
    superscript = (
        ["^", *wrap_braces([rng.choice(("n", "N", "m", r"\infty"))])] if len(subscript) > 1 else []
    )
    return [
        rng.choice(SUMS),
        "_",
        *wrap_braces(subscript),
        *superscript,
        *_sample_factor(rng, min(depth, 1)),
    ]


def _sample_integral(rng: random.Random, depth: int) -> Tokens:
    share, variable = rng.random(), rng.choice("xytzskp")
    bounds = Tokens()
    if share < 0.6:
        lower, upper = (
            rng.choice((["0"], ["-", r"\infty"], ["a"])),
            rng.choice((r"\infty", "1", "b")),
        )
        bounds = ["_", *wrap_braces(lower), "^", *wrap_braces([upper])]
    elif share < 0.75:
        bounds = ["_", *wrap_braces([rng.choice("CDSV")])]
    power = ["^", *wrap_braces([rng.choice("234")])] if rng.random() < 0.25 else []
    if rng.random() < 0.3:
        return [rng.choice(INTEGRALS), *bounds, "d", *power, variable, *_sample_factor(rng, 0)]
    return [
        rng.choice(INTEGRALS),
        *bounds,
        *_sample_factor(rng, min(depth, 1)),
        "d",
        *power,
        variable,
    ]


def _sample_ellipsis(rng: random.Random, depth: int) -> Tokens:
    """Sample the first and the last element of a sequence."""
    letter, dots = _pick_symbol(rng), rng.choice(DOTS)
    between = "," if dots == r"\ldots" else rng.choice("+")
    last = [letter, "_", *wrap_braces([rng.choice("nNm")])]
    return [letter, "_", *wrap_braces(["1"]), between, dots, between, *last]


Productions = Sequence[tuple[Callable[[random.Random, int], Tokens], float]]

_LEAF_PRODUCTIONS: Productions = (
    (_sample_symbol, 6),
    (_sample_scripted_symbol, 4),
    (_sample_accent, 0.5),
    (_sample_styled_letter, 0.4),
)
_NESTED_PRODUCTIONS: Productions = (
    *(
        (_sample_symbol, 22),
        (_sample_scripted_symbol, 24),
        (_sample_accent, 3),
        (_sample_styled_letter, 2),
        (_sample_fraction, 14),
    ),
    *(
        (_sample_root, 6),
        (_sample_brackets, 7),
        (_sample_call, 8),
        (_sample_named_function, 7),
        (_sample_sum, 5),
        (_sample_integral, 5),
    ),
    (_sample_ellipsis, 1),
)
