"""Tests of `import` with archives, WebDatasets and web sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from archive_fixtures import (
    build_coco_files,
    get_text,
    make_tar,
    make_zip,
    read_image_bytes,
    run_import,
)
from fake_hub_servers import FakeHubServer
from hub_fixtures import cache, certificate, make_png, web_server, without_sockets

from finesight.data.sample import read_samples

__all__ = ["cache", "certificate", "web_server", "without_sockets"]


@pytest.mark.parametrize("folder", ["", "dogs/"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_import_archive_of_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, folder: str
) -> None:
    archive = tmp_path / f"dogs.{kind}"
    archive.write_bytes({"zip": make_zip, "tar": make_tar}[kind](build_coco_files(folder)))
    code, output = run_import(capsys, archive, tmp_path / "out")
    assert code == 0, output
    assert "2 rows, read as coco" in output
    archive.unlink()
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [read_image_bytes(sample, tmp_path / "out") for sample in samples] == [
        make_png(1),
        make_png(2),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "something was left behind"


@pytest.mark.parametrize("name", ["../../evil.png", "/tmp/evil-of-an-archive.png"])
def test_unsafe_archive_writes_no_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    archive = tmp_path / "bad.zip"
    archive.write_bytes(make_zip({**build_coco_files(), name: b"evil"}))
    code, output = run_import(capsys, archive, tmp_path / "deep" / "out")
    assert code == 2
    assert "may be outside" in output
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]
    assert not Path("/tmp/evil-of-an-archive.png").exists()


def test_archive_cannot_reference_files_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.png").write_bytes(make_png(99))
    files = build_coco_files()
    document = files["instances.json"].decode().replace('"1.png"', f'"{tmp_path}/1.png"')
    files["instances.json"] = document.encode()
    (tmp_path / "a.zip").write_bytes(make_zip(files))
    code, output = run_import(capsys, tmp_path / "a.zip", tmp_path / "out")
    assert (code, "no such image in the source" in output) == (2, True)
    assert "cannot use other files of this machine" in output


def test_symlink_at_unpack_folder_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.unpacked.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a.zip").write_bytes(make_zip(build_coco_files()))
    assert run_import(capsys, tmp_path / "a.zip", tmp_path / "out")[0] == 0
    assert not list((tmp_path / "elsewhere").iterdir())


def test_import_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, bytes] = {}
    for n in range(6):
        files |= {f"{n:04}.png": make_png(n), f"{n:04}.txt": f"Number {n}.".encode()}
    (tmp_path / "shard.tar").write_bytes(make_tar(files))
    code, output = run_import(capsys, tmp_path / "shard.tar", tmp_path / "out", "--prompt", "Say.")
    assert code == 2
    assert "--map image=image --map answer=txt" in output
    columns = ["--map", "image=image", "--map", "answer=txt", "--prompt", "Say."]
    code, output = run_import(capsys, tmp_path / "shard.tar", tmp_path / "out", *columns)
    assert code == 0, output
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [sample.id for sample in samples] == [f"{n:04}" for n in range(6)]
    assert (get_text(samples[2], 1), read_image_bytes(samples[2], tmp_path / "out")) == (
        "Number 2.",
        make_png(2),
    )


@pytest.mark.parametrize("source", ["https://example.com/a.zip", "http://example.com/a.zip"])
def test_web_source_needs_allow_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_sockets: None, source: str
) -> None:
    code, output = run_import(capsys, source, tmp_path / "out")
    assert code == 2
    assert ("--allow-host example.com" in output) == source.startswith("https")
    assert "\n  remedy: " in output


def test_import_archive_from_web(
    web_server: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web_server.repositories["files"]["dogs.zip"] = make_zip(build_coco_files("dogs/"))
    web_server.faults.cuts["dogs.zip"] = [300]
    source = f"https://localhost:{web_server.server_address[1]}/dogs.zip"
    code, output = run_import(capsys, source, tmp_path / "out", "--allow-host", "localhost")
    assert code == 0, output
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [read_image_bytes(sample, tmp_path / "out") for sample in samples] == [
        make_png(1),
        make_png(2),
    ]
    assert [asked.range for asked in web_server.requests] == [None, "bytes=300-"]


def test_import_with_images_from_web(
    web_server: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web_server.repositories["files"] |= {f"{n}.png": make_png(n) for n in range(3)}
    base = f"https://localhost:{web_server.server_address[1]}"
    addresses = [f"{base}/{n}.png" for n in range(4)]
    addresses += ["https://127.0.0.1/a.png", f"{base}/to/file:///etc/passwd"]
    rows = [{"image": [a], "query": "Which?", "response": "This."} for a in addresses]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    code, output = run_import(capsys, source, out)
    assert (code, web_server.requests) == (2, [])
    assert "allow their host with --allow-host HOST" in output
    code, output = run_import(
        capsys, source, out, "--allow-host", "localhost", "--on-invalid-row", "skip"
    )
    assert code == 0, output
    samples = read_samples(out / "data.jsonl")
    assert [read_image_bytes(sample, out) for sample in samples] == [make_png(n) for n in range(3)]
    left = (out / "skipped_rows.jsonl").read_text()
    for result in ("status 404", "--allow-host 127.0.0.1", "file:///etc/passwd"):
        assert result in left
    requested = len(web_server.requests)
    columns = ("--limit", "3", "--allow-host", "localhost")
    assert run_import(capsys, source, tmp_path / "again", *columns)[0] == 0
    again = web_server.requests[requested:]
    assert [one.headers["If-None-Match"] is not None for one in again] == [True] * 3
    web_server.repositories["files"]["1.png"] = make_png(9)
    assert run_import(capsys, source, tmp_path / "new", *columns)[0] == 0
    samples = read_samples(tmp_path / "new" / "data.jsonl")
    assert [read_image_bytes(sample, tmp_path / "new") for sample in samples][1] == make_png(9)
