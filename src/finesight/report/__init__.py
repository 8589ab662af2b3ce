"""Pages to look at: samples as the model sees them, findings, runs."""
