"""Evaluation metrics with confidence intervals, and comparison of two evaluations."""
