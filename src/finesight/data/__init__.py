"""Dataset files: importers, exporters and readers of samples."""
