"""Metrics before and after: how much each moved, and whether that is more than chance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from finesight.evaluate.compare import ONE_SUM, Difference, unsampled
from finesight.evaluate.score import LOWER_IS_BETTER
from finesight.report.language import say
from finesight.report.record import Line, is_finite

Verdict = Literal["better", "worse", "unsure", "same", ""]

WORDS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "unsure": "no clear change",
    "same": "no change",
    "": "",
}

LOSS = "held_out_loss"

MEANINGS = {
    LOSS: "surprise at the right answers, in nats per token",
    "similarity": "share of a text that need not be edited",
    "exact": "answers that are right throughout",
    "exact_folded": "the same, whatever the case and width of letters",
    "edit_distance": "tokens to edit in an answer",
    "cer": "characters to edit, over those of the right texts",
    "wer": "words to edit, over those of the right texts",
    "rendered": "formulas that look right when drawn",
    "rendered_share": "pairs of formulas that could be drawn",
    "stopped": "answers that ended by themselves",
    "accuracy": "answers that name the right class",
    "bleu": "runs of up to four tokens that agree",
    "f1": "words, classes or fields that agree: the mean of precision and recall",
    "ap": "average precision over ten overlaps, 0.5 to 0.95",
    "accuracy_at_0.5": "boxes that overlap the right ones by half or more",
    "accuracy_at_0.75": "boxes that overlap the right ones by three quarters or more",
    "mean_iou": "overlap with the right boxes",
    "parse_rate": "answers that could be read",
    "anls": "likeness to the right text, 0 where it is below a half",
    "cider_d": "agreement with people's captions, rare words counting more",
    "rouge_l": "longest common sequence of words",
}
"""What figures say, where their names do not."""

NAMES = {
    LOSS: "held-out loss",
    "accuracy_at_0.5": "accuracy at overlap 0.5",
    "accuracy_at_0.75": "accuracy at overlap 0.75",
    "mean_iou": "mean overlap (IoU)",
    "parse_rate": "readable answers",
    "parsed": "readable",
    "iou": "overlap (IoU)",
    "hit": "hit at overlap 0.5",
    "hit_at_0.75": "hit at overlap 0.75",
    "f1": "F1",
    "f1_macro": "F1, mean of the classes or fields",
    "f1_at_0.5": "F1 at overlap 0.5",
    "precision_at_0.5": "precision at overlap 0.5",
    "recall_at_0.5": "recall at overlap 0.5",
    "ap": "AP",
    "ap_50": "AP at overlap 0.5",
    "ap_75": "AP at overlap 0.75",
    "exact": "exactly right",
    "exact_folded": "right but for case and width",
    "edit_distance": "edit distance",
    "cer": "CER",
    "wer": "WER",
    "bleu": "BLEU",
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "cider_d": "CIDEr-D",
    "rouge_l": "ROUGE-L",
    "anls": "ANLS",
    "rendered": "rendered alike",
    "rendered_share": "share that could be rendered",
    "stopped": "finished answers",
}
"""Figures as people call them; those of a user's own metric keep their names."""

Ends = tuple[float, float]


class Judged(ABC):
    """A figure that may have a difference from another one, and what that means."""

    difference: Difference | None

    @property
    @abstractmethod
    def change(self) -> float | None:
        """How much more it is."""

    @property
    def change_ends(self) -> Ends | None:
        """The 95 % interval of the difference."""
        one = self.difference
        return None if one is None or one.low is None or one.high is None else (one.low, one.high)

    @property
    def verdict(self) -> Verdict:
        """As the comparison has it."""
        if self.difference is None:
            return ""
        if self.change == 0:
            return "same"
        told = self.difference.verdict
        return told if told in ("better", "worse") else "unsure"


@dataclass(frozen=True)
class Row(Judged):
    """A metric: its value before and after with 95 % intervals, the difference with its own, and
    what that means. What is not known is None. `notes` say why an interval is missing, or warn."""

    name: str
    headline: bool
    lower: bool
    before: float | None
    before_ends: Ends | None
    after: float | None
    after_ends: Ends | None
    difference: Difference | None
    notes: tuple[str, ...] = ()

    @property
    def change(self) -> float | None:
        """After less before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def meaning(self) -> str:
        """What the figure says, and which way is up."""
        up = say("lower is better" if self.lower else "higher is better")
        return say("{}; {}", say(MEANINGS[self.name]), up) if self.name in MEANINGS else up

    @property
    def words(self) -> str:
        """The verdict in words."""
        return say(WORDS[self.verdict])


def rows(measured: Sequence[Line], differences: Mapping[str, Difference]) -> list[Row]:
    """All figures of no measurement, one or two, the headline first and the loss last. What
    `differences` does not know is told by the figures alone."""
    if not measured:
        return []
    before, after = measured[0], measured[1] if len(measured) > 1 else {}
    old, new = figures_of(before), figures_of(after)
    headline = (after or before).get("headline")
    order = [*([headline] if headline else []), *old, *new]
    names = [name for name in dict.fromkeys(order) if name != LOSS]
    found = []
    for name in (*names, LOSS):
        then, now = old.get(name), new.get(name)
        difference = differences.get(name)
        if difference is None and then is not None and now is not None:
            difference = unsampled(name, then, now, ONE_SUM if name == LOSS else "")
        ends = [interval_of(line, name) for line in (before, after)]
        found.append(
            Row(
                name,
                name == headline,
                name in LOWER_IS_BETTER,
                then,
                ends[0],
                now,
                ends[1],
                difference,
                (
                    *(note_of(line, name) for line in (before, after)),
                    difference.note if difference else "",
                ),
            )
        )
    return found


def named(figure: str) -> str:
    """What people call a figure."""
    return say(NAMES.get(figure, figure))


def figures_of(line: Line) -> dict[str, float]:
    """All figures of a measurement that are finite numbers, its loss among them."""
    scores = line.get("scores")
    both = {**(scores if isinstance(scores, dict) else {}), LOSS: line.get(LOSS)}
    return {str(name): float(value) for name, value in both.items() if is_finite(value)}


def interval_of(line: Line, name: str) -> Ends | None:
    """The 95 % interval that a measurement has for one of its figures."""
    intervals = line.get("intervals")
    return ends_of(intervals.get(name)) if isinstance(intervals, dict) else None


def note_of(line: Line, name: str) -> str:
    """Return why a score of a measurement has no interval, or a warning about it."""
    notes = line.get("notes")
    return str(notes.get(name, "")) if isinstance(notes, dict) else ""


def remarks(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Return a sentence for each note, with the scores that it is about.

    Args:
        notes: Names of scores, each with a note or an empty string.
    """
    about: dict[str, dict[str, None]] = {}
    for name, note in notes:
        about.setdefault(note, {})[named(name)] = None
    return [
        say("{}: {}", say(", ").join(names), say(note)) for note, names in about.items() if note
    ]


def ends_of(content: object) -> Ends | None:
    """Two finite numbers as JSON holds them."""
    if not isinstance(content, Sequence) or isinstance(content, str) or len(content) != 2:
        return None
    low, high = content
    return (float(low), float(high)) if is_finite(low) and is_finite(high) else None


def sentence(row: Row) -> str:
    """What became of a figure, and how sure that is."""
    name = named(row.name)
    if row.before is None and row.after is None:
        return say("The {} could not be told from these answers.", name)
    if row.change is None:
        return say("The {} was measured once: there is nothing yet to compare it with.", name)
    if row.change == 0:
        return say("The {} is what it was.", name)
    moved = say(
        "The {} rose by {}" if row.change > 0 else "The {} fell by {}",
        name,
        plain(abs(row.change)),
    )
    if row.change_ends is None:
        return say("{}. How much of that is chance is not known.", moved)
    ends = signed_between(row.change_ends)
    chance = "more than chance explains"
    if row.verdict == "unsure":
        clear = row.change_ends[0] > 0 or row.change_ends[1] < 0
        chance = "on too few samples to be sure" if clear else "which may be chance"
    return say("{}, {}: the 95 % interval of the difference is {}.", moved, say(chance), ends)


def plain(value: float) -> str:
    """A figure with the digits that matter: shares to a hundredth of a percent."""
    digits = 4 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{'−' if value < 0 else '+'}{plain(abs(value))}"


def signed_between(ends: Ends) -> str:
    """An interval of a difference."""
    return say("{} to {}", *(f"{'−' if end < 0 else '+'}{short(abs(end))}" for end in ends))


def between(ends: Ends | None) -> str:
    """An interval of a figure."""
    return "" if ends is None else say("{} to {}", short(ends[0]), short(ends[1]))


def short(value: float) -> str:
    """A figure with the digits that the ends of an interval deserve."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
