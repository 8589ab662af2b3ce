"""Training: trainer, data loading, optimizer, checkpoints and run directory."""
