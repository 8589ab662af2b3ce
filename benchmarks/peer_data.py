"""Prepare data and model for `peer_comparison.py`."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

import torch
from PIL import Image
from random_model import init_random_model

from finesight.encode.renderer_builder import build_renderer
from finesight.infer.model_loader import resolve_device
from finesight.model.config import ConfigReader
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import build_model
from finesight.model.weights_io import save_model
from finesight.model_folder import ModelFolder, locate_model
from finesight.samples.corpus import load_corpus
from finesight.samples.sample import write_samples
from finesight.settings.config import ExactSize, LoraSettings, TrainFileSettings, TuneSettings
from finesight.train.flops import FlopCounter, measure_peak_flops
from finesight.train.sampler import SequentialSampler
from finesight.train.step_dataset import StepDataset

SAMPLES = 496
PHOTO_SIZE = 640, 480
PROMPT = "Describe the image."
COUNT_BATCH_SIZE = 16


@dataclass(frozen=True)
class SampleCosts:
    """Mean cost of a sample: tokens, supervised tokens, patches, training FLOPs and attention
    FLOPs. Also the longest sample in tokens and the peak FLOP/s of a large matrix product."""

    num_samples: int
    num_tokens: float
    num_supervised_tokens: float
    num_patches: float
    max_tokens: int
    flops: float
    attention_flops: float
    peak_flops: float


def write_caption_dataset(output_dir: Path) -> Path:
    """Generate captioned scenes as JPEGs of the size of a photograph."""
    table = output_dir / "data.jsonl"
    if table.exists():
        return table
    (output_dir / "images").mkdir(parents=True)
    from synthetic_tasks.tasks import EVAL_TASKS, iter_samples_of_kind

    scenes = EVAL_TASKS["captions"]
    samples = []
    for number, drawn in islice(iter_samples_of_kind(scenes.task, 11, scenes.task_kind), SAMPLES):
        image = f"images/{number:06}.jpg"
        drawn.image.convert("RGB").resize(PHOTO_SIZE).save(output_dir / image, quality=90)
        samples.append(drawn.to_sample(f"scene-{number}", image))
    write_samples(table, samples)
    return table


def write_resized_dataset(data: Path, output_dir: Path, image_side: int) -> Path:
    """Write the samples of peers: images resized to `image_side`, with `messages` and `images` per
    line."""
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    lines = []
    for number, located_sample in enumerate(
        load_corpus((TrainFileSettings(path=data),)).read_samples()
    ):
        question, answer = located_sample.sample.messages
        images = [part.image for part in question.content if part.type == "image"]
        texts = [
            "".join(p.text for p in turn.content if p.type == "text") for turn in (question, answer)
        ]
        if len(images) != 1:
            raise SystemExit(f"{data}, sample {number}: {len(images)} images, expected one")
        image_path = (output_dir / f"{number:06}.png").resolve()
        with Image.open(located_sample.folder / images[0]) as image:
            image.convert("RGB").resize((image_side, image_side), Image.Resampling.BICUBIC).save(
                image_path
            )
        turns = [
            {"role": "user", "content": f"<image>{texts[0]}"},
            {"role": "assistant", "content": texts[1]},
        ]
        lines.append(
            json.dumps({"messages": turns, "images": [str(image_path)]}, ensure_ascii=False)
        )
    table = output_dir / "samples.jsonl"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def ensure_weights(config: Path, output_dir: Path) -> Path:
    """Return a model folder with weights: `config`, or random bf16 weights in `output_dir`."""
    if list(config.glob("*.safetensors")) or output_dir.exists():
        return config if list(config.glob("*.safetensors")) else output_dir
    making = output_dir.with_name(f".{output_dir.name}")
    shutil.rmtree(making, ignore_errors=True)
    # A new model has its configuration in the folder to which its weights are written.
    source = locate_model(str(config)).path
    shutil.copytree(source, making, ignore=shutil.ignore_patterns("sha256.json"))
    folder = ModelFolder(making)
    model = init_random_model(folder.config, 0, torch.bfloat16, resolve_device("auto"))
    save_model(model, folder, making, torch.bfloat16)
    return making.rename(output_dir)


def measure_sample_costs(
    config: Path, data: Path, image_side: int, lora: LoraSettings
) -> SampleCosts:
    """Count tokens and FLOPs of the samples without weights, and measure the peak FLOP/s."""
    folder = locate_model(str(config))
    corpus = load_corpus((TrainFileSettings(path=data),))
    model = build_model(
        ConfigReader(folder.config),
        ConfigReader(folder.preprocessor_config, "preprocessor_config.json"),
        torch.bfloat16,
        torch.device("meta"),
    )
    configure_tuning(model, TuneSettings(lora=lora), seed=0)
    arithmetic = FlopCounter(model)
    members = SequentialSampler(tuple(range(len(corpus))), COUNT_BATCH_SIZE)
    renderer = build_renderer(folder, ExactSize(height=image_side, width=image_side), None)
    steps = StepDataset(corpus, renderer, members, pack_tokens=65536, on_invalid_sample="fail")
    batches = [batch for number in range(len(members)) for batch in steps.get_step(number).packs]
    # Peers compute all tokens of a sample; FLOPs count the required operations.
    lengths = [
        renderer.tokenize(located_sample).num_tokens for located_sample in corpus.read_samples()
    ]
    patches = sum(t * h * w for batch in batches for t, h, w in batch.grid_thw)
    device = resolve_device("auto")
    peak = measure_peak_flops(device, torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return SampleCosts(
        num_samples=len(lengths),
        num_tokens=sum(lengths) / len(lengths),
        num_supervised_tokens=sum(batch.num_supervised_tokens for batch in batches) / len(lengths),
        num_patches=patches / len(lengths),
        max_tokens=max(lengths),
        flops=sum(map(arithmetic.count, batches)) / len(lengths),
        attention_flops=sum(sum(arithmetic.count_attention(b.lengths, b.grid_thw)) for b in batches)
        / len(lengths),
        peak_flops=peak,
    )
