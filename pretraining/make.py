"""Makes finesight-tiny again from nothing: pictures, tokenizer, training, measurements, folder.

    python pretraining/make.py OUT

What is in OUT already is not made again, so the same command goes on after an interruption.
Further arguments change the recipe of all runs, as in `train.steps=100`.
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
from card import MEASURING, Facts, card
from facts import MEASURED, gather
from rich.console import Console
from stages import LAST, STAGES, Stage

from finesight.config import Eval, Metric
from finesight.data.jsonl import Located, read_samples
from finesight.digests import digest
from finesight.errors import Interrupted, UserError
from finesight.evaluate.evaluate import evaluate
from finesight.hub import TINY, ModelFolder
from finesight.infer.load import load_answerer
from finesight.model.tiny import make_tiny
from finesight.model.weights import save_model
from finesight.recipe import load_recipe
from finesight.storage import make_folder, write_file, write_folder
from finesight.synth.drawn import Said
from finesight.synth.tasks import FIRST, HELD_OUT, MIXTURE, mixed
from finesight.synth.writing import DATA, write_mixture, write_task
from finesight.train.loop import train

HERE = Path(__file__).parent

PART = 5_000
"""Samples of a folder: one process draws it."""

TRAIN_SEED, EVAL_SEED = 1, 2

TEXTS = 10_000
"""Samples whose words the tokenizer learns from."""

CHAT = ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n"] * 1000
"""What stands in every conversation."""

READ_SINGLY = {"letters", "word", "find", "read_at", "spot"}
"""Kinds of questions whose answers are words of the picture without a sentence around them."""

_QUOTED = re.compile('"[^"]*"')

SHARD = 11_900_000
"""Bytes of the tensors in a file of weights, at most: with its header no file reaches 12 MB."""

METRICS: dict[str, Metric] = {
    "words": "ocr",
    "words in unseen fonts": "ocr",
    "word boxes": "grounding",
    "word boxes in unseen fonts": "grounding",
    "word boxes among clutter": "grounding",
    "formulas": "latex",
    "captions": f"{os.path.relpath(HERE / 'metric.py')}:caption",
    "shape boxes": "detection",
    "counts": "qa",
    "receipts": "json",
    "chinese": "ocr",
}
"""How each held-out set of HELD_OUT is measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("changes", nargs="*", metavar="group.setting=value")
    default = Size()
    parser.add_argument("--pictures", type=int, nargs=len(STAGES), default=default.pictures)
    parser.add_argument("--held-out", type=int, default=default.held_out)
    asked = parser.parse_intermixed_args(arguments)
    size = Size(tuple(asked.pictures), asked.held_out)
    try:
        make(asked.out, size, asked.changes, Console())
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return 75
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def make(out: Path, size: Size, changes: Sequence[str], console: Console) -> None:
    """All stages, each only where its result is not there yet.

    Raises UserError when `out` holds the making of another size.
    """
    _claim(out, size)
    clock = Clock(out / "seconds.json")
    with closing(Drawing(out / "data", size)) as drawing:
        model = out / "random"
        with clock.of("tokenizer"):
            make_random(model, size)
        for stage, pictures in zip(STAGES, size.pictures, strict=True):
            with clock.of(f"{stage.name} pictures"):
                data = drawing.of(stage, pictures)
            with clock.of(stage.name):
                teach(stage, model, data, out / stage.name, changes, console)
            model = out / stage.name / "model"
        drawing.measured()
    if not (out / MEASURED).exists():
        with clock.of(MEASURING):
            measure(out, console)
    pack(out, size)


def _claim(out: Path, size: Size) -> None:
    """Note the size before anything is made: parts of another size must not be mixed in."""
    note, content = out / "size.json", json.dumps(asdict(size)).encode()
    if note.exists() and note.read_bytes() != content:
        raise UserError(
            f"holds a making of the size {note.read_text()}",
            where=str(out),
            expected=f"an empty folder, or a making of {content.decode()}",
            remedy="give the same numbers again, or another folder",
        )
    make_folder(out)
    write_file(note, content)


@dataclass(frozen=True)
class Size:
    """Pictures of each run, and samples of each kind that is measured."""

    pictures: tuple[int, ...] = tuple(stage.pictures for stage in STAGES)
    held_out: int = 1_200


class Clock:
    """Seconds of each stage, added up over interruptions, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            spent = self.seconds.get(stage, 0.0) + time.monotonic() - start
            self.seconds[stage] = round(spent, 1)
            write_file(self._file, json.dumps(self.seconds).encode())


Parts = tuple[Future[Path], dict[int, Future[Path]]]


class Drawing:
    """The pictures, drawn by other processes while this one goes on: first those of the first run,
    then the held-out ones, then those of the mixture. A part that is there is not drawn again."""

    def __init__(self, folder: Path, size: Size) -> None:
        self._folder = folder
        self._pool = ProcessPoolExecutor(os.cpu_count(), initializer=_as_helper)
        self._held_out = range(size.held_out)
        first, *further = size.pictures
        self._first = self._drawn("first", FIRST, [first])
        self._measured = [
            self._pool.submit(_draw_held_out, folder, name, size.held_out) for name in HELD_OUT
        ]
        self._mixture = self._drawn("mixture", MIXTURE, further)

    def of(self, stage: Stage, pictures: int) -> list[Path]:
        """The data files of so many pictures, once they are there: held-out samples, then parts."""
        held_out, parts = self._first if stage.mixture is FIRST else self._mixture
        drawn = (part for stop, part in parts.items() if stop <= pictures)
        return [future.result() for future in (held_out, *drawn)]

    def measured(self) -> None:
        """Wait for what the model is measured with."""
        for future in self._measured:
            future.result()

    def close(self) -> None:
        """Draw no more."""
        self._pool.shutdown(cancel_futures=True)

    def _drawn(self, name: str, mixture: Mapping[str, float], pictures: Sequence[int]) -> Parts:
        """The held-out samples and the parts, by the number of pictures that end with each: every
        number of `pictures` ends one."""
        job = (self._folder / f"{name}-held-out", mixture, self._held_out, EVAL_SEED)
        held_out, parts = self._pool.submit(_draw, *job), dict[int, Future[Path]]()
        ends = sorted({*range(PART, max(pictures), PART), *pictures})
        for start, stop in pairwise([0, *ends]):
            part = self._folder / f"{name}-{start:07}"
            parts[stop] = self._pool.submit(_draw, part, mixture, range(start, stop), TRAIN_SEED)
        return held_out, parts


def _as_helper() -> None:
    # What trains beside goes first.
    os.nice(10)
    # Pictures leave no cycles behind, and looking for some takes a tenth of the time.
    gc.freeze()
    gc.disable()


def _draw(target: Path, mixture: Mapping[str, float], numbers: range, seed: int) -> Path:
    return target / DATA if target.exists() else write_mixture(target, mixture, seed, numbers)


def _draw_held_out(folder: Path, name: str, samples: int) -> None:
    target, what = _held_out(folder, name), HELD_OUT[name]
    if not target.exists():
        write_task(target, what.task, samples, EVAL_SEED, what.kind)


def _held_out(folder: Path, name: str) -> Path:
    return folder / "held-out" / name.replace(" ", "-")


def make_random(target: Path, size: Size) -> None:
    """A model that knows nothing, with a tokenizer made from what the mixture says."""
    if not target.exists():
        most = size.pictures[-1]
        numbers = range(0, most, max(1, most // TEXTS))
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            said = [text for texts in pool.map(_texts, numbers, chunksize=50) for text in texts]
        make_tiny(target, "qwen2_vl", size="finesight-tiny", text=[*CHAT, *said])


def _texts(number: int) -> list[str]:
    """What is asked and said about a sample, boxes with any numbers, but not the words that are
    read from its picture one by one: those are to be spelled."""
    drawn = mixed(MIXTURE, TRAIN_SEED, number)
    said = [(drawn.question, drawn.answer, drawn.kind), *drawn.further]
    return [
        _QUOTED.sub('""', _plain(part))
        for question, answer, kind in said
        for part in (question, () if kind in READ_SINGLY else answer)
    ]


def _plain(said: Iterable[Said]) -> str:
    return "".join(
        piece if isinstance(piece, str) else f"{piece.label or ''}(1,2),(3,4)" for piece in said
    )


def teach(
    stage: Stage,
    model: Path,
    data: Sequence[Path],
    output: Path,
    changes: Sequence[str],
    console: Console,
) -> None:
    """A run, as `finesight train` does it; `data`: the held-out file, then those to learn from."""
    held_out, *train_on = map(str, data)
    settings = [
        f"model={model}",
        f"train.steps={stage.steps}",
        f"train.schedule={stage.schedule}",
        f"data.train={json.dumps(train_on)}",
        f"data.eval={held_out}",
        f"output={output}",
    ]
    train(load_recipe(HERE / "recipe.yaml", [*settings, *changes]), resume=True, console=console)


def measure(out: Path, console: Console) -> None:
    """Answers to every held-out set: figures in `measured.json`, answers in `answers/`."""
    answerer = load_answerer(str(out / LAST))
    figures: dict[str, Any] = {}
    for name in HELD_OUT:
        file = _held_out(out / "data", name) / DATA
        samples = [Located(sample, file.parent) for sample in read_samples(file)]
        settings = Eval(metric=METRICS[name], max_new_tokens=160, batch=500)
        answers = out / "answers" / f"{name.replace(' ', '-')}.jsonl"
        done = evaluate(answerer.model, answerer.renderer, samples, settings, answers)
        figures[name] = done.as_json()
        console.print(f"{name}\n{done.as_table()}\n", markup=False, highlight=False)
    write_file(out / MEASURED, (json.dumps(figures, indent=1) + "\n").encode())


def pack(out: Path, size: Size) -> None:
    """`finesight-tiny`: the folder that the package carries."""
    target = out / TINY
    if target.exists():
        return
    facts = gather(out, size.pictures)
    write_file(out / "facts.json", (json.dumps(facts, indent=1) + "\n").encode())
    model = load_answerer(str(out / LAST), "cpu", "fp32").model
    with write_folder(target) as folder:
        save_model(model, ModelFolder(out / "random"), folder, torch.bfloat16, SHARD)
        _tell_apart(folder)
        (folder / "README.md").write_text(card(Facts.model_validate(facts)), encoding="utf-8")


def _tell_apart(folder: Path) -> None:
    """Name the weights' digests in their index, which counts for the fingerprint of a model: else
    another making of the same shapes would pass for this one."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    digests = {path.name: digest(path) for path in sorted(folder.glob("*.safetensors"))}
    content["metadata"]["sha256"] = digests
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
