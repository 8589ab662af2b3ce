"""Mutated recipes, models, adapters and runs: commands end well, in bounded time and memory."""

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from mutations import (
    ODD_FILES,
    mutated_bytes,
    mutated_json,
    mutated_lines,
    mutated_value,
    read_peak_memory,
)
from tiny_task import TinyTask

from finesight.cli.app import run_command
from finesight.settings.recipe import dump_recipe, load_recipe

CASES = int(os.environ.get("FINESIGHT_FUZZ_CASES", "2000"))
SEED = int(os.environ.get("FINESIGHT_FUZZ_SEED", "0"))
SECONDS, RESIDENT, ADDRESSES = 20, 2e9, 8 << 30
"""Bounds of a process: its time, its memory, and addresses, of which libraries take a part."""

PEAK_MARK = "@peak memory "


class Ended(NamedTuple):
    """How a command ended. `memory` is 0 if a signal ended the process, as after a timeout."""

    code: int
    memory: int
    output: str

    @property
    def well(self) -> bool:
        return self.code in (0, 2, 3, 75) and self.memory < RESIDENT


def run_forked(command: list[str], folder: Path) -> Ended:
    with tempfile.TemporaryFile("w+b") as file:
        child = os.fork()
        if child == 0:
            run_limited(command, folder, file.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        file.seek(0)
        output, _, peak = file.read().decode(errors="replace").rpartition(PEAK_MARK)
    return Ended(code, int(peak) if output else 0, output or peak)


def run_limited(command: list[str], folder: Path, output: int) -> None:
    code = 1
    try:
        os.setsid()
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        os.chdir(folder)
        code = run_command(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        print(f"\n{PEAK_MARK}{read_peak_memory()}", flush=True)
        os._exit(code)


TO_MODEL = (
    ["predict", "task/tiny", "task/train0.png", "--prompt", "Which?", "--max-new-tokens", "4"],
    ["show", "recipe.yaml"],
    ["plan", "recipe.yaml", "--gpu", "T4"],
    ["train", "recipe.yaml", "output_dir=new", "train.steps=1", "train.epochs=null", "eval=null"],
    ["doctor", "task/tiny"],
    ["merge", "run", "merged"],
)
TO_RUN = (
    ["predict", "run", "task/train0.png", "--prompt", "Which?", "--max-new-tokens", "4"],
    ["report", "run"],
    ["doctor", "run"],
    ["compare", "run", "run2", "--out", "page.html"],
    ["merge", "run", "merged"],
    ["eval", "run"],
    ["train", "recipe.yaml", "--resume"],
)
TO_RECIPE = (
    ["plan", "fuzzed.yaml", "--gpu", "T4"],
    ["show", "fuzzed.yaml"],
    ["check", "fuzzed.yaml"],
    ["train", "fuzzed.yaml", "output_dir=new", "train.steps=1", "train.epochs=null", "eval=null"],
)
MODEL_FILES = (
    *("config", "tokenizer", "preprocessor_config", "generation_config", "tokenizer_config"),
    "chat_template",
)
RUN_FILES = (
    *("adapter/adapter_config.json", "adapter/sha256.json", "manifest.json", "metrics.jsonl"),
    *("result.json", "param_audit.json", "skipped_samples.jsonl", "predictions/before.jsonl"),
    *("predictions/after.jsonl", "model/sha256.json", "model/config.json"),
    *("checkpoints/step-6/sha256.json", "checkpoints/step-6/state.json"),
)
COMMANDS = {f"task/tiny/{name}.json": TO_MODEL for name in MODEL_FILES}
COMMANDS |= {f"run/{name}": TO_RUN for name in RUN_FILES}
OFTEN = (
    *("fuzzed.yaml", "task/tiny/config.json", "task/tiny/tokenizer.json"),
    *("run/adapter/adapter_config.json", "run/manifest.json", "run/metrics.jsonl"),
)


def mutated_recipe(rng: random.Random, content: bytes) -> bytes:
    match rng.randrange(6):
        case 0:
            return rng.choice(ODD_FILES)
        case 1:
            return mutated_bytes(rng, content)
        case _:
            found = mutated_value(rng, yaml.safe_load(content))
            return yaml.safe_dump(found, allow_unicode=False).encode("utf-8", "replace")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task and its finished run, by paths that are relative to their folder."""
    folder = tmp_path_factory.mktemp("original")
    torch.set_num_threads(1)
    here = Path.cwd()
    os.chdir(folder)
    try:
        task = TinyTask(Path("task"))
        task.recipe["eval"] = {"metric": "ocr", "max_new_tokens": 2}
        task.run(name="../run")
    finally:
        os.chdir(here)
    shutil.move(folder / "task" / "recipe.yaml", folder / "recipe.yaml")
    text = (folder / "recipe.yaml").read_text().replace("task/../run", "run")
    (folder / "recipe.yaml").write_text(text)
    for model in ("task/tiny", "run/model"):
        (folder / model / "sha256.json").rename(folder / model / "sha256.kept")
    full = dump_recipe(load_recipe(folder / "recipe.yaml"))
    (folder / "full.yaml").write_text(full)
    return folder


def prepared(rng: random.Random, original: Path, folder: Path, name: str) -> list[str]:
    """A copy of the original with the file mutated; gives the command that reads it."""
    shutil.copytree(original, folder)
    if name == "fuzzed.yaml":
        good = (original / rng.choice(("recipe.yaml", "full.yaml"))).read_bytes()
        (folder / name).write_bytes(mutated_recipe(rng, good))
        return rng.choice(TO_RECIPE)
    mutate = mutated_lines if name.endswith(".jsonl") else mutated_json
    command = rng.choice(COMMANDS[name])
    path = folder / name
    stored = path.with_suffix(".kept")
    if stored.exists():
        stored.rename(path)
    elif name.endswith(("adapter_config.json", "state.json")):
        (path.parent / "sha256.json").unlink()
    shutil.copytree(folder / "run", folder / "run2")
    if command[-1] == "--resume" and not name.endswith(("result.json", "config.json")):
        (folder / "run" / "result.json").unlink()
    if rng.randrange(25):
        path.write_bytes(mutate(rng, path.read_bytes()))
    else:
        path.unlink()
        make_other = (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"))
        rng.choice(make_other)()
    return command


@pytest.mark.fuzz
def test_commands_end_well_on_mutated_files(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = (*OFTEN * 3, *COMMANDS)
    failures: list[str] = []
    codes: Counter[object] = Counter()
    for number in range(CASES):
        rng = random.Random(f"{SEED}-{number}")
        name = rng.choice(names)
        folder = tmp_path / f"case{number}"
        command = prepared(rng, original, folder, name)
        ended = run_forked(command, folder)
        codes[ended.code] += 1
        if ended.well:
            shutil.rmtree(folder)
            continue
        failures.append(
            f"{folder}: {name} {' '.join(command)}: code {ended.code},"
            f" {ended.memory / 1e9:.2f} GB: {ended.output.strip()[-200:]}"
        )
    assert failures == []
    assert codes[2] > CASES // 5
