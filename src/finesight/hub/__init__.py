"""Download and verify files from hubs, archives, object storage and the web."""
