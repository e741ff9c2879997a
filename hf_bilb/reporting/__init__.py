"""What stands at the end of a run: `results.json`, tables and plots. Needs neither torch nor transformers."""
