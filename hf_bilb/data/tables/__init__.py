"""Data sets that are tables of numbers and categories."""
