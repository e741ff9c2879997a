"""Data sets of molecules: descriptors and graphs."""
