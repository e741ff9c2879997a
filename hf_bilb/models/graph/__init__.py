"""Models of molecular graphs."""
