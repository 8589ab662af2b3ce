"""HTML reports of runs, comparisons, data checks and samples."""
