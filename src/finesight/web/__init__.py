"""Chat UI for the browser (`finesight web`)."""
