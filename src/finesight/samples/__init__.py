"""Samples: coordinate frames of boxes."""
