"""Model families: one module for each architecture."""
