"""Whether pictures are looked at beforehand, and what is said where something is in the way."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from looking_run import LORA, SCREEN, all_features, look, seen_by, session_of
from PIL import Image
from rich.console import Console
from small_run import Task

from finesight.errors import Interrupted, UserError
from finesight.train import looking
from finesight.train.progress import Screen
from finesight.train.stop import Stop


def screen() -> tuple[Screen, Callable[[], str]]:
    shown = io.StringIO()
    return Screen(Console(file=shown, width=300)), shown.getvalue


@pytest.mark.parametrize("part", ["merger", "vision"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_learns_is_not_kept(tmp_path: Path, part: str, mode: str) -> None:
    looked = look(session_of(tmp_path / "task", LORA | {part: mode}))
    assert looked.seen is None
    assert looked.why == "pictures are looked at in every step: the vision part learns"


def test_pictures_that_come_once_are_not_looked_at_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless all of their features are on disk already."""
    session = session_of(tmp_path / "task", epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(looking, "shown_by", None)
        looked = look(session)
    assert looked.seen is None
    assert looking.ONCE in looked.why
    seen_by(session_of(tmp_path / "task", epochs=2))
    looked = look(session)
    assert looked.found == looked.pictures == 9
    Image.new("RGB", (56, 56), (1, 2, 3)).save(tmp_path / "task" / "train0.png")
    assert look(session_of(tmp_path / "task", epochs=1)).seen is None


def test_pictures_that_several_samples_show_pay_within_an_epoch(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    session_of(folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    asked_twice = [line.replace("Which colour?", "What colour is it?") for line in lines]
    (folder / "train.jsonl").write_text("\n".join([*lines, *asked_twice]) + "\n")
    session = session_of(folder, epochs=1)
    assert session.train.survey.pictures == 22
    assert session.train.survey.distinct == 11
    assert look(session).pictures == 9, "two pairs of files are equal"


def test_samples_without_any_picture(tmp_path: Path) -> None:
    task = Task(tmp_path)
    data = tmp_path / "train.jsonl"
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for sample in samples:
        del sample["messages"][0]["content"][0]
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    task.run(tune=LORA)
    assert "pictures are looked at in every step: there are none" in task.screen


def test_features_that_fit_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(tmp_path / "task")
    monkeypatch.setattr(looking, "free_memory", lambda: 2_000_000)
    monkeypatch.setattr(looking, "free_on_gpu", lambda device: None)
    assert look(session).place == "memory"
    monkeypatch.setattr(looking, "free_memory", lambda: 1000)
    assert look(session).place == "disk"
    limited = look(session_of(tmp_path / "task", cache="memory"))
    assert limited.seen is None
    assert "free are 0.00 MB in memory" in limited.why
    assert "(train.cache=memory)" in limited.why


def test_a_picture_that_changed_is_never_given_old_features(tmp_path: Path, assets: Path) -> None:
    """Also where size and time of its file are what they were."""
    folder = tmp_path / "task"
    before = seen_by(session_of(folder))
    path = folder / "train0.png"
    stat, colour = path.stat(), Image.open(path).getpixel((0, 0))
    size = Image.open(path).size
    Image.new("RGB", size, (9, 99, 199)).save(path)
    assert colour != (9, 99, 199)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    looked = look(session_of(folder))
    assert looked.seen is not None
    assert looked.found < looked.pictures
    for file in assets.rglob("*.safetensors"):
        file.unlink()
    session = session_of(folder)
    fresh = all_features(session, seen_by(session))
    assert torch.equal(all_features(session, looked.seen), fresh)
    assert not torch.equal(all_features(session, before), fresh)


def test_another_tower_or_size_finds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    first = look(session_of(folder))
    assert look(session_of(folder)).found == first.pictures
    recipe = json.loads((folder / "task.json").read_text())
    smaller = recipe | {"picture": {"min_pixels": 784, "max_pixels": 3136}}
    (folder / "task.json").write_text(json.dumps(smaller))
    assert look(session_of(folder)).found < first.pictures
    (folder / "task.json").write_text(json.dumps(recipe))
    session = session_of(folder)
    with torch.no_grad():
        session.model.visual.merger.mlp["2"].bias[3] += 1e-3
    assert look(session).found == 0
    assert look(session_of(folder, precision="bf16")).found == 0


@pytest.mark.parametrize("fault", ["a bit", "cut off", "empty", "no safetensors", "other shape"])
@pytest.mark.parametrize("cache", ["auto", "disk"])
def test_damaged_files_are_made_again(tmp_path: Path, assets: Path, fault: str, cache: str) -> None:
    session = session_of(tmp_path / "task", cache=cache)
    expected = all_features(session, seen_by(session))
    first, *others = sorted(assets.rglob("*.safetensors"))
    whole = first.read_bytes()
    bad: dict[str, Any] = {
        "a bit": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "cut off": whole[:-1],
        "empty": b"",
        "no safetensors": b"\xff" * len(whole),
        "other shape": others[0].read_bytes(),
    }
    first.write_bytes(bad[fault])
    console, shown = screen()
    looked = look(session_of(tmp_path / "task", cache=cache), console)
    assert f"1 of {1 + len(others)} files with features of pictures were damaged" in shown()
    assert looked.seen is not None
    assert 0 < looked.found < looked.pictures
    assert torch.equal(all_features(session, looked.seen), expected)
    assert look(session).found == looked.pictures
    assert first.read_bytes() == whole


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(blocked))
    console, shown = screen()
    assert look(session_of(tmp_path / "task"), console).place == "memory"
    assert "features of pictures are not kept on disk" in shown()
    with pytest.raises(UserError, match="cannot be written"):
        look(session_of(tmp_path / "task", cache="disk"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ESTALE])
@pytest.mark.parametrize("cache", ["auto", "disk"])
def test_a_disk_that_takes_no_more_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, number: int
) -> None:
    def full(*inputs: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    session = session_of(tmp_path / "task", cache=cache)
    monkeypatch.setattr("finesight.train.feature_files.save_file", full)
    console, shown = screen()
    if cache == "disk":
        with pytest.raises(UserError, match="cannot be written"):
            look(session, console)
    else:
        assert look(session, console).place == "memory"
        assert shown().count("are not kept on disk") == 1


def test_two_runs_at_once(tmp_path: Path) -> None:
    """On the same pictures: neither disturbs the other, and each has all features."""
    sessions = [session_of(tmp_path / "task", cache=cache) for cache in ("disk", "auto")]
    together = threading.Barrier(2)

    def looks(number: int) -> torch.Tensor:
        together.wait(timeout=60)
        return all_features(sessions[number], seen_by(sessions[number]))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(looks, range(2))
    assert torch.equal(first, second)
    looked = look(sessions[0])
    assert looked.found == looked.pictures


def test_a_signal_ends_the_looking(tmp_path: Path) -> None:
    stop = Stop()
    stop.signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        look(session_of(tmp_path / "task"), SCREEN, stop)
