"""Samples go into files and come back; everything else is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases

from finesight.errors import UserError
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    Message,
    Sample,
    TextPart,
    VideoPart,
    read_samples,
    write_samples,
)

CASES = load_cases("jsonl")

SAMPLE = Sample(
    id="été",
    messages=(
        Message(role="system", content=(TextPart(text="Be brief."),)),
        Message(
            role="user",
            content=(
                ImagePart(image="a/b.png"),
                TextPart(text="line\u2028separator\x85 and \n newline"),
                VideoPart(frames=("1.png", "2.png"), fps=4),
                VideoPart(video="clip.mp4", fps=1),
            ),
        ),
        Message(role="assistant", content=(BoxPart(label="cat", xyxy=(1, 2.5, 3, 4)),)),
    ),
    references=("other",),
    meta={"licence": None, "nested": [1, {"a": 2}]},
)


def record(**changes: Any) -> dict[str, Any]:
    base = {
        "id": "1",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
            {"role": "assistant", "content": "a cat"},
        ],
    }
    return {**base, **changes}


def make_messages(*roles: str) -> dict[str, Any]:
    return record(messages=[{"role": role, "content": "words"} for role in roles])


def load_error(path: Path, line: str | bytes, *, answered: bool = True) -> UserError:
    """The refusal of a file whose third line is `line`; it names that line."""
    data = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(record()).encode() + b"\n\n" + data + b"\n")
    with pytest.raises(UserError) as caught:
        read_samples(path, require_answer=answered)
    assert caught.value.where.startswith(f"{path}:3")
    assert caught.value.expected
    assert caught.value.remedy
    return caught.value


def test_roundtrip(tmp_path):
    path = tmp_path / "a.jsonl"
    write_samples(path, [SAMPLE, SAMPLE])
    assert read_samples(path) == [SAMPLE, SAMPLE]
    assert len(path.read_bytes().splitlines()) == 2
    # Integral coordinates have no decimal point.
    assert '"xyxy": [1, 2.5, 3, 4]' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("line", "what"), CASES["test_invalid_line_error_has_line_number"])
def test_invalid_line_error_has_line_number(tmp_path, line, what):
    text = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(UserError, match=what):
        raise load_error(tmp_path / "a.jsonl", text)
    with pytest.raises(UserError, match="broken JSON"):
        raise load_error(tmp_path / "a.jsonl", b'{"id": "\xff"}')


def test_misspelled_key_is_reported_first(tmp_path: Path) -> None:
    error = load_error(
        tmp_path / "a.jsonl", json.dumps(record(messages=[{"role": "user", "contents": "x"}]))
    )
    assert "messages.0.contents" in error.what
    assert error.remedy == "did you mean content?"


def test_prediction_needs_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(make_messages("user")))
    assert read_samples(path, require_answer=False)[0].messages[-1].role == "user"
    path.write_text(json.dumps(make_messages("user", "assistant")))
    assert read_samples(path, require_answer=False)[0].messages[-1].role == "assistant"


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="contains no samples") as caught:
        read_samples(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("key", ["images", "conversations", "query"])
def test_foreign_row_error_suggests_import(key: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_text(json.dumps({"id": "a", "messages": [], key: ["x"]}) + "\n")
    with pytest.raises(UserError, match="another dataset format") as caught:
        read_samples(path)
    assert "finesight import" in str(caught.value)


@pytest.mark.parametrize(("changes", "what"), CASES["test_invalid_tools_and_loss"])
def test_invalid_tools_and_loss(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    messages = [
        {"role": "user", "content": "Which?"},
        {"role": changes.pop("role", "assistant"), "content": "a"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "b", "loss": changes.pop("loss", True)},
    ]
    messages[1] |= {"loss": changes.pop("first_loss", True)}
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "messages": messages, **changes}))
    with pytest.raises(UserError, match=what):
        read_samples(tmp_path / "a.jsonl")
