"""What must not leave the machine, planted in settings, texts and a whole run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tracked_run import PLANTED, Tracked

from finesight.config import Tracker
from finesight.track.records import RECORD, Alert, Begin, Picture
from finesight.track.secrets import LEFT_OUT, cleaned, cleaned_tree


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s3://me:planted@store/data.jsonl", "s3://store/data.jsonl"),
        ("https://planted@host/x", "https://host/x"),
        ("http://h/?X-Amz-Signature=planted&n=2", f"http://h/?X-Amz-Signature={LEFT_OUT}&n=2"),
        ("https://h/x?a=1&access_token=planted", f"https://h/x?a=1&access_token={LEFT_OUT}"),
        ("use hf_abcdefghijklmnopqrstuvwx now", f"use {LEFT_OUT} now"),
        ("sk-proj-abcdefghijklmnopqrst", LEFT_OUT),
        ("ghp_abcdefghijklmnopqrstuv", LEFT_OUT),
        ("AKIAABCDEFGHIJKLMNOP", LEFT_OUT),
        ("Authorization: Bearer planted.planted", f"Authorization: Bearer {LEFT_OUT}"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", LEFT_OUT),
        ("/home/alice/data/x.png", "~/data/x.png"),
        ("file:/Users/alice/x", "file:~/x"),
        ("'/home/alice'", "'~'"),
    ],
)  # fmt: skip
def test_what_only_secrets_look_like(text: str, left: str) -> None:
    assert cleaned(text) == left
    assert cleaned(left) == left


@pytest.mark.parametrize(
    "text",
    ["a cat, 3 > 2", "/data/home/x.png", "Qwen/Qwen2-VL-2B-Instruct", r"\frac{a}{b}", "me@host",
     "max_new_tokens=512", "http://host:5000/#/runs"],
)  # fmt: skip
def test_other_texts_stay(text: str) -> None:
    assert cleaned(text) == text


def test_values_of_the_environment_that_are_named_like_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0123456789abcdef-and-more")
    monkeypatch.setenv("MY_PASSWORD", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    monkeypatch.setenv("HOME", "/srv/people/bob")
    assert cleaned("0123456789abcdef-and-more 0123456789abcdef") == f"{LEFT_OUT} {LEFT_OUT}"
    assert cleaned("short parallelism") == "short parallelism"
    assert cleaned("/srv/people/bob/x /srv/people/bobby") == "~/x /srv/people/bobby"


def test_settings_that_are_named_like_secrets() -> None:
    tree = {
        "api_key": "planted",
        "deep": [{"Password": "planted", "max_new_tokens": 4, "path": "/home/alice/x"}],
        "pack_tokens": 100,
        "seen": True,
        "none": None,
    }
    assert cleaned_tree(tree) == {
        "api_key": LEFT_OUT,
        "deep": [{"Password": LEFT_OUT, "max_new_tokens": 4, "path": "~/x"}],
        "pack_tokens": 100,
        "seen": True,
        "none": None,
    }


def test_no_record_can_hold_one() -> None:
    secret = "hf_abcdefghijklmnopqrstuvwx"
    records = [
        Begin(
            tracker=Tracker(kind="tensorboard"),
            name=secret,
            folder=Path("x"),
            settings={"a": {"b": [secret]}},
        ),
        Alert(step=1, level="info", title=secret, text=secret),
    ]
    for record in records:
        sent = record.model_dump_json()
        assert secret not in sent
        assert RECORD.validate_json(sent) == record
    assert Picture(jpeg=b"", caption=secret).caption == LEFT_OUT


LOGS_OF_THEIR_OWN = re.compile(r"\.(log|swanlab)$")
"""They name the files that they write, on this machine, and are sent to nobody; SwanLab's
transaction log is read by `swanlab sync`, which sends what is in those files."""


def test_nothing_secret_is_in_any_tracker_s_files(tracked: Tracked) -> None:
    places = [tracked.run / "track", Path(tracked.mlflow), Path(tracked.trackio)]
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    assert len(files) > 10
    marked = 0
    for file in files:
        content = file.read_bytes()
        marked += LEFT_OUT.encode() in content
        for name, secret in PLANTED.items():
            assert secret.encode() not in content, f"the {name} is in {file}"
        if not LOGS_OF_THEIR_OWN.search(file.name):
            assert b"/alice" not in content, f"whose home it is stands in {file}"
    assert marked, "the settings with the secrets are there, without them"
