"""Train finesight-tiny from scratch: images, tokenizer, training, evaluation, model folder.

    python pretraining/build_tiny_model.py OUT

Existing results in OUT are reused, so the command resumes after an interruption. Further arguments
override recipe settings of all stages, for example `train.steps=100`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from card_facts import EVAL_RESULTS_FILE, collect_facts
from model_card import EVAL_STAGE, ModelCardFacts, render_card
from rich.console import Console
from synthetic_tasks.dataset_writer import DATA_FILE, write_mixture, write_task
from synthetic_tasks.synthetic_sample import ContentPart
from synthetic_tasks.tasks import EVAL_TASKS, MAIN_MIXTURE, WARMUP_MIXTURE, generate_mixture_sample
from tiny_model import create_tiny_model
from train_stages import LAST_STAGE, TRAIN_STAGES, TrainStage

from finesight.errors import TrainingInterrupted, UserError
from finesight.evaluate.generation_eval import evaluate
from finesight.files.storage import make_folder, sha256_file, write_file, write_folder
from finesight.infer.model_loader import load_inference_model
from finesight.model.weights_io import save_model
from finesight.model_folder import TINY_MODEL, ModelFolder
from finesight.samples.sample import LocatedSample, read_samples
from finesight.settings.config import EvalSettings, MetricSpec
from finesight.settings.recipe import load_recipe
from finesight.train.training_run import train

PRETRAINING_DIR = Path(__file__).parent

SAMPLES_PER_PART = 5_000
"""Samples per folder. One process generates a folder."""

TRAIN_SEED, EVAL_SEED = 1, 2

NUM_TOKENIZER_SAMPLES = 10_000
"""Number of samples for tokenizer training."""

CHAT_TEMPLATE_TEXTS = ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n"] * 1000
"""Texts of the chat template that occur in every conversation."""

SINGLE_WORD_TASKS = {"letters", "word", "find", "read_at", "spot"}
"""Tasks whose answers are words of the image, without a sentence."""

_QUOTED = re.compile('"[^"]*"')

MAX_SHARD_BYTES = 11_900_000
"""Maximum bytes of tensors per weight file. With its header, no file reaches 12 MB."""

EVAL_METRICS: dict[str, MetricSpec] = {
    "words": "ocr",
    "words in unseen fonts": "ocr",
    "word boxes": "grounding",
    "word boxes in unseen fonts": "grounding",
    "word boxes among clutter": "grounding",
    "formulas": "latex",
    "captions": f"{os.path.relpath(PRETRAINING_DIR / 'caption_metric.py')}:caption",
    "shape boxes": "detection",
    "counts": "qa",
    "receipts": "json",
    "chinese": "ocr",
}
"""Metric of each evaluation set in EVAL_TASKS."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="group.setting=value")
    default = DataSize()
    parser.add_argument(
        "--num-images", type=int, nargs=len(TRAIN_STAGES), default=default.num_images
    )
    parser.add_argument("--num-eval-samples", type=int, default=default.num_eval_samples)
    args = parser.parse_intermixed_args(argv)
    size = DataSize(tuple(args.num_images), args.num_eval_samples)
    try:
        build_model(args.out, size, args.overrides, Console())
    except TrainingInterrupted as interrupt:
        print(interrupt, file=sys.stderr)
        return 75
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def build_model(
    output_dir: Path, data_size: DataSize, overrides: Sequence[str], console: Console
) -> None:
    """Run all stages whose results do not exist yet.

    Raises:
        UserError: `output_dir` belongs to a build of another size.
    """
    _write_size(output_dir, data_size)
    clock = StageTimer(output_dir / "seconds.json")
    with closing(ImageDrawer(output_dir / "data", data_size)) as drawing:
        model = output_dir / "random"
        with clock.measure("tokenizer"):
            make_random_model(model, data_size)
        for stage, num_images in zip(TRAIN_STAGES, data_size.num_images, strict=True):
            with clock.measure(f"{stage.name} images"):
                data = drawing.wait_for_stage(stage, num_images)
            with clock.measure(stage.name):
                train_stage(stage, model, data, output_dir / stage.name, overrides, console)
            model = output_dir / stage.name / "model"
        drawing.wait_for_eval_sets()
    if not (output_dir / EVAL_RESULTS_FILE).exists():
        with clock.measure(EVAL_STAGE):
            evaluate_model(output_dir, console)
    write_model_folder(output_dir, data_size)


def _write_size(output_dir: Path, size: DataSize) -> None:
    """Write the data size first, so that builds of different sizes are not mixed."""
    note, content = output_dir / "size.json", json.dumps(asdict(size)).encode()
    if note.exists() and note.read_bytes() != content:
        raise UserError(
            f"contains a build of the size {note.read_text()}",
            where=str(output_dir),
            expected=f"an empty folder, or a build of {content.decode()}",
            remedy="use the same sizes, or another folder",
        )
    make_folder(output_dir)
    write_file(note, content)


@dataclass(frozen=True)
class DataSize:
    """Number of images per stage and of samples per evaluation set."""

    num_images: tuple[int, ...] = tuple(stage.num_images for stage in TRAIN_STAGES)
    num_eval_samples: int = 1_200


class StageTimer:
    """Accumulates the seconds of each stage in a file, across interruptions."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            spent = self.seconds.get(stage, 0.0) + time.monotonic() - start
            self.seconds[stage] = round(spent, 1)
            write_file(self._file, json.dumps(self.seconds).encode())


PartFutures = tuple[Future[Path], dict[int, Future[Path]]]


class ImageDrawer:
    """Generates images in background processes during training.

    Order: images of the first stage, evaluation sets, images of the mixture. Existing parts are
    reused.
    """

    def __init__(self, folder: Path, size: DataSize) -> None:
        self._folder = folder
        self._pool = ProcessPoolExecutor(os.cpu_count(), initializer=_init_worker)
        self._eval_range = range(size.num_eval_samples)
        first, *further = size.num_images
        self._first = self._submit_parts("first", WARMUP_MIXTURE, [first])
        self._measured = [
            self._pool.submit(_draw_eval_set, folder, name, size.num_eval_samples)
            for name in EVAL_TASKS
        ]
        self._mixture = self._submit_parts("mixture", MAIN_MIXTURE, further)

    def wait_for_stage(self, stage: TrainStage, num_images: int) -> list[Path]:
        """Wait for the data files of a stage: validation samples first, then training parts."""
        validation, parts = self._first if stage.mixture is WARMUP_MIXTURE else self._mixture
        drawn = (part for stop, part in parts.items() if stop <= num_images)
        return [future.result() for future in (validation, *drawn)]

    def wait_for_eval_sets(self) -> None:
        """Wait for the evaluation sets."""
        for future in self._measured:
            future.result()

    def close(self) -> None:
        """Stop generating images."""
        self._pool.shutdown(cancel_futures=True)

    def _submit_parts(
        self, name: str, mixture: Mapping[str, float], image_counts: Sequence[int]
    ) -> PartFutures:
        """Submit the validation samples and the training parts.

        Returns the parts by the cumulative number of images. Every count of `image_counts` ends a
        part.
        """
        job = (self._folder / f"{name}-validation", mixture, self._eval_range, EVAL_SEED)
        validation, parts = self._pool.submit(_draw_part, *job), dict[int, Future[Path]]()
        ends = sorted(
            {*range(SAMPLES_PER_PART, max(image_counts), SAMPLES_PER_PART), *image_counts}
        )
        for start, stop in pairwise([0, *ends]):
            part = self._folder / f"{name}-{start:07}"
            parts[stop] = self._pool.submit(
                _draw_part, part, mixture, range(start, stop), TRAIN_SEED
            )
        return validation, parts


def _init_worker() -> None:
    # Training has priority.
    os.nice(10)
    # Image generation creates no reference cycles; garbage collection takes a tenth of the time.
    gc.freeze()
    gc.disable()


def _draw_part(output_dir: Path, mixture: Mapping[str, float], indices: range, seed: int) -> Path:
    return (
        output_dir / DATA_FILE
        if output_dir.exists()
        else write_mixture(output_dir, mixture, seed, indices)
    )


def _draw_eval_set(folder: Path, name: str, samples: int) -> None:
    target, what = _eval_set_dir(folder, name), EVAL_TASKS[name]
    if not target.exists():
        write_task(target, what.task, samples, EVAL_SEED, what.task_kind)


def _eval_set_dir(folder: Path, name: str) -> Path:
    return folder / "validation" / name.replace(" ", "-")


def make_random_model(output_dir: Path, size: DataSize) -> None:
    """Create a model with random weights and a tokenizer of the mixture."""
    if not output_dir.exists():
        most = size.num_images[-1]
        indices = range(0, most, max(1, most // NUM_TOKENIZER_SAMPLES))
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            texts = [
                text
                for texts in pool.map(_tokenizer_texts, indices, chunksize=50)
                for text in texts
            ]
        create_tiny_model(
            output_dir, "qwen2_vl", preset="finesight-tiny", corpus=[*CHAT_TEMPLATE_TEXTS, *texts]
        )


def _tokenizer_texts(index: int) -> list[str]:
    """Return questions and answers of a sample for tokenizer training.

    Box coordinates are replaced. Answers that read single words are excluded, so that the model
    learns to spell them.
    """
    drawn = generate_mixture_sample(MAIN_MIXTURE, TRAIN_SEED, index)
    turns = [(drawn.question, drawn.answer, drawn.task_kind), *drawn.extra_turns]
    return [
        _QUOTED.sub('""', _to_text(part))
        for question, answer, kind in turns
        for part in (question, () if kind in SINGLE_WORD_TASKS else answer)
    ]


def _to_text(parts: Iterable[ContentPart]) -> str:
    return "".join(
        piece if isinstance(piece, str) else f"{piece.label or ''}(1,2),(3,4)" for piece in parts
    )


def train_stage(
    stage: TrainStage,
    model: Path,
    data: Sequence[Path],
    run_dir: Path,
    overrides: Sequence[str],
    console: Console,
) -> None:
    """Train one stage. `data` holds the validation file, then the training files."""
    validation, *train_on = map(str, data)
    settings = [
        f"model={model}",
        f"train.steps={stage.num_steps}",
        f"train.lr_schedule={stage.lr_schedule}",
        f"data.train={json.dumps(train_on)}",
        f"data.eval={validation}",
        f"output_dir={run_dir}",
    ]
    train(
        load_recipe(PRETRAINING_DIR / "recipe.yaml", [*settings, *overrides]),
        resume=True,
        console=console,
    )


def evaluate_model(output_dir: Path, console: Console) -> None:
    """Evaluate all evaluation sets; write `eval_results.json` and `answers/`."""
    inference_model = load_inference_model(str(output_dir / LAST_STAGE))
    results: dict[str, Any] = {}
    for name in EVAL_TASKS:
        file = _eval_set_dir(output_dir / "data", name) / DATA_FILE
        samples = [LocatedSample(sample, file.parent) for sample in read_samples(file)]
        settings = EvalSettings(metric=EVAL_METRICS[name], max_new_tokens=160)
        answers_file = output_dir / "answers" / f"{name.replace(' ', '-')}.jsonl"
        result = evaluate(
            inference_model.model, inference_model.renderer, samples, settings, answers_file
        )
        results[name] = result.as_json()
        console.print(f"{name}\n{result.as_table()}\n", markup=False, highlight=False)
    write_file(output_dir / EVAL_RESULTS_FILE, (json.dumps(results, indent=1) + "\n").encode())


def write_model_folder(output_dir: Path, size: DataSize) -> None:
    """Write the model folder `finesight-tiny` of the package."""
    target = output_dir / TINY_MODEL
    if target.exists():
        return
    facts = collect_facts(output_dir, size.num_images)
    write_file(output_dir / "facts.json", (json.dumps(facts, indent=1) + "\n").encode())
    model = load_inference_model(str(output_dir / LAST_STAGE), "cpu", "fp32").model
    with write_folder(target) as folder:
        save_model(
            model, ModelFolder(output_dir / "random"), folder, torch.bfloat16, MAX_SHARD_BYTES
        )
        _write_weight_digests(folder)
        (folder / "README.md").write_text(
            render_card(ModelCardFacts.model_validate(facts)), encoding="utf-8"
        )


def _write_weight_digests(folder: Path) -> None:
    """Write the digests of the weight files into their index.

    The index is part of the model fingerprint, which would otherwise not depend on the weights.
    """
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    digests = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
    content["metadata"]["sha256"] = digests
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
