"""HTML pages: run reports, run comparisons, data checks and rendered samples."""
