"""Detect wrong box conventions (format, units, image size) from all boxes of a data file."""
