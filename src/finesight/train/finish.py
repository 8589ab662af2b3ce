"""The end of a run: what moved, the trained weights, and what to do with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from finesight.errors import UserError
from finesight.evaluate import own
from finesight.evaluate.compare import REMOVED, Difference, as_table, paired_files, unsampled
from finesight.hub import ModelFolder
from finesight.model.adapter import write_adapter
from finesight.model.any_family import AnyModel, save_any
from finesight.model.lora import adapters
from finesight.report.run_page import MOST_EXAMPLES, Live, write_report
from finesight.run_folder import MOVED, RESULT
from finesight.storage import write_file, write_folder
from finesight.train.checkpoint import Best, Checkpoints
from finesight.train.measure import Measured, history
from finesight.train.moved import PartChange, check_moved
from finesight.train.prepare import Session
from finesight.train.progress import Screen
from finesight.train.ranks import Errand
from finesight.train.run import Run


class RunResult(BaseModel):
    """`result.json`, the last file that a run writes.

    `loss` is that of the last step, `dropped` counts samples not learned from. `before` and `after`
    are None without held-out data, `differences` then is empty. `best` is the best measurement of
    trained weights; `weights_of` the step whose weights `adapter/` and `model/` hold, which are
    those that `after` measured; `stopped_early` says that patience ended the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    steps: int
    samples: int
    dropped: int
    loss: float | None
    before: Measured | None
    after: Measured | None
    moved: tuple[PartChange, ...]
    differences: tuple[Difference, ...] = ()
    best: Best | None = None
    weights_of: int | None = None
    stopped_early: bool = False

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return self.model_dump(mode="json")

    def as_table(self) -> str:
        """Every figure before and after, the headline marked; no line without held-out data."""
        if self.after is None:
            return ""
        return as_table(self.differences, self.after.headline)


def finish(session: Session, screen: Screen, checkpoints: Checkpoints) -> RunResult:
    """Show what moved and write the trained weights: `adapter/` for LoRA, `model/` when a part was
    trained whole, both for a mix (the adapter then belongs on top of `model/`). They are those of
    the last step or, in a run with patience, of the best measurement.

    Raises RuntimeError when a frozen part changed, UserError when a trained one did not.
    """
    run = session.run
    measured = history(run)
    best = _best(measured[1:])
    before, after = (measured[0], measured[-1]) if len(measured) > 1 else (None, None)
    step = session.progress.step
    if best is not None and session.recipe.eval is not None and session.recipe.eval.patience:
        after = best
        if best.step != step:
            step = best.step
            screen.say(f"going back to the weights of step {step}, the best that were measured")
        _take_over(run, best)
    session.together.called(Errand.SETTLE, step)
    with settled(session, checkpoints, step) as rows:
        run.write(MOVED, [row.as_json() for row in rows])
        screen.say(moved_table(rows))
        check_moved(rows)
        _export(session, checkpoints, step)
    loss, late = None, 0
    for line in run.lines():
        found = line.get("loss")
        # Of a void step it is NaN.
        if found is not None and isfinite(found):
            loss = found
        late += len(line.get("dropped", ()))
    result = RunResult(
        run=str(run.folder),
        steps=session.progress.step,
        samples=session.state().samples,
        dropped=len(session.train.survey.dropped) + late,
        loss=loss,
        before=before,
        after=after,
        moved=tuple(rows),
        differences=tuple(_differences(session, before, after)) if before and after else (),
        best=best_of(best) if best else None,
        weights_of=after.step if after else session.progress.step,
        stopped_early=session.progress.step < len(session.course),
    )
    run.finished(result.as_json())
    _last_words(result, run, screen)
    report(run, screen)
    screen.say(f"Try it:  finesight predict {run.folder} PICTURE --prompt TEXT")
    return result


@contextmanager
def settled(session: Session, checkpoints: Checkpoints, step: int) -> Iterator[list[PartChange]]:
    """Within the block, the model is whole and has the weights after so many steps; yields what
    moved. Where it lies in parts, all processes go through it."""
    if step != session.progress.step:
        remedy = "set eval.patience=null and resume to keep the weights of the last step"
        _, values, moments = checkpoints.read(step, remedy)
        session.load(values, moments)
    rows = session.watch.changes(session.masters.reached(), session.together)
    with session.parallel.whole():
        yield rows


def report(run: Run, screen: Screen, most: int = MOST_EXAMPLES, live: Live | None = None) -> None:
    """Write `report.html` of the run so far, with at most so many examples; `live` says that it
    goes on.

    Whatever goes wrong is said and not raised: no page is worth a run that has hours behind it.
    """
    try:
        page = write_report(run.folder, most=most, live=live)
    except Exception as error:
        screen.say(
            f"no report was written ({type(error).__name__}: {error});"
            f" `finesight report {run.folder}` makes one at any time"
        )
    else:
        if run.result() is not None:
            screen.say(f"Report:  {page}")


def best_of(measured: Measured) -> Best:
    """A measurement as what is remembered of it."""
    return Best(
        step=measured.step,
        loss=measured.held_out_loss,
        headline=measured.headline,
        score=measured.score,
    )


def _best(measured: Sequence[Measured]) -> Measured | None:
    """The best of them; of equals the first."""
    best: Measured | None = None
    for one in measured:
        if best is None or best_of(one).better_than(best_of(best)):
            best = one
    return best


def _take_over(run: Run, best: Measured) -> None:
    """The answers of the best measurement become those after."""
    answers = run.predictions / f"step-{best.step}.jsonl"
    if answers.is_file():
        write_file(run.predictions / "after.jsonl", answers.read_bytes())


def _differences(session: Session, before: Measured, after: Measured) -> list[Difference]:
    """What changed from before the first step to the weights that are kept."""
    loss = unsampled("held_out_loss", before.held_out_loss, after.held_out_loss)
    settings, run = session.recipe.eval, session.run
    if settings is None:
        return [loss]
    metric = own.found(settings.metric, run.folder)
    files = [run.predictions / f"{name}.jsonl" for name in ("before", "after")]
    if all(path.is_file() for path in files):
        return [loss, *paired_files(metric, *files)]
    # Somebody has tidied up: the figures are known, but not how sure their differences are.
    shared = [name for name in before.scores if name in after.scores]
    return [loss, *(unsampled(n, before.scores[n], after.scores[n], REMOVED) for n in shared)]


def _last_words(result: RunResult, run: Run, screen: Screen) -> None:
    """What came of it."""
    after, best = result.after, result.best
    if after is not None:
        screen.say(result.as_table())
    if after is not None and best is not None and best.step != after.step:
        what = "held-out loss" if best.headline is None else best.headline
        value = best.loss if best.score is None else best.score
        screen.say(
            f"The {what} was better after step {best.step} ({value:.4f});"
            f" its checkpoint is kept in {run.checkpoints / f'step-{best.step}'}"
        )


def _published(session: Session, checkpoints: Checkpoints, step: int) -> Mapping[str, Tensor]:
    """What learned, in fp32 and whole: of a model in parts, from its checkpoint."""
    if not session.parallel.sharded:
        return session.masters.published()
    _, values, _ = checkpoints.read(step, "start again with --resume")
    return values


def _export(session: Session, checkpoints: Checkpoints, step: int) -> None:
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
            values=_published(session, checkpoints, step),
        )


def _save_without_adapters(
    model: AnyModel, base: ModelFolder, folder: Path, session: Session
) -> None:
    groups = [(group, adapter) for _, group, adapter in adapters(model)]
    for group, _ in groups:
        group.adapter = None
    try:
        save_any(model, base, folder, session.machine.dtype)
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


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column < 2 and not cell[:1].isdigit() else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
