"""Models with predictions for each pixel."""
