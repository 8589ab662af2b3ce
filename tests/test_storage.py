"""Files exist whole or not at all: killed at every operation, full disk, flipped bits."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from crash_disk import run_in_crashing_child
from safetensors.numpy import load_file, save_file

from finesight.errors import UserError
from finesight.files import storage
from finesight.files.storage import temporary_folder, working_folder

OLD, NEW = {"a": b"old", "b/c": b"older"}, {"a": b"new" * 1000, "b/c": b"newer"}


def make_failing_disk(operation: str, number: int) -> storage.FileSystem:
    """Return a disk that refuses an operation; a write fails in the middle."""
    disk = storage.FileSystem()

    def fail(*arguments: Any) -> None:
        if operation == "write":
            file, data = arguments
            os.write(file, data[: len(data) // 2])
        raise OSError(number, os.strerror(number))

    setattr(disk, operation, fail)
    return disk


def write_all(target: Path, contents: dict[str, bytes]) -> None:
    with storage.write_folder(target) as folder:
        for name, data in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)


def visible(store: Path) -> dict[str, dict[str, bytes]]:
    """Folders that a reader sees, each verified, with their contents."""
    folders = [path for path in store.iterdir() if not path.name.startswith(".")]
    for folder in folders:
        storage.verify_folder(folder)
    return {
        folder.name: {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != storage.DIGESTS_FILE
        }
        for folder in folders
    }


def replace_generation(store: Path) -> None:
    """Replace a folder as a run does at a checkpoint."""
    write_all(store / "new", NEW)
    storage.remove_folder(store / "old")


@pytest.mark.parametrize("crash", ["process", "power"])
def test_crash_at_every_operation_leaves_valid_state(tmp_path: Path, crash: str) -> None:
    legal = [{"old": OLD}, {"old": OLD, "new": NEW}, {"new": NEW}]
    seen = []
    for last in range(1, 100):
        store = tmp_path / str(last)
        write_all(store / "old", OLD)
        done = run_in_crashing_child(last, replace_generation, store, crash)
        assert visible(store) in legal, f"illegal state when killed before operation {last}"
        seen.append(legal.index(visible(store)))
        if done:
            break
        # A new process finishes the work after any crash.
        storage.remove_partial_files(store)
        assert not list(store.glob(".*")), f"leftovers after operation {last}"
        if "new" not in visible(store):
            write_all(store / "new", NEW)
    assert done
    assert last > 10, f"only {last} operations: the harness misses some"
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2}


@pytest.mark.parametrize("crash", ["process", "power"])
def test_crash_at_every_operation_leaves_old_or_new_file(tmp_path: Path, crash: str) -> None:
    def rewrite_file(store: Path) -> None:
        storage.write_file(store / "file", b"new" * 1000)

    done, seen = False, set()
    for last in range(1, 20):
        (tmp_path / "file").write_bytes(b"old")
        done = done or run_in_crashing_child(last, rewrite_file, tmp_path, crash)
        seen.add((tmp_path / "file").read_bytes())
        if done:
            break
    assert done
    assert seen == {b"old", b"new" * 1000}


def test_folder_appears_after_what_it_must_follow(tmp_path: Path) -> None:
    """An error of the other work leaves no folder."""
    steps = []

    def wait(problem: str = "") -> None:
        (partial,) = tmp_path.glob(".*")
        steps.append(((partial / storage.DIGESTS_FILE).exists(), (tmp_path / "x").exists()))
        if problem:
            raise ValueError(problem)

    with (
        pytest.raises(ValueError, match="full disk"),
        storage.write_folder(tmp_path / "x", lambda: wait("full disk")) as folder,
    ):
        (folder / "a").write_bytes(b"1")
    assert not [*tmp_path.iterdir()]
    with storage.write_folder(tmp_path / "x", wait) as folder:
        (folder / "a").write_bytes(b"1")
    assert steps == [(True, False), (True, False)]
    assert (tmp_path / "x" / "a").read_bytes() == b"1"


def test_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    """It may also be created during the write, or just before the rename."""

    class Slow(storage.FileSystem):
        def rename(self, source: Path, target: Path) -> None:
            with patch.object(storage, "file_system", storage.FileSystem()):
                write_all(target, OLD)
            super().rename(source, target)

    def write_twice() -> None:
        with storage.write_folder(tmp_path / "x") as folder:
            (folder / "a").write_bytes(b"late")
            write_all(tmp_path / "x", OLD)

    with (
        patch.object(storage, "file_system", Slow()),
        pytest.raises(UserError, match="late: exists already"),
    ):
        write_all(tmp_path / "late", NEW)
    with pytest.raises(UserError, match="x: exists already"):
        write_twice()
    with pytest.raises(UserError, match="never overwritten"):
        write_all(tmp_path / "x", NEW)
    assert visible(tmp_path) == {"late": OLD, "x": OLD}
    assert not list(tmp_path.glob(".*"))


def test_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    assert not run_in_crashing_child(5, lambda store: write_all(store / "x", OLD), tmp_path)
    (dead,) = tmp_path.glob(".x.*.partial")
    with storage.write_folder(tmp_path / "x.y") as other, storage.write_folder(tmp_path / "x") as x:
        for folder in (other, x):
            (folder / "a").write_bytes(b"1")
        with pytest.raises(FileNotFoundError):
            write_all(tmp_path / "x", {"missing/folder/b": b"2"})
        assert not dead.exists()
    assert visible(tmp_path) == {"x": {"a": b"1"}, "x.y": {"a": b"1"}}


@pytest.mark.parametrize("operation", ["write", "rename", "sync", "make_folder"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_failed_operation_is_explained_and_cleaned_up(tmp_path, operation, number):
    with (
        patch.object(storage, "file_system", make_failing_disk(operation, number)),
        pytest.raises(UserError, match=r"cannot be written[\s\S]*remedy") as caught,
    ):
        write_all(tmp_path / "x", NEW)
    assert str(tmp_path / "x") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_partial_line_or_file(tmp_path: Path) -> None:
    storage.append_line(tmp_path / "lines", "first")
    storage.write_file(tmp_path / "file", b"old")
    with patch.object(storage, "file_system", make_failing_disk("write", errno.ENOSPC)):
        with pytest.raises(UserError, match="no space left"):
            storage.append_line(tmp_path / "lines", "second")
        with pytest.raises(UserError, match="no space left"):
            storage.write_file(tmp_path / "file", b"new")
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert contents == {"lines": b"first\n", "file": b"old"}


def test_errors_of_other_writers_are_explained(tmp_path: Path) -> None:
    """The system itself refuses: files of at most 64 KiB, in a child process."""
    script = f"""
import numpy, resource
from pathlib import Path
from safetensors.numpy import save_file
from finesight.files import storage
from finesight.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for kind in ("tensors", "bytes"):
    try:
        with storage.write_folder(Path({str(tmp_path)!r}) / kind) as folder:
            if kind == "tensors":
                save_file({{"x": numpy.zeros(100_000)}}, folder / "x.safetensors")
            else:
                (folder / "x").write_bytes(bytes(100_000))
    except UserError as error:
        print(error.what, "|", error.remedy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.count("cannot be written: file too large") == 2, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 65536


def test_every_bit_flip_is_reported_with_digests(tmp_path: Path) -> None:
    with storage.write_folder(tmp_path / "x") as folder:
        save_file({"w": np.arange(6, dtype=np.float32)}, folder / "w.safetensors")
    file = tmp_path / "x" / "w.safetensors"
    good = file.read_bytes()
    expected = json.loads((tmp_path / "x" / storage.DIGESTS_FILE).read_text())["w.safetensors"]
    for at in range(0, len(good), 7):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(UserError) as caught:
            storage.verify_folder(tmp_path / "x")
        for words in (str(file), expected, storage.sha256_file(file)):
            assert words in str(caught.value)
    file.write_bytes(good)
    storage.verify_folder(tmp_path / "x")
    assert load_file(file)["w"].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a").unlink(), "the file a is missing"),
        (lambda folder: folder.rename(folder.parent / "y"), "(?s)missing folder x.*check the path"),
        (lambda folder: (folder / storage.DIGESTS_FILE).unlink(), "is missing: the folder is inco"),
        (lambda folder: (folder / storage.DIGESTS_FILE).write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / storage.DIGESTS_FILE).write_text("{}"), "expected: file names"),
    ],
)
def test_incomplete_folder_is_rejected(tmp_path, damage, message):
    write_all(tmp_path / "x", OLD)
    damage(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        storage.verify_folder(tmp_path / "x")


def test_folders_of_killed_processes_are_removed_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder("web") as running, working_folder(tmp_path / "data" / "a") as partial:
        assert (running.stat().st_mode & 0o777, running.parent) == (0o700, tmp_path)
        character = "b" if running.name.endswith("a.tmp") else "a"
        leftovers = [running.with_name(f"{running.name[:-5]}{character}.tmp")]
        leftovers.append(partial.with_name(partial.name.replace(".a.", ".another.")))
        kept = [tmp_path / name for name in ("finesight-web-12345678", "finesight-data")]
        kept += [tmp_path / "data" / ".model.0123456789ab.partial", running, partial]
        for folder in (*leftovers, *kept):
            folder.mkdir(exist_ok=True)
            (folder / "file").touch()
        with temporary_folder("import") as other, working_folder(tmp_path / "data" / "b"):
            assert [*other.iterdir()] == []
        assert [folder.exists() for folder in leftovers] == [False, False]
        assert all((folder / "file").exists() for folder in kept)
    assert not running.exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTEMPTY, errno.EIO])
def test_leftover_that_cannot_be_removed_is_skipped(tmp_path: Path, number: int) -> None:
    class Strict(storage.FileSystem):
        def remove(self, path: Path) -> None:
            if ".stuck." in path.name:
                raise OSError(number, os.strerror(number))
            super().remove(path)

    with working_folder(tmp_path / "a") as partial:
        names = [partial.name.replace(".a.", f".{name}.") for name in ("stuck", "z", "link")]
    (tmp_path / "elsewhere").mkdir()
    stuck, removed, link = (tmp_path / name for name in names)
    link.symlink_to("elsewhere")
    for folder in (stuck, removed):
        folder.mkdir()
    with patch.object(storage, "file_system", Strict()):
        write_all(tmp_path / "a", OLD)
        storage.remove_leftovers(tmp_path)
    assert [path.exists() for path in (stuck, removed, link)] == [True, False, True]


def test_new_file_replaces_none_that_appears_meanwhile(tmp_path: Path) -> None:
    class Slow(storage.FileSystem):
        def create(self, path: Path) -> int:
            (tmp_path / "file").write_bytes(b"other")
            return super().create(path)

    with (
        patch.object(storage, "file_system", Slow()),
        pytest.raises(UserError, match="exists already"),
    ):
        storage.write_new_file(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"other"}


@pytest.mark.parametrize("make", [os.symlink, os.link, shutil.copy])
def test_file_with_a_temporary_name_is_not_opened(tmp_path, monkeypatch, make):
    """The content is neither written to another file, nor readable by the owner of this one."""
    monkeypatch.chdir(tmp_path)
    Path("other").write_bytes(b"precious")
    make("other", ".file.partial")
    with open(".file.partial", "rb") as earlier:
        storage.write_file(Path("file"), b"secret")
        assert earlier.read() == b"precious"
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert contents == {"other": b"precious", "file": b"secret"}


def test_pipe_with_a_temporary_name_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".file.partial")
    storage.write_file(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


@pytest.mark.parametrize("replace", [True, False])
def test_two_processes_that_write_one_file_do_not_mix_it(tmp_path, replace):
    file = tmp_path / "file"

    def write_other_file() -> Iterator[bytes]:
        yield b"first" * storage.WRITE_BUFFER_BYTES
        storage.write_file(file, b"second")
        yield b"end"

    with pytest.raises(UserError, match=r"another process wrote it|exists already"):
        storage.write_chunks(file, write_other_file(), replace=replace)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"second"}


@pytest.mark.parametrize(
    ("names", "target", "remedy"),
    [
        (["a.jsonl"], "a.jsonl", "a-2.jsonl"),
        (["a.jsonl", "a-2.jsonl", "a-3.jsonl"], "a.jsonl", "a-4.jsonl"),
        (["folder/a"], "folder", "folder-2"),
        (["a.jsonl"], ".", "-2"),
        (["a.jsonl"], "..", "-2"),
    ],
)
def test_proposed_name_is_free(tmp_path, monkeypatch, names, target, remedy):
    for name in names:
        storage.write_file(tmp_path / name, b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="exists already") as caught:
        storage.check_new_path(Path(target))
    proposed = str(caught.value.remedy).rpartition(" ")[2]
    assert proposed.endswith(remedy)
    storage.check_new_path(Path(proposed))


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("file/new", "not a directory"),
        ("loop/new", "symbolic links"),
        ("broken/new", "not a directory"),
        ("a" * 300, "too long"),
        ("locked/new", "permission denied"),
    ],
)
def test_place_without_new_files_is_reported_first(tmp_path, monkeypatch, target, word):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("missing")
    (tmp_path / "locked").mkdir(0o555)
    # The permissions of a folder do not apply to root, who may run the tests.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    with pytest.raises(UserError, match=word) as caught:
        storage.check_new_path(tmp_path / target)
    assert caught.value.remedy
