"""Tests of `import` and `download` with hubs."""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from container_fixtures import make_parquet, make_png, make_tar
from hub_fixtures import (
    build_coco_files,
    cache,
    get_text,
    huggingface,
    make_image_cell,
    make_zip,
    modelscope,
    read_image_bytes,
    without_sockets,
)
from tiny_model import create_tiny_model

from finesight.samples.sample import Sample, read_samples

__all__ = ["cache", "huggingface", "modelscope", "without_sockets"]

FORMULAS = [{"image": make_image_cell(n), "text": rf"x ^ {{ {n} }}"} for n in range(30)]
BROKEN = b'{"default": {"features": {"image": {"_type": "Value"}}}}'
LATEX_CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
- config_name: full
  data_files:
  - {split: train, path: full/train-*}
---
"""
COLUMNS = ("--map", "image=image", "--map", "answer=text", "--prompt", "Read.")


def shards(name: str, rows: Sequence[dict[str, object]], count: int) -> dict[str, bytes]:
    size = -(-len(rows) // count)
    return {
        f"data/{name}-{n:05}-of-{count:05}.parquet": make_parquet(rows[n * size : (n + 1) * size])
        for n in range(count)
    }


def read(out: Path, name: str = "data") -> list[Sample]:
    return list(read_samples(out / f"{name}.jsonl"))


def test_needed_files_of_a_subset_are_fetched(modelscope, tmp_path, cli):
    modelscope.repositories["datasets/Some/set"] = {
        **shards("train", FORMULAS, 4),
        **shards("validation", FORMULAS[:2], 1),
        "full/train-00000-of-00001.parquet": make_parquet(FORMULAS[:3]),
        "README.md": LATEX_CARD,
        "dataset_infos.json": BROKEN,
        "code.py": b"raise SystemExit",
    }
    out, full = tmp_path / "out", tmp_path / "full"
    rows = ("--rows", "0:15", "--eval-last", "4")
    output = cli("import", "modelscope:Some/set:default/train", out, *COLUMNS, *rows).text
    validation = read(out, "eval")
    assert (len(read(out, "train")), len(validation)) == (11, 4)
    assert get_text(validation[3], 1) == "x ^ { 14 }"
    assert read_image_bytes(validation[3], out) == make_png(14)
    assert "2 of 4 files not downloaded" in output
    assert len(modelscope.lfs_requests) == 2
    assert (
        "split train, not validation" in cli("import", "modelscope:Some/set", full, *COLUMNS).text
    )
    missing = ("import", "modelscope:Some/set:test", tmp_path / "none", *COLUMNS)
    assert "no split 'test'" in cli(*missing, code=2).err
    cli("import", "modelscope:Some/set:full", tmp_path / "three", *COLUMNS)
    assert len(read(tmp_path / "three")) == 3


def test_tars_zips_and_folders_on_hub(huggingface, tmp_path, cli):
    shard: dict[str, bytes] = {}
    for n in range(3):
        shard |= {f"{n}.png": make_png(n), f"{n}.txt": b"a"}
    rows = [{"image": f"images/{n}.png", "query": "Which?", "response": f"{n}"} for n in (1, 2)]
    huggingface.repositories |= {
        "datasets/Some/tars": {f"train-{n}.tar": make_tar(shard) for n in range(2)},
        "datasets/Some/zip": {"dogs.zip": make_zip(build_coco_files("dogs/"))},
        "datasets/Some/folder": {"a/1.png": make_png(1), "a/1.txt": b"one", "code.py": b""},
        "datasets/Some/rows": {
            "train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "images.zip": make_zip({f"images/{n}.png": make_png(n) for n in (1, 2)}),
        },
        "datasets/Some/coco": build_coco_files(),
    }
    columns = ["--map", "image=image", "--map", "answer=txt", "--prompt", "Say."]
    for name, options, count in (
        ("tars", columns, 6),
        ("zip", [], 2),
        ("folder", ["--prompt", "Say."], 1),
        ("rows", [], 2),
        ("coco", [], 2),
    ):
        cli("import", f"hf:Some/{name}", tmp_path / name, *options)
        samples = read(tmp_path / name)
        assert len(samples) == count, name
        assert read_image_bytes(samples[-1], tmp_path / name).startswith(b"\x89PNG")
    assert not [asked for asked in huggingface.requests if "code.py" in asked.path]
    assert not list(tmp_path.glob(".*"))


def test_download_command(huggingface, tmp_path, cli):
    files = {"config.json": b"{}", "model.safetensors": bytes(5000)}
    huggingface.repositories["models/Some/model"] = files | {"code.py": b""}
    printed = cli("download", "Some/model")
    folder = Path(printed.out.strip())
    assert "next:" not in printed.err  # This is no model that finesight can load.
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    huggingface.faults.cuts["model.safetensors"] = [1234, 0, 0, 0, 0, 0]
    to = tmp_path / "models" / "mine"
    download = ("download", "hf:Some/model@main", "--to", to)
    assert "start again to resume the download" in cli(*download, code=2).err
    assert not to.exists()
    cli(*download)
    assert huggingface.lfs_requests[-1].range == "bytes=1234-"
    assert {path.name: path.read_bytes() for path in to.iterdir()} == files
    assert [path.name for path in to.parent.iterdir()] == ["mine"]
    assert "exists already" in cli(*download, code=2).err
    assert "is not the address of a repository" in cli("download", "no name", code=2).err


def test_next_step_after_a_download(huggingface, tmp_path, cli, monkeypatch):
    """A model that can be loaded is asked, and data are imported into a new folder."""
    monkeypatch.chdir(tmp_path)
    tiny = create_tiny_model(tmp_path / "tiny")
    huggingface.repositories["models/Some/model"] = {
        path.name: path.read_bytes() for path in tiny.iterdir()
    }
    printed = cli("download", "Some/model")
    assert printed.err.splitlines()[-1] == f"next: finesight chat {printed.out.strip()}"
    rows = [{"query": "Which?", "response": f"This {n}."} for n in range(3)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    huggingface.repositories["datasets/Some/set"] = {"train.jsonl": content}
    (tmp_path / "set").mkdir()
    step = cli("download", "hf:datasets/Some/set").err.splitlines()[-1]
    assert step.endswith(" set-2")
    cli(*shlex.split(step.removeprefix("next: finesight ")))
    assert len((tmp_path / "set-2" / "data.jsonl").read_text().splitlines()) == 3


def test_rows_cannot_reference_local_files(huggingface, tmp_path, cli, monkeypatch):
    secret, out = tmp_path / "mine" / "secret.png", tmp_path / "out"
    secret.parent.mkdir()
    secret.write_bytes(make_png(99))
    monkeypatch.chdir(secret.parent)
    names = ("secret.png", str(secret), f"file://{secret}", f"{'../' * 40}{secret}")
    rows = [
        {"image": name, "query": "Which?", "response": "This."}
        for name in (*names, "../images/1.png")
    ]
    huggingface.repositories["datasets/Some/set"] = {
        "data/train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "images/1.png": make_png(1),
    }
    cli("import", "hf:Some/set", out, "--on-invalid-row", "skip")
    assert [path.read_bytes() for path in out.rglob("*.png")] == [make_png(1)]
    assert "no such image in the source" in (out / "skipped_rows.jsonl").read_text()


def test_duplicate_file_names_in_repository(huggingface, tmp_path, cli):
    files = {"LICENSE": b"MIT", "a.txt": b"a", **build_coco_files()}
    more = {"LICENSE": b"GPL", "a.txt": b"a"}
    zips = {"a.zip": make_zip(files), "b.zip": make_zip(more), "a.txt": b"a"}
    huggingface.repositories["datasets/Some/set"] = zips
    cli("import", "hf:Some/set", tmp_path / "out")
    for other in ({"a.txt": b"b"}, {"b.zip": make_zip({"a.txt": b"b"})}):
        huggingface.repositories["datasets/Some/set"] = {**zips, **other}
        shutil.rmtree(tmp_path / "cache")
        error = cli("import", "hf:Some/set", tmp_path / "other", code=2).err
        assert "a.txt is duplicated in this repository" in error


@pytest.mark.parametrize(("name", "code"), [("named", 2), ("row", 2), ("split", 2), ("column", 0)])
def test_control_characters_are_escaped(huggingface, tmp_path, cli, name, code):
    evil = "\x1b]0;mine\x07\x9b\u202e"
    row = {"image": "1.png", "text": "This."}
    good = {"train.jsonl": json.dumps(row).encode(), "1.png": make_png(1)}
    card = f"---\nconfigs: [{{config_name: a, data_files: {json.dumps({evil: '*.jsonl'})}}}]\n---"
    huggingface.repositories["datasets/Some/set"] = {
        "named": {f"{evil}.bin": b"x"},
        "row": {"train.jsonl": json.dumps({**row, "image": evil}).encode()},
        "split": {**good, "README.md": card.encode()},
        "column": {**good, "train.jsonl": json.dumps({**row, evil: "a"}).encode()},
    }[name]
    output = cli("import", "hf:Some/set:train", tmp_path / name, *COLUMNS, code=code).text
    assert "\\x1b" in output
    assert not {*evil[:1], *evil[-3:]} & set(output)
