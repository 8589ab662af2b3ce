"""The report of a run: one page that says what was done, whether it helped, and how to use it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    rows,
    sentence,
    signed,
    signed_between,
)
from finesight.report.formulas import Formulas
from finesight.report.gallery import Gallery
from finesight.report.page import render, write_page
from finesight.report.record import Line, Record, read_record
from finesight.report.run_charts import charts

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


def write_report(run: Path, out: Path | None = None, most: int = MOST_EXAMPLES) -> Path:
    """Write the report of the run in folder `run` to `out`, by default `report.html` within it.

    At most `most` examples are shown. Raises UserError when there is no run, or no place to write.
    """
    target = out or run / names.REPORT
    write_page(target, run_page(run, most))
    return target


def run_page(run: Path, most: int = MOST_EXAMPLES) -> str:
    """The report as HTML, from what is in the run's folder so far."""
    record = read_record(run)
    examples = _examples(record, most)
    formulas = Formulas() if _metric(record) == "latex" else None
    gallery = Gallery(_folders(record), formulas).data(examples.shown)
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
        },
        title=record.folder.resolve().name,
        record=record,
        measurements=measurements,
        charts=drawings,
        boxed=any(one["boxes"] for one in gallery["examples"]),
        formulas_missing=formulas is not None and not formulas.installed,
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
    return f"The {named(name)} was best after step {best:,}: {plain(up * values[best])}."


def _details(measured: Line) -> dict[str, Any]:
    """What a task says beyond figures: classes that are taken for others most often, and fields,
    the worst first."""
    details = measured.get("details")
    known: Line = details if isinstance(details, dict) else {}
    taken = [row for row in known.get("confusion", ()) if row[0] != row[1]]
    fields = sorted(known.get("fields", {}).items(), key=lambda pair: pair[1]["f1"])
    return {"taken": taken[:MOST_DETAILS], "fields": fields[:MOST_DETAILS]}


def _seen(record: Record, examples: Examples) -> dict[str, Any]:
    """Values for the examples."""
    words = KIND_WORDS if examples.paired else ONCE_WORDS
    shown = Counter(example.kind for example in examples.shown)
    return {
        "examples": examples,
        "kinds": list(words.items()),
        "shown_counts": {kind: shown[kind] for kind in KINDS},
        "examples_note": _examples_note(examples, words),
    }


def _examples_note(examples: Examples, words: dict[Kind, str]) -> str:
    """How examples are told apart, and which are not shown."""
    note = f"{examples.total:,} held-out samples"
    if examples.figure and examples.paired:
        note += (
            f", told apart by the {named(examples.figure)} of each: right is full marks,"
            " wrong is anything less. The greatest changes come first"
        )
    elif examples.figure:
        note += f", right where the {named(examples.figure)} is at full marks"
    left = [f"{count:,} that {words[kind]}" for kind, count in examples.left_out().items()]
    kept_in = "all of them are in the run's folder"
    return note + (f". Not on this page: {facts.listed(left)}; {kept_in}." if left else ".")


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
            (True, True): f"yes: gradients reached {reached:,}",
            (True, False): "no: it should have moved",
            (False, True): "yes: every bit is as it was",
            (False, False): "no: it should have stayed",
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
    named = [line["headline"] for line in record.measured if line.get("headline")]
    files = record.answers
    first = files[0] if files and files[0].stem == "before" else None
    last = files[-1] if files and files[-1] != first else None
    return read_examples(first, last, named[-1] if named else None, most)


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
        found.append("after" if at_end else f"after step {step:,}" if step else "before")
    return found


def _differences(record: Record, compared: Sequence[Line]) -> dict[str, Difference]:
    """How the answers of the last measurement differ from those of the first, by figure: as the
    run says or, before its end, as far as its answers' scores say it."""
    told = (record.result or {}).get("differences")
    if told:
        return {line["name"]: Difference(**line) for line in told if isinstance(line, dict)}
    files = record.answers
    if len(files) < 2 or len(compared) < 2:
        return {}
    then, since = (figures_of(line) for line in compared)
    return differences(files[0], files[-1], then, since)


def _folders(record: Record) -> list[Path]:
    """Where paths of pictures may start: here, and where the run was started."""
    started: Any = [line.get("folder") for line in record.starts]
    return [Path(), *(Path(folder) for folder in started if isinstance(folder, str))]
