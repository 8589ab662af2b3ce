"""Native models: layers, families, adapters, weights in and out."""
