"""Training objectives: the loss of a packed batch, with one folder per objective."""
