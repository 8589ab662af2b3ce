"""Generation, and questions answered."""
