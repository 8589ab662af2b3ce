from __future__ import annotations

import pytest

from finesight.evaluate import latex_rendering
from finesight.evaluate.latex_rendering import (
    MAX_FORMULA_LENGTH,
    is_ziamath_installed,
    render_digests,
)

pytestmark = pytest.mark.skipif(not is_ziamath_installed(), reason="ziamath is not installed")


def test_equal_rendering_has_equal_digest():
    same, other = (r"\frac{a}{b}", r"\frac ab"), r"\frac{b}{a}"
    renderings = render_digests([*same, other])
    assert None not in renderings.values()
    assert renderings[same[0]] == renderings[same[1]] != renderings[other]


@pytest.mark.parametrize(
    "formula",
    [
        "",
        r"\left(",
        "a & b",
        "{" * 1500 + "x" + "}" * 1500,
        "x^" * 900,
        r"\begin{array}{" + "c" * 1500 + "}" + "&" * 1500 + r"\end{array}",
        "x" * (MAX_FORMULA_LENGTH + 1),
        "\ud800",
        "a\x00b",
    ],
    ids=["empty", "open", "ampersand", "deep", "scripts", "wide", "long", "surrogate", "null"],
)
def test_invalid_formula_has_no_rendering(formula):
    renderings = render_digests([formula, "y", "z"])
    assert renderings[formula] is None
    assert renderings["y"] != renderings["z"]
    assert None not in (renderings["y"], renderings["z"])


def test_slow_formula_times_out():
    nested = r"\frac{" * 80 + "x" + "}{y}" * 80
    assert render_digests([nested, "w"])[nested] is None


def test_killed_renderer_process_returns_empty():
    with latex_rendering.start_render_process() as child:
        child.kill()
        child.wait()
        assert latex_rendering.request_digest(child, "x") == ""
