"""Metrics of tasks: pure functions of predictions and labels, streaming accumulators in addition to them, `evaluate`
modules.

hf_bilb.metrics.load("matthews_correlation").compute(predictions=..., references=...)     # a module of `evaluate`
TaskMetrics({"cola": MatthewsCorrelation(), ...}, task_names)                             # a `compute_metrics`
"""

from hf_bilb.metrics.hub.loading import EVALUATE_MODULES, load, module_path

__all__ = ["EVALUATE_MODULES", "load", "module_path"]
