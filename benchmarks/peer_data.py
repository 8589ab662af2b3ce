"""What the contestants of `peers.py` learn from, and the model that learns."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from finesight.config import DataFile, ExactSize, Lora, Tune
from finesight.data.jsonl import write_samples
from finesight.data.sources import load_sources
from finesight.encode.rendering import renderer_of
from finesight.hub import locate
from finesight.infer.load import resolve_device
from finesight.model.geometry import Settings
from finesight.model.network import build
from finesight.model.parts import apply_tuning
from finesight.model.weights import random_model, save_model
from finesight.synth.tasks import HELD_OUT, of_kind
from finesight.train.course import InOrder
from finesight.train.flops import Arithmetic, measured_peak
from finesight.train.loader import StepData

SAMPLES = 496
PHOTO = 640, 480
PROMPT = "Describe the picture."
TOGETHER = 16


@dataclass(frozen=True)
class Counted:
    """What a sample is, in the mean: tokens, of them learned, patches, operations of a training
    step, of them for attention; the longest in tokens, and the operations a second that a large
    product reaches here."""

    samples: int
    tokens: float
    learned: float
    patches: float
    longest: int
    operations: float
    attention: float
    peak: float


def draw(target: Path) -> Path:
    """Drawn scenes with their captions, as JPEG of a photograph's size: what one costs to open."""
    table = target / "data.jsonl"
    if table.exists():
        return table
    (target / "pictures").mkdir(parents=True)
    scenes = HELD_OUT["captions"]
    samples = []
    for number, drawn in islice(of_kind(scenes.task, 11, scenes.kind), SAMPLES):
        picture = f"pictures/{number:06}.jpg"
        drawn.picture.convert("RGB").resize(PHOTO).save(target / picture, quality=90)
        samples.append(drawn.as_sample(f"scene-{number}", picture))
    write_samples(table, samples)
    return table


def resized(data: Path, target: Path, side: int) -> Path:
    """The samples for everybody else: pictures brought to side x side pixels, and a table with
    `messages` and `images` a line, as most peers read it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    lines = []
    for number, located in enumerate(load_sources((DataFile(path=data),)).read()):
        asked, answered = located.sample.messages
        pictures = [part.image for part in asked.content if part.type == "image"]
        texts = [
            "".join(p.text for p in turn.content if p.type == "text") for turn in (asked, answered)
        ]
        if len(pictures) != 1:
            raise SystemExit(f"{data}, sample {number}: {len(pictures)} pictures, expected one")
        place = (target / f"{number:06}.png").resolve()
        with Image.open(located.folder / pictures[0]) as picture:
            picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(place)
        turns = [
            {"role": "user", "content": f"<image>{texts[0]}"},
            {"role": "assistant", "content": texts[1]},
        ]
        lines.append(json.dumps({"messages": turns, "images": [str(place)]}, ensure_ascii=False))
    table = target / "samples.jsonl"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def random_weights(config: Path, target: Path) -> Path:
    """The folder itself where it has weights, or one with random ones in bf16."""
    if list(config.glob("*.safetensors")) or target.exists():
        return config if list(config.glob("*.safetensors")) else target
    folder = locate(str(config))
    making = target.with_name(f".{target.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    model = random_model(folder.config, 0, torch.bfloat16, resolve_device("auto"))
    save_model(model, folder, making, torch.bfloat16)
    return making.rename(target)


def count(config: Path, data: Path, side: int, lora: Lora) -> Counted:
    """Count tokens and operations of the samples, without a weight, and measure the peak."""
    folder = locate(str(config))
    corpus = load_sources((DataFile(path=data),))
    model = build(
        Settings(folder.config),
        Settings(folder.preprocessor, "preprocessor_config.json"),
        torch.bfloat16,
        torch.device("meta"),
    )
    apply_tuning(model, Tune(lora=lora), seed=0)
    arithmetic = Arithmetic(model)
    members = InOrder(tuple(range(len(corpus))), TOGETHER)
    renderer = renderer_of(folder, ExactSize(height=side, width=side), None)
    steps = StepData(corpus, renderer, members, pack_tokens=65536, unusable="refuse")
    batches = [batch for number in range(len(members)) for batch in steps.step(number).packs]
    # Others compute all tokens of a sample; operations are those that are needed.
    lengths = [renderer.outline(located).tokens for located in corpus.read()]
    patches = sum(t * h * w for batch in batches for t, h, w in batch.grids)
    device = resolve_device("auto")
    peak = measured_peak(device, torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Counted(
        samples=len(lengths),
        tokens=sum(lengths) / len(lengths),
        learned=sum(batch.supervised for batch in batches) / len(lengths),
        patches=patches / len(lengths),
        longest=max(lengths),
        operations=sum(map(arithmetic.of, batches)) / len(lengths),
        attention=sum(arithmetic.attention(b.lengths, b.grids) for b in batches) / len(lengths),
        peak=peak,
    )
