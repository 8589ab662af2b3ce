"""OpenAI-compatible HTTP server for vision-language models."""
