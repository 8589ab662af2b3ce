"""The loop and what it needs: data in order, optimiser, checkpoints, the run's folder."""
