"""The cache of the hubs, for every test here."""

from hubs import cache

__all__ = ["cache"]
