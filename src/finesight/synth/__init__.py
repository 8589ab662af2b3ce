"""Synthetic data: train tickets, small words, tasks of a window, and demonstrations of tools."""
