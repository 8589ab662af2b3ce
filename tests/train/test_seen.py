"""Features of pictures that a frozen tower saw once: the same as seen anew in every step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import Task, final_files, losses, make_task, write_recipe

from finesight.errors import Interrupted
from finesight.recipe import load_recipe
from finesight.report.facts import phases
from finesight.report.record import read_record
from finesight.storage import remove_folder
from finesight.train.prepare import Session, prepare
from finesight.train.progress import Screen
from finesight.train.run import Run
from finesight.train.seen import look, pays
from finesight.train.step import take_step
from finesight.train.stop import Stop

TESTS = Path(__file__).parents[1]
LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
STARTS = {"started", "seen_s"}
SCREEN = Screen(Console(file=sys.stderr))


def session_of(
    folder: Path, tune: dict[str, Any] = LORA, mixed: bool = False, **train: Any
) -> Session:
    recipe = make_task(folder) | {"output": str(folder / "run"), "tune": tune}
    if mixed:
        mix(folder / "train.jsonl")
    path = write_recipe(folder / "recipe.yaml", recipe, **train)
    return prepare(load_recipe(path), Run(folder / "run"), SCREEN, resume=False)


def mix(data: Path) -> None:
    """Take the pictures of samples 1 and 6 away, and give sample 2 another one."""
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for number in (1, 6):
        del samples[number]["messages"][0]["content"][0]
    samples[2]["messages"][0]["content"].insert(0, {"type": "image", "image": "train0.png"})
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def test_features_of_a_pack_are_those_of_its_pictures_seen_anew(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    seen = look(session, SCREEN, Stop())
    assert seen is not None
    assert sorted(seen.features) == list(range(11))
    bare = session.data.without_pictures()
    for number in range(len(session.course)):
        step, without = session.data.step(number), bare.step(number)
        assert step.members == without.members
        for batch, other, members in zip(step.packs, without.packs, step.members, strict=True):
            assert (other.grids, len(other.patches_ND)) == ((), 0)
            assert torch.equal(batch.ids_T, other.ids_T)
            expected = session.model.see(batch.patches_ND, batch.grids)
            torch.testing.assert_close(seen.of(members), expected)


def test_a_run_learns_the_same_with_features_kept(tmp_path: Path) -> None:
    session = session_of(tmp_path / "anew")
    steps = [session.data.step(number) for number in range(len(session.course))]
    anew = [take_step(session, step, Stop()).wait()[0] for step in steps]
    task = Task(tmp_path / "kept")
    task.run(tune=LORA)
    kept = [line for line in task.history() if "loss" in line]
    assert [line["loss"] for line in kept] == pytest.approx(anew, rel=1e-4)


@pytest.mark.parametrize("budget", [1, 100])
def test_samples_without_a_picture_and_with_two(tmp_path: Path, budget: int) -> None:
    """Alone in a pack and among others."""
    session, other = (
        session_of(tmp_path / name, mixed=True, pack_tokens=budget) for name in ("kept", "anew")
    )
    seen = look(session, SCREEN, Stop())
    assert seen is not None
    assert (len(seen.features), seen.pictures) == (11, 10)
    assert [number for number, found in seen.features.items() if not len(found)] == [1, 6]
    bare, texts, pairs = session.data.without_pictures(), 0, 0
    for number in range(len(session.course)):
        step = other.data.step(number)
        texts += sum(not batch.grids for batch in step.packs)
        pairs += sum(2 in members and len(members) > 1 for members in step.members)
        anew = take_step(other, step, Stop()).wait()
        kept = take_step(session, bare.step(number), Stop(), seen).wait()
        assert kept == pytest.approx(anew, rel=1e-4)
    assert (texts, pairs) == ((4, 0) if budget == 1 else (0, 2))


def test_looking_takes_time_that_is_noted(tmp_path: Path) -> None:
    task = Task(tmp_path)
    task.run(tune=LORA)
    (tmp_path / "run" / "result.json").unlink()
    remove_folder(tmp_path / "run" / "checkpoints" / "step-6")
    task.run(tune=LORA, resume=True)
    lines = task.history()
    noted = [line for line in lines if "seen_s" in line]
    assert [(line["step"], line["pictures"]) for line in noted] == [(0, 11), (4, 11)]
    assert all(line["seen_s"] > 0 for line in noted)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert lines.index(noted[0]) < next(i for i, line in enumerate(lines) if "loss" in line)
    record = read_record(tmp_path / "run")
    assert phases(record)[1].seconds == pytest.approx(sum(line["seen_s"] for line in noted))


def test_nothing_is_looked_at_after_the_last_step(tmp_path: Path) -> None:
    task = Task(tmp_path)
    task.run(tune=LORA)
    (tmp_path / "run" / "result.json").unlink()
    task.run(tune=LORA, resume=True)
    kinds = [
        "started" if "started" in line else "seen" for line in task.history() if STARTS & set(line)
    ]
    assert kinds == ["started", "seen", "started"]


def test_work_that_is_not_done_is_not_counted(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    seen, step = look(session, SCREEN, Stop()), session.data.step(0)
    bare = session.data.without_pictures().step(0)
    whole, kept = take_step(session, step, Stop()), take_step(session, bare, Stop(), seen)
    assert kept.operations < whole.operations


def test_where_looking_beforehand_pays(tmp_path: Path) -> None:
    session = session_of(tmp_path / "twice")
    assert pays(session)
    places = session.train.survey.patches // 4
    assert pays(session, places * 64 * 4)
    assert not pays(session, places * 64 * 4 - 1)
    assert not pays(session_of(tmp_path / "once", epochs=1))
    for part in ("merger", "vision"):
        assert not pays(session_of(tmp_path / part, LORA | {part: "lora"}))


def test_a_damaged_picture_is_left_to_the_steps(tmp_path: Path) -> None:
    task = Task(tmp_path)
    picture = tmp_path / "train3.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    task.run(tune=LORA)
    dropped = [name for line in task.history() for name in line.get("dropped", ())]
    assert dropped == ["train3", "train3"]
    (noted,) = (line for line in task.history() if "seen_s" in line)
    assert noted["pictures"] == 0


def test_a_signal_ends_the_looking(tmp_path: Path) -> None:
    stop = Stop()
    stop.signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        look(session_of(tmp_path), SCREEN, stop)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    """Stopped during the fifth call of the model, and gone on with in a new process; in bf16 with
    products, norms and dropout of its own."""
    changed = make_task(tmp_path / "task") | {"tune": LORA | {"embeddings": "full"}}
    recipe = write_recipe(tmp_path / "recipe.yaml", changed, precision=precision)

    def trained(*points: str) -> list[str]:
        command = [sys.executable, str(TESTS / "stopping.py"), str(recipe), str(tmp_path), "term"]
        environment = os.environ | {"PYTHONPATH": str(TESTS)}
        done = subprocess.run([*command, *points], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [line.split()[1] for line in done.stdout.splitlines()]

    assert trained("whole:0", "parts:5") == ["done", "stopped"]
    assert 0 < len(losses(tmp_path / "parts")) < 6
    assert trained("parts:0") == ["done"]
    begun = json.loads((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()[0])
    assert begun["precision"] == precision
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    expected, found = (final_files(tmp_path / name) for name in ("whole", "parts"))
    assert found == expected
