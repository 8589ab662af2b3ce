"""Inference: model loading, generation engine, predictions and chat sessions."""
