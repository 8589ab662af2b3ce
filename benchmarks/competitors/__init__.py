"""Training scripts of peers for `peer_comparison.py`, each in its own process."""
