"""Archives: extraction, and rejection of malicious and corrupt archives."""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from finesight.data.row_reader import is_webdataset, open_webdataset
from finesight.errors import UserError
from finesight.hub import archive
from finesight.hub.archive import unpack_archive

FILES = {"a/1.txt": b"one", "a/b/2.bin": bytes(100_000), "ü 3.txt": b"three"}


def write_zip(path: Path, files: dict[str, bytes], mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], member_type: bytes = tarfile.REGTYPE) -> Path:
    compression = path.name.rpartition(".tar")[2].lstrip(".")
    with tarfile.open(path, f"w:{compression}") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.size = member_type, len(data) if member_type == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd"
            file.addfile(info, io.BytesIO(data))
    return path


def read_files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_rejected(tmp_path: Path, file: Path, message: str) -> UserError:
    before = read_files(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        unpack_archive(file, tmp_path / "deep" / "target")
    after = read_files(tmp_path)
    outside = {name for name in after if not name.startswith("deep/target/")}
    assert outside == before.keys(), "a file was written outside of the folder"
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    shutil.rmtree(tmp_path / "deep", ignore_errors=True)
    assert raised.value.where
    assert raised.value.expected
    assert raised.value.remedy
    return raised.value


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_files_are_extracted(tmp_path: Path, name: str) -> None:
    write = write_zip if name.endswith("zip") else write_tar
    unpack_archive(write(tmp_path / name, FILES), tmp_path / "target")
    assert read_files(tmp_path / "target") == FILES


def test_system_files_are_skipped(tmp_path: Path) -> None:
    system_files = {"__MACOSX/a/._1.txt": b"x", "a/.DS_Store": b"x", "a/": b""}
    unpack_archive(write_zip(tmp_path / "a.zip", {**FILES, **system_files}), tmp_path / "target")
    assert read_files(tmp_path / "target") == FILES


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"]
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_path_traversal_is_rejected(tmp_path: Path, write: object, name: str) -> None:
    file = tmp_path / ("a.zip" if write is write_zip else "a.tar")
    assert callable(write)
    assert_rejected(tmp_path, write(file, {name: b"evil"}), "may be outside")


@pytest.mark.parametrize(
    "member_type",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices_in_tar_are_rejected(tmp_path: Path, member_type: bytes) -> None:
    assert_rejected(
        tmp_path,
        write_tar(tmp_path / "a.tar", {"innocent": b""}, member_type),
        "a link or a device",
    )


def test_links_in_zip_are_rejected(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"innocent": b"/etc/passwd"}, stat.S_IFLNK | 0o777)
    assert_rejected(tmp_path, file, "a link or a device")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.xz"])
def test_decompression_bombs_are_rejected(tmp_path: Path, name: str) -> None:
    write = write_zip if name.endswith("zip") else write_tar
    file = write(tmp_path / name, {"bomb.txt": bytes(150_000_000)})
    assert file.stat().st_size < 200_000
    assert_rejected(tmp_path, file, "more than 100 times the")


def test_endless_member_name_is_rejected(tmp_path: Path) -> None:
    # A GNU header with a name of 300 MB.
    file = tmp_path / "a.tar.gz"
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 300_000_000
    with gzip.open(file, "wb", 1) as out:
        out.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(300):
            out.write(b"a" * 1_000_000)
    tracemalloc.start()
    assert_rejected(tmp_path, file, "a header of 3000")
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_wrong_declared_size_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The header declares 10 bytes of 2 million.
    monkeypatch.setattr(archive, "UNCHECKED_BYTES", 1000)
    file = write_zip(tmp_path / "a.zip", {"a.txt": bytes(2_000_000)})
    data = file.read_bytes().replace((2_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"over 100 times|cannot be read"):
        unpack_archive(file, tmp_path / "target")
    assert sum(map(len, read_files(tmp_path / "target").values())) <= 10


def test_member_and_size_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    assert_rejected(tmp_path, write_tar(tmp_path / "a.tar", FILES), "more than 2 files")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 9)
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 50_000)
    assert_rejected(tmp_path, write_tar(tmp_path / "b.tar", FILES), "more than 50000 bytes")


def test_duplicate_encrypted_and_damaged_members(tmp_path: Path) -> None:
    duplicate = tmp_path / "twins.tar"
    with tarfile.open(duplicate, "w") as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo("a.txt"))
    assert_rejected(tmp_path, duplicate, "two files with the name 'a.txt'")
    encrypted = write_zip(tmp_path / "locked.zip", {"a.txt": b"secret"})
    data = bytearray(encrypted.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    encrypted.write_bytes(data)
    assert_rejected(tmp_path, encrypted, "is encrypted")
    data = write_tar(tmp_path / "whole.tar.gz", FILES).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(data[: len(data) // 2])
    assert_rejected(tmp_path, tmp_path / "cut.tar.gz", "cannot be read")
    (tmp_path / "none.zip").write_bytes(b"no zip at all")
    assert_rejected(tmp_path, tmp_path / "none.zip", "cannot be read")


def tar_with_header(name: str, **header: str) -> bytes:
    """Return a tar with a file of one byte after this PAX header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = 1, header
        out.addfile(info, io.BytesIO(b"a"))
    return file.getvalue()


def tar_with_long_name(size: int) -> bytes:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    return header.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


BAD_TARS = {
    "negative size": tar_with_header("a.txt", size="-1536"),
    "negative size of a skipped file": tar_with_header("__MACOSX/a.txt", size="-1536"),
    "invalid number": tar_with_header(
        "a.txt", **{"GNU.sparse.map": "a,b", "GNU.sparse.size": "10"}
    ),
    "huge size": tar_with_header("a.txt", size="9" * 30),
    "huge name": tar_with_long_name(2**60),
    "nested headers": tar_with_header("a", comment="b")[:1024] * 3000,
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_invalid_tar_headers(tmp_path: Path, case: str) -> None:
    for name, pack in (("a.tar", bytes), ("a.tar.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(BAD_TARS[case]))
        assert_rejected(tmp_path, tmp_path / name, "cannot be read: ")
    for read in (is_webdataset, open_webdataset):
        with pytest.raises(UserError, match="cannot be read: "):
            read(tmp_path / "a.tar")


def test_corrupt_archives(tmp_path: Path) -> None:
    (tmp_path / "none.tar.bz2").write_bytes(b"hello world" * 100)
    assert_rejected(tmp_path, tmp_path / "none.tar.bz2", "Invalid data stream")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2) as out:
        out.writestr("aé.txt", bytes(range(256)) * 20)
    data = file.getvalue()
    (tmp_path / "a.zip").write_bytes(data.replace("é".encode(), b"\xff\xfe"))
    assert_rejected(tmp_path, tmp_path / "a.zip", "UnicodeDecodeError")
    (tmp_path / "a.zip").write_bytes(data[:60] + bytes(100) + data[160:])
    assert_rejected(tmp_path, tmp_path / "a.zip", "Invalid data stream")


def test_folders_count_as_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    folders = write_tar(tmp_path / "a.tar", dict.fromkeys("abc", b""), tarfile.DIRTYPE)
    assert_rejected(tmp_path, folders, "more than 2 files")
    assert_rejected(
        tmp_path,
        write_zip(tmp_path / "a.zip", dict.fromkeys(("a/", "b/", "c/"), b"")),
        "more than 2",
    )
