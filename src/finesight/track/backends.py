"""Former place of the interface `Tracker`, from which plug-ins of version 0.1.0 import it."""

from finesight.track.tracker import Tracker

__all__ = ["Tracker"]
