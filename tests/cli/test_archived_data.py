"""Imports of archives, WebDatasets and from the web, by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from arriving import coco, imported, shown, tar_of, words, zip_of
from hub_servers import Serving
from hubs import cache, certificate, picture, web_server, without_sockets

from finesight.data.jsonl import read_samples

__all__ = ["cache", "certificate", "web_server", "without_sockets"]


@pytest.mark.parametrize("folder", ["", "dogs/"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_of_a_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, folder: str
) -> None:
    archive = tmp_path / f"dogs.{kind}"
    archive.write_bytes({"zip": zip_of, "tar": tar_of}[kind](coco(folder)))
    code, said = imported(capsys, archive, tmp_path / "out")
    assert code == 0, said
    assert "2 rows, read as coco" in said
    archive.unlink()
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [shown(sample, tmp_path / "out") for sample in samples] == [picture(1), picture(2)]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "something was left behind"


@pytest.mark.parametrize("name", ["../../evil.png", "/tmp/evil-of-an-archive.png"])
def test_a_bad_archive_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    archive = tmp_path / "bad.zip"
    archive.write_bytes(zip_of({**coco(), name: b"evil"}))
    code, said = imported(capsys, archive, tmp_path / "deep" / "out")
    assert code == 2
    assert "could lie outside" in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]
    assert not Path("/tmp/evil-of-an-archive.png").exists()


def test_a_zipped_document_reaches_no_file_of_mine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.png").write_bytes(picture(99))
    files = coco()
    document = files["instances.json"].decode().replace('"1.png"', f'"{tmp_path}/1.png"')
    files["instances.json"] = document.encode()
    (tmp_path / "a.zip").write_bytes(zip_of(files))
    code, said = imported(capsys, tmp_path / "a.zip", tmp_path / "out")
    assert (code, "no such picture in the source" in said) == (2, True)


def test_a_link_where_an_archive_is_unpacked_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.unpacked.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a.zip").write_bytes(zip_of(coco()))
    assert imported(capsys, tmp_path / "a.zip", tmp_path / "out")[0] == 0
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, bytes] = {}
    for n in range(6):
        files |= {f"{n:04}.png": picture(n), f"{n:04}.txt": f"Number {n}.".encode()}
    (tmp_path / "shard.tar").write_bytes(tar_of(files))
    code, said = imported(capsys, tmp_path / "shard.tar", tmp_path / "out", "--prompt", "Say.")
    assert code == 2
    assert "--map image=image --map answer=txt" in said
    columns = ["--map", "image=image", "--map", "answer=txt", "--prompt", "Say."]
    code, said = imported(capsys, tmp_path / "shard.tar", tmp_path / "out", *columns)
    assert code == 0, said
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [sample.id for sample in samples] == [f"{n:04}" for n in range(6)]
    assert (words(samples[2], 1), shown(samples[2], tmp_path / "out")) == ("Number 2.", picture(2))


@pytest.mark.parametrize("source", ["https://example.com/a.zip", "http://example.com/a.zip"])
def test_the_web_is_not_asked_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_sockets: None, source: str
) -> None:
    code, said = imported(capsys, source, tmp_path / "out")
    assert code == 2
    assert ("--allow-host example.com" in said) == source.startswith("https")
    assert "\n  remedy: " in said


def test_an_archive_from_the_web(
    web_server: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web_server.repositories["files"]["dogs.zip"] = zip_of(coco("dogs/"))
    web_server.faults.cuts["dogs.zip"] = [300]
    source = f"https://localhost:{web_server.server_address[1]}/dogs.zip"
    code, said = imported(capsys, source, tmp_path / "out", "--allow-host", "localhost")
    assert code == 0, said
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [shown(sample, tmp_path / "out") for sample in samples] == [picture(1), picture(2)]
    assert [asked.range for asked in web_server.asked] == [None, "bytes=300-"]


def test_pictures_from_the_web(
    web_server: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web_server.repositories["files"] |= {f"{n}.png": picture(n) for n in range(3)}
    base = f"https://localhost:{web_server.server_address[1]}"
    addresses = [f"{base}/{n}.png" for n in range(4)]
    addresses += ["https://127.0.0.1/a.png", f"{base}/to/file:///etc/passwd"]
    rows = [{"image": [a], "query": "Which?", "response": "This."} for a in addresses]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    code, said = imported(capsys, source, out)
    assert (code, web_server.asked) == (2, [])
    assert "allow their host by --allow-host HOST" in said
    code, said = imported(capsys, source, out, "--allow-host", "localhost", "--unusable", "drop")
    assert code == 0, said
    samples = read_samples(out / "data.jsonl")
    assert [shown(sample, out) for sample in samples] == [picture(n) for n in range(3)]
    left = (out / "left_out.jsonl").read_text()
    for told in ("status 404", "--allow-host 127.0.0.1", "file:///etc/passwd"):
        assert told in left
    asked = len(web_server.asked)
    columns = ("--limit", "3", "--allow-host", "localhost")
    assert imported(capsys, source, tmp_path / "again", *columns)[0] == 0
    again = web_server.asked[asked:]
    assert [one.headers["If-None-Match"] is not None for one in again] == [True] * 3
    web_server.repositories["files"]["1.png"] = picture(9)
    assert imported(capsys, source, tmp_path / "new", *columns)[0] == 0
    samples = read_samples(tmp_path / "new" / "data.jsonl")
    assert [shown(sample, tmp_path / "new") for sample in samples][1] == picture(9)
