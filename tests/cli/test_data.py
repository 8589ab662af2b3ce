"""Tests of the command `finesight data export`."""

from pathlib import Path

import pytest
from image_fixtures import write_gray_image, write_jsonl


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write samples and records with boxes into the working directory."""
    monkeypatch.chdir(tmp_path)
    write_gray_image(Path("a.png"), 1000, 500)
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where?"}]
    answer = [{"type": "box", "label": "door", "xyxy": [1, 2, 30, 14]}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = {"id": "1", "messages": turns}
    write_jsonl(Path("data.jsonl"), [sample | {"references": ["There."]}])
    turns = [{"role": "user", "content": question[::-1]}, turns[1]]
    write_jsonl(Path("image_last.jsonl"), [sample | {"messages": turns}])


def test_exported_samples_are_checked_by_the_next_command(cli):
    printed = cli("data", "export", "data.jsonl", "out", "--to", "llama-factory")
    assert "out: 1 sample in the format llama-factory" in printed.out
    assert "out/data.jsonl, out/dataset_info.json" in printed.out
    assert "not supported: 1 references" in printed.out
    assert "note: the boxes of 1 samples are JSON in the answers" in printed.out
    command = "check out/data.jsonl --format llama-factory"
    assert printed.next_steps == f"finesight {command}"
    cli(*command.split())


def test_invalid_export_is_rejected(cli):
    export = ("data", "export", "image_last.jsonl", "out")
    assert "error: --to: " in cli(*export, "--to", "swift", code=2).err
    assert "remedy: " in cli(*export, "--to", "image-path", code=2).err
    assert "--to" in cli(*export, code=2).err
    assert not Path("out").exists()
