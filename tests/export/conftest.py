"""The cache of the hubs, for every test here."""

from hub_fixtures import cache

__all__ = ["cache"]
