"""Box conventions that only a whole source shows: how boxes may be meant, and by what it shows."""
