"""Dataset checks that find errors in training and validation data before training."""
