"""From foreign files to samples, and samples in files."""
