"""One tracker's queue, thread and process, with limits of tenths of a second."""

from __future__ import annotations

import io
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broken_trackers import plant

from finesight.config import Tracker
from finesight.track import child, lane
from finesight.track.lane import Gone, Lane
from finesight.track.records import Alert, Begin, Begun, End, Figures, Row

LONG = 60.0


def begin(folder: Path) -> Begin:
    tracker = Tracker(kind="swanlab", address="offline")
    return Begin(tracker=tracker, name="x", folder=folder / "swanlab", settings={})


def figures(step: int, loss: float = 1.0) -> Figures:
    return Figures(rows=(Row(step=step, values={"loss": loss}),))


def hanging(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> Lane:
    """One that answers nothing, and was given the figures of so many steps."""
    plant(monkeypatch, folder, "hangs")
    one = Lane("swanlab", folder / "log")
    one.put(begin(folder))
    for step in range(steps):
        one.put(figures(step))
    return one


def test_one_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "CALL", 0.3)
    one = hanging(tmp_path, monkeypatch, 5)
    assert one.wait(LONG)
    assert one.delivered < one.taken == 6
    assert list(one.heard())[-1] == Gone("no answer for 0.3 s; the run goes on without it")
    one.put(End(state="finished"))
    assert one.taken == 7


def test_records_beyond_the_bound_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "MOST", 3)
    one = hanging(tmp_path, monkeypatch, 50)
    one.kill()
    assert one.wait(0)
    assert one.taken == 51
    assert one.delivered <= 1
    assert list(one.heard())[-1] == Gone("was not done yet, and was ended")


def test_figures_that_wait_go_together_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Still(Lane):
        """One that delivers nothing by itself."""

        def _serve(self) -> None:
            pass

    monkeypatch.setattr(lane, "TOGETHER", 3)
    one = Still("swanlab", tmp_path / "log")
    alert = Alert(step=5, level="info", title="t", text="t")
    given = [begin(tmp_path), *map(figures, range(5)), alert, figures(6), End(state="finished")]
    for record in given:
        one.put(record)
    sent = list(one._together())
    steps = [[row.step for row in r.rows] if isinstance(r, Figures) else r.type for r in sent]
    assert steps == ["begin", [0, 1, 2], [3, 4], "alert", [6], "end"]


def test_one_that_works_takes_all_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "raises")
    one = Lane("swanlab", tmp_path / "log")
    one.put(begin(tmp_path))
    one.put(figures(1, float("nan")))
    one.put(End(state="finished"))
    assert one.wait(LONG)
    assert one.delivered == one.taken == 3
    (begun,) = one.heard()
    assert isinstance(begun, Begun)
    assert begun.id == "fake"
    one.kill()
    assert list(one.heard()) == [], "one that has ended is not ended again"


def test_no_process_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane.sys, "executable", str(tmp_path / "no-python"))
    one = Lane("swanlab", tmp_path / "log")
    one.put(begin(tmp_path))
    assert one.wait(LONG)
    (gone,) = one.heard()
    assert "No such file" in str(gone)


PARENT = """
import os, signal, sys
from pathlib import Path
from finesight.config import Tracker
from finesight.track.lane import Lane
from finesight.track.records import Begin

folder = Path(sys.argv[1])
one = Lane("swanlab", folder / "log")
tracker = Tracker(kind="swanlab", address="offline")
one.put(Begin(tracker=tracker, name="x", folder=folder / "swanlab", settings={}))
while not list(one.heard()):
    assert not one.wait(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_tracker_of_a_run_that_is_killed_closes_it_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "raises")
    killed = subprocess.run([sys.executable, "-c", PARENT, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    closed = tmp_path / "swanlab" / "finished-crashed"
    for _ in range(round(LONG / 0.02)):
        if closed.exists():
            return
        time.sleep(0.02)
    raise AssertionError("nobody has closed it")


def test_a_tracker_outlives_the_signals_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "raises")
    one = Lane("swanlab", tmp_path / "log")
    one.put(begin(tmp_path))
    while not (told := list(one.heard())):
        assert not one.wait(0.01)
    assert isinstance(told[0], Begun)
    assert one._process is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        one._process.send_signal(number)
    one.put(End(state="interrupted"))
    assert one.wait(LONG)
    assert one.delivered == 2
    assert (tmp_path / "swanlab" / "finished-aborted").exists()


def test_a_tracker_that_hangs_when_its_run_has_died_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(child, "ALONE", 0.01)
    monkeypatch.setattr(child.os, "_exit", ended.append)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    child._read(io.BytesIO(b"one\ntwo\n"), lines)
    assert [lines.get() for _ in range(3)] == [b"one\n", b"two\n", b""]
    assert ended == [1]
