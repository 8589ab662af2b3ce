"""Send metrics, images and alerts of a run to experiment trackers."""
