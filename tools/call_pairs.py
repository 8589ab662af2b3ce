"""Find pairs of files that call each other in both directions on three paths, at run time.

    python tools/call_pairs.py

The paths run on the CPU with finesight-tiny, the bundled model. A pair of files counts once: during
the path, a function of each file directly calls a function of the other one. `call_recorder.py`
defines a direct call.

| path | calls between |
|---|---|
| step | start and end of `Trainer.run_step`: LoRA, the same with DPO |
| request | an HTTP chat completion with an image and its response, with the worker processes |
| evaluation | start and end of `run_evaluation`, with a metric |
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from call_recorder import (
    Call,
    CallRecorder,
    find_mutual_calls,
    load_recorded_state,
    read_worker_log,
)
from PIL import Image
from rich.console import Console

from finesight.encode.renderer import NativeRenderer
from finesight.files.worker_pool import WorkerPool
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import load_inference_model
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import TINY_MODEL
from finesight.serve.api_schema import ServerLimits
from finesight.serve.api_server import ApiServer, make_app
from finesight.serve.http_protocol import bind_socket
from finesight.serve.preprocessing_jobs import load_worker_state
from finesight.settings.recipe import recipe_from_text
from finesight.train.evaluation import run_evaluation
from finesight.train.trainer import Trainer
from finesight.train.training_run import train

COLORS = ("red", "green", "blue", "white")
QUESTION = "Which color is it?"

RECIPE: dict[str, Any] = {
    "model": TINY_MODEL,
    "tune": {"language": "lora"},
    "train": {
        "steps": 1,
        "batch_size": 2,
        "num_workers": 0,
        "device": "cpu",
        # The cache would be a file outside the temporary folder.
        "vision_cache": "never",
    },
}
SETTLING_SECONDS = 0.2
"""Seconds after a response in which the threads of the server end its request."""


@dataclass(frozen=True)
class PathResult:
    """Result of a path.

    Attributes:
        num_files: Number of files with a function that was called.
        pairs: An example in both directions for each pair of files that call each other.
    """

    num_files: int
    pairs: list[tuple[Call, Call]]


def measure_step(folder: Path, objective: str = "sft") -> PathResult:
    """Record the training steps of a LoRA run."""
    recorder = CallRecorder(Trainer.run_step)
    train_on_colors(folder, recorder, RECIPE["train"] | {"objective": objective})
    return build_result(recorder)


def measure_evaluation(folder: Path) -> PathResult:
    """Record the evaluations of a LoRA run, before and after its step."""
    recorder = CallRecorder(run_evaluation)
    settings = {"metric": "qa", "max_new_tokens": 4}
    train_on_colors(folder, recorder, RECIPE["train"], eval=settings)
    return build_result(recorder)


def measure_request(folder: Path) -> PathResult:
    """Record a chat completion with an image, in all threads and in the worker processes."""
    recorder = CallRecorder()
    data = base64.b64encode(draw_image(COLORS[0])).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [image, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    body = json.dumps({"model": TINY_MODEL, "messages": messages, "max_tokens": 4})
    with recorder.profile(), run_server(folder) as port, recorder.record():
        post_chat(port, body)
        time.sleep(SETTLING_SECONDS)
    return build_result(recorder, read_worker_log(folder))


PATHS: dict[str, Callable[[Path], PathResult]] = {
    "step": measure_step,
    "step, DPO": partial(measure_step, objective="dpo"),
    "request": measure_request,
    "evaluation": measure_evaluation,
}


def build_result(recorder: CallRecorder, worker_calls: list[Call] | None = None) -> PathResult:
    """Combine the calls of this process with those of worker processes."""
    calls = [*recorder.calls(), *(worker_calls or [])]
    files = recorder.files | {call.callee.file for call in calls}
    return PathResult(len(files), find_mutual_calls(calls))


def train_on_colors(
    folder: Path, recorder: CallRecorder, train_settings: dict[str, Any], **groups: Any
) -> None:
    """Train a recipe on images of one color each, with validation data if it is evaluated."""
    data = {"train": str(write_samples(folder, with_rejected="objective" in train_settings))}
    if "eval" in groups:
        data["eval"] = data["train"]
    groups |= {"data": data, "train": train_settings, "output_dir": str(folder / "run")}
    recipe = recipe_from_text(json.dumps(RECIPE | groups), folder / "recipe.yaml")
    with recorder.profile():
        train(recipe, console=Console(quiet=True))


def write_samples(folder: Path, with_rejected: bool) -> Path:
    """Write an image and a sample of each color, and return the file of the samples."""
    lines = []
    for index, color in enumerate(COLORS):
        (folder / f"{color}.png").write_bytes(draw_image(color))
        image = {"type": "image", "image": f"{color}.png"}
        question = {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}
        answer = {"role": "assistant", "content": color}
        sample: dict[str, Any] = {"id": color, "messages": [question, answer]}
        if with_rejected:
            sample["rejected"] = COLORS[index - 1]
        lines.append(json.dumps(sample) + "\n")
    path = folder / "samples.jsonl"
    path.write_text("".join(lines))
    return path


def draw_image(color: str) -> bytes:
    """Return a PNG image of one color."""
    file = io.BytesIO()
    Image.new("RGB", (56, 56), color).save(file, "PNG")
    return file.getvalue()


@contextmanager
def run_server(folder: Path) -> Iterator[int]:
    """Run the server of `finesight serve` within the block, on the port that is returned."""
    limits = ServerLimits(max_num_seqs=2)
    inference_model = load_inference_model(TINY_MODEL, "cpu")
    model, renderer = inference_model.model, inference_model.renderer
    assert isinstance(model, VisionLanguageModel), type(model)
    assert isinstance(renderer, NativeRenderer), type(renderer)
    vocab_size = model.config.decoder.vocab_size
    state_args = folder, load_worker_state, renderer, vocab_size
    pool = WorkerPool(load_recorded_state, *state_args, num_idle=1, memory_bytes=1 << 31)
    pool.start()
    service = InferenceService(inference_model, max_num_seqs=2, kv_cache_bytes=1 << 26)
    is_ready = threading.Event()
    server = ApiServer(
        make_app(service, pool, vocab_size, folder, limits=limits), limits, is_ready.set
    )
    listener = bind_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert is_ready.wait(30), "the server does not listen"
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        service.close(wait_for_running=False)
        pool.close()


def post_chat(port: int, body: str) -> None:
    """Post a chat completion, and read its response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {content[:500]!r}")


def measure_path(name: str) -> PathResult:
    """Run a path in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return PATHS[name](Path(folder))


def print_result(name: str, result: PathResult) -> None:
    """Print a row with the counts, and a row for each direction of a pair."""
    print(f"{name:12} {result.num_files:>5} {len(result.pairs):>5}")
    for number, calls in enumerate(result.pairs, 1):
        for call in calls:
            caller, callee = call.caller, call.callee
            print(f"  {number}  {caller.file}: {caller.name} -> {callee.file}: {callee.name}")


def main() -> int:
    """Measure paths and print their pairs of files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", metavar="PATH", help=f"of {', '.join(PATHS)}")
    names = parser.parse_args().paths or list(PATHS)
    print(f"{'path':12} {'files':>5} {'pairs':>5}")
    for name in names:
        print_result(name, measure_path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
