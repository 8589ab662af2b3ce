"""Rewards of responses for objectives that train by rewards, with one module or folder each."""
