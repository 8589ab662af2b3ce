"""Figures to where people look at them: SwanLab and TensorBoard, when a recipe asks.

`metrics.jsonl` is written whatever else is; see `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from finesight.config import Recipe, SwanLab
from finesight.errors import UserError

Say = Callable[[str], None]


class Tracker(Protocol):
    """Takes figures by name at a step, and is told of the end."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record `figures` as of `step` finished steps."""
        ...

    def close(self) -> None:
        """Write out what is still held back."""
        ...


def trackers(recipe: Recipe, folder: Path, say: Say, step: int = 0) -> list[Tracker]:
    """The trackers that the recipe asks for, writing below `folder`; `say` is told where. A run
    that goes on after `step` replaces what was recorded of later steps.

    Raises UserError for a package that is missing and for a cloud that cannot be reached.
    """
    found: list[Tracker] = []
    if recipe.track.tensorboard:
        found.append(_TensorBoard(folder / "tensorboard", say, step))
    if recipe.track.swanlab is not None:
        found.append(_SwanLabRun(recipe.track.swanlab, recipe, folder / "swanlab", say))
    return found


class _TensorBoard:
    def __init__(self, folder: Path, say: Say, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing(error, "tensorboard") from error
        # Steps after the last checkpoint are done again: their first figures are passed over.
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        say(f"TensorBoard: tensorboard --logdir {folder}")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _SwanLabRun:
    """In the cloud where a key is known (SWANLAB_API_KEY or `swanlab login`), else in files."""

    def __init__(self, settings: SwanLab, recipe: Recipe, folder: Path, say: Say) -> None:
        try:
            import swanlab
        except ImportError as error:
            raise _missing(error, "swanlab") from error
        online = swanlab.Settings().api_key is not None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = swanlab.init(
                project=settings.project,
                name=settings.name,
                config=recipe.model_dump(mode="json"),
                mode="online" if online else "offline",
                log_dir=str(folder),
            )
        except Exception as error:  # its own, its HTTP client's and the system's have no base
            raise UserError(
                f"SwanLab could not start ({type(error).__name__}: {error})",
                where="track.swanlab",
                expected="a connection and a valid key, or no key for files only",
                remedy="check the key and the connection, or leave track.swanlab out",
            ) from error
        if not online:
            say(
                f"SwanLab: no key, so the run is recorded offline in {folder}; after"
                " `swanlab login`, `swanlab sync` brings it to the cloud"
            )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def _missing(error: ImportError, package: str) -> UserError:
    return UserError(
        f"{package} is not installed ({error})",
        where=f"track.{package}",
        expected="the packages of the extra `track`",
        remedy="pip install 'finesight[track]'",
    )
