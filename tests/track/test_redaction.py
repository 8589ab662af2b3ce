"""Tests of redaction in settings, texts and a complete run."""

import re
from pathlib import Path

import pytest
from tracking_fixtures import PLANTED_SECRETS, TrackedRun

from finesight.config import TrackerSettings
from finesight.track.tracker_records import (
    RECORD_ADAPTER,
    REDACTED,
    AlertRecord,
    StartRecord,
    TrackedImage,
    redact,
    redact_tree,
)

SECRET = "hf_abcdefghijklmnopqrstuvwx"
REDACTED_TEXTS = {
    "s3://me:planted@store/data.jsonl": "s3://store/data.jsonl",
    "https://planted@host/x": "https://host/x",
    "http://h/?X-Amz-Signature=planted&n=2": f"http://h/?X-Amz-Signature={REDACTED}&n=2",
    "https://h/x?a=1&access_token=planted": f"https://h/x?a=1&access_token={REDACTED}",
    f"use {SECRET} now": f"use {REDACTED} now",
    "sk-proj-abcdefghijklmnopqrst": REDACTED,
    "ghp_abcdefghijklmnopqrstuv": REDACTED,
    "AKIAABCDEFGHIJKLMNOP": REDACTED,
    "Authorization: Bearer planted.planted": f"Authorization: Bearer {REDACTED}",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl": REDACTED,
    "/home/alice/data/x.png": "~/data/x.png",
    "file:/Users/alice/x": "file:~/x",
    "'/home/alice'": "'~'",
}
OTHER_TEXTS = (
    *("a cat, 3 > 2", "/data/home/x.png", "Qwen/Qwen2-VL-2B-Instruct", r"\frac{a}{b}"),
    *("me@host", "max_new_tokens=512", "http://host:5000/#/runs"),
)


def test_only_secrets_and_home_folders_are_redacted() -> None:
    for text, expected in REDACTED_TEXTS.items():
        assert redact(text) == redact(expected) == expected
    for text in OTHER_TEXTS:
        assert redact(text) == text


def test_secret_environment_values_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0123456789abcdef-and-more")
    monkeypatch.setenv("MY_PASSWORD", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    monkeypatch.setenv("HOME", "/srv/people/bob")
    assert redact("0123456789abcdef-and-more 0123456789abcdef") == f"{REDACTED} {REDACTED}"
    assert redact("short parallelism") == "short parallelism"
    assert redact("/srv/people/bob/x /srv/people/bobby") == "~/x /srv/people/bobby"


def test_secret_settings_are_redacted() -> None:
    unchanged = {"pack_tokens": 100, "seen": True, "none": None}
    tree = {"api_key": "planted", "deep": [{"Password": "planted", "path": "/home/alice/x"}]}
    expected = {"api_key": REDACTED, "deep": [{"Password": REDACTED, "path": "~/x"}]}
    assert redact_tree(tree | unchanged) == expected | unchanged


def test_records_contain_no_secrets() -> None:
    tracker = TrackerSettings(kind="tensorboard")
    settings = {"a": {"b": [SECRET]}}
    records = [
        StartRecord(tracker=tracker, name=SECRET, folder=Path("x"), settings=settings),
        AlertRecord(step=1, level="info", title=SECRET, text=SECRET),
    ]
    for record in records:
        sent = record.model_dump_json()
        assert SECRET not in sent
        assert RECORD_ADAPTER.validate_json(sent) == record
    assert TrackedImage(jpeg=b"", caption=SECRET).caption == REDACTED


LOGS_OF_THEIR_OWN = re.compile(r"\.(log|swanlab)$")
"""They name the files that they write, on this machine, and are sent to nobody; SwanLab's
transaction log is read by `swanlab sync`, which sends what is in those files."""


def test_tracker_files_contain_no_secrets(tracked_run: TrackedRun) -> None:
    locations = [tracked_run.run / "track", Path(tracked_run.mlflow), Path(tracked_run.trackio)]
    files = [file for folder in locations for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    marked = 0
    for file in files:
        content = file.read_bytes()
        marked += REDACTED.encode() in content
        for name, secret in PLANTED_SECRETS.items():
            assert secret.encode() not in content, f"the {name} is in {file}"
        if not LOGS_OF_THEIR_OWN.search(file.name):
            assert b"/alice" not in content, f"whose home it is stands in {file}"
    assert marked, "the settings with the secrets are there, without them"
