"""Where a run stands, on disk: `checkpoints/step-N`, each whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finesight.bounded_files import read_bytes
from finesight.digests import verify_folder
from finesight.errors import UserError
from finesight.storage import explained, remove_folder, set_aside, sweep, write_folder
from finesight.train.budget import Budget
from finesight.train.ranks import ALONE, Ranks

VALUES, MOMENTS, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"

FORMAT = 1


class Best(BaseModel):
    """The best measurement so far: by the task's headline and its score, where the recipe asks for
    a metric; otherwise, and where scores are equal, by the held-out loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    loss: float
    headline: str | None = None
    score: float | None = None

    def better_than(self, other: Best | None) -> bool:
        """Whether this one takes the other's place; so it does if that went by another headline."""
        if other is None or other.headline != self.headline:
            return True
        mine, theirs = self.score or 0.0, other.score or 0.0
        return mine > theirs or (mine == theirs and self.loss < other.loss)


class State(BaseModel):
    """`state.json`: everything beside tensors that a run needs to go on.

    `step` steps are finished, and `samples` is the position in the order of the data, counted in
    samples since the start. `measured` is the step of the last measurement. `budget` is that of the
    next step, None in runs of versions that kept to the recipe's. `void` counts steps that moved
    nothing, as their figures were no finite numbers, and `void_in_a_row` the last of them.
    `identity` holds the settings and fingerprints that a run which goes on must share, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    step: int
    samples: int
    measured: int
    best: Best | None
    loss_scale: dict[str, float]
    budget: Budget | None = None
    void: int = 0
    void_in_a_row: int = 0
    identity: dict[str, Any]


@dataclass(slots=True)
class Progress:
    """How far a run is: `step` steps finished, `void` of them void, last measured after step
    `measured` (-1: never), and the budget of the next step."""

    budget: Budget
    step: int = 0
    measured: int = -1
    best: Best | None = None
    void: int = 0
    void_in_a_row: int = 0


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file, each tensor read when asked for. Raises UserError when damaged."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = _opened(path)
            self._names: list[str] = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"not readable as safetensors: {error}",
                where=str(path),
                expected="a file as `finesight train` wrote it",
                remedy=f"delete {path.parent} to resume from the checkpoint before it",
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class RowFiles(Mapping[str, Tensor]):
    """Files with some rows of every tensor each, in order; what has no rows is the same in all."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._files = files
        self._names = [*dict.fromkeys(name for file in files for name in file)]

    def __getitem__(self, name: str) -> Tensor:
        rows = [file[name] for file in self._files if name in file]
        return torch.cat(rows) if rows[0].dim() else rows[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


Tensors = TensorFile | RowFiles


def _opened(path: Path) -> Any:
    # Its methods are untyped.
    return safe_open(path, framework="pt")


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or has changed since it was written."""


class Checkpoints:
    """The checkpoints of a run: the last `keep` of them and the best one stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        names = [path.name for path in self.folder.glob("step-*")]
        numbers = [name.removeprefix("step-") for name in names]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def path(self, step: int) -> Path:
        """Its folder."""
        return self.folder / f"step-{step}"

    def save(
        self,
        state: State,
        values: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        ranks: Ranks = ALONE,
    ) -> None:
        """Write a checkpoint, then delete those that are not to be kept. One that is there already
        stays as it is: it was made from the same steps. Where `ranks` are several, each of them
        has to call it, with its own rows of every tensor."""
        with ExitStack() as stack:
            folder = None
            try:
                if ranks.first and state.step not in self.steps():
                    folder = stack.enter_context(write_folder(self.path(state.step)))
            finally:
                # The others have to know, whatever went wrong.
                told = ranks.everybodys(folder.name if folder else "")[0].decode()
            if told:
                with ranks.confirmed():
                    _write(self.folder / told, values, moments, ranks)
            if folder is not None:
                if not ranks.alone:
                    # A disk of many machines may show what others wrote only later.
                    for name in (VALUES, MOMENTS):
                        _tensors(folder, name)
                (folder / STATE).write_text(state.model_dump_json(indent=1) + "\n")
        if ranks.first:
            self._tidy(state)

    def _tidy(self, state: State) -> None:
        wanted = {*self.steps()[-self.keep :], state.best.step if state.best else state.step}
        for step in self.steps():
            if step not in wanted:
                remove_folder(self.path(step))

    def newest(self, say: Callable[[str], None]) -> tuple[State, Tensors, Tensors] | None:
        """The last checkpoint that is whole, every byte verified: state, values and moments. None
        without one. Damaged ones after it are told to `say`; see `set_aside`.

        Raises UserError where all are damaged, naming what is wrong with the last one.
        """
        sweep(self.folder)
        last: UserError | None = None
        for step in reversed(self.steps()):
            remedy = f"delete {self.folder} to start from the beginning"
            try:
                found = self.read(step, remedy)
            except DamagedCheckpoint as error:
                last = last or error
                say(f"the checkpoint of step {step} is damaged: {error.where}: {error.what}")
            else:
                if last is not None:
                    say(f"going on from that of step {step}, the last one that is whole")
                return found
        if last is not None:
            raise last
        return None

    def set_aside(self, step: int) -> None:
        """Take the checkpoints after this step for damaged ones: they make room for those that
        will be written again, under names that nothing reads."""
        for later in self.steps():
            if later > step:
                set_aside(self.path(later), self.folder / f"damaged-step-{later}")

    def read(self, step: int, remedy: str) -> tuple[State, Tensors, Tensors]:
        """The checkpoint of a step, every byte verified. Raises UserError with the remedy, a
        DamagedCheckpoint where it is not as it was written."""
        folder = self.path(step)
        try:
            verify_folder(folder)
        except UserError as error:
            raise DamagedCheckpoint(
                error.what, where=error.where, expected=error.expected, remedy=remedy
            ) from error
        return self.opened(step, remedy)

    def opened(self, step: int, remedy: str) -> tuple[State, Tensors, Tensors]:
        """The checkpoint of a step that somebody has verified."""
        folder = self.path(step)
        state = _read_state(folder / STATE, remedy)
        return state, _tensors(folder, VALUES), _tensors(folder, MOMENTS)


def _write(
    folder: Path, values: Mapping[str, Tensor], moments: Mapping[str, Tensor], ranks: Ranks
) -> None:
    for tensors, name in ((values, VALUES), (moments, MOMENTS)):
        file = folder / (name if ranks.alone else _part(name, ranks.number, ranks.count))
        # One by one: a GPU has no room for the wide copies of all.
        with explained(file):
            save_file({key: t.cpu() for key, t in tensors.items()}, file)


def _part(name: str, number: int, count: int) -> str:
    stem, _, ending = name.rpartition(".")
    return f"{stem}-{number + 1:05}-of-{count:05}.{ending}"


def _tensors(folder: Path, name: str) -> Tensors:
    whole = folder / name
    if whole.is_file():
        return TensorFile(whole)
    stem, _, ending = name.rpartition(".")
    found = sorted(folder.glob(f"{stem}-*-of-*.{ending}"))
    expected = [_part(name, number, len(found)) for number in range(len(found))]
    if not found or [part.name for part in found] != expected:
        raise DamagedCheckpoint(
            f"holds {', '.join(part.name for part in found) or 'no part'} of {name}",
            where=str(folder),
            expected=f"{name}, or all parts of it",
            remedy=f"delete {folder}, and start again with --resume",
        )
    return RowFiles([TensorFile(part) for part in found])


def _read_state(path: Path, remedy: str) -> State:
    try:
        state = State.model_validate_json(
            read_bytes(path, expected=f"a state of format {FORMAT}", remedy=remedy)
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}",
            where=str(path),
            expected=f"a state of format {FORMAT}",
            remedy=f"continue with the finesight that wrote it, or {remedy}",
        ) from error
    if state.format != FORMAT:
        raise UserError(
            f"the checkpoint has format {state.format}",
            where=str(path),
            expected=f"format {FORMAT}",
            remedy=f"continue with the finesight that wrote it, or {remedy}",
        )
    return state


def check_identity(stored: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raises UserError naming every setting or fingerprint in which the two differ."""
    now = json.loads(json.dumps(now))
    different = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if different:
        raise UserError(
            "; ".join(f"{name} is {now.get(name)!r} now" for name in different),
            where=str(where),
            expected="; ".join(f"{name}={stored.get(name)!r}" for name in different),
            remedy="resume with the recipe and data the run began with, or give another output",
        )
