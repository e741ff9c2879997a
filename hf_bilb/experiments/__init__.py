"""Recipes: read, checked, trained, compared."""
