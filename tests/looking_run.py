"""Sessions of the tiny task whose pictures are looked at."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from small_run import make_task, write_recipe
from torch import Tensor

from finesight.model.tiny import TinyFamily, make_tiny
from finesight.recipe import load_recipe
from finesight.train.looking import Looked, looked_at
from finesight.train.prepare import Session, prepare
from finesight.train.progress import Screen
from finesight.train.run import Run
from finesight.train.seen import Seen
from finesight.train.stop import Stop

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
SCREEN = Screen(Console(file=sys.stderr))


def session_of(
    folder: Path,
    tune: dict[str, Any] = LORA,
    mixed: bool = False,
    family: TinyFamily = "qwen2_vl",
    **train: Any,
) -> Session:
    """A new session of the task, or another one where it has been written before."""
    if not folder.exists():
        made = make_task(folder) | {"output": str(folder / "run"), "tune": tune}
        if mixed:
            mix(folder / "train.jsonl")
        if family != "qwen2_vl":
            make_tiny(folder / family, family)
            made["model"] = str(folder / family)
        if family == "qwen":
            # It reads pictures of one size.
            del made["picture"]
        (folder / "task.json").write_text(json.dumps(made))
    recipe = json.loads((folder / "task.json").read_text())
    path = write_recipe(folder / "recipe.yaml", recipe, **train)
    return prepare(load_recipe(path), Run(folder / "run"), SCREEN, resume=False)


def mix(data: Path) -> None:
    """Take the pictures of samples 1 and 6 away, and give sample 2 another one."""
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for number in (1, 6):
        del samples[number]["messages"][0]["content"][0]
    samples[2]["messages"][0]["content"].insert(0, {"type": "image", "image": "train0.png"})
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def look(session: Session, screen: Screen = SCREEN, stop: Stop | None = None) -> Looked:
    """What comes of looking. Nobody removes features from disk in a test."""
    with ExitStack() as stack:
        return stack.enter_context(looked_at(session, screen, stop or Stop()))


def seen_by(session: Session) -> Seen:
    """What is known once the pictures were looked at."""
    seen = look(session).seen
    assert seen is not None
    return seen


def all_features(session: Session, seen: Seen) -> Tensor:
    """Of all pictures, sample by sample."""
    kept = session.train.survey.kept
    dtype, shape = seen.known.form(kept)
    room = torch.empty(shape, dtype=dtype)
    seen.known.lay(kept, room)
    return seen.of(room)
