"""A run's figures, pictures and alerts to every tracker that the recipe lists, never in its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from finesight.bounded_files import read_bytes
from finesight.config import Recipe, Tracker
from finesight.errors import Interrupted, UserError
from finesight.run_folder import TRACK
from finesight.storage import write_file
from finesight.track.lane import Gone, Lane
from finesight.track.records import (
    Alert,
    Begin,
    Begun,
    End,
    Figures,
    Level,
    Picture,
    Pictures,
    Record,
    Row,
    State,
)

Say = Callable[[str], None]

IDS = "ids.json"

WAIT: dict[State, float] = {"finished": 60.0, "failed": 20.0, "interrupted": 20.0}
"""Seconds that all trackers together get to deliver what is left, when the run has ended."""

PATIENT = 2.0
"""Seconds of it that pass unmentioned."""


class Kept(BaseModel):
    """What a tracker called the run: a resumed one goes on under it, at the same place."""

    tracker: Tracker
    id: str


_KEPT: TypeAdapter[list[Kept]] = TypeAdapter(list[Kept])


class Tracking:
    """The trackers of a run. No method waits for any of them, but for the end; what they have to
    tell is told at the next call."""

    def __init__(self, recipe: Recipe, run: Path, step: int, say: Say) -> None:
        self._recipe, self._run, self._step, self._say = recipe, run, step, say
        self._folder = run / TRACK
        self._begun = False
        self._kept = _read(self._folder / IDS, say) if recipe.track else []
        self._lanes = [
            (tracker, Lane(tracker.kind, self._folder / f"{tracker.kind}.log"))
            for tracker in recipe.track
        ]

    @property
    def on(self) -> bool:
        """Whether there is anybody left to tell."""
        return any(not lane.wait(0) for _, lane in self._lanes)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """The run begins or goes on: with the recipe in force, and these facts of this run."""
        self._begun = True
        settings = self._recipe.model_dump(mode="json", exclude={"track"}) | {"run": dict(facts)}
        for tracker, lane in self._lanes:
            lane.put(
                Begin(
                    tracker=tracker,
                    name=self._run.resolve().name,
                    folder=self._folder.resolve() / tracker.kind,
                    settings=settings,
                    step=self._step,
                    id=self.known(tracker),
                )
            )
        self._hear()

    def known(self, tracker: Tracker) -> str | None:
        """What this tracker called the run, if it began there."""
        return next((kept.id for kept in self._kept if kept.tracker == tracker), None)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Figures as of `step` finished steps."""
        self._step = step
        self._put(Figures(rows=(Row(step=step, values=dict(values)),)))

    def pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """What was answered after `step` steps."""
        if pictures:
            self._put(Pictures(step=step, pictures=tuple(pictures)))

    def alert(self, level: Level, title: str, text: str) -> None:
        """Something to hear of now, as of the step of the last figures."""
        self._put(Alert(step=self._step, level=level, title=title, text=text))

    def end(self, end: End) -> None:
        """Let all trackers deliver what is left, for a bounded time, and say what was not."""
        if not self._begun:
            for _, lane in self._lanes:
                lane.kill()
            return
        for _, lane in self._lanes:
            lane.put(end)
        start, seconds = time.monotonic(), WAIT[end.state]
        self._wait(start + min(PATIENT, seconds))
        if waiting := [tracker.kind for tracker, lane in self._lanes if not lane.wait(0)]:
            self._say(f"waiting for {', '.join(waiting)}, {seconds:g} s at most")
        self._wait(start + seconds)
        for _, lane in self._lanes:
            lane.kill()
        self._hear()
        for tracker, lane in self._lanes:
            if lane.delivered < lane.taken:
                self._say(
                    f"{tracker.kind}: {lane.taken - lane.delivered} of {lane.taken} records were"
                    " not delivered; metrics.jsonl has every figure"
                )

    def _wait(self, until: float) -> None:
        for _, lane in self._lanes:
            lane.wait(max(0.0, until - time.monotonic()))

    def _put(self, record: Record) -> None:
        if self._begun:
            for _, lane in self._lanes:
                lane.put(record)
            self._hear()

    def _hear(self) -> None:
        """Tell people, from their own thread, what trackers have told."""
        for tracker, lane in self._lanes:
            for told in lane.heard():
                match told:
                    case Begun():
                        self._say(told.told)
                        self._keep(tracker, told.id)
                    case Gone():
                        self._say(f"{tracker.kind}: {told.told}")

    def _keep(self, tracker: Tracker, name: str | None) -> None:
        if name is None:
            return
        others = [kept for kept in self._kept if kept.tracker.kind != tracker.kind]
        self._kept = [*others, Kept(tracker=tracker, id=name)]
        try:
            write_file(self._folder / IDS, _KEPT.dump_json(self._kept, indent=1) + b"\n")
        except (UserError, OSError) as error:
            self._say(f"{tracker.kind}: a resumed run will be a new one there ({error})")


@contextmanager
def tracked(recipe: Recipe, run: Path, step: int, say: Say) -> Iterator[Tracking]:
    """The trackers that the recipe lists, of the run in folder `run`, which has finished `step`
    steps; at the end of the block they are told how it ended."""
    tracking = Tracking(recipe, run, step, say)
    try:
        yield tracking
    except Interrupted as stop:
        tracking.end(End(state="interrupted", reason=str(stop)))
        raise
    except BaseException as error:
        what = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        tracking.alert("error", "run stopped", what)
        tracking.end(End(state="failed", reason=what))
        raise
    tracking.end(End(state="finished"))


def _read(path: Path, say: Say) -> list[Kept]:
    if not path.exists():
        return []
    try:
        return _KEPT.validate_json(read_bytes(path, expected="the runs of trackers"))
    except (UserError, ValidationError) as error:
        say(f"{path} cannot be read: trackers begin new runs ({type(error).__name__})")
        return []
