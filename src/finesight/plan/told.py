"""A plan in words and figures: for people, and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from finesight.plan.choice import Estimate
from finesight.plan.memory import FULL
from finesight.plan.plan import Plan
from finesight.plan.seconds import StepTime

BAR = 30
"""Letters of the longest bar."""

ROWS = {
    "weights": "weights",
    "masters": "fp32 masters",
    "gradients": "gradients",
    "moments": "optimiser's moments",
    "activations": "activations kept",
    "working": "working space",
    "logits": "logits",
    "inputs": "inputs",
    "libraries": "libraries",
    "recordings": "set aside for recordings",
    "outside": "CUDA itself",
}
"""Parts of the memory, in the order in which they are printed."""


def as_lines(plan: Plan) -> list[str]:
    """What a person reads."""
    return [
        *_about(plan),
        *_histogram(plan),
        *_operations(plan),
        *_estimates(plan),
        *_beside(plan),
        *_verdict(plan),
    ]


def _about(plan: Plan) -> Iterator[str]:
    tokens, target = plan.tokens, plan.target
    known = "measured" if target.measured else "by its data sheet"
    yield f"model   {plan.family}, {plan.learning:,} of {plan.numbers:,} numbers learn"
    yield (
        f"target  {target.name}, {known}: {target.memory / 1e9:.0f} GB,"
        f" {target.peak / 1e12:.3g} TFLOP/s of products in {plan.precision},"
        f" {target.bandwidth / 1e9:.0f} GB/s"
    )
    yield (
        f"data    {tokens.samples} samples, {tokens.tokens:,} tokens, {tokens.patches:,} patches;"
        f" {tokens.dropped} dropped"
    )
    yield (
        f"run     {plan.steps} steps of {plan.batch} samples, {plan.chosen.packs:.3g} packs each"
    )


def _histogram(plan: Plan) -> Iterator[str]:
    tokens = plan.tokens
    yield ""
    yield (
        f"tokens of a sample: {tokens.shortest} to {tokens.longest}, median {tokens.median:g};"
        f" the longest is {tokens.longest_id}"
    )
    most = max(count for _, count in tokens.bars)
    ends = [f"{start} to {start + tokens.width - 1}" for start, _ in tokens.bars]
    width = max(map(len, ends))
    for end, (_, count) in zip(ends, tokens.bars, strict=True):
        yield f"  {end:>{width}}  {'#' * -(-count * BAR // most):<{BAR}}  {count}"


def _operations(plan: Plan) -> Iterator[str]:
    whole = sum(plan.operations.values())
    yield ""
    yield f"operations of a sample: {whole / 1e9:,.1f} billion"
    for part, count in plan.operations.items():
        if count:
            yield f"  {_named(part):<22}{count / 1e9:>12,.1f}  {count / whole:4.0%}"


def _named(part: str) -> str:
    return {"embeddings": "head", "language": "language model"}.get(part, part)


def _estimates(plan: Plan) -> Iterator[str]:
    """Two columns: as the recipe is written, and as chosen; one where both are the same."""
    columns = {"as written": plan.written, "chosen": plan.chosen}
    if plan.written.setting == plan.chosen.setting and not plan.words:
        columns = {"as written": plan.written}
    yield ""
    yield _row("", list(columns))
    estimates = list(columns.values())
    yield _row("train.pack_tokens", [str(e.setting.pack_tokens) for e in estimates])
    yield _row("train.recompute", [f"{e.setting.recompute:g}" for e in estimates])
    yield _row("tune.nf4", [",".join(e.setting.nf4) or "none" for e in estimates])
    for key, name in ROWS.items():
        parts = [asdict(e.peak)[key] for e in estimates]
        if any(parts):
            yield _row(name, [f"{part / 1e9:.2f} GB" for part in parts])
    yield _row("a run's own figure", [f"{e.peak.allocated / 1e9:.2f} GB" for e in estimates])
    yield _row("memory in all", [f"{e.peak.in_all / 1e9:.2f} GB" for e in estimates])
    room = f"{plan.chosen.room / 1e9:.1f} GB"
    yield _row(f"fits {FULL:.0%}, {room}", ["yes" if e.fits else "no" for e in estimates])
    yield _row("a step", [_seconds(e.step.in_all) for e in estimates])
    yield _row("samples/s", [f"{plan.batch / e.step.in_all:.4g}" for e in estimates])
    yield _row("what sets the pace", [_pace(e.step) for e in estimates])
    yield _row("all steps", [_seconds(plan.steps * e.step.in_all) for e in estimates])


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:<24}" + "".join(f"{cell:>16}" for cell in cells)


def _pace(step: StepTime) -> str:
    work = {
        "products": step.products,
        "memory": step.moved,
        "optimiser": step.optimiser,
    }
    if step.host > step.products + step.moved:
        work = {"host": step.host, "optimiser": step.optimiser}
    if step.reading > sum(work.values()):
        return "reading"
    return max(work, key=lambda name: work[name])


def _beside(plan: Plan) -> Iterator[str]:
    answers = plan.answering
    yield ""
    yield f"start: about {_seconds(plan.start_s)} more before the first step"
    if answers.times:
        measured = f"{answers.times} measurements of {answers.samples} held-out samples"
        yield f"{measured}: about {_seconds(answers.seconds)} more, very roughly"
        if answers.bytes:
            yield f"  answering takes about {answers.bytes / 1e9:.2f} GB in place of a pack"
    if plan.features is not None:
        seen = plan.chosen.seen_s
        assert seen is not None, "a frozen tower without a time"
        yield (
            "nothing of the tower learns: features of all pictures take"
            f" {plan.features / 1e9:.3g} GB; once they are known, a step takes {_seconds(seen)},"
            f" {plan.batch / seen:.4g} samples/s"
        )
    yield f"precision {plan.precision}, {plan.workers} reading processes"


def _verdict(plan: Plan) -> Iterator[str]:
    chosen = plan.chosen
    yield ""
    if not chosen.fits:
        least = chosen.peak.in_all / FULL / 1e9
        yield (
            f"does not fit: needs {least:.0f} GB at least, and {plan.target.name} has"
            f" {plan.target.memory / 1e9:.0f}; try {', '.join(plan.less)}"
        )
    elif plan.words:
        yield f"to take what was chosen: {' '.join(plan.words)}"
    else:
        yield "the recipe is right as it is written"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def as_record(plan: Plan) -> dict[str, Any]:
    """The same for machines, in bytes, operations and seconds."""
    target = plan.target
    return {
        "family": plan.family,
        "numbers": plan.numbers,
        "learning": plan.learning,
        "target": {
            "name": target.name,
            "measured": target.measured,
            "memory": target.memory,
            "operations_per_s": target.peak,
            "bytes_per_s": target.bandwidth,
        },
        "tokens": asdict(plan.tokens),
        "operations_of_a_sample": dict(plan.operations),
        "steps": plan.steps,
        "batch": plan.batch,
        "written": _estimate(plan, plan.written),
        "chosen": _estimate(plan, plan.chosen),
        "answering": asdict(plan.answering),
        "feature_bytes": plan.features,
        "precision": plan.precision,
        "workers": plan.workers,
        "start_s": plan.start_s,
        "words": list(plan.words),
    }


def _estimate(plan: Plan, estimate: Estimate) -> dict[str, Any]:
    step_s = estimate.step.in_all
    return {
        **asdict(estimate.setting),
        "fits": estimate.fits,
        "memory": asdict(estimate.peak),
        "memory_gb": estimate.peak.allocated / 1e9,
        "memory_in_all": estimate.peak.in_all,
        "packs": estimate.packs,
        "step_s": step_s,
        "step": asdict(estimate.step),
        "step_with_features_s": estimate.seen_s,
        "samples_per_s": plan.batch / step_s,
        "steps_s": plan.steps * step_s,
        "run_s": plan.seconds(estimate),
    }
