"""Metrics of tasks: pure functions of predictions and labels, and streaming accumulators beside them."""
