"""Diagnosis of a machine, a model or a run."""
