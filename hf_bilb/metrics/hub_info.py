"""What the modules of the library `evaluate` have in common."""

from __future__ import annotations

import datasets
import evaluate


def info_of_pairs(description: str, citation: str, inputs: str, urls: list[str]) -> evaluate.MetricInfo:
    """For a metric of predictions and references that are a number each."""
    # One type for both: integers would cut 0.7 down to class 0, and have no NaN. And no format="numpy": that hands over
    # float32.
    number = datasets.Value("float64")
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=datasets.Features({"predictions": number, "references": number}),
        reference_urls=urls,
    )
