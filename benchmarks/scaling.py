"""How much more several GPUs of one machine learn than one, and that they learn the same.

    python benchmarks/scaling.py CONFIGS --work DIR --out FILE [--gpus 1,2,4] [--only "NAME;..."]

CONFIGS holds folders of configuration and tokenizer files of Qwen2-VL-2B-Instruct,
Qwen2.5-VL-3B-Instruct and Qwen2.5-VL-7B-Instruct; weights are drawn at random and deleted after
their runs. Every run is a real `torchrun -m finesight train` of drawn scenes, with the pictures
looked at in every step; it is ended after its steps, since the checkpoint of billions of numbers
takes longer than they do. A run on as many GPUs learns as many times the samples a step; `linear`
is its samples a second over those of as many single GPUs. Cases named `same` learn the same samples
on any number of GPUs: their losses are compared. `gb` is the most that the first GPU had
allocated, in 10^9 bytes. Cases of `Trainer` are those of transformers' Trainer, started by the same
launcher: pictures are brought to their size beforehand, batches are padded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contestants.job import FIGURES, Job, as_argument
from one_card import ALL, LORA, SEVEN, THREE, TWO
from peer_data import draw, random_weights, resized
from peer_figures import WARM, head, rate
from stopwatch import watch

from finesight.config import DataFile
from finesight.data.jsonl import Located
from finesight.data.sources import load_sources

HERE = Path(__file__).resolve().parent
LIMIT_S, GRACE_S = 240.0, 120.0


@dataclass(frozen=True)
class Case:
    """Runs with so many samples a step on each GPU, or on `all_of_them` together: of a picture, or
    of a video of so many frames."""

    name: str
    model: str
    side: int
    batch: int
    settings: tuple[str, ...]
    all_of_them: bool = False
    fewest: int = 1
    trainer: Mapping[str, Any] | None = None
    frames: int = 0


# The quickest that it was found with (peers.py); all parameters are fp32, in bf16 where computed.
_LORA = {"attention": "sdpa", "adapters": "bf16", "liger": True, "compiled": False}
_ALL = {"attention": "sdpa", "adapters": "fp32", "liger": True, "compiled": False, "learns": "all"}
LONG = "train.recompute=true", "data.max_length=140000"
FSDP, ZERO2 = "train.parallel=fsdp", "train.parallel=zero2"
CASES = (
    Case("2B LoRA", TWO, 280, 64, (LORA,)),
    Case("7B full, fsdp", SEVEN, 280, 16, (*ALL, FSDP), fewest=4),
    Case("3B full, fsdp", THREE, 280, 64, (*ALL, FSDP)),
    # One process has nobody to share with.
    Case("3B full, zero2", THREE, 280, 64, (*ALL, ZERO2), fewest=2),
    Case("3B full, same, fsdp", THREE, 280, 16, (*ALL, FSDP), all_of_them=True),
    # 256 tokens for every two frames; a sample that several GPUs share.
    Case("7B LoRA, 128k tokens", SEVEN, 448, 1, (LORA, *LONG), all_of_them=True, frames=1000),
    Case("2B LoRA, Trainer", TWO, 280, 64, (), trainer=_LORA | {"engine": "ddp"}),
    Case("3B full, fsdp, Trainer", THREE, 280, 64, (), trainer=_ALL | {"engine": "fsdp"}),
)


def measure(case: Case, gpus: int, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run's speed, memory and losses."""
    run, file = options.work / "run", options.work / "recipe.yaml"
    shutil.rmtree(run, ignore_errors=True)
    file.write_text("{}\n", encoding="utf-8")
    words = [
        f"model={model}",
        f"data.train={data_of(case, options.work)}",
        f"picture={{height: {case.side}, width: {case.side}}}",
        f"train.steps={options.steps + 500}",
        f"train.batch={case.batch if case.all_of_them else case.batch * gpus}",
        f"train.pack_tokens={max(4096, 256 * case.batch)}",
        "train.cache=never",
        "train.precision=bf16",
        "train.save_every=0",
        f"output={run}",
        *case.settings,
    ]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m"]
    command = [sys.executable, "-m", *launcher, "finesight", "train", str(file), *words]
    said = options.work / "said.txt"
    with said.open("wb") as stream:
        # A group of its own, so that all its processes end with it.
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True, env=environment(gpus)
        )
        start = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - start < LIMIT_S:
                if len(steps_of(run)) >= options.steps:
                    break
                time.sleep(0.2)
        finally:
            end(process, run)
    steps = steps_of(run)[: options.steps]
    if len(steps) < options.steps:
        words = said.read_text(errors="replace").splitlines()
        return {"case": case.name, "gpus": gpus, "failed": [word[:300] for word in words[-40:]]}
    return {
        "case": case.name,
        "gpus": gpus,
        "settings": list(case.settings),
        "samples_a_step": steps[0]["samples"],
        "tokens_a_step": steps[0]["tokens"],
        "samples_per_s": round(statistics.median(s["samples_per_s"] for s in steps[WARM:]), 2),
        "gb": round(max(step["memory_gb"] for step in steps), 2),
        "losses": [step["loss"] for step in steps],
    }


def data_of(case: Case, work: Path) -> Path:
    """Drawn scenes, each by itself or as the frames of videos."""
    table = draw(work / "data")
    if not case.frames:
        return table
    pictures = [located.sample.messages[0].content[0] for located in rows_of(table)]
    files = [str(part.image) for part in pictures if part.type == "image"]
    films = table.with_name("films.jsonl")
    lines = []
    for number in range(8):
        shown = [files[(number + place) % len(files)] for place in range(case.frames)]
        asked = [{"type": "video", "frames": shown}, {"type": "text", "text": "What is shown?"}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Scenes."}]
        lines.append(json.dumps({"id": f"film-{number}", "messages": turns}))
    films.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return films


def rows_of(table: Path) -> Iterator[Located]:
    """The samples of a table."""
    return load_sources((DataFile(path=table),)).read()


def measure_trainer(
    case: Case, gpus: int, model: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """The same of transformers' Trainer."""
    table = resized(draw(options.work / "data"), options.work / "resized", case.side)
    target = options.work / "trainer"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    job = Job(
        model=str(model),
        table=str(table),
        target=str(target),
        batch=case.batch,
        steps=options.steps,
        seconds=LIMIT_S,
        pack_tokens=0,
        workers=8 if (os.cpu_count() or 1) > 8 else 0,
        began=time.time(),
        setting=case.trainer or {},
    )
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m"]
    started = ["contestants.started", "with_trainer", as_argument(job)]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    places = [str(HERE), os.environ.get("PYTHONPATH", "")]
    watched = watch(
        [sys.executable, "-m", *launcher, *started],
        environment(gpus) | quiet | {"PYTHONPATH": os.pathsep.join(places)},
        LIMIT_S + GRACE_S,
    )
    told = target / FIGURES
    found = json.loads(told.read_text()) if told.exists() else {}
    if "seconds" not in found:
        said = watched.last_words().splitlines()
        return {"case": case.name, "gpus": gpus, "failed": [word[:300] for word in said[-40:]]}
    return {
        "case": case.name,
        "gpus": gpus,
        "settings": [f"{name}={value}" for name, value in job.setting.items()],
        "samples_a_step": gpus * found["samples"][0],
        "samples_per_s": round(gpus * rate(found), 2),
        "gb": round(found["peak_gb"], 2),
        "loss": found["loss"],
    }


def end(process: subprocess.Popen[bytes], run: Path) -> None:
    """End the launcher and the processes that it started, each in a group of its own."""
    word = f"output={run}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            # It has ended meanwhile.
            continue
    process.wait()


def environment(gpus: int) -> dict[str, str]:
    """The first so many GPUs."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What the run has noted of its steps so far."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    lines = [line for line in file.read_text().split("\n")[:-1] if line]
    return [line for line in map(json.loads, lines) if "loss" in line]


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of all cases, with `linear` where one GPU was measured, too."""
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    for name in dict.fromkeys(case.model for case in chosen):
        folder = options.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        model = random_weights(options.configs / name, folder)
        alone = 0.0
        for case in chosen:
            for gpus in options.gpus:
                if case.model != name or gpus < case.fewest:
                    continue
                measured = measure if case.trainer is None else measure_trainer
                found = measured(case, gpus, model, options)
                alone = found.get("samples_per_s", 0.0) if gpus == 1 else alone
                if alone and "failed" not in found and not case.all_of_them:
                    found["linear"] = round(found["samples_per_s"] / alone / gpus, 4)
                yield found
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure, write, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=lambda t: [int(n) for n in t.split(",")], default=[1, 2, 4])
    parser.add_argument("--only", type=lambda text: text.split(";"), default=[])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = head("scaling.py", options.configs) | {"results": []}
    for found in results(options):
        report["results"].append(found)
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps(found)[:700], flush=True)


if __name__ == "__main__":
    main()
