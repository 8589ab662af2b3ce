"""The page to talk to a model in a browser."""
