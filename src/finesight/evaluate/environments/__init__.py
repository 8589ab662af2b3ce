"""Built-in environments, whose tools a model calls in an episode."""
