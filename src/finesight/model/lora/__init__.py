"""LoRA: layers, fused kernels, multi-adapter serving, PEFT files, merging."""
