"""LoRA: fused matmuls, multi-LoRA, PEFT files, merging; by phase: `docs/en/architecture.md`."""
