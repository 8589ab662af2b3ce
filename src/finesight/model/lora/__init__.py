"""LoRA: fused matmuls, multi-LoRA inference, PEFT files and merging."""
