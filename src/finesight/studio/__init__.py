"""Local page from data to a served model (`finesight studio`)."""
