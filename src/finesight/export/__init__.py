"""Export tuned models: merge adapters, upload to hubs, convert to GGUF, build serving commands."""
