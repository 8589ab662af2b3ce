"""Distributed training: data parallelism, sharding, context parallelism."""
