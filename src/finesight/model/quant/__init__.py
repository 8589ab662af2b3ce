"""Quantized weights: NF4, INT4, INT8 and FP8."""
