"""Room on the disk, looked at before it is needed: a run that is refused in its first minute has
lost nothing."""

from __future__ import annotations

from finesight.storage import require_room
from finesight.train.prepare import Session
from finesight.train.schedule import saved_every


def checkpoint_bytes(session: Session) -> int:
    """Of one checkpoint: values in fp32 and the optimiser's moments, of all processes where each
    has some rows of them."""
    masters = session.masters
    own = 4 * masters.numbers + sum(moment.nbytes for moment in masters.moments().values())
    return own * session.together.count


def require_room_for_run(session: Session, present: int) -> None:
    """Raises UserError where the disk has no room for the checkpoints that a run keeps, of which
    so many are `present`, for the best one, for another that is being written, and for the trained
    weights."""
    recipe, total = session.recipe, len(session.course)
    one, every = checkpoint_bytes(session), saved_every(recipe.train, total)
    coming = 1 + ((total - session.progress.step) // every if every else 0)
    more = max(1, min(recipe.train.keep + 2, coming + 1 if every else 1) - present)
    weights = 4 * session.parallel.numbers if recipe.tune.uses("lora") else 0
    if recipe.tune.uses("full"):
        weights += sum(parameter.nbytes for parameter in session.model.parameters())
    require_room(
        session.run.folder,
        more * one + weights,
        f"{more} checkpoints of {one / 1e9:.3g} GB and {weights / 1e9:.3g} GB of trained weights",
        "free some space, choose another output, or keep fewer checkpoints (train.keep)",
    )
