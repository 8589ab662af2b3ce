"""Run the code blocks of documentation pages in one shell, with hubs of tiny models and data."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from case_files import load_cases
from container_fixtures import make_parquet
from docs_code_blocks import CodeBlock
from fake_hub_servers import HuggingFaceHandler, ModelScopeHandler, run_hub_server
from hub_fixtures import make_image_cell
from PIL import Image
from tiny_model import create_tiny_model

from finesight.model_folder import TINY_MODEL, locate_model
from finesight.synth.tickets import write_tickets

READER = load_cases("docs_reader")
BLOCK_TIMEOUT_S = 300.0
SERVER_COMMAND = re.compile(
    r"^finesight (?:serve|web|studio)\b(?!.*&[ \t]*(?:#.*)?$).*\n?", re.MULTILINE
)
"""Commands that run until Ctrl-C; the page continues in another terminal."""

START_SERVER = """\
{{ {command}
}} > {log} 2>&1 &
server=$!
until grep -Eq 'http://[a-z0-9.]+:[0-9]+' {log}; do
  kill -0 $server || {{ cat {log}; false; }}
  sleep 0.2
done
cat {log}
"""
INTERRUPT_SERVER = """\
if [ "$server" ]; then
  kill -INT -- -$server
  wait $server || [ $? = 130 ]
  server=
fi
"""
DONE_COMMAND = r"printf '\n@done\n'"
PYTHON_LOOP = """
import json, sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    exec(compile(json.loads(line), "<block>", "exec"), names)
    print("\\n@done", flush=True)
"""


class InteractiveProcess:
    """A shell or interpreter that runs code blocks one after another, and ends with an error."""

    def __init__(self, command: list[str], folder: Path, env: Mapping[str, str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(
            command, cwd=folder, env=dict(env), start_new_session=True, **pipes
        )

    def run_line(self, line: str) -> str:
        timer = threading.Timer(BLOCK_TIMEOUT_S, self.process.kill)
        timer.start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
        output = ""
        for piece in iter(self.process.stdout.readline, b""):
            if piece == b"@done\n":
                timer.cancel()
                return output
            output += piece.decode(errors="replace")
        timer.cancel()
        raise AssertionError(f"exit code {self.process.wait()}: {line}\n{output[-3000:]}")


class DocsTerminal:
    """Runs code blocks and returns their output. A failed block raises AssertionError."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self._env, self._number = folder, env, 0
        self._shell = InteractiveProcess(["bash", "--norc"], folder, env)
        # A failed command ends the shell. Job control gives each job its own process group.
        self._shell.run_line(f"set -emo pipefail; server=; {DONE_COMMAND}")

    @cached_property
    def _python(self) -> InteractiveProcess:
        command = [sys.executable, "-u", "-c", PYTHON_LOOP]
        return InteractiveProcess(command, self.folder, self._env)

    def run_block(self, block: CodeBlock) -> str:
        """Run a block, or write it to the file in its caption."""
        if block.caption is not None:
            file = self.folder / block.caption
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
            return ""
        if block.language == "python":
            return self._python.run_line(json.dumps(block.text))
        if block.language == "console":
            # Run `$ COMMAND` with the lines after `> ` as input.
            command, *lines = block.text.splitlines()
            typed = [line.removeprefix("> ") for line in lines]
            return self._run_shell("\n".join([f"{command[2:]} << 'END'", *typed, "END\n"]))
        # A server command runs alone, until the next one or the end of the page.
        ends = [end for found in SERVER_COMMAND.finditer(block.text) for end in found.span()]
        pieces = zip([0, *ends], [*ends, len(block.text)], strict=True)
        texts = [block.text[start:end] for start, end in pieces]
        return "".join(self._run_shell(text) for text in texts if text.strip())

    def _run_shell(self, text: str) -> str:
        self._number += 1
        script = self.folder.with_name(f"{self.folder.name}-{self._number}.sh")
        if SERVER_COMMAND.match(text):
            start = START_SERVER.format(command=text.rstrip(), log=script.with_suffix(".log"))
            text = INTERRUPT_SERVER + start
        script.write_text(text, encoding="utf-8")
        return self._shell.run_line(f". {script} < /dev/null; {DONE_COMMAND}")

    def close(self) -> None:
        """Interrupt the server, and stop all processes."""
        try:
            if self._shell.process.poll() is None:
                self._shell.run_line(f"{INTERRUPT_SERVER}{DONE_COMMAND}")
        finally:
            for one in (self._shell, self._python):
                one.process.kill()
                one.process.wait()


def build_model_repositories(folder: Path) -> dict[str, dict[str, bytes]]:
    found = {"Qwen/Qwen2-VL-2B-Instruct": locate_model(TINY_MODEL).path}
    for name, family in READER["models"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        found[name] = create_tiny_model(folder / name, family)
    return {
        f"models/{name}": {one.name: one.read_bytes() for one in path.iterdir() if one.is_file()}
        for name, path in found.items()
    }


def build_dataset_repositories(num_rows: int = 140) -> dict[str, dict[str, bytes]]:
    """Build all datasets of the documentation, larger than their validation splits."""
    question = {"question": "Where is the word?", "answer": "word", "bbox": [4.0, 6.0, 20.0, 12.0]}
    captions, formulas, boxes = [], [], []
    for n in range(num_rows):
        image = {"image": make_image_cell(n)}
        captions.append(image | {"caption": f"an image of {n} things", "image_id": n})
        formulas.append(image | {"text": rf"x ^ {{ {n} }}"})
        boxes.append(image | question | {"dataset_id": str(n)})
    sets = {
        "modelscope/coco_2014_caption": captions,
        "AI-ModelScope/LaTeX_OCR": formulas,
        "jrzhang/TextVQA_GT_bbox": boxes,
        "Tina12345/textVQA_groundingtask_bbox": boxes,
    }
    file = "data/train-00000-of-00001.parquet"
    return {f"datasets/{name}": {file: make_parquet(rows)} for name, rows in sets.items()}


def write_tutorial_files(folder: Path, num_rows: int = 130) -> None:
    """Write the data files of widely used tutorials, with whole paths of their images."""
    images = folder / "files"
    images.mkdir()
    captions, formulas, turns, paths, boxes = [], [], [], [], []
    for number in range(num_rows):
        path = str(images / f"{number}.jpg")
        Image.new("RGB", (60, 40), (number, 2 * number % 256, 90)).save(path)
        answer = {"from": "assistant", "value": f"image {number}"}
        question = {"from": "user", "value": f"COCO Yes: <|vision_start|>{path}<|vision_end|>"}
        turns.append({"id": f"identity_{number}", "conversations": [question, answer]})
        formula = {"role": "assistant", "value": f"x^{number}"}
        paths.append(
            {"id": f"{number}", "conversations": [{"role": "user", "value": path}, formula]}
        )
        captions.append({"image_path": path, "caption": f"image {number}"})
        formulas.append({"image_path": path, "text": f"x^{number}"})
        box = json.dumps({"bbox_2d": [20.0, 20.0, 9.0, 8.0]})
        boxes.append({"image": [path], "query": "Where is the word?", "response": box})
    for name, rows in (("data_vl.json", turns), ("latex_ocr_train.json", paths)):
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    (folder / "data").mkdir()
    lines = [json.dumps(row) for row in boxes]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tables = {
        "coco-2024-dataset.csv": captions,
        "coco.csv": captions,
        "latex_ocr_train.csv": formulas,
    }
    for name, rows in tables.items():
        with (folder / name).open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, rows[0])
            table.writeheader()
            table.writerows(rows)


@contextmanager
def run_fake_hubs(
    repositories: dict[str, dict[str, bytes]], home: Path
) -> Iterator[dict[str, str]]:
    """Run both hubs locally. Yields the environment variables of a reader."""
    with run_hub_server(HuggingFaceHandler) as first, run_hub_server(ModelScopeHandler) as second:
        for server in (first, second):
            server.repositories.update(repositories)
        # Nothing is installed; another test checks the names of the extras.
        (home / "shims").mkdir(parents=True)
        (home / "shims" / "pip").symlink_to(shutil.which("true") or "/bin/true")
        folders = [home / "shims", Path(sys.executable).parent, "/usr/local/bin:/usr/bin:/bin"]
        names = ("LANG", "PYTHONPATH", "TMPDIR", "OMP_NUM_THREADS")
        yield {name: os.environ[name] for name in names if name in os.environ} | {
            "HOME": str(home),
            "PATH": os.pathsep.join(map(str, folders)),
            "HF_ENDPOINT": first.url,
            "MODELSCOPE_ENDPOINT": second.url,
            "HF_HOME": str(home / "hub"),
            "MODELSCOPE_CACHE": str(home / "modelscope"),
        }


def prepare_page_folder(name: str, prepared: Path, folder: Path) -> None:
    """Prepare the working folder of a page; some pages start in an empty folder."""
    if name.startswith(("api.md", "quickstart-own-data.md", "tutorials/")):
        folder.mkdir(parents=True)
    elif name == "README.md":
        create_reader_folder(folder)
    else:
        shutil.copytree(prepared, folder)


def create_reader_folder(folder: Path) -> None:
    """Write a table of labels, images and a recipe."""
    folder.mkdir(parents=True)
    table = write_tickets(folder / "drawn", 24, seed=1)
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        labels = [[f"drawn/{row['image']}", row["seat"]] for row in rows]
        csv.writer(stream).writerows([["path", "text"], *labels])
    for name in ("new.jpg", "cat.jpg", "ticket.png"):
        Image.open(folder / labels[0][0]).convert("RGB").save(folder / name)
    # Lazy import: it skips tests that need no video.
    from video_fixtures import write_video

    write_video(folder / "clip.mp4")
    (folder / "recipe.yaml").write_text(READER["recipe"], encoding="utf-8")
