"""Synthetic tasks: images of words, formulas, receipts and shapes, with questions and answers."""
