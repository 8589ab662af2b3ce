"""Dataset files: importers, exporters and readers of training and evaluation samples."""
