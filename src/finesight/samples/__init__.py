"""Samples: their format, lists, images and videos, and the frames of their boxes."""
