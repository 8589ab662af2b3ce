"""LoRA layers, fused kernels, multi-LoRA, PEFT, merging; by phase: `docs/en/architecture.md`."""
