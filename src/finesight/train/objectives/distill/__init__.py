"""Distillation from a larger model."""
