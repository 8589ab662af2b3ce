"""Tests of frequent mistakes of users: one message each, which names the fix.

Each case runs a command line in a workspace with images, a table, data, a recipe and a run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pillow_heif
import pytest
import torch
import yaml
from PIL import Image
from tiny_model import create_tiny_model
from tiny_task import make_task

from finesight import storage
from finesight.app import start
from finesight.cli.app import run_command
from finesight.label.label_store import JOURNAL_FILE
from finesight.plan import run_plan, step_time
from finesight.train import setup
from finesight.train.run_dir import RunDir

Prepare = Callable[[contextlib.ExitStack, pytest.MonkeyPatch], object]

TABLE = ["image,text", *(f"photos/{n}.png,ticket {n}" for n in range(4))]
XYWH_ROWS = [f'{{"image": "photos/{n}.png", "box": [30, 30, 20, 20]}}' for n in range(4)]
FRACTION_ROWS = [f'{{"image": "photos/{n}.png", "box": [0.1, 0.1, 0.5, 0.5]}}' for n in range(4)]
SCRIPT = "BASE=Qwen/Qwen2-VL-2B\nswift sft --model $MODEL --dataset a.jsonl --output_dir out\n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create the workspace, and make it the working directory."""
    folder = tmp_path_factory.mktemp("workspace")
    with contextlib.chdir(folder):
        for name in ("photos", "pairs", "moved", "empty"):
            Path(name).mkdir()
        for n in range(4):
            Image.new("RGB", (56, 56), (60 * n, 0, 0)).save(f"photos/{n}.png")
            shutil.copy(f"photos/{n}.png", f"pairs/{n}.png")
            Path(f"pairs/{n}.txt").write_text(f"ticket {n}" * (n != 2))
        pillow_heif.from_pillow(Image.new("RGB", (56, 56))).save("photo.heic")
        Path("heic.csv").write_text("image,text\nphoto.heic,a dog\n")
        for file, rows in {
            "labels.csv": TABLE,
            "moved/labels.csv": [row.replace("photos/", "images/") for row in TABLE],
            "xywh.jsonl": XYWH_ROWS,
            "fractions.jsonl": FRACTION_ROWS,
        }.items():
            Path(file).write_text("\n".join(rows) + "\n")
        Path("utf16.csv").write_text("\n".join(TABLE), encoding="utf-16-le")
        Path("train.sh").write_text(SCRIPT)
        recipe = make_task(Path("task")) | {"output_dir": "run"}
        recipe["tune"]["merger"] = "lora"
        recipe["train"] |= {"epochs": None, "steps": 2, "save_every": 1}
        text = yaml.safe_dump(recipe, sort_keys=False)
        Path("recipe.yaml").write_text(text)
        Path("colon.yaml").write_text(text.replace("model: ", "model "))
        Path("tab.yaml").write_text(text.replace("  train: ", "\ttrain: "))
        Path("typo.yaml").write_text(text.replace("  batch_size:", "  bach_size:"))
        create_tiny_model(Path("other"), "qwen2_5_vl")
        assert run_command(["train", "recipe.yaml"]) == 0
        shutil.copytree("run", "stopped")
        Path("stopped/result.json").unlink()
        yield folder


@dataclass(frozen=True)
class Mistake:
    """A command line, the first line of its error, and its remedy; both may be abbreviated."""

    command: str
    problem: str
    remedy: str
    prepare: Prepare | None = None


def hide_heif_plugin(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "pillow_heif", None)
    patch.delitem(Image.OPEN, "HEIF", raising=False)  # registered by an earlier test


def hide_web_packages(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(start, "find_spec", lambda name: None)


def occupy_port(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setenv(
        "PORT", str(stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])
    )


def limit_memory(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_plan, "MIN_CHECKED_PARAMS", 0)
    patch.setattr(step_time, "total_memory", lambda: 500_000_000)
    patch.setattr(setup, "measure_peak_flops", lambda device, dtype: 1e12)


def fill_disk(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=1))


def hide_gpu(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


def train_elsewhere(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    stack.enter_context(RunDir(Path("stopped")).lock())


def label_elsewhere(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    Path("labels").mkdir(exist_ok=True)
    lock = stack.enter_context(
        storage.FileLock(Path("labels") / JOURNAL_FILE, os.O_RDWR | os.O_CREAT)
    )
    lock.acquire()


def forget_token(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN", raising=False)
    patch.delenv("HF_HUB_OFFLINE", raising=False)


IMPORT = "--map image=image --map answer=text --prompt Read."
BOXES = "--map image=image --map box=box --prompt Locate."
MISTAKES = {
    # Import and init
    "wrong-column": Mistake(
        "import labels.csv out --map image=img --map answer=text --prompt Read.",
        "labels.csv: no column 'img' for --map image=img",
        "did you mean image?",
    ),
    "missing-prompt": Mistake(
        "import labels.csv out --map image=image --map answer=text",
        "labels.csv: 4 of 4 rows are invalid; no files were written",
        'give --prompt "..."',
    ),
    "missing-image-folder": Mistake(
        f"import moved/labels.csv out {IMPORT}",
        "moved/labels.csv: 4 of 4 rows are invalid; no files were written",
        "correct the path, or change to the base folder of the paths",
    ),
    "wrong-encoding": Mistake(
        f"import utf16.csv out {IMPORT} --encoding utf-8",
        "utf16.csv: not utf-8 text: it contains NUL characters, as UTF-16 does",
        "give another encoding, or remove --encoding to detect it",
    ),
    "unknown-encoding": Mistake(
        f"import labels.csv out {IMPORT} --encoding utf9",
        "--encoding: unknown encoding 'utf9'",
        "for example cp1250, or remove --encoding to detect it",
    ),
    "boxes-as-xywh": Mistake(
        f"import xywh.jsonl out {BOXES}",
        "xywh.jsonl: 4 of 4 rows are invalid; no files were written",
        "if the boxes are xywh, give --box-format xywh",
    ),
    "boxes-as-fractions": Mistake(
        f"import fractions.jsonl out {BOXES}",
        "fractions.jsonl: 4 of 4 rows are invalid; no files were written",
        "if the boxes are fractions of the image size, give --box-units 1",
    ),
    "empty-caption-file": Mistake(
        "import pairs out --prompt Read.",
        "pairs: 1 of 4 rows are invalid; no files were written\n"
        "  pairs/2.png: pairs/2.txt: an empty text file",
        "write the answer into it, or remove the file; --on-invalid-row skip skips and lists",
    ),
    "heic-without-extra": Mistake(
        f"import heic.csv out {IMPORT}",
        "heic.csv: 1 of 1 rows are invalid; no files were written\n  row 1:",
        "install it: pip install 'finesight[heif]'",
        hide_heif_plugin,
    ),
    "existing-output": Mistake(
        f"import labels.csv task {IMPORT}",
        "task: exists already and is never overwritten",
        "move it away first, or choose another name, such as task-2",
    ),
    "no-such-folder": Mistake("init foto --yes", "foto: no such file", "did you mean ./photos?"),
    "empty-folder": Mistake(
        "init empty --yes",
        "empty: a folder without a known dataset format; it contains no file",
        "give the folder with the images and labels, or the file with the rows",
    ),
    "image-instead-of-folder": Mistake(
        "init photos/0.png --yes",
        "photos/0.png: a file of type .png",
        "give the folder of the images: photos",
    ),
    # Recipe
    "misspelled-setting": Mistake(
        "train typo.yaml output_dir=out",
        "typo.yaml:17: train.bach_size: unknown setting, given 4",
        "did you mean train.batch_size?",
    ),
    "setting-of-another-trainer": Mistake(
        "train recipe.yaml output_dir=out gradient_checkpointing=true",
        "override gradient_checkpointing=true: gradient_checkpointing: unknown setting, given true",
        "use train.activation_checkpointing=true",
    ),
    "option-of-another-trainer": Mistake(
        "train recipe.yaml output_dir=out --lr 1e-4",
        "command line: no such option: --lr",
        "use train.learning_rate=1e-4",
    ),
    "invalid-choice": Mistake(
        "train recipe.yaml output_dir=out tune.vision=qlora",
        "override tune.vision=qlora: tune.vision: has the invalid value 'qlora'",
        "did you mean tune.vision: lora?",
    ),
    "override-without-equals-sign": Mistake(
        "train recipe.yaml output_dir=out train.learning_rate 1e-4",
        "command line: 'train.learning_rate' is not an override",
        "write train.learning_rate=VALUE",
    ),
    "missing-colon": Mistake(
        "train colon.yaml output_dir=out",
        "colon.yaml:2: broken YAML: mapping values are not allowed here",
        "add a colon on line 1: model: task/tiny",
    ),
    "tab": Mistake(
        "train tab.yaml output_dir=out",
        "tab.yaml:3: broken YAML: found character '\\t' that cannot start any token",
        "replace the tab by spaces",
    ),
    # Check, plan and train
    "missing-data-file": Mistake(
        "check task/trian.jsonl", "task/trian.jsonl: no such file", "did you mean task/train.jsonl?"
    ),
    "data-as-recipe": Mistake(
        "plan task/train.jsonl",
        "task/train.jsonl: is a data file",
        "write one for these data: finesight init task/train.jsonl",
    ),
    "table-as-samples": Mistake(
        "train recipe.yaml output_dir=out data.train=labels.csv",
        "labels.csv: is a table, not a file of samples",
        "import it: finesight init labels.csv",
    ),
    "mistyped-recipe": Mistake(
        "train recipe.yml", "recipe.yml: no such file", "did you mean ./recipe.yaml?"
    ),
    "existing-run": Mistake(
        "train recipe.yaml",
        "run: contains a finished run",
        "set another folder: output_dir=run-2",
    ),
    "mistyped-model": Mistake(
        "plan recipe.yaml model=task/tyni", "model: no folder task/tyni", "use task/tiny, or give"
    ),
    "model-larger-than-memory": Mistake(
        "train recipe.yaml output_dir=out",
        "model task/tiny: the predicted peak memory is",
        "try train.precision=bf16, smaller images",
        limit_memory,
    ),
    "full-disk": Mistake(
        "train recipe.yaml output_dir=out",
        "out: ",
        "free disk space, set another output_dir, or lower train.keep_checkpoints",
        fill_disk,
    ),
    "no-gpu": Mistake(
        "train recipe.yaml output_dir=out train.device=cuda",
        "device: device is cuda, but torch",
        "use the CPU (--device cpu, in a recipe train.device: cpu)",
        hide_gpu,
    ),
    "metric-without-validation-data": Mistake(
        "train recipe.yaml output_dir=out data.eval=[] eval.metric=ocr",
        "data.eval: eval.metric is ocr, but there is no validation data",
        "set data.eval, for example by an import: finesight import SOURCE OUT --train-fraction 0.9",
    ),
    "resume-with-another-recipe": Mistake(
        "train recipe.yaml --resume output_dir=stopped train.batch_size=3",
        "stopped/checkpoints/step-2: train.batch_size is 3 now",
        "to keep the settings of the run: finesight train stopped --resume; to start from the",
    ),
    "run-in-use": Mistake(
        "train recipe.yaml --resume output_dir=stopped",
        "stopped: another process is training in stopped",
        "wait for it, stop it, or set another output_dir",
        train_elsewhere,
    ),
    # Results, inference and deployment
    "mistyped-run": Mistake(
        "report rnu",
        "report: rnu is not a run directory",
        "did you mean ./run?",
    ),
    "evaluation-of-mistyped-run": Mistake("eval rnu", "model: no folder rnu", "use run"),
    "question-without-prompt": Mistake(
        "predict run photos/0.png",
        "predict: 1 image, no --prompt and no --data",
        "for example: finesight predict run photos/0.png --prompt 'What is this?'",
    ),
    "port-in-use": Mistake(
        "serve run --port $PORT",
        "cannot listen on 127.0.0.1:$PORT (Address already in use)",
        "add --port 0 for any free port, or stop the other program",
        occupy_port,
    ),
    "missing-extra": Mistake(
        "web run",
        "web: starlette and uvicorn cannot be imported",
        "pip install 'finesight[web]'",
        hide_web_packages,
    ),
    "adapter-of-another-base": Mistake(
        "merge run out --base other",
        "run/manifest.json: the base model other has the fingerprint",
        "use $WORKSPACE/task/tiny as in the training; an adapter fits no other",
    ),
    "upload-without-token": Mistake(
        "export run hf:me/mine --yes",
        "HF_TOKEN: no token for hf:me/mine",
        "create a token at https://huggingface.co/settings/tokens, then: export HF_TOKEN=TOKEN",
        forget_token,
    ),
    "labels-in-use": Mistake(
        "label finesight-tiny photos --prompt Read. --suggest-only",
        "labels: another process labels in this folder",
        "use the page of that process, or another --out",
        label_elsewhere,
    ),
    "port-of-page-in-use": Mistake(
        "label finesight-tiny photos --prompt Read. --out out --port $PORT",
        "cannot listen on 127.0.0.1:$PORT (Address already in use)",
        "add --port 0 for any free port, or stop the other program",
        occupy_port,
    ),
    "script-with-variables": Mistake(
        "convert train.sh out.yaml",
        "train.sh: the training command depends on '$MODEL'",
        "save the resolved command, with values in place of variables and loops, in another .sh",
    ),
}


def read_contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", MISTAKES)
def test_message_names_the_fix_and_no_files_are_written(workspace, name, monkeypatch, cli):
    mistake = MISTAKES[name]
    monkeypatch.setenv("WORKSPACE", str(workspace))
    with contextlib.ExitStack() as stack:
        if mistake.prepare is not None:
            mistake.prepare(stack, monkeypatch)
        before = read_contents(workspace)
        error = cli(*os.path.expandvars(mistake.command).split(), code=2).err
        assert read_contents(workspace) == before
    *_, message = error.partition("error: ")
    problem, remedy = map(os.path.expandvars, (mistake.problem, mistake.remedy))
    assert message.startswith(problem), message
    assert message.count("\n  expected: ") == message.count("\n  remedy: ") == 1, message
    assert "error: " not in message
    assert message.partition("\n  remedy: ")[2].startswith(remedy), message
    assert not Path("out").exists()
