"""Supervised fine-tuning: trainer, data loading, optimizers, checkpoints and the run directory."""
