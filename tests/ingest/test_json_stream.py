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
    assert stream.unused_keys == ["info", "images"]
    assert stream.named_lists == {"groups"}


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
