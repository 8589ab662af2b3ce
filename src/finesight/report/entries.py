"""What is compared: runs, finished or going on, and files of answers, with their last figures."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finesight.errors import UserError, look_beside
from finesight.evaluate import own
from finesight.evaluate.answered import Case
from finesight.evaluate.compare import by_sample
from finesight.evaluate.saved import Answered, read_answers
from finesight.evaluate.score import TASKS
from finesight.report.facts import data_of
from finesight.report.figures import figures_of
from finesight.report.language import say
from finesight.report.record import Line, Record, read_record
from finesight.report.standing import Standing, standing

WHERE = "finesight compare"

MOST = 8
"""Runs of a comparison: of more, no page holds the columns and no eye tells the colours."""

Key = tuple[str, int]
"""A held-out sample: its id, and how many of that id came before it."""


@dataclass(frozen=True)
class Entry:
    """One of those that are compared. `letter` stands for it on the page, `name` is its own.

    `measured` is its last measurement, or that of the weights it keeps; empty, as is `record`, for
    a file of answers. `answers` are those of that measurement, by sample. `metric` is None where
    nobody knows it.
    """

    letter: str
    name: str
    path: Path
    record: Record | None
    standing: Standing | None
    measured: Line
    metric: str | None
    answers: dict[Key, Answered]

    @property
    def label(self) -> str:
        """Letter and name."""
        return f"{self.letter} {self.name}"

    def setting(self, group: str, name: str) -> object:
        """A setting of the recipe, if there is one."""
        found: Any = self.record.recipe.get(group) if self.record else None
        return found.get(name) if isinstance(found, dict) else None


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """What lies at the paths. Raises UserError for fewer than two, more than MOST or the same one
    twice, what is neither a run nor a file of answers, and a run that was never measured."""
    if not 2 <= len(paths) <= MOST:
        raise UserError(
            f"{len(paths)} given",
            where=WHERE,
            expected=f"2 to {MOST} runs",
            remedy="give the folders of the runs, one after the other",
        )
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise UserError(
                f"{path} is given {count} times",
                where=WHERE,
                expected="different runs",
                remedy="give each run once",
            )
    entries = [
        _entry(*one) for one in zip(string.ascii_uppercase, _names(paths), paths, strict=False)
    ]
    return [_with_metric(entry, entries) for entry in entries]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        found = ["/".join(names[-count:]) for names in parts]
        if len(set(found)) == len(found):
            return found
    return [str(path) for path in paths]


def _entry(letter: str, name: str, path: Path) -> Entry:
    if path.is_file():
        return Entry(letter, name, path, None, None, {}, None, _by_sample(read_answers(path)))
    if not path.exists():
        raise UserError(
            f"no such folder: {path}",
            where=WHERE,
            expected="the folder of a run, or a file that `finesight eval --out` wrote",
            remedy=look_beside(path),
        )
    record = read_record(path, WHERE)
    if not record.measured:
        raise UserError(
            f"{path} was never measured",
            where=WHERE,
            expected="runs with held-out samples (data.eval), measured at least once",
            remedy=f"leave it out, or measure it: finesight eval {path} --data FILE --metric NAME"
            " --out answers.jsonl, and give answers.jsonl instead",
        )
    kept = (record.result or {}).get("after")
    measured = kept if isinstance(kept, dict) else record.measured[-1]
    files = record.answers
    answers = _by_sample(read_answers(files[-1])) if files and figures_of(measured) else {}
    settings = record.recipe.get("eval")
    metric = settings.get("metric") if isinstance(settings, dict) else None
    known = metric if isinstance(metric, str) else None
    return Entry(letter, name, path, record, standing(record), measured, known, answers)


def _with_metric(entry: Entry, entries: Sequence[Entry]) -> Entry:
    """A file of answers has the metric of a run whose answers have the same scores."""
    names = {name for one in entry.answers.values() for name in one.scores}
    for other in entries:
        others = {name for one in other.answers.values() for name in one.scores}
        if entry.record is None and other.metric is not None and others == names:
            return replace(entry, metric=other.metric)
    return entry


def _by_sample(answers: Sequence[Answered]) -> dict[Key, Answered]:
    return by_sample(answers, lambda one: one.case.id)


def shared(first: Entry, other: Entry) -> tuple[list[Key], int]:
    """The samples that both answered, and how many more have the same id and ask something else or
    have another right answer."""
    both = [key for key in first.answers if key in other.answers]
    same = [key for key in both if _asked(first.answers[key]) == _asked(other.answers[key])]
    return same, len(both) - len(same)


def _asked(one: Answered) -> tuple[object, ...]:
    case: Case = one.case
    return one.record.get("prompt"), case.truths, case.targets


def is_own(metric: str | None) -> bool:
    """Whether a metric is a program of the user's, which no page runs, or not known at all."""
    return metric is None or own.split(metric) is not None or metric not in TASKS


def cautions(first: Entry, other: Entry) -> list[str]:
    """What speaks against comparing two of them, or for reading their difference with care."""
    said = []
    same, unlike = shared(first, other)
    names = first.label, other.label
    if first.metric != other.metric:
        metrics = first.metric or say("unknown"), other.metric or say("unknown")
        text = "{} was measured by {}, {} by {}: their scores are not compared."
        said.append(say(text, names[0], metrics[0], names[1], metrics[1]))
    elif not same:
        said.append(
            say("{} and {} have no held-out sample in common: nothing is compared.", *names)
        )
    elif (counts := (len(first.answers), len(other.answers))) != (len(same), len(same)):
        text = "{} and {} are compared on the {:,} samples that both answered, of {:,} and {:,}."
        said.append(say(text, *names, len(same), *counts))
    if first.metric == other.metric == "detection" and len(first.answers) != len(other.answers):
        text = (
            "Average precision falls as a set grows: {} and {} answered {:,} and {:,} samples, and"
            " their values of AP are not to be compared. The differences are of the samples that"
            " both answered."
        )
        said.append(say(text, *names, len(first.answers), len(other.answers)))
    if unlike:
        text = (
            "{} and {}: {:,} samples of the same id have other questions or right answers, and are"
            " left out."
        )
        said.append(say(text, *names, unlike))
    longest = [one.setting("eval", "max_new_tokens") for one in (first, other)]
    if None not in longest and longest[0] != longest[1]:
        text = (
            "{} answered in at most {} tokens, {} in at most {}: what was cut off counts as wrong."
        )
        said.append(say(text, names[0], longest[0], names[1], longest[1]))
    if why := other_loss(first, other):
        text = "The held-out losses of {} and {} are not compared: {}."
        said.append(say(text, *names, say(why)))
    return said


def other_loss(first: Entry, other: Entry) -> str:
    """Why the held-out losses of two of them mean different things; empty where they do not."""
    a, b = first.record, other.record
    if a is None or b is None:
        return ""
    prints = [_fingerprint(record) for record in (a, b)]
    if prints[0] != prints[1]:
        return "they are of different data"
    if a.manifest.get("family") != b.manifest.get("family"):
        return "the models' families split texts into other tokens"
    if a.manifest.get("system") != b.manifest.get("system"):
        return "the system prompts differ"
    return ""


def _fingerprint(record: Record) -> object:
    return data_of(record, "eval").get("fingerprint") or record.identity.get("data.eval")
