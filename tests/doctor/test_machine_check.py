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
from doctor_fixtures import find_diagnosis, list_codes, run_remedy

from finesight.doctor import machine_check
from finesight.doctor.diagnosis import Diagnosis
from finesight.doctor.machine_check import GB, MachineInfo, WriteLocation

HERE = WriteLocation("current folder", Path("/work"), 500 * GB, True)
HEALTHY_MACHINE = MachineInfo(
    "3.12.1", "Linux x86_64", 8, 64 * GB, 60 * GB, 30 * GB, 1024, (HERE,), HERE
)


def diagnose(**facts: object) -> list[Diagnosis]:
    return list(machine_check.check_machine(replace(HEALTHY_MACHINE, **facts)))


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


def test_machine_facts_are_read() -> None:
    seen = machine_check.inspect_machine(dict(os.environ), Path.cwd())
    assert 0 < seen.available_memory <= seen.total_memory
    assert {location.role for location in seen.locations} == set(
        machine_check.RECOMMENDED_FREE_BYTES
    )
    assert list_codes(diagnose()) == list_codes(diagnose(), "warning") == []


def test_full_temp_disk_is_found_and_remedy_changes_it(small_disk: Path, tmp_path: Path) -> None:
    around = {"TMPDIR": str(small_disk), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    seen = machine_check.inspect_machine(around, tmp_path)
    (full,) = [location for location in seen.locations if location.role == "temporary files"]
    assert full.free_bytes < machine_check.MIN_FREE_BYTES
    roomy = WriteLocation("disk", tmp_path / "free space", 500 * GB, True)
    found = find_diagnosis(
        machine_check.check_machine(replace(seen, locations=(full,), largest_location=roomy)),
        "disk-full",
    )
    assert found.severity == "error"
    assert str(small_disk) in found.what
    after = machine_check.inspect_machine(run_remedy(found.remedy, around), tmp_path)
    (now,) = [location for location in after.locations if location.role == "temporary files"]
    assert now.folder == roomy.folder / "finesight"
    assert now.folder.is_dir()
    # Other processes write to the same disk between the two calls.
    expected = machine_check.inspect_location("x", tmp_path).free_bytes
    assert now.free_bytes == pytest.approx(expected, rel=0.05)


def test_cache_path_that_is_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    around = {"HF_HOME": str(tmp_path / "file"), "PATH": os.environ["PATH"]}
    seen = machine_check.inspect_machine(around, tmp_path)
    (cache,) = [location for location in seen.locations if location.role == "models"]
    roomy = WriteLocation("disk", tmp_path, 500 * GB, True)
    found = find_diagnosis(
        machine_check.check_machine(replace(seen, locations=(cache,), largest_location=roomy)),
        "not-writable",
    )
    after = machine_check.inspect_machine(run_remedy(found.remedy, around), tmp_path)
    (now,) = [location for location in after.locations if location.role == "models"]
    assert now.is_writable


def test_remedy_lists_large_files_without_free_disk(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "file").write_bytes(bytes(100_000))
    tight = WriteLocation("current folder", tmp_path, 1000, True)
    found = find_diagnosis(diagnose(locations=(tight,), largest_location=tight), "disk-full")
    done = subprocess.run(found.remedy, shell=True, capture_output=True, text=True, check=True)
    assert str(tmp_path / "large") in done.stdout


def test_remedy_works_before_the_folder_exists(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    tight = WriteLocation("models", tmp_path / "not yet" / "models", 1000, True)
    found = find_diagnosis(diagnose(locations=(tight,), largest_location=tight), "disk-full")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", found.remedy], capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "large") in done.stdout


@pytest.mark.parametrize(
    ("facts", "code", "severity"),
    [
        ({"available_memory": GB // 2}, "low-memory", "error"),
        ({"available_memory": 3 * GB}, "low-memory", "warning"),
        ({"free_shm": 0}, "low-shared-memory", "error"),
        ({"free_shm": 64_000_000}, "low-shared-memory", "warning"),
        ({"max_open_files": 64}, "low-open-files-limit", "error"),
        ({"locations": (replace(HERE, free_bytes=GB),)}, "disk-full", "warning"),
    ],
)
def test_scarce_resources_are_reported(facts: dict[str, object], code: str, severity: str) -> None:
    found = find_diagnosis(diagnose(**facts), code)
    assert found.severity == severity
    assert found.remedy
    assert found.why


def test_open_files_limit_is_raised_by_remedy(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        seen = machine_check.inspect_machine({}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = find_diagnosis(machine_check.check_machine(seen), "low-open-files-limit")
    script = f"ulimit -Sn 200 && {found.remedy} && ulimit -n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= machine_check.MIN_OPEN_FILES


def test_paths_with_spaces_are_quoted() -> None:
    roomy = WriteLocation("disk", Path("/my disk"), 500 * GB, True)
    found = find_diagnosis(
        diagnose(locations=(replace(HERE, free_bytes=0),), largest_location=roomy), "disk-full"
    )
    assert shlex.split(found.remedy)[-1] == "/my disk/finesight"
