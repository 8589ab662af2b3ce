"""Build and submit training jobs with launchers such as torchrun."""

DEFAULT_LAUNCHER = "torchrun"
"""Launcher of a job that names none."""
