"""Measure the phases of a complete run, from the command to the saved adapter.

    python benchmarks/full_recipe.py CONFIG --work DIR --out FILE [--data TABLE] [--batch 16]
        [--rounds 3] [--side 280] [--cold] [--predict] [--profile] [KEY=VALUE]...

CONFIG is a folder of configuration and tokenizer files. Missing weights are initialized randomly.
The command trains two epochs of 496 generated scenes, or of TABLE. Console lines and files mark the
start of each phase, and metrics.jsonl contains the step times. The remaining time between steps
belongs to checkpoints.

With --cold, one more run starts after the weights left the page cache. With --predict, commands
answer a question with the adapter. With --profile, one more run lists the functions and imports of
the main thread that take at least PROFILE_MIN_S; the time of a function contains that of the
functions it calls.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from competitors.job import CompetitorJob
from peer_data import ensure_weights, measure_sample_costs, write_caption_dataset
from peer_metrics import RECIPE_EPOCHS, lora_settings, recipe_overrides, report_header
from subprocess_timer import run_timed

from finesight.samples.corpus import load_corpus
from finesight.settings.config import DataFileSettings
from finesight.train.dataset_stats import list_sample_images

LIMIT_S = 540.0
PROFILE_MIN_S = 0.03


def drop_from_page_cache(folder: Path) -> None:
    """Remove the weights in a folder from the page cache, as after a restart of the machine."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class FileWatcher(threading.Thread):
    """Thread that records when the metrics of the first step and the adapter appear."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.files = {"first step": run_dir / "metrics.jsonl", "adapter": run_dir / "adapter"}
        self.times: dict[str, float] = {}

    def run(self) -> None:
        """Look for the files every 5 ms."""
        start = time.perf_counter()
        while len(self.times) < len(self.files):
            time.sleep(0.005)
            for name, path in self.files.items():
                is_there = path.exists() and (path.is_dir() or '"loss"' in path.read_text())
                if name not in self.times and is_there:
                    self.times[name] = time.perf_counter() - start


def measure_stages(
    run_dir: Path, overrides: list[str], recipe_path: Path, profiler: tuple[str, ...] = ()
) -> dict[str, float]:
    """Run the command once, with a profiler, and return the seconds of each phase and in total."""
    recipe_path.write_text("{}\n", encoding="utf-8")
    cache_dir = run_dir.with_name("features")
    for folder in (run_dir, cache_dir):
        shutil.rmtree(folder, ignore_errors=True)
    program = [sys.executable, *profiler, "-m", "finesight"]
    # Clear the vision cache of earlier runs. An installed package has compiled modules.
    environment = {"HF_ASSETS_CACHE": str(cache_dir), "PYTHONDONTWRITEBYTECODE": ""}
    command = [*program, "train", str(recipe_path), *overrides]
    watcher = FileWatcher(run_dir)
    watcher.start()
    command_log = run_timed(command, environment, LIMIT_S)
    if command_log.exit_code:
        raise SystemExit(f"exit {command_log.exit_code}\n{command_log.last_lines()}")
    watcher.join()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step_s"] for line in lines if "loss" in line]
    image_encoding_s = sum(line.get("vision_cache_s", 0.0) for line in lines)
    read, loaded = (
        command_log.first_line_time("data.train:"),
        command_log.first_line_time("training "),
    )
    # `setup_s` starts after the imports and ends before the plan is printed.
    imported = loaded - lines[0]["setup_s"]
    saved = watcher.times["adapter"]
    trained = command_log.first_line_time("part ")
    between = trained - loaded - image_encoding_s - sum(steps)
    return {
        "imports": imported,
        "device and headers": read - imported,
        "weights": loaded - read,
        "vision cache": image_encoding_s,
        "first step": steps[0],
        "other steps": sum(steps[1:]),
        "checkpoints": between,
        "saving the adapter": saved - trained,
        "report and the end": command_log.seconds - saved,
        "command to first step": watcher.times["first step"],
        "command to saved adapter": saved,
        "command to its end": command_log.seconds,
    }


def format_table(rounds: list[dict[str, float]]) -> list[str]:
    """Format the median, minimum and maximum of the rounds as Markdown."""
    table = ["| | seconds | from, to |", "|---|---|---|"]
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        middle = statistics.median(values)
        table.append(f"| {name} | {middle:.2f} | {min(values):.2f}, {max(values):.2f} |")
    return table


def format_profile(file: Path) -> list[str]:
    """Format the slow functions and imports of a profile as Markdown, in descending order."""
    table = ["| function or import | calls | seconds |", "|---|---|---|"]
    # The stubs of pstats lack its data: {(file, line, name): (_, calls, _, seconds, callers)}.
    stats: dict[tuple[str, int, str], Any] = vars(pstats.Stats(str(file)))["stats"]
    for (path, _, name), (_, calls, _, seconds, _) in sorted(
        stats.items(), key=lambda entry: -entry[1][3]
    ):
        module = ".".join(Path(path).with_suffix("").parts)
        is_own = "finesight." in module or module.endswith(("torch.__init__", "numpy.__init__"))
        if is_own and seconds >= PROFILE_MIN_S and not name.startswith("<listcomp"):
            short_name = module.rpartition("site-packages.")[2].rpartition("src.")[2]
            table.append(f"| {short_name} {name} | {calls} | {seconds:.2f} |")
    return table


def main() -> None:
    """Run the benchmark, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=280)
    for flag in ("--cold", "--predict", "--profile"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_intermixed_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.data or write_caption_dataset(options.work / "data")
    model = ensure_weights(options.config, options.work / "model")
    counted = measure_sample_costs(model, data, options.side, lora_settings())
    job = CompetitorJob(
        model=str(model),
        dataset="",
        output_dir=str(options.work / "run"),
        batch_size=options.batch,
        num_steps=-(-RECIPE_EPOCHS * counted.num_samples // options.batch),
        time_limit_s=LIMIT_S,
        max_pack_tokens=0,
        num_workers=0,
    )
    words = recipe_overrides(job, data, options.side) + options.overrides
    report: dict[str, Any] = report_header("full_recipe.py", options.config)
    report |= {"samples": counted.num_samples, "steps": job.num_steps, "rounds": []}
    for _ in range(options.rounds):
        found = measure_stages(Path(job.output_dir), words, options.work / "recipe.yaml")
        report["rounds"].append({name: round(value, 3) for name, value in found.items()})
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(format_table(report["rounds"])))
    if options.cold:
        drop_from_page_cache(model)
        found = measure_stages(Path(job.output_dir), words, options.work / "recipe.yaml")
        report["cold"] = {name: round(value, 3) for name, value in found.items()}
        print("cold files", *format_table([report["cold"]]), sep="\n")
    if options.predict:
        sample = load_corpus([DataFileSettings(path=str(data))]).read_samples()[0]
        image = list_sample_images(sample)[0]
        command = ["predict", job.output_dir, str(image), "--prompt", "Describe the image."]
        program = [sys.executable, "-m", "finesight", *command, "--max-new-tokens", "32"]
        environment = {"PYTHONDONTWRITEBYTECODE": ""}
        runs = [run_timed(program, environment, LIMIT_S).seconds for _ in range(options.rounds)]
        report["predict"] = [round(seconds, 3) for seconds in runs]
        print("predict:", *report["predict"])
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.profile:
        file = options.work / "profile.out"
        profiler = ("-m", "cProfile", "-o", str(file))
        measure_stages(Path(job.output_dir), words, options.work / "recipe.yaml", profiler)
        print("\n".join(format_profile(file)))


if __name__ == "__main__":
    main()
