"""Detection of box conventions from the statistics of a full source."""
