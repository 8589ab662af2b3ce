"""Export tuned models: merge, publish, convert to GGUF, and build serving commands."""
