"""LoRA: adapter layers, fused kernels, multi-LoRA inference, PEFT files and merging."""
