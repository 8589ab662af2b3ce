"""Several runs on one page: what differs, how they score, and the same samples side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.evaluate.compare import aligned
from finesight.report import facts
from finesight.report.contrast import Cell, Row, contrast
from finesight.report.curves import Drawing, Series, draw, finite, smooth
from finesight.report.entries import Entry, cautions, read_entries
from finesight.report.figures import (
    LOSS,
    MEANINGS,
    WORDS,
    between,
    named,
    plain,
    remarks,
    signed,
    signed_between,
)
from finesight.report.formulas import Formulas
from finesight.report.histograms import Counts, half_octaves, histogram, read_counts
from finesight.report.language import Language, preferred, say, speaking
from finesight.report.page import render, write_page
from finesight.report.record import Line
from finesight.report.side_by_side import MOST, Samples, as_data, samples_of
from finesight.report.unlike import costs, counts_of, unlike

PAGE = "comparison.html"


@dataclass(frozen=True)
class Comparison:
    """Runs, the first of which the others are compared with."""

    entries: list[Entry]
    rows: list[Row]
    cautions: list[str]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "runs": [
                {
                    "path": str(entry.path),
                    "metric": entry.metric,
                    "step": entry.measured.get("step"),
                    "standing": entry.standing.kind if entry.standing else None,
                    "figures": {
                        row.name: _as_json(row.cells[number])
                        for row in self.rows
                        if row.cells[number].value is not None
                    },
                }
                for number, entry in enumerate(self.entries)
            ],
            "cautions": self.cautions,
        }

    def as_table(self) -> str:
        """The headline and the loss of each run, and how sure the differences are."""
        lines = [("run", "figure", "value", "difference", "95 % interval", "")]
        shown = [row for row in self.rows if row.headline or row.name == LOSS]
        for row in shown:
            for entry, cell in zip(self.entries, row.cells, strict=True):
                lines.append((entry.label, row.name, *_told(cell)))
        return "\n".join([aligned(lines, 2), *remarks(notes_of(shown))])


def notes_of(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield the notes of scores and of their differences, with the names of the scores."""
    for row in rows:
        for cell in row.cells:
            yield row.name, cell.note
            if cell.difference is not None:
                yield row.name, cell.difference.note


def compared(paths: Sequence[Path]) -> Comparison:
    """The runs and files of answers at the paths. Raises UserError as `read_entries` does."""
    entries = read_entries(paths)
    first, *others = entries
    said = [text for other in others for text in cautions(first, other)]
    return Comparison(entries, contrast(entries), list(dict.fromkeys(said)))


def write_comparison(
    paths: Sequence[Path], out: Path, language: Language | None = None
) -> Comparison:
    """Write the page of a comparison to `out`, in `language`, by default that of the user's locale.
    Raises UserError for what cannot be compared, and for no place to write."""
    with speaking(language or preferred()):
        found = compared(paths)
        write_page(out, compare_page(found))
    return found


def compare_page(comparison: Comparison, most: int = MOST) -> str:
    """The page as HTML, in the language in force."""
    entries = comparison.entries
    samples = samples_of(entries, most)
    latex = any(entry.metric == "latex" for entry in entries)
    examples = as_data(samples, _folders(entries), Formulas() if latex else None)
    charts = [chart for chart in _charts(entries) if chart is not None]
    spread = [chart for chart in _histograms(entries) if chart is not None]
    labels = [entry.label for entry in entries]
    return render(
        "compare",
        data={
            **examples,
            "charts": [chart.data for chart in (*charts, *spread)],
            "runs": labels,
            "figure": named(samples.figure),
        },
        assets=["results"],
        title=say("Comparison of {} runs", len(entries)),
        entries=entries,
        labels=labels,
        models=[facts.model_name(entry.record) if entry.record else "" for entry in entries],
        rows=comparison.rows,
        cautions=comparison.cautions,
        unlike=unlike(entries),
        costs=costs(entries),
        charts=charts,
        histograms=spread,
        samples=samples,
        note=_note(samples),
        named_figure=named(samples.figure) or say("score"),
        notes=remarks(notes_of(comparison.rows)),
        meaning={row.name: say(MEANINGS.get(row.name, "")) for row in comparison.rows},
        verdicts={kind: say(text) for kind, text in WORDS.items()},
        figure=plain,
        named=named,
        between=between,
        signed=signed,
        signed_between=signed_between,
    )


def _note(samples: Samples) -> str:
    text = (
        "{:,} held-out samples, by the {} of each answer: those on which the runs differ most come"
        " first."
    )
    said = say(text, samples.total, named(samples.figure))
    left = samples.total - len(samples.shown)
    return said + (say(" {:,} more are not on this page.", left) if left else "")


def _charts(entries: Sequence[Entry]) -> list[Drawing | None]:
    """Losses and headline of all runs, each over its own steps."""
    training, held_out, scores = [], [], []
    for entry in entries:
        if entry.record is None:
            continue
        steps, measured = entry.record.steps, entry.record.measured
        losses = finite((line.get("step"), line.get("loss")) for line in steps)
        training.append(Series(entry.label, smooth(losses) or losses))
        found = finite((line.get("step"), line.get(LOSS)) for line in measured)
        held_out.append(Series(entry.label, found, "marks"))
        score = finite((line.get("step"), _headline(entry, line)) for line in measured)
        scores.append(Series(entry.label, score, "marks"))
    headlines = [str(one.measured.get("headline")) for one in entries if one.record]
    charts = [
        draw(say("Loss"), training, say("training, smoothed")),
        draw(say("Held-out loss"), held_out, say("nats per learned token")),
    ]
    if len(set(headlines)) == 1:
        charts.append(draw(named(headlines[0]), scores, say("held-out")))
    return charts


def _headline(entry: Entry, line: Line) -> object:
    scores = line.get("scores")
    return scores.get(entry.measured.get("headline")) if isinstance(scores, dict) else None


def _histograms(entries: Sequence[Entry]) -> list[Drawing | None]:
    """Tokens of samples and of answers, sizes of pictures."""
    runs = [entry for entry in entries if entry.record is not None]

    def noted(name: str) -> list[tuple[str, Counts]]:
        return [
            (entry.label, read_counts(counts_of(entry.record, name)))
            for entry in runs
            if entry.record is not None
        ]

    said = [(entry.label, half_octaves(_tokens(entry))) for entry in entries]
    return [
        histogram(say("Tokens of a sample"), say("share of training samples"), noted("tokens")),
        histogram(
            say("Size of a picture"),
            say("in patches, as the model sees it; share of training pictures"),
            noted("patches"),
        ),
        histogram(say("Tokens of an answer"), say("share of held-out samples"), said),
    ]


def _tokens(entry: Entry) -> list[int]:
    found = (one.record.get("tokens") for one in entry.answers.values())
    return [count for count in found if isinstance(count, int)]


def _folders(entries: Sequence[Entry]) -> list[Path]:
    """Where paths of pictures may start: here, where the runs were started, and beside answers."""
    started = [
        line.get("folder") for entry in entries if entry.record for line in entry.record.starts
    ]
    beside = [entry.path.parent for entry in entries if entry.record is None]
    return [Path(), *(Path(folder) for folder in started if isinstance(folder, str)), *beside]


def _as_json(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = {"value": cell.value, "interval": cell.ends}
    note = cell.note or (cell.difference.note if cell.difference else "")
    if note:
        found["note"] = note
    if cell.difference is not None:
        found |= {
            "difference": cell.change,
            "difference_interval": cell.change_ends,
            "verdict": cell.difference.verdict,
        }
    return found


def _told(cell: Cell) -> tuple[str, str, str, str]:
    value = "-" if cell.value is None else f"{cell.value:.4f}"
    if cell.difference is None or cell.change is None:
        return value, "", "", ""
    one = cell.difference
    ends = "" if one.low is None else f"{one.low:+.4f} to {one.high:+.4f}"
    return value, f"{cell.change:+.4f}", ends, one.verdict
