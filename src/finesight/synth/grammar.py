r"""Formulas from a grammar, as LaTeX tokens with blanks between, in one canonical form.

What looks the same is written the same: subscripts come before superscripts, every argument stands
in braces and nothing else does, symbols have one name (`\rightarrow`, never `\to`), brackets are
stretched (`\left (`) when what they hold is tall and only then, and letters that fonts draw alike
(o, O, I) are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Tokens = list[str]

SHORTEST, LONGEST = 3, 40
"""Tokens of a formula, braces counted."""

LETTERS = tuple("abcdefghijklmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ")
BOLD = tuple("abdefhkprxyzABCDEFGHKLMNPRSTXYZ")
CALLIGRAPHIC = tuple("ABCDEFGHLMNPRSTZ")
USUAL = tuple("xyzabnkmptfgr")
INDICES = tuple("ijkmnabqs")
GREEK = tuple(
    rf"\{name}"
    for name in (
        *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa"),
        *("lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "phi", "varphi", "chi"),
        *("psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Phi", "Psi", "Omega"),
    )
)
TENSOR = (r"\mu", r"\nu", r"\alpha", r"\beta", r"\rho", r"\sigma", r"\lambda")
OPERATORS = ("+", "+", "-", "-", r"\pm", r"\cdot", r"\times", r"\otimes", "/")
RELATIONS = (
    *("=", "=", "=", "=", "=", "<", ">", r"\leq", r"\geq", r"\neq", r"\approx", r"\equiv"),
    *(r"\sim", r"\rightarrow", r"\in", r"\subset"),
)
CONSTANTS = (r"\infty", r"\hbar", r"\ell", r"\nabla", r"\partial")
FUNCTIONS = (r"\sin", r"\cos", r"\tan", r"\log", r"\ln", r"\exp", r"\cosh", r"\sinh", r"\det")
LIMITED = (r"\lim", r"\max", r"\min", r"\sup")
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
            *(*LETTERS, *"0123456789", *GREEK, *OPERATORS, *RELATIONS, *CONSTANTS, *FUNCTIONS),
            *(*LIMITED, *INTEGRALS, *SUMS, *DOTS, r"\prime", "*", ",", "."),
            *(sign for pair in BRACKETS for sign in pair),
        )
    )
)
"""Every sign that stands for itself."""

_TALL = {r"\frac", r"\sum", r"\prod", r"\int", r"\oint"}
_DEEPEST = 3


def formula(rng: random.Random) -> str:
    """A formula of SHORTEST to LONGEST tokens, blanks between them."""
    goal = rng.choice((4, 6, 8, 10, 12, 15, 18, 22, 26, 32))
    while True:
        tokens = _expression(rng, _DEEPEST, goal)
        if goal > 6 and rng.random() < 0.55:
            left = _expression(rng, _DEEPEST - 1, goal // 3)
            tokens = [*left, rng.choice(RELATIONS), *_expression(rng, _DEEPEST, goal * 2 // 3)]
        if rng.random() < 0.08:
            tokens.append(rng.choice(",."))
        if SHORTEST <= len(tokens) <= LONGEST:
            return " ".join(tokens)


def group(tokens: Sequence[str]) -> Tokens:
    return ["{", *tokens, "}"]


def in_brackets(tokens: Sequence[str], left: str, right: str) -> Tokens:
    """Between brackets, which stretch around what is tall."""
    if _TALL.intersection(tokens):
        return [r"\left", left, *tokens, r"\right", right]
    return [left, *tokens, right]


def _expression(rng: random.Random, depth: int, goal: int) -> Tokens:
    """Terms with signs between them, of about `goal` tokens."""
    tokens = ["-"] if rng.random() < 0.08 else []
    tokens += _term(rng, depth, goal)
    while len(tokens) < goal - 1 and rng.random() < 0.9:
        tokens += [rng.choice(OPERATORS), *_term(rng, depth, goal - len(tokens))]
    return tokens


def _term(rng: random.Random, depth: int, goal: int) -> Tokens:
    """A number, or one to three factors side by side."""
    tokens = _number(rng) if rng.random() < 0.22 else []
    if tokens and rng.random() < 0.4:
        return tokens
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        tokens += _factor(rng, depth if goal > 4 else 0)
        if len(tokens) >= goal:
            break
    return tokens


def _factor(rng: random.Random, depth: int) -> Tokens:
    kinds = _DEEP if depth > 0 else _FLAT
    chosen = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
    return chosen(rng, depth - 1)


def _inner(rng: random.Random, depth: int) -> Tokens:
    """What stands under a root, in a fraction or between brackets."""
    return _expression(rng, depth, rng.choice((1, 1, 3, 3, 5, 7)))


def _symbol(rng: random.Random) -> str:
    share = rng.random()
    if share < 0.4:
        return rng.choice(USUAL)
    if share < 0.62:
        return rng.choice(LETTERS)
    return rng.choice(GREEK) if share < 0.93 else rng.choice(CONSTANTS)


def _plain(rng: random.Random, depth: int) -> Tokens:
    return [_symbol(rng)]


def _number(rng: random.Random) -> Tokens:
    share = rng.random()
    if share < 0.75:
        return [str(rng.randint(1, 9))]
    if share < 0.95:
        return list(str(rng.randint(10, 256)))
    return [*str(rng.randrange(10)), ".", *str(rng.randrange(1, 100))]


def _low(rng: random.Random) -> Tokens:
    """A subscript: an index, two, a number, or more."""
    share = rng.random()
    if share < 0.4:
        return [rng.choice(INDICES)]
    if share < 0.65:
        return [str(rng.randrange(10))]
    if share < 0.9:
        return rng.sample(TENSOR if rng.random() < 0.6 else INDICES, rng.choice((1, 2)))
    return [rng.choice(INDICES), rng.choice("+-"), "1"]


def _high(rng: random.Random, depth: int) -> Tokens:
    """A superscript: a power, a mark, or an expression."""
    share = rng.random()
    if share < 0.45:
        return [str(rng.randint(2, 4))]
    if share < 0.6:
        return [rng.choice((r"\prime", "*", "+", "-"))]
    if share < 0.75:
        return [rng.choice(TENSOR + INDICES)]
    if share < 0.85:
        return ["-", *rng.choice((_number(rng), [_symbol(rng)]))]
    return _inner(rng, depth) if depth > 0 else [_symbol(rng)]


def _scripts(rng: random.Random, depth: int) -> Tokens:
    share = rng.random()
    low = ["_", *group(_low(rng))] if share < 0.6 else []
    high = ["^", *group(_high(rng, depth))] if share > 0.4 else []
    return low + high


def _scripted(rng: random.Random, depth: int) -> Tokens:
    return [_symbol(rng), *_scripts(rng, depth)]


def _accented(rng: random.Random, depth: int) -> Tokens:
    letter = rng.choice(USUAL + TENSOR + (r"\psi", r"\phi"))
    return [
        rng.choice(ACCENTS),
        *group([letter]),
        *(_scripts(rng, 0) if rng.random() < 0.4 else []),
    ]


def _lettered(rng: random.Random, depth: int) -> Tokens:
    """A letter in a face of its own."""
    if rng.random() < 0.5:
        return [r"\mathbf", *group([rng.choice(BOLD)])]
    return [r"\mathcal", *group([rng.choice(CALLIGRAPHIC)])]


def _fraction(rng: random.Random, depth: int) -> Tokens:
    share = rng.random()
    if share < 0.25:
        above, below = _number(rng), _number(rng)
    elif share < 0.4:
        sign = rng.choice(("d", r"\partial"))
        above, below = [sign, *_plain(rng, 0)], [sign, rng.choice(USUAL)]
        above = above if rng.random() < 0.6 else [sign]
    else:
        above, below = _inner(rng, depth), _inner(rng, depth)
    return [r"\frac", *group(above), *group(below)]


def _root(rng: random.Random, depth: int) -> Tokens:
    degree = ["[", rng.choice("345n"), "]"] if rng.random() < 0.2 else []
    return [r"\sqrt", *degree, *group(_inner(rng, depth))]


def _bracketed(rng: random.Random, depth: int) -> Tokens:
    inner = _expression(rng, depth, rng.choice((3, 3, 5, 7)))
    tokens = in_brackets(inner, *rng.choice(BRACKETS))
    return [*tokens, "^", *group(_high(rng, 0))] if rng.random() < 0.35 else tokens


def _called(rng: random.Random, depth: int) -> Tokens:
    """A function of one or two arguments, or a commutator."""
    first, second = _inner(rng, 0), _plain(rng, 0)
    inner = [*first, ",", *second] if rng.random() < 0.4 else first
    if rng.random() < 0.12:
        return ["[", *_plain(rng, 0), ",", *second, "]"]
    name = [rng.choice(("f", "g", "F", "h", "P", r"\phi", r"\Gamma", r"\psi", r"\delta"))]
    name += _scripts(rng, 0) if rng.random() < 0.2 else []
    return [*name, *in_brackets(inner, "(", ")")]


def _function(rng: random.Random, depth: int) -> Tokens:
    """A function with a name, and what it is of."""
    if rng.random() < 0.2:
        target = rng.choice((["0"], [r"\infty"], [rng.choice(USUAL)]))
        low = [rng.choice(USUAL), r"\rightarrow", *target]
        return [rng.choice(LIMITED), "_", *group(low), *_scripted(rng, 0)]
    name = [rng.choice(FUNCTIONS)]
    name += ["^", *group(["2"])] if rng.random() < 0.2 else []
    if rng.random() < 0.5:
        return [*name, *_plain(rng, 0)]
    return [*name, *in_brackets(_inner(rng, depth), "(", ")")]


def _sum(rng: random.Random, depth: int) -> Tokens:
    index = rng.choice("ijkmn")
    low = [index, "=", rng.choice("01")] if rng.random() < 0.7 else [index]
    high = ["^", *group([rng.choice(("n", "N", "m", r"\infty"))])] if len(low) > 1 else []
    return [rng.choice(SUMS), "_", *group(low), *high, *_factor(rng, min(depth, 1))]


def _integral(rng: random.Random, depth: int) -> Tokens:
    share, variable = rng.random(), rng.choice("xytzskp")
    bounds = Tokens()
    if share < 0.6:
        low, high = rng.choice((["0"], ["-", r"\infty"], ["a"])), rng.choice((r"\infty", "1", "b"))
        bounds = ["_", *group(low), "^", *group([high])]
    elif share < 0.75:
        bounds = ["_", *group([rng.choice("CDSV")])]
    power = ["^", *group([rng.choice("234")])] if rng.random() < 0.25 else []
    if rng.random() < 0.3:
        return [rng.choice(INTEGRALS), *bounds, "d", *power, variable, *_factor(rng, 0)]
    return [rng.choice(INTEGRALS), *bounds, *_factor(rng, min(depth, 1)), "d", *power, variable]


def _dotted(rng: random.Random, depth: int) -> Tokens:
    """The first and the last of a row."""
    letter, dots = _symbol(rng), rng.choice(DOTS)
    between = "," if dots == r"\ldots" else rng.choice("+")
    last = [letter, "_", *group([rng.choice("nNm")])]
    return [letter, "_", *group(["1"]), between, dots, between, *last]


Kinds = Sequence[tuple[Callable[[random.Random, int], Tokens], float]]

_FLAT: Kinds = ((_plain, 6), (_scripted, 4), (_accented, 0.5), (_lettered, 0.4))
_DEEP: Kinds = (
    *((_plain, 22), (_scripted, 24), (_accented, 3), (_lettered, 2), (_fraction, 14)),
    *((_root, 6), (_bracketed, 7), (_called, 8), (_function, 7), (_sum, 5), (_integral, 5)),
    (_dotted, 1),
)
