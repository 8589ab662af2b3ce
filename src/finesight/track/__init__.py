"""Figures, pictures and alerts of a run, to trackers in processes of their own."""
