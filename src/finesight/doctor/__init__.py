"""Diagnose a machine, model, recipe or run, and suggest a command for each problem."""
