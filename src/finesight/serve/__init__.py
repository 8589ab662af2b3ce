"""The model behind HTTP, as OpenAI's clients speak it."""
