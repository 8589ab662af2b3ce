"""Model families, one module per architecture."""
