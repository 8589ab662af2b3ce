"""Aliases of modules with the names that plug-ins of version 0.1.0 import."""
