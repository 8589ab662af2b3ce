"""Archives: extraction, and rejection of malicious and corrupt archives."""

import gzip
import io
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from finesight.errors import UserError
from finesight.files import archive
from finesight.files.archive import unpack_archive
from finesight.ingest.row_reader import is_webdataset, open_webdataset

FILES = {"a/1.txt": b"one", "a/b/2.bin": bytes(100_000), "ü 3.txt": b"three"}
SYSTEM_FILES = {"__MACOSX/a/._1.txt": b"x", "a/.DS_Store": b"x"}
EVIL_NAMES = ("../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:\\evil")
SPECIAL_TYPES = {
    "symlink": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
}


def zipped(files, mode=0o100644, compression=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, compression
            file.writestr(info, data)
    return out.getvalue()


def tarred(files, suffix="", kind=tarfile.REGTYPE, **header):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{suffix}", format=tarfile.PAX_FORMAT) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            info.linkname, info.pax_headers = "/etc/passwd", header
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def long_name_header(size: int) -> bytes:
    """Return a GNU header that declares a name of this size."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    return header.tobuf(tarfile.GNU_FORMAT)


def read_files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_rejected(file: Path, message: str) -> None:
    before = read_files(file.parent)
    with pytest.raises(UserError, match=message) as raised:
        unpack_archive(file, file.parent / "deep" / "target")
    assert not any(path.is_symlink() for path in file.parent.rglob("*"))
    shutil.rmtree(file.parent / "deep" / "target", ignore_errors=True)
    assert read_files(file.parent) == before, "a file was written outside of the folder"
    assert all((raised.value.where, raised.value.expected, raised.value.remedy))


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_files_are_extracted_without_system_files(tmp_path: Path, suffix: str) -> None:
    files = FILES | SYSTEM_FILES
    data = zipped(files) if suffix == "zip" else tarred(files, suffix[4:])
    (tmp_path / f"a.{suffix}").write_bytes(data)
    unpack_archive(tmp_path / f"a.{suffix}", tmp_path / "target")
    assert read_files(tmp_path / "target") == FILES


def encrypted() -> bytes:
    data = bytearray(zipped({"a.txt": b"secret"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


BZIP2 = zipped({"aé.txt": bytes(range(256)) * 20}, compression=zipfile.ZIP_BZIP2)
WHOLE = tarred(FILES, "gz")
BAD_ARCHIVES: dict[str, tuple[str, bytes, str]] = {
    **{f"zip {name}": ("zip", zipped({name: b"x"}), "may be outside") for name in EVIL_NAMES},
    **{f"tar {name}": ("tar", tarred({name: b"x"}), "may be outside") for name in EVIL_NAMES},
    **{
        name: ("tar", tarred({"innocent": b""}, kind=kind), "a link or a device")
        for name, kind in SPECIAL_TYPES.items()
    },
    "zip link": ("zip", zipped({"a": b"/etc/passwd"}, stat.S_IFLNK | 0o777), "a link or a device"),
    "encrypted": ("zip", encrypted(), "is encrypted"),
    "cut off": ("tar.gz", WHOLE[: len(WHOLE) // 2], "cannot be read"),
    "no zip": ("zip", b"no zip at all", "cannot be read"),
    "no bzip2": ("tar.bz2", b"hello world" * 100, "Invalid data stream"),
    "invalid name": ("zip", BZIP2.replace("é".encode(), b"\xff\xfe"), "UnicodeDecodeError"),
    "damaged data": ("zip", BZIP2[:60] + bytes(100) + BZIP2[160:], "Invalid data stream"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_malicious_and_damaged_archives_are_rejected(tmp_path: Path, case: str) -> None:
    suffix, data, message = BAD_ARCHIVES[case]
    (tmp_path / f"a.{suffix}").write_bytes(data)
    assert_rejected(tmp_path / f"a.{suffix}", message)


def test_duplicate_names_are_rejected(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twins.tar", "w") as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo("a.txt"))
    assert_rejected(tmp_path / "twins.tar", "two files with the name 'a.txt'")


BAD_TARS = {
    "negative size": tarred({"a.txt": b"a"}, size="-1536"),
    "negative size of a skipped file": tarred({"__MACOSX/a.txt": b"a"}, size="-1536"),
    "invalid number": tarred({"a.txt": b"a"}, **{"GNU.sparse.map": "a,b", "GNU.sparse.size": "10"}),
    "huge size": tarred({"a.txt": b"a"}, size="9" * 30),
    "huge name": long_name_header(2**60) + bytes(2048),
    "nested headers": tarred({"a": b"a"}, comment="b")[:1024] * 3000,
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_invalid_tar_headers(tmp_path: Path, case: str) -> None:
    for name, pack in (("a.tar", bytes), ("a.tar.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(BAD_TARS[case]))
        assert_rejected(tmp_path / name, "cannot be read: ")
    for read in (is_webdataset, open_webdataset):
        with pytest.raises(UserError, match="cannot be read: "):
            read(tmp_path / "a.tar")


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.xz"])
def test_decompression_bombs_are_rejected(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(archive, "UNCHECKED_BYTES", archive.UNCHECKED_BYTES // 10)
    file, files = tmp_path / f"a.{suffix}", {"bomb.txt": bytes(15_000_000)}
    file.write_bytes(zipped(files) if suffix == "zip" else tarred(files, suffix[4:]))
    assert file.stat().st_size < 20_000
    assert_rejected(file, "more than 100 times the")


def test_endless_member_name_uses_little_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as out:
        out.write(long_name_header(300_000_000))
        for _ in range(300):
            out.write(b"a" * 1_000_000)
    tracemalloc.start()
    assert_rejected(tmp_path / "a.tar.gz", "a header of 3000")
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_wrong_declared_size_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The header declares 10 bytes of 2 million.
    monkeypatch.setattr(archive, "UNCHECKED_BYTES", 1000)
    real, declared = ((size).to_bytes(4, "little") for size in (2_000_000, 10))
    data = zipped({"a.txt": bytes(2_000_000)}).replace(real, declared)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"over 100 times|cannot be read"):
        unpack_archive(tmp_path / "a.zip", tmp_path / "target")
    assert sum(map(len, read_files(tmp_path / "target").values())) <= 10


def test_member_and_size_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = dict.fromkeys(("a/", "b/", "c/"), b"")
    archives = {
        "files.tar": tarred(FILES),
        "folders.tar": tarred(folders, kind=tarfile.DIRTYPE),
        "folders.zip": zipped(folders),
    }
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    for name, data in archives.items():
        (tmp_path / name).write_bytes(data)
        assert_rejected(tmp_path / name, "more than 2 files")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 9)
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 50_000)
    assert_rejected(tmp_path / "files.tar", "more than 50000 bytes")
