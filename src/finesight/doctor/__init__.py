"""What is wrong with a machine, a model, a recipe or a run, and the command that mends it."""
