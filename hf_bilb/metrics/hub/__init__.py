"""Modules of the library `evaluate`, one folder each, as `evaluate.load` wants them; see `hf_bilb.metrics.load`."""
