"""Tests of `import` with archives, WebDatasets and web sources."""

import json
from pathlib import Path

import pytest
from container_fixtures import make_png, make_tar
from hub_fixtures import (
    build_coco_files,
    cache,
    certificate,
    make_zip,
    read_image_bytes,
    web_server,
    without_sockets,
)

from finesight.samples.sample import read_samples

__all__ = ["cache", "certificate", "web_server", "without_sockets"]


def read_images(out: Path) -> list[bytes]:
    return [read_image_bytes(sample, out) for sample in read_samples(out / "data.jsonl")]


@pytest.mark.parametrize("folder", ["", "dogs/"])
@pytest.mark.parametrize(("kind", "make"), [("zip", make_zip), ("tar", make_tar)])
def test_import_archive_of_dataset(tmp_path, cli, kind, make, folder):
    archive, out = tmp_path / f"dogs.{kind}", tmp_path / "out"
    archive.write_bytes(make(build_coco_files(folder)))
    assert "2 rows, read as coco" in cli("import", archive, out).out
    archive.unlink()
    assert read_images(out) == [make_png(1), make_png(2)]
    assert [*tmp_path.iterdir()] == [out], "something was left behind"


def test_archive_cannot_reference_files_outside(tmp_path, cli):
    (tmp_path / "1.png").write_bytes(make_png(99))
    files = build_coco_files()
    document = files["instances.json"].decode().replace('"1.png"', f'"{tmp_path}/1.png"')
    archive = tmp_path / "a.zip"
    archive.write_bytes(make_zip(files | {"instances.json": document.encode()}))
    error = cli("import", archive, tmp_path / "out", code=2).err
    assert "no such image in the source" in error
    assert "cannot use other files of this machine" in error


def test_symlink_at_unpack_folder_is_not_followed(tmp_path, cli):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.unpacked.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a.zip").write_bytes(make_zip(build_coco_files()))
    cli("import", tmp_path / "a.zip", tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_import_webdataset(tmp_path, cli):
    shard, out = tmp_path / "shard.tar", tmp_path / "out"
    shard.write_bytes(make_tar({"1.png": make_png(1), "1.txt": b"Number 1."}))
    columns = ["--map", "image=image", "--map", "answer=txt"]
    assert " ".join(columns) in cli("import", shard, out, "--prompt", "Say.", code=2).err
    cli("import", shard, out, *columns, "--prompt", "Say.")
    assert read_images(out) == [make_png(1)]


def test_import_with_images_from_web(web_server, tmp_path, cli):
    web_server.repositories["files"] |= {f"{n}.png": make_png(n) for n in range(3)}
    base = f"https://localhost:{web_server.server_address[1]}"
    addresses = [f"{base}/{n}.png" for n in range(4)]
    addresses += ["https://127.0.0.1/a.png", f"{base}/to/file:///etc/passwd"]
    rows = [{"image": [a], "query": "Which?", "response": "This."} for a in addresses]
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = cli("import", source, out, code=2).err
    assert "allow their host with --allow-host HOST" in error
    assert "--allow-host localhost" in cli("import", f"{base}/0.zip", out, code=2).err
    assert web_server.requests == []
    allowed = ("--allow-host", "localhost")
    web_server.repositories["files"]["dogs.zip"] = make_zip(build_coco_files("dogs/"))
    cli("import", f"{base}/dogs.zip", tmp_path / "dogs", *allowed)
    assert read_images(tmp_path / "dogs") == [make_png(1), make_png(2)]
    cli("import", source, out, *allowed, "--on-invalid-row", "skip")
    assert read_images(out) == [make_png(n) for n in range(3)]
    skipped = (out / "skipped_rows.jsonl").read_text()
    for result in ("status 404", "--allow-host 127.0.0.1", "file:///etc/passwd"):
        assert result in skipped
    requested = len(web_server.requests)
    cli("import", source, tmp_path / "again", "--limit", "3", *allowed)
    again = web_server.requests[requested:]
    assert [one.headers["If-None-Match"] is not None for one in again] == [True] * 3
    web_server.repositories["files"]["1.png"] = make_png(9)
    cli("import", source, tmp_path / "new", "--limit", "3", *allowed)
    assert read_images(tmp_path / "new")[1] == make_png(9)
