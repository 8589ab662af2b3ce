"""Diagnose a machine, model or run (`finesight doctor`).

Each reported problem has a reason and a command that fixes it.
"""
