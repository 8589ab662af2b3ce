"""Browser of the labelling page tests."""

from browser import browser as browser
