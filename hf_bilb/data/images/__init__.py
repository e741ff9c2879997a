"""Data sets of images with labels for the whole image."""
