"""Estimate the tokens, FLOPs, memory and time of a run before it starts."""
