"""The model card of a merged folder: what it is, what was measured, how to serve it."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finesight import __version__
from finesight.bounded_files import read_bytes
from finesight.errors import UserError
from finesight.evaluate.answered import note_lines
from finesight.export.files import ARCHITECTURES
from finesight.export.parity import Parity
from finesight.export.serving import lines as serving_lines
from finesight.hub import TINY, TINY_FOLDER, ModelFolder
from finesight.infer.load import Parts
from finesight.manifest import MANIFEST
from finesight.model.merge import public_name
from finesight.remote.address import model_address
from finesight.report.figures import note_of
from finesight.report.record import Record, read_lines, read_record
from finesight.yaml_text import parsed

CARD = "README.md"

QUESTIONS = 3
"""That are shown, the most frequent ones."""

_PRIVATE = ("output", "track")
"""Groups of a recipe that say nothing of the model: folders, accounts, projects."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a card is made of: `source` is the run, or what else was merged, `name` what the folder
    will be called."""

    source: Path
    parts: Parts
    name: str
    precision: str
    thawed: int
    parity: Parity
    missing: tuple[str, ...]
    left_out: dict[str, Any]


def write_card(folder: Path, told: Told) -> None:
    """Write README.md into a merged folder that is else complete."""
    run = told.source / MANIFEST
    record = read_record(told.source) if run.is_file() else None
    blocks = [
        _front(told),
        f"# {told.name}",
        _what(told, record),
        *_questions(record),
        *_scores(record),
        *_recipe(record),
        _parity(told),
        _serving(ModelFolder(folder), told),
        _licence(told.parts.folder, folder),
    ]
    (folder / CARD).write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def _base(parts: Parts) -> str:
    if parts.folder.path.resolve() == TINY_FOLDER.resolve():
        return TINY
    return public_name(parts.manifest.base if parts.manifest else str(parts.folder.path))


def _front(told: Told) -> str:
    parts, base = told.parts, _base(told.parts)
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["finesight", parts.folder.family],
    }
    licence = _front_matter(parts.folder.path).get("license")
    if isinstance(licence, str):
        facts["license"] = licence
    if base != TINY and model_address(base) is not None:
        facts["base_model"] = base
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


def _what(told: Told, record: Record | None) -> str:
    manifest, parity = told.parts.manifest, told.parity
    said = [
        f"{_base(told.parts)} (family {told.parts.folder.family}), tuned with finesight"
        f" {__version__}; weights in {told.precision}."
    ]
    if manifest is not None:
        parts = {name: how for name, how in manifest.tune if how in ("lora", "full")}
        said.append("Trained: " + ", ".join(f"{name} ({how})" for name, how in parts.items()) + ".")
        said.append(f"The base's fingerprint is {manifest.base_fingerprint}.")
    if record is not None:
        said += _counts(record)
    if told.parts.quantised:
        said.append(
            f"The run had the weights of {told.parts.quantised}; here they are as published."
            + ("" if parity.as_trained else " By how much answers differ was not measured.")
        )
    if told.thawed:
        said.append(
            f"{told.thawed} layers were published in four bits and are written in full: what they"
            " stand for is the same."
        )
    if told.left_out:
        said.append(
            "Answers are greedy, as they were measured; of the base's generation_config.json these"
            f" are left out: {json.dumps(told.left_out)}."
        )
    return " ".join(said)


def _counts(record: Record) -> list[str]:
    said = []
    data = (record.starts[-1].get("data") if record.starts else None) or {}
    counts = {name: data[name].get("samples") for name in ("train", "eval") if data.get(name)}
    if counts.get("train"):
        held_out = f", {counts['eval']:,} held out" if counts.get("eval") else ""
        said.append(f"Data: {counts['train']:,} samples to learn from{held_out}.")
    result = record.result or {}
    if result.get("steps"):
        said.append(f"{result['steps']:,} steps.")
    return said


def _questions(record: Record | None) -> list[str]:
    """What it was asked: a tuned model is good at that, and at nothing else for certain."""
    counted: Counter[str] = Counter()
    for path in (record.answers if record else [])[-1:]:
        for line in read_lines(path):
            asked = line.get("prompt")
            if isinstance(asked, str) and asked.strip():
                counted[asked] += 1
    if not counted:
        return []
    quoted = (one[:300].replace("\n", "\n> ") for one, _ in counted.most_common(QUESTIONS))
    shown = "\n".join(f"> {one}\n" for one in quoted)
    more = len(counted) - QUESTIONS
    others = f"\nAnd {more:,} others like these." if more > 0 else ""
    return ["## Ask it", f"As its held-out samples do:\n\n{shown}{others}".strip()]


def _scores(record: Record | None) -> list[str]:
    result = (record.result if record else None) or {}
    before, after = result.get("before") or {}, result.get("after") or {}
    scores = {"before": before.get("scores") or {}, "after": after.get("scores") or {}}
    intervals = after.get("intervals") or {}
    rows = [
        f"| {name} | {_figure(scores['before'].get(name))} | {_figure(value)} |"
        f" {_interval(intervals.get(name))} |"
        for name, value in scores["after"].items()
    ]
    losses = (before.get("held_out_loss"), after.get("held_out_loss"))
    if losses[1] is not None:
        rows.append(f"| held_out_loss | {_figure(losses[0])} | {_figure(losses[1])} | - |")
    if not rows:
        return []
    head = "| held-out samples | before | after | 95 % interval |\n| --- | --- | --- | --- |"
    notes = note_lines({name: note_of(after, name) for name in scores["after"]})
    return ["## What it can", "\n".join([head, *rows]), *notes]


def _interval(ends: object) -> str:
    if not isinstance(ends, list) or len(ends) != 2:
        return "-"
    return f"{_figure(ends[0])} to {_figure(ends[1])}"


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _recipe(record: Record | None) -> list[str]:
    if record is None or not record.recipe:
        return []
    shown = {key: _without_places(v) for key, v in record.recipe.items() if key not in _PRIVATE}
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip()
    return ["## Recipe", f"```yaml\n{text}\n```"]


def _without_places(value: Any) -> Any:
    """The value with only the last piece of every absolute path: where files lay is nobody's."""
    if isinstance(value, Mapping):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    if isinstance(value, str) and value.startswith(("/", "~", ".", "\\")):
        return Path(value).name
    return value


def _parity(told: Told) -> str:
    shown = "\n".join(told.parity.as_lines())
    whole = told.parts.adapter is None
    return (
        f"## {'Written' if whole else 'Merged'} equals trained\n\nThe folder, loaded anew from the"
        f" disk, against {'the trained model' if whole else 'the adapter on its base'}:"
        f"\n\n```\n{shown}\n```"
    )


def _serving(folder: ModelFolder, told: Told) -> str:
    title = "## Serving"
    name = shlex.quote(told.name)
    ways = ("predict", " PICTURE --prompt TEXT"), ("chat", ""), ("web", ""), ("serve", "")
    own = "\n".join(f"finesight {way} {name}{more}" for way, more in ways)
    own = f"```sh\n{own}\n```"
    if folder.family not in ARCHITECTURES:
        return f"{title}\n\n{own}"
    manifest = told.parts.manifest
    system = manifest.system if manifest else None
    rule = manifest.picture if manifest else None
    serving = serving_lines(folder, told.name, told.name, rule, system)
    notes = "\n".join(f"- {note}" for note in serving.notes)
    engines = f"```sh\n{serving.vllm}\n\n{serving.sglang}\n```"
    return f"{title}\n\n{own}\n\nvLLM and SGLang:\n\n{engines}\n\n{notes}"


def _licence(base: ModelFolder, folder: Path) -> str:
    files = sorted(p.name for p in folder.iterdir() if p.name.startswith(("LICENSE", "NOTICE")))
    licence = _front_matter(base.path).get("license")
    named = f" ({licence})" if isinstance(licence, str) else ""
    if files:
        said = f"The base's licence{named} holds for these weights: {', '.join(files)}."
    elif named:
        said = f"The base's licence{named} holds for these weights."
    else:
        said = (
            "The base's licence holds for these weights; its folder does not say which: look where"
            " it was published."
        )
    return f"## Licence\n\n{said}"


def _front_matter(folder: Path) -> dict[str, Any]:
    """What the card of a folder says before its text."""
    path = folder / CARD
    try:
        text = read_bytes(path, expected="a model card").decode(errors="replace")
    except UserError:
        text = ""
    head, end, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not end:
        return {}
    try:
        content = parsed(head)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
