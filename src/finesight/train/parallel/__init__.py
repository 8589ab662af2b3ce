"""Distributed training: process group, data parallelism and sharding (ZeRO-2, FSDP)."""
