"""Streams of JSON documents: items, keys, limits and the errors of broken documents."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from finesight.errors import UserError
from finesight.ingest import json_stream
from finesight.ingest.field_path import parse_path
from finesight.ingest.json_stream import JsonStream

DOCUMENT: dict[str, Any] = {
    "info": {"year": 2031, "parts": [[1, -2.5e3], {"é": 'a "b" \\ \U0001f600'}]},
    "images": [{"id": 1, "name": "a\u2028.png"}, {"id": 12345678901234567890}, {}, None, -7, 1e5],
    "groups": {"x": {"rows": [{"id": "p"}]}, "y": {"rows": []}, "z": {"rows": ["q", True]}},
    "last": [False, "", [], {}, 0.5],
}


def read_items(content: bytes, **paths: str) -> list[tuple[str, str, Any]]:
    """Return name, location and value of the items of lists."""
    stream = JsonStream(io.BytesIO(content), Path("d.json"))
    found: list[tuple[str, str, Any]] = []
    for name, scope, text in stream.iter_items({one: parse_path(paths[one]) for one in paths}):
        assert json.loads(text) == scope.value
        found.append((name, scope.location, scope.value))
    return found


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("options", [{}, {"indent": 3}, {"ensure_ascii": False}])
def test_items_have_the_values_of_the_document(monkeypatch, window, options) -> None:
    monkeypatch.setattr(json_stream, "WINDOW_CHARS", window)
    content = json.dumps(DOCUMENT, **options).encode("utf-8-sig")
    found = read_items(content, last="last", rows="groups.*.rows", images="images.*")
    expected = [("images", f"images.{n}", one) for n, one in enumerate(DOCUMENT["images"])]
    expected += [
        ("rows", "groups.x.rows.0", {"id": "p"}),
        ("rows", "groups.z.rows.0", "q"),
        ("rows", "groups.z.rows.1", True),
    ]
    expected += [("last", f"last.{n}", one) for n, one in enumerate(DOCUMENT["last"])]
    assert found == expected


@pytest.mark.parametrize("path", ["*", "."])
def test_items_of_a_document_that_is_a_list(path: str) -> None:
    found = read_items(b'[{"a": 1}, {"a": 2}]', rows=path)
    assert found == [("rows", "0", {"a": 1}), ("rows", "1", {"a": 2})]


def test_items_of_the_same_list_belong_to_each_name() -> None:
    found = read_items(b'{"a": [1]}', first="a", second="$.a.*")
    assert found == [("first", "a.0", 1), ("second", "a.0", 1)]


def test_other_keys_and_keys_of_objects_are_named(monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "WINDOW_CHARS", 4)
    stream = JsonStream(io.BytesIO(json.dumps(DOCUMENT).encode()), Path("d.json"))
    paths = {"groups": parse_path("groups"), "last": parse_path("last")}
    assert len(list(stream.iter_items(paths))) == 8
    assert stream.unused_keys == {"info": 1, "images": 1}
    assert stream.named_lists == {"groups"}


@pytest.mark.parametrize(
    ("path", "document", "unused"),
    [
        ("a.r", {"a": {"r": [1], "note": "x"}, "t": [2]}, {"a.note": 1, "t": 1}),
        ("0.r", [{"r": [1], "note": 0}, {"r": [2]}, "x"], {"0.note": 1, "*": 2}),
        ("a.1.r", {"a": [7, {"r": [1]}, [8]]}, {"a.*": 2}),
        ("a.b?.r", {"a": {"x.y": {"r": [1]}}}, {'a."x.y"': 1}),
        (
            "g.*.r",
            {"g": {"x": {"r": [], "n": 1}, "y": {"n": {"n": 2}, "r": [1]}}},
            {"g.*.n": 2},
        ),
        ("*.*.r", [[{"r": [1], "n": 1}, {"r": [], "n": [2], "m": 3}]], {"*.*.n": 2, "*.*.m": 1}),
    ],
)
@pytest.mark.parametrize("window", [4, 10_000])
def test_values_beside_nested_lists_are_named(monkeypatch, window, path, document, unused) -> None:
    monkeypatch.setattr(json_stream, "WINDOW_CHARS", window)
    stream = JsonStream(io.BytesIO(json.dumps(document).encode()), Path("d.json"))
    list(stream.iter_items({"rows": parse_path(path)}))
    assert stream.unused_keys == unused


@pytest.mark.parametrize("key", ["rows", "unused"])
def test_values_are_decoded_once(monkeypatch, key) -> None:
    """Values at the end of a window are decoded again, about one of 100 here."""
    num_decoded = 0
    raw_decode = json.JSONDecoder.raw_decode

    def count(decoder: json.JSONDecoder, text: str, position: int) -> tuple[Any, int]:
        nonlocal num_decoded
        num_decoded += 1
        return raw_decode(decoder, text, position)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", count)
    monkeypatch.setattr(json_stream, "WINDOW_CHARS", 1000)
    content = json.dumps({"rows": [], key: [[]] * 5000})
    stream = JsonStream(io.BytesIO(content.encode()), Path("d.json"))
    num_items = sum(1 for _ in stream.iter_items({"rows": parse_path("rows")}))
    assert num_items == (5000 if key == "rows" else 0)
    assert 5000 < num_decoded < 5500


@pytest.mark.parametrize("window", [1, 16, 100_000])
def test_truncated_documents_are_errors(monkeypatch, window) -> None:
    monkeypatch.setattr(json_stream, "WINDOW_CHARS", window)
    content = json.dumps(DOCUMENT, ensure_ascii=False).encode()
    for length in range(0, len(content), 5):
        with pytest.raises(UserError, match=r"not a JSON document: .* at line 1 column") as caught:
            read_items(content[:length], images="images", last="last")
        assert caught.value.where == "d.json"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"a": [{"b": 1, "b": 2}]}', "the key 'b' occurs twice in one object in a.0, at line 1"),
        ('{"a": [],\n "a": []}', "the key 'a' occurs twice in one object, at line 2 column"),
        ('{"a": [], "c": {"b": 1, "b": 2}}', "the key 'b' occurs twice in one object"),
        ('{"a": [1\n 2]}', "no ',', at line 2 column 2"),
        ('{"a": [1,]}', "Expecting value, at line 1 column 10"),
        ('{"a": [],}', "no key in double quotes, at line 1 column 10"),
        ('{"a" []}', "no ':', at line 1 column 6"),
        ('{"a": [tru]}', "Expecting value, at line 1 column 8"),
        ('{"a": [01]}', "no ',', at line 1 column 9"),
        ('{"a": [1.]}', "no ',', at line 1 column 9"),
        ('{"a": ["x\ny"]}', "Invalid control character at, at line 1 column 10"),
        ('{"a": []} {}', "more text after the document, at line 1 column 11"),
        ('{"a": [[' + "[" * 100_000, "more than 200 nested values"),
        ('{"b": ' + "[" * 100_000, "more than 200 nested values"),
        (
            '{"a": [' + "[" * 300 + "]" * 300 + "]}",
            "recursion limit exceeded in a.0, at line 1 column",
        ),
        ('{"a": ["\\ud800"]}', "in a.0"),
        ("", "Expecting value, at line 1 column 1"),
    ],
)
@pytest.mark.parametrize("padding", [0, 10_000])
def test_broken_documents_are_errors_with_their_position(monkeypatch, text, what, padding) -> None:
    monkeypatch.setattr(json_stream, "WINDOW_CHARS", 32)
    with pytest.raises(UserError, match=f"not a JSON document: .*{what}"):
        read_items(f"{text}{' ' * padding}".encode(), a="a")


def test_text_that_is_not_utf_8_is_an_error() -> None:
    with pytest.raises(UserError, match="bytes after this position are not UTF-8"):
        read_items(b'{"a": ["\xff"]}', a="a")


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("b", r"no key b in the document \(path b\)"),
        ("a.c", r"no key c in a \(path a.c\)"),
        ("a.b.*.x", r"no key x in a.b.0 \(path"),
        ("t", r"t is 'text' \(path t\)"),
        ("t.x", r"t is 'text' \(path t.x\)"),
    ],
)
def test_missing_lists_are_errors(path: str, what: str) -> None:
    content = b'{"a": {"b": [{"y": 1}]}, "t": "text"}'
    with pytest.raises(UserError, match=what) as caught:
        read_items(content, rows=path)
    assert caught.value.where == "d.json"


def test_missing_optional_lists_have_no_items() -> None:
    assert read_items(b'{"a": 1}', rows="b?.c") == []


@pytest.mark.parametrize("path", ["b?", "b?.c", "a.b?.*.c", "a.b?.c.d"])
@pytest.mark.parametrize("value", [None, "", " ", [], {}])
@pytest.mark.parametrize("window", [2, 1000])
def test_empty_optional_lists_have_no_items(monkeypatch, path, value, window) -> None:
    monkeypatch.setattr(json_stream, "WINDOW_CHARS", window)
    content = json.dumps({"a": {"b": value}, "b": value}).encode()
    assert read_items(content, rows=path) == []
    if value not in ([], {}):
        with pytest.raises(UserError, match=r"b is .* \(path .*b"):
            read_items(content, rows=path, other=path.replace("?", ""))


@pytest.mark.parametrize("value", [0, False, "text"])
def test_optional_lists_of_another_type_are_errors(value) -> None:
    with pytest.raises(UserError, match=r"b is .* \(path b\?\)"):
        read_items(json.dumps({"b": value}).encode(), rows="b?")


def test_lists_inside_of_each_other_are_errors() -> None:
    with pytest.raises(UserError, match=r"one of the lists a, a\.\*\.b is inside of another"):
        read_items(b'{"a": [{"b": [1]}]}', rows="a", inner="a.*.b")


def test_errors_at_the_start_do_not_read_the_document(monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "WINDOW_CHARS", 1000)
    content = io.BytesIO(b'{"a": [{"b" 1}, ' + b'"x", ' * 10**6)
    stream = JsonStream(content, Path("d.json"))
    with pytest.raises(UserError, match="at line 1 column 13"):
        list(stream.iter_items({"a": parse_path("a")}))
    assert content.tell() < 20_000


def test_random_documents_have_the_items_of_a_parser(monkeypatch) -> None:
    rng = random.Random(7)

    def build(depth: int) -> Any:
        kind = rng.randrange(8 if depth else 6)
        if kind == 7:
            return {f"k{n}{rng.choice('é ,[')}": build(depth - 1) for n in range(rng.randrange(4))}
        if kind == 6:
            return [build(depth - 1) for _ in range(rng.randrange(4))]
        return rng.choice([None, True, -1.5e-7, 10**20, "", 'x"\\,]}\n', "\U0001f600" * 9])

    for _ in range(300):
        monkeypatch.setattr(json_stream, "WINDOW_CHARS", rng.randrange(1, 40))
        items = [build(3) for _ in range(rng.randrange(5))]
        document = {"before": build(4), "rows": items, "after": build(4)}
        content = json.dumps(
            document, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])
        )
        assert [one for _, _, one in read_items(content.encode(), rows="rows")] == items
