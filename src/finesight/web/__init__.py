"""Chat UI for the browser."""
