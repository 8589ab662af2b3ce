"""Probes that `finesight doctor` runs in child processes, because they may crash.

Usage: `python -m finesight.doctor.probes torch` prints the properties of torch and its GPUs as a
JSON line. `python -m finesight.doctor.probes smoke-test cpu|cuda FOLDER` creates samples, trains
and generates on one device, and prints a JSON line for each stage.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

COMPILED_PACKAGES = ("numpy", "PIL", "safetensors", "tokenizers", "triton.language", "bitsandbytes")
"""Modules with compiled code that may be incompatible. Missing ones are ignored."""

NUM_STEPS, NUM_TICKETS, MAX_NEW_TOKENS = 6, 12, 24

RECIPE_TEMPLATE = """\
model: finesight-tiny
data: {{train: {train}}}
tune: {{vision: lora, merger: lora, language: lora, lora: {{rank: 8, alpha: 16, dropout: 0.0}}}}
train:
  steps: {steps}
  batch_size: 2
  learning_rate: 2.0e-3
  device: {device}
  num_workers: 0
  vision_cache: never
output_dir: {run}
"""


class ProbeResult(NamedTuple):
    """Standard output of a child process, and its error. The error is empty on success."""

    stdout: str
    error: str


def run_probe(
    arguments: Sequence[str], timeout_s: float, extra_env: Mapping[str, str]
) -> ProbeResult:
    """Run `python ARGUMENTS` in a child process.

    Args:
        arguments: Arguments of the Python interpreter.
        timeout_s: Seconds after which the process is killed.
        extra_env: Additional environment variables.
    """
    try:
        completed = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **extra_env},
        )
    except subprocess.TimeoutExpired as error:
        stdout = error.stdout or b""
        text = stdout.decode("utf-8", "replace") if isinstance(stdout, bytes) else stdout
        return ProbeResult(text, f"timed out after {timeout_s:.0f} s")
    if completed.returncode == 0:
        return ProbeResult(completed.stdout, "")
    lines = [line.strip() for line in completed.stderr.splitlines() if line.strip()]
    reason = lines[-1][:300] if lines else "no output"
    if completed.returncode < 0:
        reason = f"killed by {signal.Signals(-completed.returncode).name}: {reason}"
    return ProbeResult(completed.stdout, reason)


def probe_torch() -> dict[str, Any]:
    """Return the properties of torch and its GPUs."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "module_file": torch.__file__ or "",
        "cuda_version": torch.version.cuda,
        "arch_list": torch.cuda.get_arch_list() if available else [],
        "cuda_warnings": [] if available else [str(warning.message) for warning in caught],
        "gpus": [_probe_gpu(i) for i in range(torch.cuda.device_count())] if available else [],
        "broken_packages": _find_broken_packages(),
    }


def _probe_gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    gpu: dict[str, Any] = {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "total_bytes": properties.total_memory,
        "free_bytes": None,
        "error": "",
    }
    try:
        gpu["free_bytes"] = torch.cuda.mem_get_info(index)[0]
        ones = torch.ones(16, 16, device=f"cuda:{index}")
        if (ones @ ones)[0, 0].item() != 16:
            gpu["error"] = "a product of two matrices is incorrect"
    except (RuntimeError, AssertionError) as error:
        gpu["error"] = str(error).strip().splitlines()[0]
    return gpu


def _find_broken_packages() -> dict[str, str]:
    """Return the installed modules that fail to import, each with its error."""
    broken = {}
    for name in COMPILED_PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                broken[name] = str(error)
        except Exception as error:  # packages may raise any exception
            broken[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return broken


def run_smoke_stages(device: Literal["cpu", "cuda"], folder: Path) -> None:
    """Run the stages of the smoke test in order. The first failure stops the process."""
    stages: dict[str, Callable[[], str]] = {
        "load": _import_trainer,
        "data": lambda: _create_samples(folder),
        "train": lambda: _train_model(device, folder),
        "generate": lambda: _generate_answer(device, folder),
    }
    for name, run_stage in stages.items():
        start = time.perf_counter()
        what = run_stage()
        seconds = round(time.perf_counter() - start, 2)
        print(json.dumps({"stage": name, "seconds": seconds, "what": what}), flush=True)


def _import_trainer() -> str:
    importlib.import_module("finesight.train.training_run")
    return ""


def _create_samples(folder: Path) -> str:
    """Create images of train tickets and import them."""
    from finesight.data.import_source import ImportOptions
    from finesight.data.importer import import_dataset
    from finesight.synth.tickets import TABLE_FILE, TICKET_FIELDS, write_tickets

    write_tickets(folder / "tickets", NUM_TICKETS, 0)
    columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
    options = ImportOptions(columns=columns, prompt="Read the ticket.")
    import_dataset(folder / "tickets" / TABLE_FILE, folder / "data", options)
    return f"{NUM_TICKETS} images created and imported"


def _train_model(device: str, folder: Path) -> str:
    """Train for a few steps, check that the loss falls, and describe the result."""
    from rich.console import Console

    from finesight.manifest import METRICS_FILE
    from finesight.recipe import load_recipe
    from finesight.train.training_run import train

    recipe_file, run = folder / "recipe.yaml", folder / "run"
    files = {"train": folder / "data" / "data.jsonl", "run": run}
    values = {name: json.dumps(str(file)) for name, file in files.items()}
    recipe_file.write_text(RECIPE_TEMPLATE.format(**values, steps=NUM_STEPS, device=device))
    train(load_recipe(recipe_file), console=Console(file=io.StringIO()))
    lines = map(json.loads, (run / METRICS_FILE).read_text().splitlines())
    # The first fp16 steps may overflow and have no loss.
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if len(losses) < 2 or not math.isfinite(sum(losses)) or losses[-1] >= losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses}")
    return f"{NUM_STEPS} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}, saved"


def _generate_answer(device: Literal["cpu", "cuda"], folder: Path) -> str:
    """Load the trained adapter, generate a completion for one image, and describe the result."""
    from finesight.infer.model_loader import load_inference_model
    from finesight.infer.prediction import build_questions, predict

    loaded = load_inference_model(str(folder / "run"), device)
    samples = build_questions([next((folder / "tickets").rglob("*.png"))], "Read the ticket.")
    (prediction,) = predict(
        loaded.model, loaded.renderer, samples, max_new_tokens=MAX_NEW_TOKENS, batch_size=1
    )
    if not prediction.num_tokens:
        raise RuntimeError("the trained model generated no tokens")
    return f"adapter loaded, {prediction.num_tokens} tokens generated"


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        print(json.dumps(probe_torch()))
    else:
        run_smoke_stages("cuda" if sys.argv[2] == "cuda" else "cpu", Path(sys.argv[3]))
