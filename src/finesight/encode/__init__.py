"""Conversion of samples to tokens and patches, and of generated tokens to text."""
