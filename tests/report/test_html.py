"""Tests of self-contained pages and of escaping."""

import base64
import hashlib
import importlib.resources
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import XSS_PAYLOADS, Browser
from html_text import ParsedPage
from image_fixtures import make_noise_image
from jinja2 import UndefinedError
from PIL import Image

from finesight.errors import UserError
from finesight.report.html import PageFile, build_inline_image, render_page

TEMPLATES = Path(str(importlib.resources.files("finesight.report"))) / "templates"


def page_of(*texts: str) -> str:
    return render_page("base", [*texts], title=" ".join(texts))


def test_embedded_data_roundtrips() -> None:
    data = {"texts": [*XSS_PAYLOADS, "a & b", "]]>", "é😀"], "numbers": [1, 2.5, None, True]}
    page = ParsedPage(render_page("base", data, title="x"))
    assert json.loads(page.scripts[0]) == data


def test_texts_add_no_elements() -> None:
    baseline, hostile = ParsedPage(page_of("x")), ParsedPage(page_of(*XSS_PAYLOADS))
    names = [[tag for tag, _ in page.tags] for page in (baseline, hostile)]
    assert names[0] == names[1]
    assert baseline.scripts[1] == hostile.scripts[1]
    for page in (baseline, hostile):
        for tag, attributes in page.tags:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)


def test_content_security_policy_allows_only_its_script() -> None:
    page = ParsedPage(page_of("x"))
    (policy,) = (
        attributes["content"]
        for _, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    locations = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href") and value is not None
    ]
    assert locations
    assert all(url.startswith(("#", "data:")) for url in locations), locations


def test_templates_do_not_parse_html() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|document\.write"
        r"|\beval\(|new Function|setTimeout\(\s*[\"']|\|\s*safe\b|autoescape|@import|url\("
    )
    files = sorted(TEMPLATES.iterdir())
    assert {"base.html", "base.js", "base.css"} <= {file.name for file in files}
    for file in files:
        found = forbidden.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{file.name}: {found}"


def test_invalid_page_data_raises() -> None:
    with pytest.raises(ValueError, match="float values"):
        render_page("base", [float("nan")], title="x")
    with pytest.raises(UndefinedError, match="title"):
        render_page("base", [])
    # Undecodable file names are replaced.
    assert "caf?.png" in page_of("caf\udce9.png").encode().decode()


def test_page_replaces_its_own_earlier_page(tmp_path: Path) -> None:
    page = PageFile(tmp_path / "run" / "page.html", "report", [tmp_path / "run"])
    for title in ("one", "two"):
        page.write(page_of(title))
        assert f"<title>{title} · finesight</title>" in page.file.read_text()
    # A run folder may be moved with its report.
    (tmp_path / "run").rename(tmp_path / "moved")
    PageFile(tmp_path / "moved/page.html", "report", [tmp_path / "moved"]).check()


@pytest.mark.parametrize(
    ("command", "name", "edit"),
    [
        ("report", "a", lambda file: file.write_text(file.read_text() + "<!-- a note -->")),
        ("report", "a", lambda file: file.write_text(page_of("copied from another page"))),
        ("report", "a", lambda file: file.write_text("{}\n")),
        ("report", "a", lambda file: file.write_bytes(b"")),
        ("report", "a", lambda file: file.unlink() or file.mkdir()),
        ("report", "a", lambda file: file.unlink() or file.symlink_to("missing")),
        ("report", "b", lambda file: None),
        ("compare", "a", lambda file: None),
    ],
)
def test_page_replaces_no_other_file(tmp_path, command, name, edit):
    file = tmp_path / "page.html"
    PageFile(file, "report", [tmp_path / "a"]).write(page_of("x"))
    edit(file)
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(UserError, match=r"page\.html exists") as caught:
        PageFile(file, command, [tmp_path / name]).write(page_of("y"))
    assert before == (file.read_bytes() if file.is_file() else None)
    assert "page-2.html" in str(caught.value.remedy)


def test_content_security_policy_blocks_injected_scripts(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "holed.html"
    file.write_text(page_of("x").replace("<noscript>", f"{''.join(XSS_PAYLOADS[7:])}<noscript>"))
    browser.open(file)
    browser.settle()
    assert browser.executed_payloads() == []
    assert any("Content Security Policy" in message for message in browser.messages())


@pytest.mark.parametrize(
    ("image", "size", "kind"),
    [
        (Image.new("RGB", (64, 32), (10, 200, 30)), (64, 32), "png"),
        (make_noise_image(64, 32), (64, 32), "jpeg"),
        (make_noise_image(400, 200), (100, 50), "jpeg"),
        (make_noise_image(200, 400), (50, 100), "jpeg"),
    ],
)
def test_inline_images_are_small_but_not_enlarged(image, size, kind):
    found = build_inline_image(image, 100)
    assert (found["width"], found["height"]) == image.size
    head, _, content = found["src"].partition(",")
    assert head == f"data:image/{kind};base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(content)))
    assert decoded.size == size
    if kind == "png":
        assert np.array_equal(np.asarray(decoded), np.asarray(image))
