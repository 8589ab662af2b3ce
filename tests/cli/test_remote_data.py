"""Tests of `import` and `download` with hubs."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Sequence
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
from fake_hub_servers import TOKEN, FakeHubServer
from hub_fixtures import (
    cache,
    huggingface,
    make_image_cell,
    make_parquet,
    make_png,
    modelscope,
    without_sockets,
)

from finesight.cli.app import run_command
from finesight.data.sample import BoxPart, read_samples

__all__ = ["cache", "huggingface", "modelscope", "without_sockets"]

CAPTIONS = [
    {"image_id": str(n), "image": make_image_cell(n), "caption": f"Image {n}."} for n in range(40)
]
FORMULAS = [{"image": make_image_cell(n), "text": rf"x ^ {{ {n} }}"} for n in range(30)]
BOXES = [
    {
        "image": make_image_cell(n),
        "question": f"what is number {n}?",
        "answer": ["a", "b"],
        "dataset_id": str(n),
        "bbox": [float(n % 20 + 5), 20.0, 30.0, 20.0],
    }
    for n in range(60)
]
BROKEN = b'{"default": {"features": {"image": {"_type": "Value"}}}}'
LATEX_CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
- config_name: full
  data_files:
  - {split: train, path: full/train-*}
---
"""


def shards(name: str, rows: Sequence[dict[str, object]], count: int) -> dict[str, bytes]:
    size = -(-len(rows) // count)
    return {
        f"data/{name}-{n:05}-of-{count:05}.parquet": make_parquet(rows[n * size : (n + 1) * size])
        for n in range(count)
    }


def test_tutorial_captions_dataset(
    modelscope: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelscope.repositories["datasets/modelscope/coco_2014_caption"] = {
        **shards("train", CAPTIONS, 4),
        **shards("validation", CAPTIONS[:2], 1),
        "dataset_infos.json": BROKEN,
    }
    code, output = run_import(
        capsys, "modelscope:modelscope/coco_2014_caption", tmp_path / "captions",
        "--map", "image=image", "--map", "answer=caption", "--prompt", "COCO Yes: ",
        "--rows", "0:15", "--eval-last", "4",
    )  # fmt: skip
    assert code == 0, output
    train = read_samples(tmp_path / "captions" / "train.jsonl")
    validation = read_samples(tmp_path / "captions" / "eval.jsonl")
    assert (len(train), len(validation)) == (11, 4)
    assert get_text(validation[3], 1) == "Image 14."
    assert read_image_bytes(validation[3], tmp_path / "captions") == make_png(14)
    assert "split train, not validation" in output
    assert "2 of 4 files not downloaded" in output
    assert len(modelscope.lfs_requests) == 2


def test_tutorial_formulas_dataset(
    modelscope: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelscope.repositories["datasets/AI-ModelScope/LaTeX_OCR"] = {
        "README.md": LATEX_CARD,
        "data/train-00000-of-00001.parquet": make_parquet(FORMULAS),
        "full/train-00000-of-00001.parquet": make_parquet(FORMULAS[:3]),
        "dataset_infos.json": BROKEN,
        "LaTeX_OCR.py": b"raise SystemExit",
    }
    code, output = run_import(
        capsys, "modelscope:AI-ModelScope/LaTeX_OCR:default/train", tmp_path / "latex",
        "--map", "image=image", "--map", "answer=text", "--prompt", "Read the formula.",
        "--limit", "20", "--eval-last", "4",
    )  # fmt: skip
    assert code == 0, output
    assert len(read_samples(tmp_path / "latex" / "train.jsonl")) == 16
    assert get_text(read_samples(tmp_path / "latex" / "eval.jsonl")[0], 1) == "x ^ { 16 }"
    code, output = run_import(
        capsys, "modelscope:AI-ModelScope/LaTeX_OCR:full", tmp_path / "full",
        "--map", "image=image", "--map", "answer=text", "--prompt", "Read the formula.",
    )  # fmt: skip
    assert len(read_samples(tmp_path / "full" / "data.jsonl")) == 3


@pytest.mark.parametrize(
    ("hub", "source"),
    [
        ("huggingface", "hf:jrzhang/TextVQA_GT_bbox"),
        ("modelscope", "modelscope:Tina12345/textVQA_groundingtask_bbox"),
    ],
)
def test_tutorial_boxes_dataset(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    hub: str, source: str,
) -> None:  # fmt: skip
    server = request.getfixturevalue(hub)
    server.repositories[f"datasets/{source.partition(':')[2]}"] = {
        **shards("train", BOXES, 2),
        "dataset_infos.json": BROKEN,
        "README.md": b"no head",
    }
    server.faults.cuts["data/train-00000-of-00002.parquet"] = [2000]
    columns = ["--map", "image=image", "--map", "question=question", "--map", "box=bbox"]
    arguments = [*columns, "--rows", "0:50", "--eval-last", "10"]
    code, output = run_import(capsys, source, tmp_path / "wrong", *arguments)
    assert code == 2
    assert "--box-format xywh" in output
    assert not (tmp_path / "wrong").exists()
    out = tmp_path / "boxes"
    code, output = run_import(capsys, source, out, *arguments, "--box-format", "xywh")
    assert code == 0, output
    assert len(read_samples(out / "train.jsonl")) == 40
    (first, *_) = read_samples(out / "eval.jsonl")
    (box,) = [part for part in first.messages[1].content if isinstance(part, BoxPart)]
    assert box.xyxy == (5.0, 20.0, 35.0, 40.0)
    assert "unused columns: answer, dataset_id" in output
    assert "bytes=2000-" in [asked.range for asked in server.lfs_requests]


def test_commands_of_documentation_page(
    huggingface: FakeHubServer, modelscope: FakeHubServer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    boxes = [{**BOXES[n % 60], "image": make_image_cell(n)} for n in range(130)]
    for hub, name, rows in (
        (modelscope, "modelscope/coco_2014_caption", CAPTIONS),
        (modelscope, "AI-ModelScope/LaTeX_OCR", FORMULAS),
        (modelscope, "Tina12345/textVQA_groundingtask_bbox", boxes),
        (huggingface, "jrzhang/TextVQA_GT_bbox", boxes),
    ):
        hub.repositories[f"datasets/{name}"] = shards("train", rows, 2)
    page = (Path(__file__).parents[2] / "docs" / "en" / "data-import.md").read_text(
        encoding="utf-8"
    )
    commands = re.findall(r"^finesight (import \w+:(?:.*\\\n)*.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for number, command in enumerate(commands):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        arguments = shlex.split(command.replace("\\\n", " "))
        assert run_command(arguments) == 0, capsys.readouterr().err
        assert read_samples(Path(arguments[2]) / "eval.jsonl")


def test_gated_and_missing_datasets(
    huggingface: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    huggingface.repositories["datasets/Some/set"] = shards("train", FORMULAS, 1)
    huggingface.gated.add("datasets/Some/set")
    columns = ["--map", "image=image", "--map", "answer=text", "--prompt", "Read."]
    code, output = run_import(capsys, "hf:Some/set", tmp_path / "out", *columns)
    assert code == 2
    for result in (
        "hf:datasets/Some/set is gated",
        "HF_TOKEN",
        f"{huggingface.url}/datasets/Some/set",
    ):
        assert result in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, output = run_import(capsys, "hf:Some/set", tmp_path / "out", *columns)
    assert code == 0, output
    code, output = run_import(capsys, "hf:Some/set:test", tmp_path / "test", *columns)
    assert (code, "no split 'test'" in output) == (2, True)
    code, output = run_import(capsys, "hf:Some/none", tmp_path / "none", *columns)
    assert (code, "hf:datasets/Some/none does not exist or is private" in output) == (2, True)


def test_offline_import_uses_the_cache(
    request: pytest.FixtureRequest, huggingface: FakeHubServer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    huggingface.repositories["datasets/Some/set"] = shards("train", FORMULAS, 1)
    columns = ["--map", "image=image", "--map", "answer=text", "--prompt", "Read."]
    assert run_import(capsys, "hf:Some/set", tmp_path / "one", *columns)[0] == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request.getfixturevalue("without_sockets")
    assert run_import(capsys, "hf:Some/set", tmp_path / "two", *columns)[0] == 0
    one, two = (read_samples(tmp_path / name / "data.jsonl") for name in ("one", "two"))
    assert one == two
    code, output = run_import(capsys, "hf:Some/other", tmp_path / "three", *columns)
    assert (code, "is not downloaded" in output) == (2, True)


def test_existing_output_is_rejected_before_any_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_sockets: None
) -> None:
    code, output = run_import(capsys, "hf:Some/set", tmp_path, "--map", "image=image")
    assert (code, "exists already" in output) == (2, True)


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_tars_zips_and_folders_on_hub(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: str
) -> None:
    server = request.getfixturevalue(hub)
    shard = {f"{n}.png": make_png(n) for n in range(3)} | {f"{n}.txt": b"a" for n in range(3)}
    shard = dict(sorted(shard.items()))
    rows = "".join(
        json.dumps({"image": f"images/{n}.png", "query": "Which?", "response": f"{n}"}) + "\n"
        for n in (1, 2)
    )
    server.repositories |= {
        "datasets/Some/tars": {f"train-{n}.tar": make_tar(shard) for n in range(2)},
        "datasets/Some/zip": {"dogs.zip": make_zip(build_coco_files("dogs/"))},
        "datasets/Some/folder": {"a/1.png": make_png(1), "a/1.txt": b"one", "code.py": b""},
        "datasets/Some/rows": {
            "train.jsonl": rows.encode(),
            "images.zip": make_zip({f"images/{n}.png": make_png(n) for n in (1, 2)}),
        },
        "datasets/Some/coco": build_coco_files(),
    }
    prefix = {"huggingface": "hf", "modelscope": "modelscope"}[hub]
    columns = ["--map", "image=image", "--map", "answer=txt", "--prompt", "Say."]
    for name, options, count in (
        ("tars", columns, 6),
        ("zip", [], 2),
        ("folder", ["--prompt", "Say."], 1),
        ("rows", [], 2),
        ("coco", [], 2),
    ):
        code, output = run_import(capsys, f"{prefix}:Some/{name}", tmp_path / name, *options)
        assert code == 0, output
        samples = read_samples(tmp_path / name / "data.jsonl")
        assert len(samples) == count, name
        assert read_image_bytes(samples[-1], tmp_path / name).startswith(b"\x89PNG")
    assert not [asked for asked in server.requests if "code.py" in asked.path]
    assert not list(tmp_path.glob(".*"))


def test_downloaded_parquet_folder(
    modelscope: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelscope.repositories["datasets/Some/set"] = {
        **shards("train", FORMULAS, 3), "dataset_infos.json": BROKEN,
    }  # fmt: skip
    source = "modelscope:datasets/Some/set"
    assert run_command(["download", source, "--to", str(tmp_path / "set")]) == 0
    assert capsys.readouterr().err.endswith(f"next: finesight import {tmp_path / 'set'} set\n")
    columns = ["--map", "image=image", "--map", "answer=text", "--prompt", "Read."]
    code, output = run_import(capsys, tmp_path / "set", tmp_path / "out", *columns)
    assert code == 0, output
    assert len(read_samples(tmp_path / "out" / "data.jsonl")) == 30


def test_download_command(
    huggingface: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = bytes(5000)
    huggingface.repositories["models/Some/model"] = {
        "config.json": b"{}", "model.safetensors": weights, "code.py": b"",
    }  # fmt: skip
    assert run_command(["download", "Some/model"]) == 0
    printed = capsys.readouterr()
    folder = Path(printed.out.strip())
    assert printed.err.splitlines()[-1] == f"next: finesight chat {folder}"
    assert (folder / "model.safetensors").read_bytes() == weights
    huggingface.faults.cuts["model.safetensors"] = [1234, 0, 0, 0, 0, 0]
    to = tmp_path / "models" / "mine"
    assert run_command(["download", "hf:Some/model@main", "--to", str(to)]) == 2
    assert "start again to resume the download" in capsys.readouterr().err
    assert not to.exists()
    assert run_command(["download", "hf:Some/model@main", "--to", str(to)]) == 0
    assert huggingface.lfs_requests[-1].range == "bytes=1234-"
    assert sorted(path.name for path in to.iterdir()) == ["config.json", "model.safetensors"]
    assert hashlib.sha256((to / "model.safetensors").read_bytes()).digest() == (
        hashlib.sha256(weights).digest()
    )
    assert [path.name for path in to.parent.iterdir()] == ["mine"]
    assert run_command(["download", "hf:Some/model", "--to", str(to)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_command(["download", "no name"]) == 2
    assert "is not the address of a repository" in capsys.readouterr().err


def test_rows_cannot_reference_local_files(
    huggingface: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mine = tmp_path / "mine" / "secret.png"
    mine.parent.mkdir()
    mine.write_bytes(make_png(99))
    monkeypatch.chdir(mine.parent)
    names = ("secret.png", str(mine), f"file://{mine}", f"{'../' * 40}{mine}", "../images/1.png")
    rows = [{"image": name, "query": "Which?", "response": "This."} for name in names]
    huggingface.repositories["datasets/Some/set"] = {
        "data/train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "images/1.png": make_png(1),
    }
    out = tmp_path / "out"
    code, output = run_import(capsys, "hf:Some/set", out, "--on-invalid-row", "skip")
    assert code == 0, output
    assert [path.read_bytes() for path in out.rglob("*.png")] == [make_png(1)]
    assert "no such image in the source" in (out / "skipped_rows.jsonl").read_text()


def test_duplicate_file_names_in_repository(
    huggingface: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"LICENSE": b"MIT", "a.txt": b"a", **build_coco_files()}
    more = {"LICENSE": b"GPL", "a.txt": b"a"}
    zips = {"a.zip": make_zip(files), "b.zip": make_zip(more), "a.txt": b"a"}
    huggingface.repositories["datasets/Some/set"] = zips
    code, output = run_import(capsys, "hf:Some/set", tmp_path / "out")
    assert code == 0, output
    for other in ({"a.txt": b"b"}, {"b.zip": make_zip({"a.txt": b"b"})}):
        huggingface.repositories["datasets/Some/set"] = {**zips, **other}
        shutil.rmtree(tmp_path / "cache")
        code, output = run_import(capsys, "hf:Some/set", tmp_path / "other")
        assert (code, "a.txt is duplicated in this repository" in output) == (2, True)


def test_control_characters_are_escaped(
    huggingface: FakeHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;mine\x07\x9b\u202e"
    row = {"image": "1.png", "text": "This."}
    columns = ["--map", "image=image", "--map", "answer=text", "--prompt", "Read."]
    good = {"train.jsonl": json.dumps(row).encode(), "1.png": make_png(1)}
    card = f"---\nconfigs: [{{config_name: a, data_files: {json.dumps({evil: '*.jsonl'})}}}]\n---"
    sets: dict[str, dict[str, bytes]] = {
        "named": {f"{evil}.bin": b"x"},
        "row": {"train.jsonl": json.dumps({**row, "image": evil}).encode()},
        "split": {**good, "README.md": card.encode()},
        "column": {**good, "train.jsonl": json.dumps({**row, evil: "a"}).encode()},
    }
    for name, files in sets.items():
        huggingface.repositories[f"datasets/Some/{name}"] = files
        output = run_import(capsys, f"hf:Some/{name}:train", tmp_path / name, *columns)[1]
        assert "\\x1b" in output, name
        assert not {*evil[:1], *evil[-3:]} & set(output), name
