"""Pictures opened safely, resized, and cut into patches."""
