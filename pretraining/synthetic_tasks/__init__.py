"""Synthetic tasks for the pretraining of finesight-tiny: images with questions and answers."""
