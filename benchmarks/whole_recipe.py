"""Where the seconds of a whole recipe go, from the command to the saved adapter.

    python benchmarks/whole_recipe.py CONFIG --work DIR --out FILE [--data TABLE] [--batch 16]
        [--rounds 3] [--side 280] [KEY=VALUE]...

CONFIG is a folder of configuration and tokenizer files; where it has no weights, random ones are
drawn. Every sample (496 drawn scenes, or TABLE's) is learned twice by the real command, which is
watched from outside: its lines say when its parts begin, and the run's own records how long steps
took. What is left between steps is checkpoints.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from contestants.job import Job
from peer_data import count, draw, random_weights
from peer_figures import RECIPE_EPOCHS, head, lora, recipe
from stopwatch import watch

LIMIT_S = 540.0


def stages(run: Path, words: list[str], file: Path) -> dict[str, float]:
    """Run the command once; the seconds of each of its parts, in order, and of all."""
    file.write_text("{}\n", encoding="utf-8")
    kept = run.with_name("features")
    for folder in (run, kept):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "finesight", "train", str(file), *words]
    # No run before has looked at the pictures.
    watched = watch(command, {"HF_ASSETS_CACHE": str(kept)}, LIMIT_S)
    if watched.code:
        raise SystemExit(f"exit {watched.code}\n{watched.last_words()}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["seconds"] for line in lines if "loss" in line]
    looked = sum(line.get("seen_s", 0.0) for line in lines)
    read, loaded = watched.at("data.train:"), watched.at("training ")
    # `prepared_s` ends where the plan is printed, and began when everything was imported.
    imported = loaded - lines[0]["prepared_s"]
    adapter = run / "adapter" / "adapter_model.safetensors"
    saved = adapter.stat().st_mtime - watched.began
    learned = watched.at("part ")
    between = learned - loaded - looked - sum(steps)
    return {
        "imports": imported,
        "device and headers": read - imported,
        "weights": loaded - read,
        "looking at pictures": looked,
        "first step": steps[0],
        "other steps": sum(steps[1:]),
        "checkpoints": between,
        "saving the adapter": saved - learned,
        "report and the end": watched.seconds - saved,
        "start to first step": loaded + looked + steps[0],
        "command to saved adapter": saved,
        "command to its end": watched.seconds,
    }


def as_table(rounds: list[dict[str, float]]) -> list[str]:
    """Markdown: the median of the rounds, and the lowest and highest."""
    table = ["| | seconds | from, to |", "|---|---|---|"]
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        middle = statistics.median(values)
        table.append(f"| {name} | {middle:.2f} | {min(values):.2f}, {max(values):.2f} |")
    return table


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=280)
    options = parser.parse_intermixed_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.data or draw(options.work / "data")
    model = random_weights(options.config, options.work / "model")
    counted = count(model, data, options.side, lora())
    job = Job(
        model=str(model),
        table="",
        target=str(options.work / "run"),
        batch=options.batch,
        steps=-(-RECIPE_EPOCHS * counted.samples // options.batch),
        seconds=LIMIT_S,
        pack_tokens=0,
        workers=0,
    )
    words = recipe(job, data, options.side) + options.overrides
    report: dict[str, Any] = head("whole_recipe.py", options.config)
    report |= {"samples": counted.samples, "steps": job.steps, "rounds": []}
    for _ in range(options.rounds):
        found = stages(Path(job.target), words, options.work / "recipe.yaml")
        report["rounds"].append({name: round(value, 3) for name, value in found.items()})
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(as_table(report["rounds"])))


if __name__ == "__main__":
    main()
