"""From a sample to tokens and back: one renderer, one file a family."""
