"""Diagnose a machine, model, recipe or run (`finesight doctor`).

Each reported problem has a reason and a command that fixes it.
"""
