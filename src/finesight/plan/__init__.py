"""What a run will take, said before it starts: tokens, arithmetic, memory and time."""
