"""The end of a run: what moved, the trained weights, and what to do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from finesight.errors import UserError
from finesight.evaluate.compare import compare
from finesight.hub import ModelFolder
from finesight.model.adapter import write_adapter
from finesight.model.lora import adapters
from finesight.model.network import VisionLanguageModel
from finesight.model.weights import save_model
from finesight.storage import write_folder
from finesight.train.measure import Measured
from finesight.train.moved import PartChange, check_moved
from finesight.train.prepare import Session
from finesight.train.progress import Screen
from finesight.train.run import MOVED, RESULT, Run


class RunResult(BaseModel):
    """`result.json`, the last file that a run writes. `loss` is that of the last step; `before`
    and `after` are None without held-out data; `dropped` counts samples not learned from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    steps: int
    samples: int
    dropped: int
    loss: float | None
    before: Measured | None
    after: Measured | None
    moved: tuple[PartChange, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return self.model_dump(mode="json")


def finish(session: Session, screen: Screen) -> RunResult:
    """Show what moved and write the trained weights: `adapter/` for LoRA, `model/` when a part was
    trained whole, both for a mix (the adapter then belongs on top of `model/`).

    Raises RuntimeError when a frozen part changed, UserError when a trained one did not.
    """
    run = session.run
    rows = session.watch.changes(session.masters.reached())
    run.write(MOVED, [row.as_json() for row in rows])
    screen.say(moved_table(rows))
    check_moved(rows)
    _export(session)
    lines = run.history()
    measured = [m for line in lines if (m := Measured.read(line)) is not None]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    late = sum(len(line["dropped"]) for line in lines if "dropped" in line)
    before, after = (measured[0], measured[-1]) if len(measured) > 1 else (None, None)
    result = RunResult(
        run=str(run.folder),
        steps=session.progress.step,
        samples=session.course.samples,
        dropped=len(session.train.survey.dropped) + late,
        loss=losses[-1] if losses else None,
        before=before,
        after=after,
        moved=tuple(rows),
    )
    run.finished(result.as_json())
    if before is not None and after is not None:
        screen.say(before_after(before, after))
    best = session.progress.best
    if best is not None and after is not None and best.loss < after.held_out_loss:
        screen.say(
            f"The held-out loss was lower after step {best.step} ({best.loss:.4f});"
            f" its checkpoint is kept in {run.checkpoints / f'step-{best.step}'}"
        )
    screen.say(f"Try it:  finesight predict {run.folder} PICTURE --prompt TEXT")
    return result


def _export(session: Session) -> None:
    run, base, model = session.run, session.base, session.model
    tune = session.recipe.tune
    whole = tune.uses("full")
    if whole and not run.model.exists():
        with write_folder(run.model) as folder:
            _save_without_adapters(model, base.folder, folder, session)
    if not list(adapters(model)) or run.adapter.exists():
        return
    # The adapter names what it lies on: the trained model where there is one, else the base.
    below = ModelFolder(run.model) if whole else base.folder
    name = str(run.model.resolve()) if whole else base.name
    with write_folder(run.adapter) as folder:
        write_adapter(
            folder,
            model,
            base=name,
            base_fingerprint=below.fingerprint(),
            values=session.masters.values(),
        )


def _save_without_adapters(
    model: VisionLanguageModel, base: ModelFolder, folder: Path, session: Session
) -> None:
    groups = [(group, adapter) for _, group, adapter in adapters(model)]
    for group, _ in groups:
        group.adapter = None
    try:
        save_model(model, base, folder, session.machine.dtype)
    finally:
        for group, adapter in groups:
            group.adapter = adapter


def finished(run: Run) -> RunResult | None:
    """The result of a run that has come to its end."""
    text = run.result()
    if text is None:
        return None
    try:
        return RunResult.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"not a result: {error.errors(include_url=False)[0]['msg']}",
            where=str(run.folder / RESULT),
            expected="the file as `finesight train` wrote it",
            remedy="delete it: --resume then writes it again",
        ) from error


def moved_table(rows: list[PartChange]) -> str:
    """What moved, a line for each part."""
    cells = [("part", "", "tensors", "numbers", "changed", "relative change")]
    for row in rows:
        relative = f"{row.relative:.2e}" if row.trained else "-"
        counts = (str(row.tensors), f"{row.numbers:,}", str(row.changed))
        cells.append((row.part, "trained" if row.trained else "frozen", *counts, relative))
    return _aligned(cells)


def before_after(before: Measured, after: Measured) -> str:
    """Figures before the first step and after the last, side by side."""
    old = {"held_out_loss": before.held_out_loss} | before.scores
    return compare(old, {"held_out_loss": after.held_out_loss} | after.scores, after.headline)


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column < 2 and not cell[:1].isdigit() else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
