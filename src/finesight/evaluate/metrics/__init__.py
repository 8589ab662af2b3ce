"""Metrics of tasks, one per module or package: how they score answers."""
