"""Environment of documentation tests: a working folder, and hubs with the models and datasets."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from docs_code_blocks import ROOT
from fake_hub_servers import HuggingFaceHandler, ModelScopeHandler, run_hub_server
from hub_fixtures import make_image_cell, make_parquet
from PIL import Image
from tiny_model import TinyFamily, create_tiny_model

from finesight.model_folder import TINY_MODEL as OWN
from finesight.model_folder import locate_model
from finesight.synth.tickets import write_tickets

TINY_MODELS: dict[str, TinyFamily] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "Qwen/Qwen3.5-2B": "qwen3_5",
    "Qwen/Qwen3.5-4B": "qwen3_5",
    "Qwen/Qwen-VL-Chat": "qwen",
}
"""Tiny random models by hub name. Qwen2-VL-2B is finesight-tiny."""

RECIPE = """\
model: finesight-tiny
data: {train: mine/train.jsonl, eval: mine/eval.jsonl}
tune: {language: lora, lora: {rank: 8, alpha: 16}}
train: {steps: 3, batch_size: 4, learning_rate: 1.0e-3}
eval: {metric: qa, limit: 4, max_new_tokens: 16}
output_dir: runs/mine
"""


NUM_ROWS = 140
"""Rows per dataset, more than the tutorials use for validation."""


def build_model_repositories(folder: Path) -> dict[str, dict[str, bytes]]:
    """Build the repositories of all models in the documentation."""
    found = {"Qwen/Qwen2-VL-2B-Instruct": locate_model(OWN).path}
    for name, family in TINY_MODELS.items():
        found[name] = folder / name
        found[name].parent.mkdir(parents=True, exist_ok=True)
        create_tiny_model(found[name], family)
    return {f"models/{name}": _files(path) for name, path in found.items()}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def build_dataset_repositories() -> dict[str, dict[str, bytes]]:
    """Build all datasets of the documentation with generated images."""
    images = [{"image": make_image_cell(n)} for n in range(NUM_ROWS)]
    captions = [
        image | {"caption": f"an image of {n} things", "image_id": n}
        for n, image in enumerate(images)
    ]
    formulas = [image | {"text": rf"x ^ {{ {n} }}"} for n, image in enumerate(images)]
    question = {"question": "Where is the word?", "answer": "word", "bbox": [4.0, 6.0, 20.0, 12.0]}
    boxes = [image | question | {"dataset_id": str(n)} for n, image in enumerate(images)]
    sets = {
        "modelscope/coco_2014_caption": captions,
        "AI-ModelScope/LaTeX_OCR": formulas,
        "jrzhang/TextVQA_GT_bbox": boxes,
        "Tina12345/textVQA_groundingtask_bbox": boxes,
    }
    return {
        f"datasets/{name}": {"data/train-00000-of-00001.parquet": make_parquet(rows)}
        for name, rows in sets.items()
    }


@contextmanager
def run_fake_hubs(
    repositories: dict[str, dict[str, bytes]], home: Path
) -> Iterator[dict[str, str]]:
    """Run both hubs locally. Yields the environment variables of a reader."""
    with run_hub_server(HuggingFaceHandler) as first, run_hub_server(ModelScopeHandler) as second:
        first.repositories.update(repositories)
        second.repositories.update(repositories)
        shims = home / "shims"
        shims.mkdir(parents=True)
        _write_pip(shims / "pip")
        saved_endpoints = {
            name: os.environ[name]
            for name in ("LANG", "PYTHONPATH", "TMPDIR")
            if name in os.environ
        }
        yield saved_endpoints | {
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
    """Write a fake `pip` that installs nothing and rejects unknown extras."""
    path.write_text(
        f"#!{sys.executable}\n"
        "import re, sys, tomllib\n"
        f"there = tomllib.load(open({str(ROOT / 'pyproject.toml')!r}, 'rb'))['project']\n"
        "asked = re.findall(r'\\[([\\w,-]+)\\]', ' '.join(sys.argv))\n"
        "extras = {name for names in asked for name in names.split(',')}\n"
        "sys.exit(f'no extra {extras}' if extras - set(there['optional-dependencies']) else 0)\n"
    )
    path.chmod(0o755)


def create_reader_folder(folder: Path) -> None:
    """Write a table of labels, images and a recipe."""
    folder.mkdir(parents=True)
    table = write_tickets(folder / "drawn", 24, seed=1)
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "text"])
        writer.writerows([f"drawn/{row['image']}", row["seat"]] for row in rows)
    first = folder / "drawn" / rows[0]["image"]
    for name in ("new.jpg", "cat.jpg", "ticket.png"):
        Image.open(first).convert("RGB").save(folder / name)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


PREPARED_COMMANDS = """\
finesight import labels.csv mine --map image=path --map answer=text \\
    --prompt "What is this?" --train-fraction 0.8
finesight train recipe.yaml
finesight train recipe.yaml output_dir=runs/rank8
finesight train recipe.yaml output_dir=runs/rank64 tune.lora.rank=64
finesight train recipe.yaml output_dir=runs/latex
finesight eval finesight-tiny --data mine/eval.jsonl --metric qa --out base.jsonl
finesight merge runs/mine models/mine
"""
"""Commands that a reader of reference pages has run before."""

PAGES_WITHOUT_SETUP: tuple[str, ...] = ("api.md", "quickstart-own-data.md", "tutorials/")
"""Pages that start in an empty folder."""


def prepare_page_folder(name: str, prepared: Path, folder: Path) -> None:
    """Prepare the working folder of a page."""
    if name.startswith(PAGES_WITHOUT_SETUP):
        folder.mkdir(parents=True)
    elif name == "README.md":
        create_reader_folder(folder)
    else:
        shutil.copytree(prepared, folder)
