"""Training objectives: the loss of a packed batch, with one file per objective."""
