"""Data sets with labels for each pixel."""
