"""Native model families, one folder each: a light half without torch, and an architecture."""
