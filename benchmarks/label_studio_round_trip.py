"""Round trip of boxes through a real Label Studio server, with pre-labels of its ML backend.

    python benchmarks/label_studio_round_trip.py --label-studio VENV/bin/label-studio --out FILE

`--label-studio` is the program of an installation in its own environment, since its dependencies
conflict with those of finesight. The script starts it with a new database in a temporary folder and
`finesight serve finesight-tiny --label-studio`, and then runs these steps:

1. `finesight data export --to label-studio` writes 52 images with 520 boxes.
2. A project is created with the exported labeling configuration. The tasks are imported without
   their annotations, once as local files and for two images as uploads.
3. The ML backend is connected with an API key. Label Studio requests predictions for all tasks.
4. The boxes of step 1 are annotated by the API. Two tasks are skipped, which leaves 500 boxes.
5. The project is exported as JSON and JSON-MIN. `finesight import` reads both.
6. finesight-tiny is trained for a few steps on the import.

The result is the largest difference of a coordinate between step 1 and step 5 in pixels.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import platform
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finesight.samples.sample import BoxPart, ImagePart, Message, Sample, TextPart, read_samples
from finesight.synth.tickets import draw_ticket, sample_ticket

NUM_IMAGES, BOXES_PER_IMAGE, NUM_UPLOADS, NUM_SKIPPED = 52, 10, 2, 2
LABEL = "shape"
PROMPT = "Locate every shape and name it."
"""Question that finesight-tiny is trained on; a project with one label accepts all of its boxes."""

START_TIMEOUT_S = 300.0
NUM_TRAIN_STEPS = 3


def write_dataset(folder: Path, seed: int) -> dict[str, list[tuple[float, ...]]]:
    """Write samples with random boxes, and return the boxes of each image name."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    boxes: dict[str, list[tuple[float, ...]]] = {}
    lines = []
    for index in range(NUM_IMAGES):
        image = draw_ticket(sample_ticket(rng), rng)
        name = f"images/ticket {index:02d}.png"
        image.save(folder / name)
        corners = []
        for _ in range(BOXES_PER_IMAGE):
            xs, ys = (sorted(rng.uniform(0, side) for _ in range(2)) for side in image.size)
            if xs[1] - xs[0] < 1 or ys[1] - ys[0] < 1:
                xs, ys = [0.0, 1.25], [0.0, float(image.size[1])]
            corners.append((xs[0], ys[0], xs[1], ys[1]))
        boxes[Path(name).name] = corners
        question = (ImagePart(image=name), TextPart(text="?"))
        answer = tuple(BoxPart(image=0, label=LABEL, xyxy=box) for box in corners)
        messages = (
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        )
        lines.append(Sample(id=str(index), messages=messages).model_dump_json() + "\n")
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return boxes


class LabelStudioClient:
    """Client of the HTTP API of Label Studio."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self._token = url, token

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Any:
        """Send a request and return the JSON of its response."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Token {self._token}", "Content-Type": content_type}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.code} {error.read()[:500]!r}") from error
        return json.loads(content) if content else None

    def upload(self, project: int, image: Path) -> None:
        """Upload an image as a task."""
        boundary = secrets.token_hex(16)
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{image.name}"'
            "\r\nContent-Type: image/png\r\n\r\n"
        )
        body = head.encode() + image.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        content_type = f"multipart/form-data; boundary={boundary}"
        self.request("POST", f"/api/projects/{project}/import", body, content_type)

    def list_tasks(self, project: int) -> list[dict[str, Any]]:
        """Return all tasks of a project with their predictions."""
        path = f"/api/tasks?project={project}&page_size=1000&fields=all"
        return list(self.request("GET", path)["tasks"])


@contextlib.contextmanager
def run_process(
    command: Sequence[str], environment: Mapping[str, str], log: Path, url: str
) -> Iterator[None]:
    """Run a server within a `with` block, from its first response at `url`."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=stream, stderr=stream
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_listening(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not respond:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def is_listening(url: str) -> bool:
    """Return whether a server responds at a URL, with any status."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def find_free_port() -> int:
    """Return a TCP port that is free on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run_finesight(*args: str | Path) -> str:
    """Run a command of finesight and return its standard output."""
    command = [sys.executable, "-m", "finesight", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")
    return done.stdout


def fill_project(
    client: LabelStudioClient, project_folder: Path, backend_url: str, key: str
) -> tuple[int, list[dict[str, Any]]]:
    """Create a project with tasks and predictions, and return its ID and tasks."""
    config = (project_folder / "label_config.xml").read_text(encoding="utf-8")
    body = {"title": "round trip", "label_config": config}
    project = int(client.request("POST", "/api/projects/", body)["id"])
    storage = {"project": project, "path": str(project_folder / "images"), "use_blob_urls": True}
    client.request("POST", "/api/storages/localfiles", storage)
    tasks = json.loads((project_folder / "tasks.json").read_text(encoding="utf-8"))
    unlabeled = [{"data": task["data"]} for task in tasks[NUM_UPLOADS:]]
    client.request("POST", f"/api/projects/{project}/import", unlabeled)
    for image in sorted((project_folder / "images").iterdir())[:NUM_UPLOADS]:
        client.upload(project, image)
    connection = {
        "project": project,
        "title": "finesight",
        "url": backend_url,
        "auth_method": "BASIC_AUTH",
        "basic_auth_user": "label-studio",
        "basic_auth_pass": key,
    }
    backend = client.request("POST", "/api/ml", connection)
    if backend["state"] != "CO":
        raise RuntimeError(f"the ML backend is not connected: {backend}")
    action = f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}"
    client.request("POST", action, {"selectedItems": {"all": True, "excluded": []}})
    return project, client.list_tasks(project)


def annotate(
    client: LabelStudioClient, project_folder: Path, tasks: Sequence[Mapping[str, Any]]
) -> None:
    """Annotate all tasks with the exported boxes, and skip the last ones."""
    exported = json.loads((project_folder / "tasks.json").read_text(encoding="utf-8"))
    results = {
        get_image_name(task["data"]["image"]): task["annotations"][0]["result"] for task in exported
    }
    for task in tasks:
        result = results[get_image_name(task["data"]["image"])]
        body = {"result": result, "was_cancelled": task in tasks[-NUM_SKIPPED:]}
        client.request("POST", f"/api/tasks/{task['id']}/annotations/", body)


def get_image_name(reference: str) -> str:
    """Return the original file name of an image; uploads have a prefix and no spaces."""
    name = urllib.request.url2pathname(reference).rpartition("/")[2]
    if "/upload/" in reference:
        return name.partition("-")[2].replace("_", " ")
    return name


def compute_max_error(
    samples: Sequence[Sample], boxes: Mapping[str, Sequence[tuple[float, ...]]]
) -> tuple[int, float]:
    """Return the number of boxes and the largest difference of a coordinate in pixels."""
    num_boxes, max_error = 0, 0.0
    for sample in samples:
        (image,) = (part.image for part in sample.iter_parts() if isinstance(part, ImagePart))
        found = sorted(part.xyxy for part in sample.iter_parts() if isinstance(part, BoxPart))
        name = Path(image).name
        expected = sorted(
            boxes[name] if name in boxes else boxes[get_image_name(f"/upload/{name}")]
        )
        if len(found) != len(expected):
            raise RuntimeError(f"{name}: {len(found)} boxes instead of {len(expected)}")
        num_boxes += len(found)
        for pair in zip(found, expected, strict=True):
            max_error = max(max_error, *(abs(a - b) for a, b in zip(*pair, strict=True)))
    return num_boxes, max_error


def train(data: Path, folder: Path) -> float:
    """Train finesight-tiny for a few steps, and return the last loss."""
    recipe = {
        "model": "finesight-tiny",
        "data": {"train": [str(data)]},
        "tune": {"language": "lora"},
        "train": {"steps": NUM_TRAIN_STEPS, "batch_size": 2, "learning_rate": 1e-4},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run_finesight("train", folder / "recipe.yaml")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    return float(losses[-1])


def run_round_trip(label_studio: str, folder: Path, seed: int) -> dict[str, Any]:
    """Run all steps in a folder, and return their results."""
    boxes = write_dataset(folder / "data", seed)
    project_folder = folder / "root" / "project"
    project_folder.parent.mkdir()
    data_file = folder / "data" / "data.jsonl"
    run_finesight(
        "data", "export", data_file, project_folder, "--to", "label-studio", "--copy-images"
    )
    token, key = secrets.token_hex(20), secrets.token_urlsafe(24)
    url = f"http://127.0.0.1:{find_free_port()}"
    environment = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "label-studio"),
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(project_folder),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        # Label Studio otherwise rejects an ML backend and its webhook on this machine.
        "USE_DEFAULT_BANNED_SUBNETS": "false",
        "LATEST_VERSION_CHECK": "False",
        "COLLECT_ANALYTICS": "False",
    }
    command = [label_studio, "start", "--no-browser", "--port", url.rpartition(":")[2]]
    command += ["--username", "user@example.com", "--password", secrets.token_urlsafe(16)]
    command += ["--user-token", token]
    port = find_free_port()
    serve = [sys.executable, "-m", "finesight", "serve", "finesight-tiny", "--port", str(port)]
    serve += ["--device", "cpu", "--label-studio", "--label-studio-files", str(project_folder)]
    serve += ["--label-studio-url", url, "--label-studio-prompt", PROMPT]
    backend_url = f"http://127.0.0.1:{port}/label-studio"
    backend_environment = {"FINESIGHT_KEY": key, "LABEL_STUDIO_API_KEY": token}
    with (
        run_process(command, environment, folder / "label-studio.log", f"{url}/health"),
        run_process(serve, backend_environment, folder / "serve.log", f"{backend_url}/health"),
    ):
        client = LabelStudioClient(url, token)
        version = client.request("GET", "/api/version")["release"]
        start_time = time.monotonic()
        project, tasks = fill_project(client, project_folder, backend_url, key)
        prediction_s = time.monotonic() - start_time
        annotate(client, project_folder, tasks)
        for name in ("JSON", "JSON_MIN"):
            export = client.request("GET", f"/api/projects/{project}/export?exportType={name}")
            (project_folder / f"{name.lower()}.json").write_text(json.dumps(export))
        log = (folder / "serve.log").read_text()
    shutil.copytree(folder / "label-studio" / "media" / "upload", project_folder / "upload")
    results: dict[str, Any] = {
        "label_studio": version,
        "tasks": len(tasks),
        "tasks_with_predictions": sum(bool(task["predictions"]) for task in tasks),
        "predicted_boxes": sum(
            len(prediction["result"]) for task in tasks for prediction in task["predictions"]
        ),
        "import_and_prediction_s": round(prediction_s, 1),
        "keys_in_server_log": sum(
            text in log for text in (token, key, base64.b64encode(key.encode()).decode())
        ),
    }
    for name in ("json", "json_min"):
        out = folder / f"imported_{name}"
        printed = json.loads(
            run_finesight("import", project_folder / f"{name}.json", out, "--json")
        )
        num_boxes, max_error = compute_max_error(read_samples(out / "data.jsonl"), boxes)
        results[name] = {
            "boxes": num_boxes,
            "max_error_px": max_error,
            "skipped_rows": printed["skipped_rows"],
        }
    results["training_loss"] = train(folder / "imported_json" / "data.jsonl", folder)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label-studio", default=shutil.which("label-studio"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.label_studio:
        parser.error("label-studio is not installed: name its program with --label-studio")
    with tempfile.TemporaryDirectory() as folder:
        results = run_round_trip(args.label_studio, Path(folder).resolve(), args.seed)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count()}
    text = json.dumps({**results, "seed": args.seed, **machine}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
