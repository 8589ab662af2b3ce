"""Imports from hubs by the command, and downloads: the way from a name to samples."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from arriving import coco, imported, shown, tar_of, words, zip_of
from hub_servers import TOKEN, Serving
from hubs import cache, huggingface, image, modelscope, parquet, picture, without_sockets

from finesight.cli.app import run
from finesight.data.jsonl import read_samples
from finesight.data.sample import BoxPart

__all__ = ["cache", "huggingface", "modelscope", "without_sockets"]

CAPTIONS = [{"image_id": str(n), "image": image(n), "caption": f"Picture {n}."} for n in range(40)]
FORMULAS = [{"image": image(n), "text": rf"x ^ {{ {n} }}"} for n in range(30)]
BOXES = [
    {
        "image": image(n),
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
        f"data/{name}-{n:05}-of-{count:05}.parquet": parquet(rows[n * size : (n + 1) * size])
        for n in range(count)
    }


def test_the_captions_of_the_tutorial(
    modelscope: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelscope.repositories["datasets/modelscope/coco_2014_caption"] = {
        **shards("train", CAPTIONS, 4),
        **shards("validation", CAPTIONS[:2], 1),
        "dataset_infos.json": BROKEN,
    }
    code, said = imported(
        capsys, "modelscope:modelscope/coco_2014_caption", tmp_path / "captions",
        "--map", "image=image", "--map", "answer=caption", "--prompt", "COCO Yes: ",
        "--rows", "0:15", "--eval-last", "4",
    )  # fmt: skip
    assert code == 0, said
    train = read_samples(tmp_path / "captions" / "train.jsonl")
    held_out = read_samples(tmp_path / "captions" / "eval.jsonl")
    assert (len(train), len(held_out)) == (11, 4)
    assert words(held_out[3], 1) == "Picture 14."
    assert shown(held_out[3], tmp_path / "captions") == picture(14)
    assert "split train, not validation" in said
    assert "2 of 4 files not fetched" in said
    assert len(modelscope.fetched) == 2


def test_the_formulas_of_the_tutorial(
    modelscope: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelscope.repositories["datasets/AI-ModelScope/LaTeX_OCR"] = {
        "README.md": LATEX_CARD,
        "data/train-00000-of-00001.parquet": parquet(FORMULAS),
        "full/train-00000-of-00001.parquet": parquet(FORMULAS[:3]),
        "dataset_infos.json": BROKEN,
        "LaTeX_OCR.py": b"raise SystemExit",
    }
    code, said = imported(
        capsys, "modelscope:AI-ModelScope/LaTeX_OCR:default/train", tmp_path / "latex",
        "--map", "image=image", "--map", "answer=text", "--prompt", "Read the formula.",
        "--limit", "20", "--eval-last", "4",
    )  # fmt: skip
    assert code == 0, said
    assert len(read_samples(tmp_path / "latex" / "train.jsonl")) == 16
    assert words(read_samples(tmp_path / "latex" / "eval.jsonl")[0], 1) == "x ^ { 16 }"
    code, said = imported(
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
def test_the_boxes_of_the_tutorial(
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
    code, said = imported(capsys, source, tmp_path / "wrong", *arguments)
    assert code == 2
    assert "--box-format xywh" in said
    assert not (tmp_path / "wrong").exists()
    out = tmp_path / "boxes"
    code, said = imported(capsys, source, out, *arguments, "--box-format", "xywh")
    assert code == 0, said
    assert len(read_samples(out / "train.jsonl")) == 40
    (first, *_) = read_samples(out / "eval.jsonl")
    (box,) = [part for part in first.messages[1].content if isinstance(part, BoxPart)]
    assert box.xyxy == (5.0, 20.0, 35.0, 40.0)
    assert "columns not used: answer, dataset_id" in said
    assert "bytes=2000-" in [asked.range for asked in server.fetched]


def test_the_commands_of_the_page(
    huggingface: Serving, modelscope: Serving, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    boxes = [{**BOXES[n % 60], "image": image(n)} for n in range(130)]
    for hub, name, rows in (
        (modelscope, "modelscope/coco_2014_caption", CAPTIONS),
        (modelscope, "AI-ModelScope/LaTeX_OCR", FORMULAS),
        (modelscope, "Tina12345/textVQA_groundingtask_bbox", boxes),
        (huggingface, "jrzhang/TextVQA_GT_bbox", boxes),
    ):
        hub.repositories[f"datasets/{name}"] = shards("train", rows, 2)
    page = (Path(__file__).parents[2] / "docs" / "en" / "data.md").read_text(encoding="utf-8")
    commands = re.findall(r"^finesight (data import \w+:(?:.*\\\n)*.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for number, command in enumerate(commands):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        arguments = shlex.split(command.replace("\\\n", " "))
        assert run(arguments) == 0, capsys.readouterr().err
        assert read_samples(Path(arguments[3]) / "eval.jsonl")


def test_what_is_gated_or_not_there(
    huggingface: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    huggingface.repositories["datasets/Some/set"] = shards("train", FORMULAS, 1)
    huggingface.gated.add("datasets/Some/set")
    columns = ["--map", "image=image", "--map", "answer=text", "--prompt", "Read."]
    code, said = imported(capsys, "hf:Some/set", tmp_path / "out", *columns)
    assert code == 2
    for told in (
        "hf:datasets/Some/set is gated",
        "HF_TOKEN",
        f"{huggingface.url}/datasets/Some/set",
    ):
        assert told in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, said = imported(capsys, "hf:Some/set", tmp_path / "out", *columns)
    assert code == 0, said
    code, said = imported(capsys, "hf:Some/set:test", tmp_path / "test", *columns)
    assert (code, "no split 'test'" in said) == (2, True)
    code, said = imported(capsys, "hf:Some/none", tmp_path / "none", *columns)
    assert (code, "the hub has no hf:datasets/Some/none" in said) == (2, True)


def test_offline_an_import_needs_no_network(
    request: pytest.FixtureRequest, huggingface: Serving, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    huggingface.repositories["datasets/Some/set"] = shards("train", FORMULAS, 1)
    columns = ["--map", "image=image", "--map", "answer=text", "--prompt", "Read."]
    assert imported(capsys, "hf:Some/set", tmp_path / "one", *columns)[0] == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request.getfixturevalue("without_sockets")
    assert imported(capsys, "hf:Some/set", tmp_path / "two", *columns)[0] == 0
    one, two = (read_samples(tmp_path / name / "data.jsonl") for name in ("one", "two"))
    assert one == two
    code, said = imported(capsys, "hf:Some/other", tmp_path / "three", *columns)
    assert (code, "was not downloaded before" in said) == (2, True)


def test_an_output_that_exists_is_told_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_sockets: None
) -> None:
    code, said = imported(capsys, "hf:Some/set", tmp_path, "--map", "image=image")
    assert (code, "exists already" in said) == (2, True)


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_tars_zips_and_folders_on_a_hub(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: str
) -> None:
    server = request.getfixturevalue(hub)
    shard = {f"{n}.png": picture(n) for n in range(3)} | {f"{n}.txt": b"a" for n in range(3)}
    shard = dict(sorted(shard.items()))
    rows = "".join(
        json.dumps({"image": f"images/{n}.png", "query": "Which?", "response": f"{n}"}) + "\n"
        for n in (1, 2)
    )
    server.repositories |= {
        "datasets/Some/tars": {f"train-{n}.tar": tar_of(shard) for n in range(2)},
        "datasets/Some/zip": {"dogs.zip": zip_of(coco("dogs/"))},
        "datasets/Some/folder": {"a/1.png": picture(1), "a/1.txt": b"one", "code.py": b""},
        "datasets/Some/rows": {
            "train.jsonl": rows.encode(),
            "images.zip": zip_of({f"images/{n}.png": picture(n) for n in (1, 2)}),
        },
        "datasets/Some/coco": coco(),
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
        code, said = imported(capsys, f"{prefix}:Some/{name}", tmp_path / name, *options)
        assert code == 0, said
        samples = read_samples(tmp_path / name / "data.jsonl")
        assert len(samples) == count, name
        assert shown(samples[-1], tmp_path / name).startswith(b"\x89PNG")
    assert not [asked for asked in server.asked if "code.py" in asked.path]
    assert not list(tmp_path.glob(".*"))


def test_a_downloaded_folder_of_parquet(
    modelscope: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelscope.repositories["datasets/Some/set"] = {
        **shards("train", FORMULAS, 3), "dataset_infos.json": BROKEN,
    }  # fmt: skip
    source = "modelscope:datasets/Some/set"
    assert run(["download", source, "--to", str(tmp_path / "set")]) == 0
    columns = ["--map", "image=image", "--map", "answer=text", "--prompt", "Read."]
    code, said = imported(capsys, tmp_path / "set", tmp_path / "out", *columns)
    assert code == 0, said
    assert len(read_samples(tmp_path / "out" / "data.jsonl")) == 30


def test_downloads_by_command(
    huggingface: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = bytes(5000)
    huggingface.repositories["models/Some/model"] = {
        "config.json": b"{}", "model.safetensors": weights, "code.py": b"",
    }  # fmt: skip
    assert run(["download", "Some/model"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "model.safetensors").read_bytes() == weights
    huggingface.faults.cuts["model.safetensors"] = [1234, 0, 0, 0, 0, 0]
    to = tmp_path / "models" / "mine"
    assert run(["download", "hf:Some/model@main", "--to", str(to)]) == 2
    assert "it goes on where it stopped" in capsys.readouterr().err
    assert not to.exists()
    assert run(["download", "hf:Some/model@main", "--to", str(to)]) == 0
    assert huggingface.fetched[-1].range == "bytes=1234-"
    assert sorted(path.name for path in to.iterdir()) == ["config.json", "model.safetensors"]
    assert hashlib.sha256((to / "model.safetensors").read_bytes()).digest() == (
        hashlib.sha256(weights).digest()
    )
    assert [path.name for path in to.parent.iterdir()] == ["mine"]
    assert run(["download", "hf:Some/model", "--to", str(to)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(["download", "no name"]) == 2
    assert "names nothing on a hub" in capsys.readouterr().err


def test_names_in_rows_of_others_reach_no_file_of_mine(
    huggingface: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mine = tmp_path / "mine" / "secret.png"
    mine.parent.mkdir()
    mine.write_bytes(picture(99))
    monkeypatch.chdir(mine.parent)
    names = ("secret.png", str(mine), f"file://{mine}", f"{'../' * 40}{mine}", "../pictures/1.png")
    rows = [{"image": name, "query": "Which?", "response": "This."} for name in names]
    huggingface.repositories["datasets/Some/set"] = {
        "data/train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "pictures/1.png": picture(1),
    }
    out = tmp_path / "out"
    code, said = imported(capsys, "hf:Some/set", out, "--unusable", "drop")
    assert code == 0, said
    assert [path.read_bytes() for path in out.rglob("*.png")] == [picture(1)]
    assert "no such picture in the source" in (out / "left_out.jsonl").read_text()


def test_files_of_one_name_in_a_repository(
    huggingface: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"LICENSE": b"MIT", "a.txt": b"a", **coco()}
    more = {"LICENSE": b"GPL", "a.txt": b"a"}
    zips = {"a.zip": zip_of(files), "b.zip": zip_of(more), "a.txt": b"a"}
    huggingface.repositories["datasets/Some/set"] = zips
    code, said = imported(capsys, "hf:Some/set", tmp_path / "out")
    assert code == 0, said
    for other in ({"a.txt": b"b"}, {"b.zip": zip_of({"a.txt": b"b"})}):
        huggingface.repositories["datasets/Some/set"] = {**zips, **other}
        shutil.rmtree(tmp_path / "cache")
        code, said = imported(capsys, "hf:Some/set", tmp_path / "other")
        assert (code, "a.txt is in this repository twice" in said) == (2, True)


def test_names_of_others_move_no_cursor(
    huggingface: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;mine\x07\x9b\u202e"
    row = {"image": "1.png", "text": "This."}
    columns = ["--map", "image=image", "--map", "answer=text", "--prompt", "Read."]
    good = {"train.jsonl": json.dumps(row).encode(), "1.png": picture(1)}
    card = f"---\nconfigs: [{{config_name: a, data_files: {json.dumps({evil: '*.jsonl'})}}}]\n---"
    sets: dict[str, dict[str, bytes]] = {
        "named": {f"{evil}.bin": b"x"},
        "row": {"train.jsonl": json.dumps({**row, "image": evil}).encode()},
        "split": {**good, "README.md": card.encode()},
        "column": {**good, "train.jsonl": json.dumps({**row, evil: "a"}).encode()},
    }
    for name, files in sets.items():
        huggingface.repositories[f"datasets/Some/{name}"] = files
        said = imported(capsys, f"hf:Some/{name}:train", tmp_path / name, *columns)[1]
        assert "\\x1b" in said, name
        assert not {*evil[:1], *evil[-3:]} & set(said), name
