"""Disks, memory and limits, planted where this machine allows it, and their remedies typed."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from doctoring import codes, exported, only

from finesight.doctor import machine
from finesight.doctor.findings import Finding
from finesight.doctor.machine import GB, Machine, Place

HERE = Place("this folder", Path("/work"), 500 * GB, True)
SOUND = Machine("3.12.1", "Linux x86_64", 8, 64 * GB, 60 * GB, 30 * GB, 1024, (HERE,), HERE)


def judged(**facts: object) -> list[Finding]:
    return machine.judge(replace(SOUND, **facts))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte, full."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        (folder / "full").write_bytes(bytes(2**20 - 8192))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_this_machine_is_read() -> None:
    seen = machine.gather(dict(os.environ), Path.cwd())
    assert 0 < seen.available <= seen.memory
    assert {place.role for place in seen.places} == set(machine.ROOM)
    assert codes(judged()) == codes(judged(), "hint") == []


def test_a_full_disk_for_temporary_files_is_found_and_the_remedy_leads_elsewhere(
    small_disk: Path, tmp_path: Path
) -> None:
    around = {"TMPDIR": str(small_disk), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    seen = machine.gather(around, tmp_path)
    (full,) = [place for place in seen.places if place.role == "temporary files"]
    assert full.free < machine.FULL
    roomy = Place("disk", tmp_path / "room here", 500 * GB, True)
    found = only(machine.judge(replace(seen, places=(full,), roomiest=roomy)), "disk-full")
    assert found.severity == "fault"
    assert str(small_disk) in found.what
    after = machine.gather(exported(found.remedy, around), tmp_path)
    (now,) = [place for place in after.places if place.role == "temporary files"]
    assert now.folder == roomy.folder / "finesight"
    assert now.folder.is_dir()
    assert now.free == machine.place("x", tmp_path).free


def test_a_cache_that_is_no_folder_is_found_and_led_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    around = {"HF_HOME": str(tmp_path / "file"), "PATH": os.environ["PATH"]}
    seen = machine.gather(around, tmp_path)
    (cache,) = [place for place in seen.places if place.role == "models"]
    roomy = Place("disk", tmp_path, 500 * GB, True)
    found = only(machine.judge(replace(seen, places=(cache,), roomiest=roomy)), "not-writable")
    after = machine.gather(exported(found.remedy, around), tmp_path)
    (now,) = [place for place in after.places if place.role == "models"]
    assert now.writable


def test_without_room_anywhere_the_remedy_shows_what_takes_it(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "file").write_bytes(bytes(100_000))
    tight = Place("this folder", tmp_path, 1000, True)
    found = only(judged(places=(tight,), roomiest=tight), "disk-full")
    done = subprocess.run(found.remedy, shell=True, capture_output=True, text=True, check=True)
    assert str(tmp_path / "large") in done.stdout


@pytest.mark.parametrize(
    ("facts", "code", "severity"),
    [
        ({"available": GB // 2}, "memory-short", "fault"),
        ({"available": 3 * GB}, "memory-short", "hint"),
        ({"shared": 0}, "shared-memory-short", "fault"),
        ({"shared": 64_000_000}, "shared-memory-short", "hint"),
        ({"files": 64}, "few-files", "fault"),
        ({"places": (replace(HERE, free=GB),)}, "disk-full", "hint"),
    ],
)
def test_what_is_scarce_is_told(facts: dict[str, object], code: str, severity: str) -> None:
    found = only(judged(**facts), code)
    assert found.severity == severity
    assert found.remedy
    assert found.why


def test_a_limit_of_open_files_is_read_and_raised_by_the_remedy(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        seen = machine.gather({}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = only(machine.judge(seen), "few-files")
    script = f"ulimit -Sn 200 && {found.remedy} && ulimit -n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= machine.FILES


def test_places_with_spaces_are_quoted() -> None:
    roomy = Place("disk", Path("/my disk"), 500 * GB, True)
    found = only(judged(places=(replace(HERE, free=0),), roomiest=roomy), "disk-full")
    assert shlex.split(found.remedy)[-1] == "/my disk/finesight"
