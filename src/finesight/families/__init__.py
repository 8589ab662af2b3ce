"""Light halves of the native model families, one folder each. They import no torch."""
