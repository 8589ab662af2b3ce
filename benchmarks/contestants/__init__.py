"""Those that `peers.py` measures: each in a process of its own, as its makers advise to run it."""
