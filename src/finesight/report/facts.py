"""What a run was: in words and figures for its report."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from finesight.report.language import say
from finesight.report.record import Line, Record

UNKNOWN = "not recorded"

WAITING = 0.03
"""Share of the steps' time that may pass for want of data before the page says what helps."""

Fact = tuple[str, str]
"""A name and what is to be said of it."""


@dataclass(frozen=True)
class Phase:
    """A part of the time that a run took."""

    name: str
    seconds: float
    share: float

    @property
    def text(self) -> str:
        """The seconds for people."""
        return duration(self.seconds)


@dataclass(frozen=True)
class Left:
    """Samples left out for one reason."""

    reason: str
    count: int
    ids: str


def last_start(record: Record) -> Line:
    """What the process that wrote last said of itself; empty in runs of older versions."""
    return record.starts[-1] if record.starts else {}


def data_of(record: Record, name: str) -> Line:
    """What a run noted of its samples `name`, train or eval, when it began."""
    data = last_start(record).get("data")
    found = data.get(name) if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}


def done(record: Record) -> int:
    """Finished steps."""
    lines = [*record.steps, *record.measured]
    return max((int(line.get("step") or 0) for line in lines), default=0)


def total_steps(record: Record) -> int | None:
    """Steps of the whole run."""
    if record.result is not None and isinstance(record.result.get("steps"), int):
        return int(record.result["steps"])
    total = last_start(record).get("steps")
    return total if isinstance(total, int) else None


def state(record: Record) -> str:
    """Where the run stands."""
    total, now = total_steps(record), done(record)
    if record.result is not None:
        kept = record.result.get("weights_of")
        early = record.result.get("stopped_early")
        said = say("finished after {:,} steps", now)
        said += say(", early, for want of a better score") if early else ""
        if kept not in (None, now):
            said += say("; the weights are those of step {:,}, the best", kept)
        return said
    if total:
        return say("not finished: {:,} of {:,} steps so far", now, total)
    return say("not finished: {:,} steps so far", now)


def model_name(record: Record) -> str:
    """The base model, without the folders above it."""
    base = str(record.manifest.get("base") or record.recipe.get("model") or say(UNKNOWN))
    return base if not Path(base).is_absolute() else Path(base).name


def training_samples(record: Record) -> int | None:
    """Different samples that were learned from."""
    known = _data(record, "train").get("samples")
    if isinstance(known, int):
        return known
    # Older runs say how far each step came, in epochs.
    epoch = record.steps[-1].get("epoch") if record.steps else None
    taken = sum(int(line.get("samples") or 0) for line in record.steps)
    return round(taken / epoch) if isinstance(epoch, float) and epoch > 0 and taken else None


def _data(record: Record, name: str) -> Line:
    found = last_start(record).get("data")
    data: Any = found.get(name) if isinstance(found, dict) else None
    return data if isinstance(data, dict) else {}


def trained_parts(record: Record) -> str:
    """Which parts learned, and how."""
    tune = record.manifest.get("tune")
    tune = tune if isinstance(tune, dict) else {}
    parts = ("vision", "merger", "language", "embeddings")
    lora = tune.get("lora")
    rank = lora.get("rank") if isinstance(lora, dict) else "unknown"
    whole = [part for part in parts if tune.get(part) == "full"]
    adapted = [part for part in parts if tune.get(part) == "lora"]
    pieces = []
    if adapted:
        pieces.append(say("{} by LoRA of rank {}", listed(adapted), rank))
    if whole:
        pieces.append(say("{} as a whole", listed(whole)))
    hows = {"nf4": "frozen weights of {} in NF4", "fp8": "frozen weights of {} multiplied in FP8"}
    for key, how in hows.items():
        quantised = tune.get(key)
        if isinstance(quantised, list) and quantised:
            pieces.append(say(how, listed(quantised)))
    return say("; ").join(pieces) or say(UNKNOWN)


def what_was_done(record: Record) -> str:
    """The run in a sentence or two."""
    samples, epoch = training_samples(record), record.steps[-1].get("epoch") if record.steps else 0
    on = say(" on {:,} samples", samples) if samples else ""
    passes = say(", {:.4g} epoch" if epoch == 1 else ", {:.4g} epochs", epoch) if epoch else ""
    return say(
        "{} tuned{}{}: {}. The run is {}.",
        model_name(record),
        on,
        passes,
        trained_parts(record),
        state(record),
    )


def phases(record: Record) -> list[Phase]:
    """Where the time went, as far as it was written down."""
    seconds = {
        "preparing": _sum(record.starts, "prepared_s"),
        "looking at pictures": _sum(record.looks, "seen_s"),
        "training steps": _sum(record.steps, "seconds"),
        "measuring": _sum(record.measured, "seconds"),
    }
    known = {name: value for name, value in seconds.items() if value}
    total = sum(known.values())
    return [Phase(say(name), value, value / total) for name, value in known.items()]


def cost(record: Record) -> list[Fact]:
    """Speed and memory. The time of looking at pictures before the steps counts as theirs."""
    steps = record.steps
    seconds = _sum(steps, "seconds")
    if not seconds:
        return [(say("training steps"), say("none yet"))]
    used = sum(float(s.get("utilisation") or 0) * float(s["seconds"]) for s in steps) / seconds
    tokens, learned = _sum(steps, "tokens"), _sum(steps, "supervised")
    whole = seconds + _sum(record.looks, "seen_s")
    waiting = _waiting(record)
    return _said(
        ("samples a second", f"{_sum(steps, 'samples') / whole:,.4g}"),
        ("tokens a second", f"{tokens / whole:,.0f}"),
        ("median step", duration(median(float(line["seconds"]) for line in steps))),
        ("of the device's peak", f"{100 * used:.3g} %" if used else say(UNKNOWN)),
        ("waiting for data", say(UNKNOWN) if waiting is None else f"{100 * waiting:.2g} %"),
        ("peak memory", _memory(steps)),
        ("samples seen", f"{_sum(steps, 'samples'):,.0f}"),
        ("tokens read", f"{tokens:,.0f}"),
        ("tokens learned", f"{learned:,.0f}"),
        ("void steps", f"{max(int(s.get('skipped') or 0) for s in steps):,}"),
        ("starts", str(len(record.starts)) if record.starts else say(UNKNOWN)),
    )


def _said(*facts: Fact) -> list[Fact]:
    """With the names in the page's language."""
    return [(say(name), text) for name, text in facts]


def remarks(record: Record) -> list[str]:
    """What the figures of speed and memory ask for."""
    return [*_starved(record), *_saved(record)]


def _waiting(record: Record) -> float | None:
    """The share of the steps' time in which the device had nothing to do for want of data."""
    known = [line for line in record.steps if line.get("waited_s") is not None]
    seconds = _sum(known, "seconds")
    return _sum(known, "waited_s") / seconds if seconds else None


def _starved(record: Record) -> list[str]:
    share = _waiting(record)
    if share is None or share <= WAITING:
        return []
    workers = last_start(record).get("workers")
    now = say(", {} now", workers) if isinstance(workers, int) else ""
    text = (
        "In {:.2g} % of the steps' time the device waited for data. More reading processes"
        " (train.workers{}), smaller files of pictures or a smaller size in the model (picture)"
        " would shorten that."
    )
    return [say(text, 100 * share, now)]


def _saved(record: Record) -> list[str]:
    """From which steps on the run took less memory than its recipe says."""
    settings = record.recipe.get("train")
    settings = settings if isinstance(settings, dict) else {}
    tokens, twice = settings.get("pack_tokens"), settings.get("recompute")
    changes = []
    for line in record.steps:
        at, now = line["step"], line.get("pack_tokens")
        if now is not None and tokens is not None and now != tokens:
            changes.append(say("packs of at most {:,} tokens from step {:,} on", now, at))
            tokens = now
        if float(line.get("recompute") or 0) > float(twice or 0):
            changes.append(say("activations computed twice from step {:,} on", at))
            twice = True
    if not changes:
        return []
    text = "The GPU's memory was full, and the run went on with less: {}."
    return [say(text, listed(changes))]


def _memory(steps: Iterable[Line]) -> str:
    most = max((float(line.get("memory_gb") or 0) for line in steps), default=0.0)
    return f"{most:.3g} GB" if most else say(UNKNOWN)


def _sum(lines: Iterable[Line], name: str) -> float:
    values = (line.get(name) for line in lines)
    return sum(float(value) for value in values if isinstance(value, int | float))


def left_out(record: Record) -> list[Left]:
    """Samples that were not learned from, by reason."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for line in record.dropped:
        groups[_short_reason(str(line.get("reason")))].append(str(line.get("id")))
    for line in record.steps:
        groups[say("pictures that could not be decoded, found on the way")] += [
            str(name) for name in line.get("dropped") or ()
        ]
    return [
        Left(reason, len(ids), ", ".join(ids[:5]) + (", …" if len(ids) > 5 else ""))
        for reason, ids in sorted(groups.items(), key=lambda item: -len(item[1]))
        if ids
    ]


def _short_reason(reason: str) -> str:
    """Without the path that a reason about a picture begins with, so that equal ones are one."""
    return reason.partition(": ")[2] or reason


def versions(record: Record) -> list[Fact]:
    """What computed."""
    start = last_start(record)
    found = start.get("versions") or record.manifest.get("versions")
    known: Line = found if isinstance(found, dict) else {}
    device = f"{start['device']}, {start.get('precision')}" if start.get("device") else ""
    return [
        *((name, str(value)) for name, value in known.items()),
        (say("device"), device or say(UNKNOWN)),
        (say("model family"), str(record.manifest.get("family", say(UNKNOWN)))),
        (say("started"), str(record.starts[0]["started"]) if record.starts else say(UNKNOWN)),
    ]


def checksums(record: Record) -> list[Fact]:
    """SHA-256 digests of what went in and of what came out."""
    facts = [(say("base model"), str(record.manifest.get("base_fingerprint") or say(UNKNOWN)))]
    for name, title in (("train", "training data"), ("eval", "held-out data")):
        found = _data(record, name).get("fingerprint") or record.identity.get(f"data.{name}")
        if found or name == "train":
            facts.append((say(title), str(found or say(UNKNOWN))))
    none = [(say("trained weights"), say("not written yet"))]
    return [*facts, *(record.weights.items() or none)]


def commands(record: Record, prompt: str) -> list[Fact]:
    """What to type to use the result, and to get it again."""
    folder = str(record.folder)
    asked = prompt if prompt and len(prompt) <= 200 else "TEXT"
    facts = []
    if record.weights:
        facts = [
            (say("Ask it"), command("predict", folder, "PICTURE", "--prompt", asked)),
            (say("Measure it again"), command("eval", folder)),
        ]
        if any(name.startswith("adapter/") for name in record.weights):
            merged = command("merge", folder, f"{folder}-merged")
            facts.append((say("Merge it for other servers"), merged))
    elif record.result is None:
        facts = [(say("Go on"), command("train", f"{folder}/recipe.yaml", "--resume"))]
    again = command("train", f"{folder}/recipe.yaml", f"output={folder}-again")
    return [*facts, (say("Do it again"), again)]


def command(*words: str) -> str:
    """A command as it is typed into a shell."""
    return shlex.join(["finesight", *words])


def duration(seconds: float) -> str:
    """Time for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return say(" and ").join([say(", ").join(words[:-1]), words[-1]] if len(words) > 1 else words)
