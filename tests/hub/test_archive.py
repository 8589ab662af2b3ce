"""Archives: what is good comes out, what is bad is refused, and neither lands elsewhere."""

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

from finesight.data.webdataset import is_webdataset, open_webdataset
from finesight.errors import UserError
from finesight.hub import archive, archive_members
from finesight.hub.archive import unpack_archive

FILES = {"a/1.txt": b"one", "a/b/2.bin": bytes(100_000), "ü 3.txt": b"three"}


def zipped(path: Path, files: dict[str, bytes], mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return path


def tarred(path: Path, files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    ending = path.name.rpartition(".tar")[2].lstrip(".")
    with tarfile.open(path, f"w:{ending}") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd"
            file.addfile(info, io.BytesIO(data))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_rejected(tmp_path: Path, file: Path, words: str) -> UserError:
    before = contents(tmp_path)
    with pytest.raises(UserError, match=words) as raised:
        unpack_archive(file, tmp_path / "deep" / "target")
    after = contents(tmp_path)
    elsewhere = {name for name in after if not name.startswith("deep/target/")}
    assert elsewhere == before.keys(), "something was written outside of the folder"
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    shutil.rmtree(tmp_path / "deep", ignore_errors=True)
    assert raised.value.where
    assert raised.value.expected
    assert raised.value.remedy
    return raised.value


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_files_are_extracted(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith("zip") else tarred
    unpack_archive(make(tmp_path / name, FILES), tmp_path / "target")
    assert contents(tmp_path / "target") == FILES


def test_system_files_are_skipped(tmp_path: Path) -> None:
    noise = {"__MACOSX/a/._1.txt": b"x", "a/.DS_Store": b"x", "a/": b""}
    unpack_archive(zipped(tmp_path / "a.zip", {**FILES, **noise}), tmp_path / "target")
    assert contents(tmp_path / "target") == FILES


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"]
)
@pytest.mark.parametrize("make", [zipped, tarred])
def test_path_traversal_is_rejected(tmp_path: Path, make: object, name: str) -> None:
    file = tmp_path / ("a.zip" if make is zipped else "a.tar")
    assert callable(make)
    assert_rejected(tmp_path, make(file, {name: b"evil"}), "may be outside")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_tar_are_rejected(tmp_path: Path, kind: bytes) -> None:
    assert_rejected(
        tmp_path, tarred(tmp_path / "a.tar", {"innocent": b""}, kind), "a link or a device"
    )


def test_links_in_zip_are_rejected(tmp_path: Path) -> None:
    file = zipped(tmp_path / "a.zip", {"innocent": b"/etc/passwd"}, stat.S_IFLNK | 0o777)
    assert_rejected(tmp_path, file, "a link or a device")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.xz"])
def test_decompression_bombs_are_rejected(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith("zip") else tarred
    file = make(tmp_path / name, {"bomb.txt": bytes(150_000_000)})
    assert file.stat().st_size < 200_000
    assert_rejected(tmp_path, file, "more than 100 times the")


def test_endless_member_name_is_rejected(tmp_path: Path) -> None:
    # A header for a long name, as GNU's tar writes it, of 300 MB.
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
    # The header says 10 bytes; zlib would give two million.
    monkeypatch.setattr(archive, "UNCHECKED_BYTES", 1000)
    file = zipped(tmp_path / "a.zip", {"a.txt": bytes(2_000_000)})
    data = file.read_bytes().replace((2_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"over 100 times|cannot be read"):
        unpack_archive(file, tmp_path / "target")
    assert sum(map(len, contents(tmp_path / "target").values())) <= 10


def test_member_and_size_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "MAX_MEMBERS", 2)
    assert_rejected(tmp_path, tarred(tmp_path / "a.tar", FILES), "more than 2 files")
    monkeypatch.setattr(archive_members, "MAX_MEMBERS", 9)
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 50_000)
    assert_rejected(tmp_path, tarred(tmp_path / "b.tar", FILES), "more than 50000 bytes")


def test_duplicate_encrypted_and_damaged_members(tmp_path: Path) -> None:
    twins = tmp_path / "twins.tar"
    with tarfile.open(twins, "w") as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo("a.txt"))
    assert_rejected(tmp_path, twins, "two files with the name 'a.txt'")
    locked = zipped(tmp_path / "locked.zip", {"a.txt": b"secret"})
    data = bytearray(locked.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    locked.write_bytes(data)
    assert_rejected(tmp_path, locked, "is encrypted")
    full = tarred(tmp_path / "whole.tar.gz", FILES).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(full[: len(full) // 2])
    assert_rejected(tmp_path, tmp_path / "cut.tar.gz", "cannot be read")
    (tmp_path / "none.zip").write_bytes(b"no zip at all")
    assert_rejected(tmp_path, tmp_path / "none.zip", "cannot be read")


def tar_with_header(name: str, **output: str) -> bytes:
    """A tar of one file of a byte, and what a header before it (PAX) says of it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = 1, output
        out.addfile(info, io.BytesIO(b"a"))
    return file.getvalue()


def tar_with_long_name(size: int) -> bytes:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    return header.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


BAD_TARS = {
    "backwards": tar_with_header("a.txt", size="-1536"),
    "backwards, left out": tar_with_header("__MACOSX/a.txt", size="-1536"),
    "no number": tar_with_header("a.txt", **{"GNU.sparse.map": "a,b", "GNU.sparse.size": "10"}),
    "no file": tar_with_header("a.txt", size="9" * 30),
    "a name of an exabyte": tar_with_long_name(2**60),
    "headers of headers": tar_with_header("a", comment="b")[:1024] * 3000,
}


@pytest.mark.parametrize("what", BAD_TARS)
def test_invalid_tar_headers(tmp_path: Path, what: str) -> None:
    for name, pack in (("a.tar", bytes), ("a.tar.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(BAD_TARS[what]))
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
    full = file.getvalue()
    (tmp_path / "a.zip").write_bytes(full.replace("é".encode(), b"\xff\xfe"))
    assert_rejected(tmp_path, tmp_path / "a.zip", "UnicodeDecodeError")
    (tmp_path / "a.zip").write_bytes(full[:60] + bytes(100) + full[160:])
    assert_rejected(tmp_path, tmp_path / "a.zip", "Invalid data stream")


def test_folders_count_as_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "MAX_MEMBERS", 2)
    folders = tarred(tmp_path / "a.tar", dict.fromkeys("abc", b""), tarfile.DIRTYPE)
    assert_rejected(tmp_path, folders, "more than 2 files")
    assert_rejected(
        tmp_path, zipped(tmp_path / "a.zip", dict.fromkeys(("a/", "b/", "c/"), b"")), "more than 2"
    )
