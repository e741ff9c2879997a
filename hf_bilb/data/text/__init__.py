"""Data sets of text: classification and instructions."""
