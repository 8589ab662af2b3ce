"""Image decoding, resizing and patch extraction."""
