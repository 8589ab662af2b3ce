"""Prepare the tasks of `time_to_quality.py` with the same texts and images for all trainers."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

from build_small_model import FORMULA_PROMPT
from PIL import Image
from synthetic_tasks.formula_recombination import MAX_PIXELS, TOKEN_SIDE, fit_formula_image
from tokenizers import Tokenizer

from finesight.encode.renderer_builder import build_renderer
from finesight.model_folder import TINY_MODEL, locate_model
from finesight.samples.corpus import load_corpus
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    Message,
    Sample,
    TextPart,
    list_media_paths,
    write_samples,
)
from finesight.settings.config import DataFileSettings

NUM_EVAL_SAMPLES = 100


def write_formulas(source: Path, output_dir: Path, limit: int | None) -> list[Sample]:
    """Write the formulas with images that no trainer resizes."""
    samples = list[Sample]()
    for row in read_rows(source / "latex_ocr.jsonl")[-(limit or 0) :]:
        path = output_dir / f"{row['id']}.png"
        with Image.open(source / row["image"]) as image:
            fit_formula_image(image).convert("RGB").save(path)
        samples.append(make_sample(row["id"], path, FORMULA_PROMPT, TextPart(text=row["latex"])))
    return samples


def write_grounding(source: Path, output_dir: Path, limit: int | None) -> list[Sample]:
    """Write the boxes with images that no trainer resizes."""
    samples = list[Sample]()
    rows = read_rows(source / "grounding.jsonl")
    # A random order that mixes the sources.
    for row in sorted(rows, key=lambda row: zlib.crc32(row["image"].encode())):
        path = output_dir / f"{Path(row['image']).stem}.png"
        with Image.open(source / row["image"]) as image:
            factor = (MAX_PIXELS / (image.width * image.height)) ** 0.5
            size = [max(1, int(s * factor / TOKEN_SIDE)) * TOKEN_SIDE for s in image.size]
            if not path.exists():
                image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC).save(path)
            scales = [new / old for new, old in zip(size, image.size, strict=True)] * 2
        box = tuple(round(c * s, 2) for c, s in zip(row["bbox_xyxy"], scales, strict=True))
        part = BoxPart(label=row["answer"], xyxy=(box[0], box[1], box[2], box[3]))
        samples.append(make_sample(row["id"], path, row["question"], part))
    return samples[-(limit or 0) :]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_sample(name: str, image: Path, question: str, answer: TextPart | BoxPart) -> Sample:
    user = Message(role="user", content=(ImagePart(image=image.name), TextPart(text=question)))
    return Sample(id=name, messages=(user, Message(role="assistant", content=(answer,))))


def write_tuning_task(task: str, source: Path, output_dir: Path, limit: int | None) -> None:
    """Write `train.jsonl`, `eval.jsonl`, and `peers.jsonl` with the same texts and images."""
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    write = write_formulas if task == "formulas" else write_grounding
    samples = write(source, output_dir, limit)
    num_eval = min(NUM_EVAL_SAMPLES, len(samples) // 4)
    images = [list_media_paths(sample.messages[0].content[0]) for sample in samples]
    while images[-num_eval] == images[-num_eval - 1]:
        num_eval += 1
    write_samples(output_dir / "train.jsonl", samples[:-num_eval])
    write_samples(output_dir / "eval.jsonl", samples[-num_eval:])
    folder = locate_model(TINY_MODEL)
    renderer = build_renderer(folder)
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    lines = []
    for located in load_corpus([DataFileSettings(path=output_dir / "train.jsonl")]).read_samples():
        tokenized = renderer.tokenize(located)
        answer = tokenizer.decode(
            tokenized.ids_T[tokenized.loss_mask_T].tolist(), skip_special_tokens=False
        ).partition("<|im_end|>")[0]
        image, question = located.sample.messages[0].content
        assert isinstance(image, ImagePart)
        assert isinstance(question, TextPart)
        turns = [
            {"role": "user", "content": f"<image>{question.text}"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": turns, "images": [str(output_dir / image.image)]}))
    (output_dir / "peers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
