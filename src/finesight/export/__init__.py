"""Handing a tuned model over: merged with proof, published, converted, and served elsewhere."""
