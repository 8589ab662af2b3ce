"""Files that may be untrusted, and writes that are complete or absent."""
