"""Settings of a run: the recipe, its defaults and problems, and the manifest of a run."""
