"""Web UI for import, data check, training, evaluation and serving (`finesight studio`)."""
