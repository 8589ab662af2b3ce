"""Tests of redaction in settings, texts and a complete run."""

import pickle
import re
from pathlib import Path

import pytest
from case_files import load_cases
from PIL import Image
from tracking_fixtures import PLANTED_SECRETS, TrackedRun

from finesight.settings.config import TrackerSettings
from finesight.track.tracker_records import (
    REDACTED,
    AlertRecord,
    StartRecord,
    TrackedImage,
    redact,
    redact_tree,
)

SECRET = "hf_abcdefghijklmnopqrstuvwx"
CASES = load_cases("redaction")


def test_only_secrets_and_home_folders_are_redacted() -> None:
    for text, expected in CASES["redacted_texts"].items():
        redacted = expected.replace("REDACTED", REDACTED)
        assert redact(text.replace("{SECRET}", SECRET)) == redact(redacted) == redacted
    for text in CASES["other_texts"]:
        assert redact(text) == text


@pytest.mark.parametrize("piece", ["?", "~?", "0z", "a+", "://a", "?key"])
def test_long_texts_are_read_in_linear_time(piece: str) -> None:
    text = piece * (400_000 // len(piece))
    assert redact(text) == text
    url = "https://me:planted@host/?a=b&api_key=planted"
    assert redact(f"{text} {url}") == f"{text} https://host/?a=b&api_key={REDACTED}"


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
        StartRecord(tracker=tracker, name=SECRET, folder=Path("x"), settings=settings, id="0"),
        AlertRecord(step=1, level="info", title=SECRET, text=SECRET),
    ]
    for record in records:
        sent = pickle.dumps(record)
        assert SECRET.encode() not in sent
        assert pickle.loads(sent) == record
    image = Image.new("RGB", (1, 1))
    assert TrackedImage(image=image, caption=SECRET).caption == REDACTED


LOGS_OF_THEIR_OWN = re.compile(r"\.(log|swanlab)$")
"""They name the files that they write, on this machine, and are sent to nobody; SwanLab's
transaction log is read by `swanlab sync`, which sends what is in those files."""


def test_tracker_files_contain_no_secrets(tracked_run: TrackedRun) -> None:
    locations = [tracked_run.run / "track", Path(tracked_run.mlflow), tracked_run.trackio]
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
