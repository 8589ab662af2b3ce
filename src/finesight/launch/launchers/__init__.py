"""Launchers: each module or package has the constant `COMPONENT`."""
