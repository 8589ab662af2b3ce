"""Dataset checks that run before training."""
