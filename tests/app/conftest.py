"""Browser of the web tests."""

from browser import browser as browser
