"""Checks of the free disk space for checkpoints and trained weights."""

from __future__ import annotations

from finesight.storage import require_free_space
from finesight.train.lr_schedule import resolve_save_interval
from finesight.train.setup import TrainState


def estimate_checkpoint_bytes(state: TrainState) -> int:
    """Return the bytes of a checkpoint: fp32 weights and optimizer state of all ranks."""
    optimizer = state.optimizer
    rank_bytes = 4 * optimizer.num_params + sum(
        moment.nbytes for moment in optimizer.optimizer_state().values()
    )
    return rank_bytes * state.shard_group.world_size


def check_disk_space(state: TrainState, num_existing: int) -> None:
    """Verify that the disk has space for the checkpoints and trained weights of a run.

    The estimate includes the retained checkpoints, the best checkpoint and one that is being
    written.

    Args:
        state: State of the run.
        num_existing: Number of checkpoints that are already on disk, which need no more space.

    Raises:
        UserError: There is not enough free space.
    """
    recipe, total_steps = state.recipe, len(state.sampler)
    checkpoint_size, interval = (
        estimate_checkpoint_bytes(state),
        resolve_save_interval(recipe.train, total_steps),
    )
    num_remaining = 1 + ((total_steps - state.progress.step) // interval if interval else 0)
    num_new = max(
        1,
        min(recipe.train.keep_checkpoints + 2, num_remaining + 1 if interval else 1) - num_existing,
    )
    weight_bytes = 4 * state.parallel.num_trainable_params if recipe.tune.has_mode("lora") else 0
    if recipe.tune.has_mode("full"):
        weight_bytes += sum(parameter.nbytes for parameter in state.model.parameters())
    require_free_space(
        state.run_dir.path,
        num_new * checkpoint_size + weight_bytes,
        f"{num_new} checkpoints of {checkpoint_size / 1e9:.3g} GB and"
        f" {weight_bytes / 1e9:.3g} GB of trained weights",
        "free disk space, set another output_dir, or lower train.keep_checkpoints",
    )
