"""What pages take for granted: a reader's folder, and hubs with what pages name."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from docs_blocks import ROOT
from hub_servers import HuggingFace, ModelScope, serving
from hubs import parquet
from PIL import Image

from finesight.hub import TINY as OWN
from finesight.hub import locate
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.synth.tickets import draw_tickets

TINY: dict[str, TinyFamily] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "Qwen/Qwen-VL-Chat": "qwen",
}
"""Models by their names on the hubs, tiny and untrained. Qwen2-VL is finesight-tiny."""

RECIPE = """\
model: finesight-tiny
data: {train: mine/train.jsonl, eval: mine/eval.jsonl}
tune: {language: lora, lora: {rank: 8, alpha: 16}}
train: {steps: 3, batch: 4, learning_rate: 1.0e-3}
eval: {metric: qa, limit: 4, max_new_tokens: 16}
output: runs/mine
"""


ROWS = 140
"""Of a data set: more than tutorials hold out."""


def models(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of every model that a page names."""
    found = {"Qwen/Qwen2-VL-2B-Instruct": locate(OWN).path}
    for name, family in TINY.items():
        found[name] = folder / name
        found[name].parent.mkdir(parents=True, exist_ok=True)
        make_tiny(found[name], family)
    return {f"models/{name}": _files(path) for name, path in found.items()}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def data_sets() -> dict[str, dict[str, bytes]]:
    """Every data set that a page names, with drawn pictures."""
    captions = [
        {"image": _cell(n), "caption": f"a picture of {n} things", "image_id": n}
        for n in range(ROWS)
    ]
    formulas = [{"image": _cell(n), "text": rf"x ^ {{ {n} }}"} for n in range(ROWS)]
    boxes = [
        {
            "image": _cell(n),
            "question": f"Where is word {n}?",
            "answer": f"word {n}",
            "dataset_id": str(n),
            "bbox": [4.0, 6.0, 20.0, 12.0],
        }
        for n in range(ROWS)
    ]
    sets = {
        "modelscope/coco_2014_caption": captions,
        "AI-ModelScope/LaTeX_OCR": formulas,
        "jrzhang/TextVQA_GT_bbox": boxes,
        "Tina12345/textVQA_groundingtask_bbox": boxes,
    }
    return {
        f"datasets/{name}": {"data/train-00000-of-00001.parquet": parquet(rows)}
        for name, rows in sets.items()
    }


def _cell(number: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (112, 84), (number % 256, number // 256, 160)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


@contextmanager
def hubs(repositories: dict[str, dict[str, bytes]], home: Path) -> Iterator[dict[str, str]]:
    """Both hubs on this machine, and the environment of a reader who asks these."""
    with serving(HuggingFace) as first, serving(ModelScope) as second:
        first.repositories.update(repositories)
        second.repositories.update(repositories)
        shims = home / "shims"
        shims.mkdir(parents=True)
        _write_pip(shims / "pip")
        kept = {
            name: os.environ[name]
            for name in ("LANG", "PYTHONPATH", "TMPDIR")
            if name in os.environ
        }
        yield kept | {
            "HOME": str(home),
            "PATH": os.pathsep.join(
                [str(shims), str(Path(sys.executable).parent), "/usr/local/bin:/usr/bin:/bin"]
            ),
            "HF_ENDPOINT": first.url,
            "MODELSCOPE_ENDPOINT": second.url,
            "HF_HOME": str(home / "hub"),
            "MODELSCOPE_CACHE": str(home / "modelscope"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }


def _write_pip(path: Path) -> None:
    """What is installed already is not fetched again; an extra that there is not is refused."""
    path.write_text(
        f"#!{sys.executable}\n"
        "import re, sys, tomllib\n"
        f"there = tomllib.load(open({str(ROOT / 'pyproject.toml')!r}, 'rb'))['project']\n"
        "asked = re.findall(r'\\[([\\w,-]+)\\]', ' '.join(sys.argv))\n"
        "extras = {name for names in asked for name in names.split(',')}\n"
        "sys.exit(f'no extra {extras}' if extras - set(there['optional-dependencies']) else 0)\n"
    )
    path.chmod(0o755)


def reader_folder(folder: Path) -> None:
    """A table of labels with its pictures, and a recipe."""
    folder.mkdir(parents=True)
    table = draw_tickets(folder / "drawn", 24, seed=1)
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "text"])
        writer.writerows([f"drawn/{row['picture']}", row["seat"]] for row in rows)
    first = folder / "drawn" / rows[0]["picture"]
    for name in ("new.jpg", "cat.jpg", "ticket.png"):
        Image.open(first).convert("RGB").save(folder / name)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


LATER = """\
finesight data import labels.csv mine --map image=path --map answer=text \\
    --prompt "What is this?" --split 0.8
finesight train recipe.yaml
finesight train recipe.yaml output=runs/rank8
finesight train recipe.yaml output=runs/rank64 tune.lora.rank=64
finesight train recipe.yaml output=runs/latex
finesight eval finesight-tiny --data mine/eval.jsonl --metric qa --out base.jsonl
finesight merge runs/mine models/mine
"""
"""What a reader has done who looks things up."""

EMPTY: tuple[str, ...] = ("api.md", "ten-minutes.md", "tutorials/")
"""Pages that begin with nothing."""


def stage(name: str, prepared: Path, folder: Path) -> None:
    """The folder in which the page of this name is read."""
    if name.startswith(EMPTY):
        folder.mkdir(parents=True)
    elif name == "README.md":
        reader_folder(folder)
    else:
        shutil.copytree(prepared, folder)
