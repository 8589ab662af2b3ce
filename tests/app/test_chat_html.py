"""Tests of the HTML of the chat page: formulas, JSON and escaping."""

from itertools import count
from pathlib import Path

import pytest
from browser import XSS_PAYLOADS
from case_files import load_cases
from html_text import ParsedPage
from web_server_fixture import ScriptedService, get_image_pool

from finesight.app.chat_page import (
    MAX_FORMULAS,
    ChatImage,
    ChatPage,
    render_answer,
    render_turns,
)
from finesight.evaluate.mathml import ALLOWED_ATTRIBUTES, ALLOWED_ELEMENTS
from finesight.infer.chat_session import ChatReply, ChatTurn
from finesight.infer.prediction import Prediction
from finesight.samples.sample import BoxPart
from finesight.settings.manifest import Manifest

CASES = load_cases("chat_html")

PLAIN = {"div", "span", "pre"}
"""Elements of a rendered answer besides MathML."""

HOSTILE = [
    *XSS_PAYLOADS,
    *(f"${payload}$" for payload in XSS_PAYLOADS),
    *(rf"\[\text{{{payload}}}\]" for payload in XSS_PAYLOADS),
    *(f'{{"a": "{payload}"}}' for payload in ("<img src=x onerror=alert(1)>", "</pre><script>")),
    r"$\href{javascript:alert(1)}{x}$",
    r"$\htmlData{a=1,onclick=alert(1)}{x}$",
    r"$$\htmlStyle{background:url(x)}{x} \class{a}{x} \url{javascript:alert(1)}$$",
    r"\(\includegraphics[onerror=alert(1)]{x}\)",
]


MANY_FORMULAS = ("$x$ " * (MAX_FORMULAS + 1), "x " * MAX_FORMULAS + "$x$ ", MAX_FORMULAS)
OPENINGS = r"\[ \( \\[ " * 30_000
MANY_OPENINGS = (rf"{OPENINGS}\[x\]", f"{OPENINGS}x", 1)
JSON_BOMBS = ("[" * 100_000, '{"a": ' + "9" * 5000 + "}")


def render(text: str, *, is_formula: bool = False) -> str:
    """Render a question whose answer is the question, with a box of the same label."""
    box = BoxPart(label=text, xyxy=(1.0, 1.0, 9.0, 9.0))
    path = Path(text)
    image = ChatImage(text, path, 10, 10)
    prediction = Prediction("", (path,), "", text, text, (box,), 1, "stop", reasoning=text)
    reply = ChatReply(text, path, finish_reason="stop", prediction=prediction)
    turn = ChatTurn(text, (path,), (reply, reply))
    return render_turns([turn], {path: image}, error=text, is_formula=is_formula)


@pytest.mark.parametrize(
    ("source", "text", "num_formulas"),
    [*CASES["test_formulas_with_delimiters_are_rendered"], MANY_FORMULAS, MANY_OPENINGS],
)
def test_formulas_with_delimiters_are_rendered(source, text, num_formulas):
    pytest.importorskip("latex2mathml", reason="the extra `latex` is not installed")
    rendered = render_answer(source, is_formula=False)
    assert (None if rendered is None else ParsedPage(rendered).text) == text
    assert (rendered or "").count("<math") == num_formulas


class EndingReply(ChatReply):
    """Reply that ends when its text is read."""

    @property
    def text(self) -> str:
        self.prediction = Prediction("", (), "", "All of it", "All of it", (), 1, "stop")
        self.finish_reason = "stop"
        return "All"

    @text.setter
    def text(self, text: str) -> None:
        pass


def test_answer_that_ends_while_it_is_rendered_is_consistent():
    turn = ChatTurn("Who?", (), (EndingReply("parrot", None),))
    assert 'streaming">All</p>' in render_turns([turn], {})
    assert 'complete">All of it</p>' in render_turns([turn], {})


def test_bare_latex_is_rendered_for_runs_with_the_latex_metric():
    pytest.importorskip("latex2mathml", reason="the extra `latex` is not installed")
    source = r"\frac { a } { b }"
    for is_formula in (False, True):
        page = render(source, is_formula=is_formula)
        assert page.count("<mfrac>") == page.count("<summary>Source</summary>") == 2 * is_formula
    for text in ("This image shows some formula", "x^2^2", ""):
        assert render_answer(text, is_formula=True) is None
    assert "</span> or <span" in str(render_answer("Either $a$ or $b$", is_formula=True))


@pytest.mark.parametrize(
    ("source", "expected"),
    [*CASES["test_json_is_indented"], *((text, None) for text in JSON_BOMBS)],
    ids=count(),
)
def test_json_is_indented(source, expected):
    rendered = render_answer(source, is_formula=False)
    assert (None if rendered is None else ParsedPage(rendered).text) == expected


@pytest.mark.parametrize("source", HOSTILE)
def test_rendered_answers_have_only_known_elements(source):
    classes = {("class", one) for one in ("formula", "json", "message-body")}
    for is_formula in (False, True):
        for tag, attributes in ParsedPage(render_answer(source, is_formula) or "").tags:
            assert tag in ALLOWED_ELEMENTS | PLAIN, tag
            for name, value in attributes.items():
                is_own = tag in PLAIN and (name, value) in classes | {("tabindex", "0")}
                assert is_own or ALLOWED_ATTRIBUTES[name].fullmatch(value or ""), (name, value)


@pytest.mark.parametrize("payload", XSS_PAYLOADS)
def test_texts_names_and_prompts_are_escaped(payload, tmp_path):
    def list_tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
        prompts = Manifest.model_construct(metric="latex", prompts=(text,), has_images=False)
        service = ScriptedService(model_names=(text,), manifest=prompts)
        page = ChatPage(service, tmp_path, get_image_pool())
        return ParsedPage(render(text, is_formula=True) + page.render()).tags

    safe = {name for tag, attributes in list_tags("a question") for name in (tag, *attributes)}
    safe |= {"math", *ALLOWED_ELEMENTS, *ALLOWED_ATTRIBUTES}
    for tag, attributes in list_tags(payload):
        assert {tag, *attributes} <= safe, (tag, attributes)
