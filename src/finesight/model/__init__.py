"""Native model implementations: layers, model families, LoRA, quantization and weight files."""
