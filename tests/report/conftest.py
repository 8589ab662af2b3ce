"""Browser of the report tests."""

from browser import browser as browser
