"""Import of foreign data by mappings: files that state the role of every key of a record."""
