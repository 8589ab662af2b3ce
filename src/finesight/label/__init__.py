"""Labelling: suggestions with confidence, decisions in a journal, and ranking of label errors."""
