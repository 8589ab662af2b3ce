"""Commands: options from an operation, text from its outcome."""
