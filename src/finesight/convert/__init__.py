"""Convert training configurations and scripts of other programs to recipes."""
