"""LLaMA-Factory's datasets, sharegpt and alpaca (the README of its folder `data`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record

from finesight.data.formats import detect_format
from finesight.data.formats.conversations import LLAMA_FACTORY
from finesight.errors import UserError


def sharegpt(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "images": ["a.png"], **more}


def alpaca(instruction: object, output: object, **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, **more}


def test_sharegpt(folder: Path) -> None:
    rows = sharegpt("<image>human instruction", "model response", system="Be brief.", tools="")
    assert list_turns(parse_record(LLAMA_FACTORY, rows, folder)) == [
        ("system", ["Be brief."]),
        ("user", [folder / "a.png", "human instruction"]),
        ("assistant", ["model response"]),
    ]
    form, reason = detect_format([rows], "here")
    assert form is LLAMA_FACTORY
    assert "a list of images in 1 of the first 1 (sharegpt)" in reason


def test_alpaca(folder: Path) -> None:
    rows = alpaca(
        "Compare it.",
        "Smaller.",
        input="To <image>",
        images=["a.png", "b.png"],
        system="Be brief.",
        history=[["<image>What is it?", "A house."]],
        licence="CC0",
    )
    case = parse_record(LLAMA_FACTORY, rows, folder)
    assert list_turns(case) == [
        ("system", ["Be brief."]),
        ("user", [folder / "a.png", "What is it?"]),
        ("assistant", ["A house."]),
        ("user", ["Compare it.\nTo ", folder / "b.png"]),
        ("assistant", ["Smaller."]),
    ]
    assert case.meta == {"licence": "CC0"}
    assert "alpaca" in detect_format([rows], "here")[1]


def test_empty_alpaca_input(folder: Path) -> None:
    for more in ({}, {"input": ""}, {"input": None}):
        rows = alpaca("<image>What?", "x", images=["a.png"], **more)
        assert list_turns(parse_record(LLAMA_FACTORY, rows, folder))[0][1] == [
            folder / "a.png",
            "What?",
        ]


def test_openai_style_rows_are_ms_swift(folder: Path) -> None:
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    form, reason = detect_format([{"messages": messages, "images": ["a.png"]}], "here")
    assert form.name == "ms-swift"
    assert "LLaMA-Factory's messages with images are the same" in reason


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (sharegpt("?", "x"), "1 of them have no `<image>`"),
        (sharegpt("<image>?", "x", chosen={"from": "gpt", "value": "y"}), "'chosen'"),
        (sharegpt("<image>?", "x", kto_tag=False), "'kto_tag'"),
        (alpaca("?", "x", images=["a.png"]), "1 of them have no `<image>`"),
        (alpaca("?", None), "output is None"),
        (alpaca("?", "x", history=["y"]), "history with 'y'"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "tool calls"),
    ],
)
def test_invalid_rows_are_rejected(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        parse_record(LLAMA_FACTORY, rows, folder)
    assert caught.value.expected
    assert caught.value.remedy
