"""The report of a run: one page that says what was done, whether it helped, and how to use it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from finesight import run_folder as names
from finesight.evaluate.compare import Difference
from finesight.evaluate.score import LOWER_IS_BETTER
from finesight.report import facts
from finesight.report.differences import differences
from finesight.report.examples import KINDS, Examples, Kind, read_examples
from finesight.report.figures import (
    LOSS,
    Row,
    between,
    figures_of,
    named,
    plain,
    remarks,
    rows,
    sentence,
    signed,
    signed_between,
)
from finesight.report.formulas import Formulas
from finesight.report.gallery import Data, Gallery, Thumbnails
from finesight.report.language import Language, preferred, say, speaking
from finesight.report.page import render, write_page
from finesight.report.record import Line, Record, read_record
from finesight.report.run_charts import charts
from finesight.report.standing import standing

MOST_EXAMPLES = 2000
"""Examples in the report of a finished run: with thumbnails some 20 MB, which browsers open in
one or two seconds."""

MOST_ON_THE_WAY = 200
"""Examples in a report that is written while the run goes on."""

MOST_DETAILS = 20
"""Rows of a table of classes or fields."""

KIND_WORDS: dict[Kind, str] = {
    "better": "got better",
    "worse": "got worse",
    "wrong": "stayed wrong",
    "right": "stayed right",
}
ONCE_WORDS: dict[Kind, str] = {"wrong": "wrong", "right": "right"}


@dataclass
class Live:
    """The pages of a run that goes on: a new one comes every `again` seconds, examples are drawn
    anew only where there are other answers, and their pictures once."""

    again: float
    _key: Hashable = None
    _thumbnails: Thumbnails = field(default_factory=dict)
    _drawn: tuple[Examples, Data] = field(default_factory=lambda: (Examples([], {}, "", False), {}))

    def drawn(self, record: Record, most: int) -> tuple[Examples, Data]:
        """The examples of a run's answers, and what the page shows of them."""
        about = [(str(path), path.stat().st_mtime_ns) for path in record.answers]
        key = most, _headline(record), tuple(about)
        if key != self._key:
            self._drawn = _drawn(record, most, self._thumbnails)
            self._key = key
        return self._drawn


def write_report(
    run: Path,
    out: Path | None = None,
    most: int = MOST_EXAMPLES,
    language: Language | None = None,
    live: Live | None = None,
) -> Path:
    """Write the report of the run in folder `run` to `out`, by default `report.html` within it, in
    `language`, by default that of the user's locale.

    At most `most` examples are shown. `live` comes from the process that trains. Raises UserError
    when there is no run, or no place to write.
    """
    target = out or run / names.REPORT
    with speaking(language or preferred()):
        write_page(target, run_page(run, most, live))
    return target


def run_page(run: Path, most: int = MOST_EXAMPLES, live: Live | None = None) -> str:
    """The report as HTML, from what is in the run's folder so far, in the language in force."""
    record = read_record(run)
    examples, gallery = live.drawn(record, most) if live else _drawn(record, most)
    now, stands = datetime.now(UTC), standing(record, going=live is not None)
    drawings = charts(record)
    compared = _compared(record)
    measurements = _called(record, compared)
    return render(
        "run",
        data={
            **gallery,
            "charts": [drawing.data for drawing in drawings],
            "figure": named(examples.figure),
            "measurements": measurements,
            "live": {"written": now.timestamp(), "again": live.again if live else 0.0}
            if stands.kind == "going"
            else None,
        },
        assets=["results"],
        standing=stands,
        written=f"{now:%Y-%m-%d %H:%M:%S} UTC",
        live=live,
        title=record.folder.resolve().name,
        record=record,
        measurements=measurements,
        charts=drawings,
        boxed=any(one["boxes"] for one in gallery["examples"]),
        formulas_missing=_metric(record) == "latex" and not Formulas().installed,
        again=facts.command("report", str(record.folder)),
        **_result(record, compared),
        **_seen(record, examples),
        **_told(record, _first_question(gallery["examples"])),
    )


def _result(record: Record, compared: Sequence[Line]) -> dict[str, Any]:
    """Values for the section of the same name."""
    table = rows(compared, _differences(record, compared))
    row = next((row for row in table if row.headline), table[-1] if table else None)
    known = any(row.before_ends or row.after_ends or row.change_ends for row in table)
    return {
        "table": table,
        "row": row,
        "sentence": sentence(row) if row else "",
        "best": [_best(record, name, compared[-1]) for name in _chief(row)],
        "intervals": known,
        "notes": remarks((row.name, note) for row in table for note in row.notes),
        **_details(compared[-1] if compared else {}),
        "figure": plain,
        "named": named,
        "between": between,
        "signed": signed,
        "signed_between": signed_between,
    }


def _chief(row: Row | None) -> list[str]:
    """The figures to judge a run by."""
    return list(dict.fromkeys([row.name, LOSS])) if row else []


def _best(record: Record, name: str, shown: Line) -> str:
    """When a figure was better than at the end, if it was: training that went on for too long."""
    up = -1 if name in LOWER_IS_BETTER else 1
    values = {
        step: up * value
        for line in (*record.measured, shown)
        if (step := int(line.get("step") or 0))
        and (value := figures_of(line).get(name)) is not None
    }
    now = figures_of(shown).get(name)
    best = max(values, key=values.__getitem__, default=0)
    if now is None or not best or values[best] <= up * now:
        return ""
    text = "The {} was best after step {:,}: {}."
    return say(text, named(name), best, plain(up * values[best]))


def _details(measured: Line) -> dict[str, Any]:
    """What a task says beyond figures: classes that are taken for others most often, and fields,
    the worst first."""
    try:
        known = _Details.model_validate(measured.get("details") or {})
    except ValidationError:
        known = _Details()
    taken = [row for row in known.confusion if row[0] != row[1]]
    fields = sorted(known.fields.items(), key=lambda pair: pair[1].f1)
    return {"taken": taken[:MOST_DETAILS], "fields": fields[:MOST_DETAILS]}


class _FieldFigures(BaseModel):
    f1: float
    precision: float
    recall: float


class _Details(BaseModel):
    """Details of a measurement that the page shows."""

    confusion: list[tuple[str, str, int]] = []
    fields: dict[str, _FieldFigures] = {}


_DIFFERENCES: TypeAdapter[list[Difference]] = TypeAdapter(list[Difference])


def _seen(record: Record, examples: Examples) -> dict[str, Any]:
    """Values for the examples."""
    words = KIND_WORDS if examples.paired else ONCE_WORDS
    shown = Counter(example.kind for example in examples.shown)
    return {
        "examples": examples,
        "kinds": [(kind, say(label)) for kind, label in words.items()],
        "shown_counts": {kind: shown[kind] for kind in KINDS},
        "examples_note": _examples_note(examples, words),
    }


def _examples_note(examples: Examples, words: dict[Kind, str]) -> str:
    """How examples are told apart, and which are not shown."""
    text = "{:,} held-out samples."
    if examples.figure and examples.paired:
        text = (
            "{:,} held-out samples, told apart by the {} of each: right is full marks, wrong is"
            " anything less. The greatest changes come first."
        )
    elif examples.figure:
        text = "{:,} held-out samples, right where the {} is at full marks."
    note = say(text, examples.total, named(examples.figure))
    left = [
        say("{:,} that {}", count, say(words[kind])) for kind, count in examples.left_out().items()
    ]
    text = " Not on this page: {}; all of them are in the run's folder."
    return note + (say(text, facts.listed(left)) if left else "")


def _told(record: Record, question: str) -> dict[str, Any]:
    """Values for the lead and for the last sections."""
    return {
        "summary": facts.what_was_done(record),
        "parts": [_Part.read(row) for row in record.moved or ()],
        "phases": facts.phases(record),
        "cost": facts.cost(record),
        "remarks": facts.remarks(record),
        "left": facts.left_out(record),
        "commands": facts.commands(record, question),
        "versions": facts.versions(record),
        "checksums": facts.checksums(record),
    }


@dataclass(frozen=True)
class _Part:
    """A line of `moved.json` as it is shown."""

    name: str
    trained: bool
    tensors: str
    numbers: str
    changed: str
    relative: str
    holds: bool
    check: str

    @classmethod
    def read(cls, line: Line) -> _Part:
        trained, changed = bool(line.get("trained")), int(line.get("changed") or 0)
        reached, relative = int(line.get("reached") or 0), line.get("relative")
        holds = bool(changed and reached) if trained else not changed
        check = {
            (True, True): say("yes: gradients reached {:,}", reached),
            (True, False): say("no: it should have moved"),
            (False, True): say("yes: every bit is as it was"),
            (False, False): say("no: it should have stayed"),
        }
        return cls(
            name=str(line.get("part")),
            trained=trained,
            tensors=f"{int(line.get('tensors') or 0):,}",
            numbers=f"{int(line.get('numbers') or 0):,}",
            changed=f"{changed:,}",
            relative=f"{100 * relative:.3g} %" if trained and relative is not None else "",
            holds=holds,
            check=check[trained, holds],
        )


def _first_question(examples: list[Any]) -> str:
    return examples[0]["question"] if examples else ""


def _metric(record: Record) -> str | None:
    settings = record.recipe.get("eval")
    return settings.get("metric") if isinstance(settings, dict) else None


def _examples(record: Record, most: int) -> Examples:
    """The first answers beside the last; of a run that was only measured once, these alone."""
    files = record.answers
    first = files[0] if files and files[0].stem == "before" else None
    last = files[-1] if files and files[-1] != first else None
    return read_examples(first, last, _headline(record), most)


def _drawn(record: Record, most: int, known: Thumbnails | None = None) -> tuple[Examples, Data]:
    examples = _examples(record, most)
    formulas = Formulas() if _metric(record) == "latex" else None
    return examples, Gallery(_folders(record), formulas, known).data(examples.shown)


def _headline(record: Record) -> str | None:
    named = [line["headline"] for line in record.measured if line.get("headline")]
    return str(named[-1]) if named else None


def _compared(record: Record) -> list[Line]:
    """The measurement before the first step and that of the weights that are kept, or the newest;
    fewer when fewer were made."""
    if record.result is not None:
        before, after = record.result.get("before"), record.result.get("after")
        if isinstance(before, dict) and isinstance(after, dict):
            return [before, after]
    return (
        [record.measured[0], record.measured[-1]] if len(record.measured) > 1 else record.measured
    )


def _called(record: Record, compared: Sequence[Line]) -> list[str]:
    """What the measurements are called."""
    found = []
    for line in compared:
        step = line.get("step") or 0
        at_end = record.result is not None and step == facts.done(record)
        later = say("after step {:,}", step) if step else say("before")
        found.append(say("after") if at_end else later)
    return found


def _differences(record: Record, compared: Sequence[Line]) -> dict[str, Difference]:
    """How the answers of the last measurement differ from those of the first, by figure: as the
    run says or, before its end, as far as its answers' scores say it."""
    told = (record.result or {}).get("differences")
    with suppress(ValidationError):
        if found := _DIFFERENCES.validate_python(told or []):
            return {one.name: one for one in found}
    files = record.answers
    if len(files) < 2 or len(compared) < 2:
        return {}
    then, since = (figures_of(line) for line in compared)
    return differences(files[0], files[-1], then, since)


def _folders(record: Record) -> list[Path]:
    """Where paths of pictures may start: here, and where the run was started."""
    started: Any = [line.get("folder") for line in record.starts]
    return [Path(), *(Path(folder) for folder in started if isinstance(folder, str))]
