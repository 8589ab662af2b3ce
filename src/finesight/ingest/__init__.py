"""Import, export and check of data."""
