"""Datasets whose files are called in GBK, as unzip leaves them, from import to training."""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unicodedata import normalize

import pytest
import yaml
from fuzzed_sources import SOURCES, encode_files
from image_fixtures import encode_image, write_gray_image, write_jsonl
from PIL import Image
from test_bounded_files import CAT, in_gbk
from tiny_task import make_task

from finesight.cli.app import run_command
from finesight.files.storage import verify_folder
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import ImportSummary, import_dataset
from finesight.ingest.source_fetch import fetch_source
from finesight.samples.corpus import open_sample_source
from finesight.samples.sample import Sample, read_samples

NAME = f"{CAT}.jpg"


def image() -> bytes:
    return encode_image(Image.new("L", (40, 20)), "JPEG")


def imported(source: Path, out: Path, **request: object) -> ImportSummary:
    options = ImportOptions(**request)  # type: ignore[arg-type]
    with fetch_source(str(source), out, options) as found:
        return import_dataset(found.path, out, found.options)


def utf8_folder(folder: Path) -> Path:
    write_gray_image(folder / in_gbk(NAME))
    (folder / in_gbk(f"{CAT}.txt")).write_text("a cat")
    return folder


def folder_in_gbk(folder: Path) -> Path:
    write_gray_image(folder / in_gbk(CAT) / in_gbk(CAT) / "a.jpg")
    (folder / in_gbk(CAT) / in_gbk(CAT) / "a.txt").write_text("a cat")
    return folder / in_gbk(CAT)


def rows(folder: Path) -> Path:
    write_gray_image(folder / in_gbk(CAT) / in_gbk(NAME))
    row = {"image": f"{CAT}\\{NAME}", "query": "?", "response": "a cat"}
    return write_jsonl(folder / "a.jsonl", [row])


def rows_in_gbk(folder: Path) -> Path:
    """The file of rows is called in GBK, and so are ids that are made of its name."""
    write_gray_image(folder / "a.jpg")
    row = {"image": "a.jpg", "query": "?", "response": "a cat"}
    return write_jsonl(folder / in_gbk(f"{CAT}.jsonl"), [row])


class _Unflagged(zipfile.ZipInfo):
    """A member as Windows writes it: its name in GBK, which no flag says."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("gbk"), 0


def zipped(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr(_Unflagged(f"{CAT}/{NAME}"), image())
        archive.writestr(_Unflagged(f"{CAT}/{CAT}.txt"), "a cat")
    return folder / "a.zip"


def tarred(folder: Path) -> Path:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", encoding="gbk") as archive:
        for name, data in ((f"{CAT}/{NAME}", image()), (f"{CAT}/{CAT}.txt", b"a cat")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    folder.mkdir(exist_ok=True)
    (folder / "a.tar.gz").write_bytes(gzip.compress(content.getvalue()))
    (folder / "a.tar").write_bytes(content.getvalue())
    return folder / "a.tar.gz"


def web_dataset(folder: Path) -> Path:
    tarred(folder)
    return folder / "a.tar"


ROWS_AND_ARCHIVES = [folder_in_gbk, rows, rows_in_gbk, zipped, tarred, web_dataset]


@pytest.mark.parametrize("make", ROWS_AND_ARCHIVES)
def test_rows_and_archives_in_gbk_are_imported(tmp_path, make):
    request: dict[str, object] = {}
    if make in (folder_in_gbk, zipped, tarred):
        request = {"prompt": "?"}
    elif make is web_dataset:
        request = {"columns": {"image": "image", "answer": "txt"}, "prompt": "?"}
    (sample,) = import_and_check(make(tmp_path / "set"), tmp_path / "out", **request)
    if make in (rows, zipped, tarred):
        assert sample.messages[0].content[0].image.endswith(f"/{NAME}")
    if make not in (rows, folder_in_gbk):
        assert CAT in sample.id


def import_and_check(source: Path, out: Path, **request: object) -> list[Sample]:
    """Import a source, and check the images and that all new names are UTF-8."""
    imported(source, out, **request)
    samples = read_samples(out / "data.jsonl")
    assert samples
    for sample in samples:
        assert (out / sample.messages[0].content[0].image).is_file()
    assert all(os.fsencode(path).decode() for path in out.rglob("*"))
    verify_folder(out)
    return samples


KINDS = ["folder", "yolo", "yolo with description", "voc", "labelme", "cvat", "fiftyone", "coco"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stored", "named"), [("gbk", "utf-8"), ("NFC", "NFD"), ("NFD", "NFC")])
def test_images_are_found_by_names_of_other_encodings(tmp_path, kind, stored, named):
    """Annotations are in UTF-8; lists of images are in GBK, too."""
    case, is_gbk = SOURCES[kind], stored == "gbk"

    def rename(name: str, form: str) -> str:
        stem = CAT if is_gbk else normalize(form, "Käse")
        name = re.sub(r"\b([ab])(?=\.|$|\":)", rf"{stem}\1", name)
        return in_gbk(name) if form == "gbk" else name

    for name, content in encode_files(case["files"]).items():
        is_image = case["files"][name] is None
        path = tmp_path / "set" / rename(name, stored if is_image or is_gbk else named)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_image:
            encoding = "gbk" if name == "val.txt" and is_gbk else "utf-8"
            content = rename(content.decode(), named).encode(encoding)
        path.write_bytes(content)
    path = case.get("path", ".")
    source = tmp_path / "set" / (path if path == "." else rename(path, stored if is_gbk else named))
    for sample in import_and_check(source, tmp_path / "out", **case.get("requests", [{}])[0]):
        assert (CAT if is_gbk else normalize(stored, "Käse")) in sample.messages[0].content[0].image


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_class_folders_and_rows_match_in_both_normal_forms(tmp_path, stored):
    name, label = (normalize(f, "Käse") for f in (stored, "NFD" if stored == "NFC" else "NFC"))
    write_gray_image(tmp_path / "rows" / name / f"{name}.jpg")
    row = {"image": f"{label}/{label}.jpg", "query": "?", "response": "x"}
    import_and_check(write_jsonl(tmp_path / "rows" / "a.jsonl", [row]), tmp_path / "out")
    write_gray_image(tmp_path / "set" / "train" / name / "a.jpg")
    write_gray_image(tmp_path / "set" / "train" / "b" / "b.jpg", gray_level=1)
    write_gray_image(tmp_path / "set" / "val" / label / "c.jpg", gray_level=2)
    summary = imported(tmp_path / "set", tmp_path / "classes")
    (sample,) = read_samples(summary.output_files[-1].file)
    assert (summary.format, sample.messages[-1].content[0].text) == ("classes", "Käse")


def test_colliding_names_are_both_imported(tmp_path: Path) -> None:
    """One is called in GBK and the other, of the same characters, in UTF-8."""
    for shade, name in enumerate((CAT, in_gbk(CAT))):
        write_gray_image(tmp_path / "set" / f"{name}.png", gray_level=shade * 99)
        (tmp_path / "set" / f"{name}.txt").write_text(f"shade {shade * 99}")
    imported(tmp_path / "set", tmp_path / "out", prompt="?", copy_images=True)
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert len({sample.id for sample in samples}) == 2
    for sample in samples:
        input_image = Image.open(tmp_path / "out" / sample.messages[0].content[0].image)
        assert sample.messages[-1].content[0].text == f"shade {input_image.getpixel((0, 0))}"


def test_a_name_in_the_field_for_utf_8(tmp_path: Path) -> None:
    """As other programs write it beside a name in any encoding."""
    import struct
    import zlib

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for suffix, data in ((".jpg", image()), (".txt", b"a cat")):
            member = zipfile.ZipInfo(f"x{suffix}")
            check = struct.pack("<I", zlib.crc32(f"x{suffix}".encode()))
            field = b"\1" + check + f"{CAT}{suffix}".encode()
            member.extra = struct.pack("<HH", 0x7075, len(field)) + field
            archive.writestr(member, data)
    imported(tmp_path / "a.zip", tmp_path / "out", prompt="?")
    assert (tmp_path / "out" / "images" / NAME).is_file()


def test_a_tar_to_train_on_whose_names_are_in_gbk(tmp_path: Path) -> None:
    sample = {
        "id": "1",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": NAME}]},
            {"role": "assistant", "content": "a cat"},
        ],
    }
    with tarfile.open(tmp_path / "a.tar", "w", encoding="gbk") as archive:
        for name, data in ((NAME, image()), (f"{CAT}.json", json.dumps(sample).encode())):
            member = tarfile.TarInfo(f"{CAT}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    located = open_sample_source(tmp_path / "a.tar").read_sample(0)
    assert "/@" in str(located.resolve_path(located.sample.messages[0].content[0].image))


def test_from_import_to_training(tmp_path, monkeypatch, capsys):
    """The source lies in a folder that is called in GBK as well; what is made of it does not, and
    a run in such a folder is refused."""
    recipe = make_task(tmp_path / "task", num_samples=4, num_eval_samples=2)
    home = tmp_path / in_gbk(CAT)
    (home / in_gbk(CAT)).mkdir(parents=True)
    for number, image_path in enumerate(sorted((tmp_path / "task").glob("train*.png"))):
        shutil.copy(image_path, home / in_gbk(CAT) / in_gbk(f"{CAT}{number}.png"))
    names = [f"{CAT}/{CAT}{number}.png" for number in range(4)]
    write_jsonl(home / "a.jsonl", [{"image": n, "query": "?", "response": "x"} for n in names])
    monkeypatch.chdir(home)
    assert run_command(["check", "a.jsonl", "--fix", str(tmp_path / "fixed")]) == 0
    assert run_command(["import", "a.jsonl", str(tmp_path / "data")]) == 0
    recipe["data"] = {"train": str(tmp_path / "data" / "data.jsonl")}
    recipe["output_dir"] = str(tmp_path / "run")
    recipe["train"] |= {"epochs": 1, "batch_size": 2, "save_every": 10}
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    assert run_command(["check", "r.yaml"]) == 0
    assert run_command(["show", "r.yaml", "--json"]) == 0
    assert run_command(["train", "r.yaml"]) == 0
    monkeypatch.chdir(home)
    shutil.copytree(recipe["model"], "tiny")
    Path("r.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": "run", "model": "tiny"}))
    capsys.readouterr()
    assert run_command(["train", "r.yaml"]) == 2
    assert "is not valid UTF-8" in capsys.readouterr().err


def test_findings_about_such_names_are_printed(tmp_path: Path) -> None:
    """To a terminal that takes nothing but UTF-8."""
    folder = utf8_folder(tmp_path / in_gbk(CAT))
    (folder / in_gbk("\u4e2d.jpg")).write_text("no image")
    (folder / in_gbk("\u4e2d.txt")).write_text("x")
    code = "from finesight.cli.app import main; main()"
    command = [sys.executable, "-c", code, "check", str(folder), "--prompt", "?", "--json"]
    done = subprocess.run(
        command,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr.decode(errors="replace")
    assert b"not an image" in done.stdout
    for line in done.stdout.splitlines():
        json.loads(line.decode())
