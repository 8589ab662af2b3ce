"""What a run notes of itself, and the page that is made of it on the way and at the end."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import Task

from finesight.errors import Interrupted
from finesight.storage import Disk, using
from finesight.train.finish import report
from finesight.train.progress import Screen
from finesight.train.report import device_name
from finesight.train.run import Run

METRIC = {"metric": "ocr", "every": 2, "max_new_tokens": 4}


class Pages(Disk):
    """A disk that keeps every version of a report, and may refuse to take one."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.pages: list[str] = []

    def rename(self, source: Path, target: Path) -> None:
        if target.name == "report.html":
            if self.refuse:
                raise RuntimeError("a fault of the report's own")
            self.pages.append(source.read_text())
        super().rename(source, target)


def stands(page: str) -> str:
    """Where a page says that its run is."""
    found = re.search(r"The run is ([^.]+)\.", page)
    assert found is not None, "the page does not say where the run stands"
    return found[1]


def test_a_page_at_every_measurement_and_at_the_end(task: Task) -> None:
    with using(disk := Pages()):
        task.run(eval=METRIC)
    assert [stands(page) for page in disk.pages] == [
        *(f"not finished: {step} of 6 steps so far" for step in (0, 2, 4)),
        "finished after 6 steps",
    ]
    assert f"Report:  {task.folder / 'run' / 'report.html'}" in task.screen
    last = disk.pages[-1]
    assert "3 held-out samples" in last
    assert "11 samples, 2 epochs: language by LoRA of rank 4; merger as a whole" in last
    assert '"problem"' not in last, "every picture was found"


def test_an_interrupted_run_has_one_too(task: Task) -> None:
    class Stopping(Pages):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.name == "step-2":
                os.kill(os.getpid(), 15)

    with using(disk := Stopping()), pytest.raises(Interrupted):
        task.run(eval={"metric": "ocr", "max_new_tokens": 4})
    assert stands(disk.pages[-1]).startswith("not finished: ")
    task.run(resume=True, eval={"metric": "ocr", "max_new_tokens": 4})
    page = (task.folder / "run" / "report.html").read_text()
    assert stands(page) == "finished after 6 steps"
    starts = [line for line in task.history() if "started" in line]
    assert len(starts) == 2
    assert starts[0]["step"] == 0


def test_a_run_outlives_its_report(task: Task) -> None:
    with using(Pages(refuse=True)):
        result = task.run(eval=METRIC)
    assert result.steps == 6
    assert task.screen.count("no report was written (RuntimeError: a fault of the report's") == 4
    assert f"`finesight report {task.folder / 'run'}` makes one at any time" in task.screen
    assert not (task.folder / "run" / "report.html").exists()


def test_a_page_of_somebody_else_is_said_and_left_alone(task: Task) -> None:
    run = task.unfinished()
    (run / "report.html").write_text("precious")
    assert task.run(resume=True).steps == 6
    assert "is not a page that finesight made" in task.screen
    assert (run / "report.html").read_text() == "precious"


def test_a_run_that_died_before_its_page_gets_it_when_resumed(task: Task) -> None:
    task.run()
    page = task.folder / "run" / "report.html"
    page.unlink()
    task.run(resume=True)
    assert stands(page.read_text()) == "finished after 6 steps"


def test_no_run_no_report(tmp_path: Path) -> None:
    shown = io.StringIO()
    report(Run(tmp_path), Screen(Console(file=shown, width=200)))
    assert "no report was written (UserError: " in shown.getvalue()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def history(task: Task) -> list[dict[str, Any]]:
    task.run(eval=METRIC)
    return task.history()


def test_the_start_says_what_computes_on_what(history: list[dict[str, Any]]) -> None:
    start = history[0]
    assert (start["step"], start["steps"], start["workers"]) == (0, 6, 0)
    assert start["precision"] == "fp32"
    assert start["versions"]["torch"] == torch.__version__
    assert start["data"]["train"]["samples"] == 11
    assert start["data"]["eval"]["samples"] == 3
    assert len(start["data"]["train"]["fingerprint"]) == 64
    assert sum(start["spread"]["tokens"].values()) == 11
    assert sum(start["spread"]["patches"].values()) == 11
    assert Path(start["folder"]) == Path.cwd()
    assert start["prepared_s"] > 0
    json.dumps(start, allow_nan=False)


def test_measurements_say_how_long_they_took(history: list[dict[str, Any]]) -> None:
    seconds = [line["seconds"] for line in history if "held_out_loss" in line]
    assert len(seconds) == 4
    assert all(value > 0 for value in seconds)


def test_a_processor_has_a_name() -> None:
    assert f"{torch.get_num_threads()} threads" in device_name(torch.device("cpu"))
