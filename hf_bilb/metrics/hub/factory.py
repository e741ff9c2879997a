"""The class that a module of the library `evaluate` consists of, made of a function of numbers and of what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from hf_bilb.metrics.hub.info import PAIRS


def metric_class(
    name: str,
    compute: Callable[..., Any],
    *,
    module: str,
    description: str,
    citation: str,
    inputs: str,
    urls: Sequence[str],
    features: datasets.Features = PAIRS,
) -> type[evaluate.Metric]:
    """A subclass of `evaluate.Metric` whose result is `{name: compute(predictions, references, **options)}`.

    Args:
        name: of the module and of its result, `mean_rank`; the class is then called `MeanRank`.
        compute: takes the lists that were added, one for each of `features` in their order, and the metric's options.
        module: `__name__` of the file that it stands in.
        description, citation: for the reader, the latter as BibTeX.
        inputs: arguments, result and an example, as in a docstring.
        urls: where the metric is described.
        features: the type of what is added.
    """

    def _info(self: evaluate.Metric) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=description,
            citation=citation,
            inputs_description=inputs,
            features=features,
            reference_urls=list(urls),
        )

    def _compute(self: evaluate.Metric, **given: Any) -> dict[str, Any]:
        added = [given.pop(column) for column in features]
        return {name: compute(*added, **given)}

    title = name.title().replace("_", "")  # of which `evaluate` makes the name again
    content = {"__module__": module, "__doc__": description, "_info": _info, "_compute": _compute}
    return type(title, (evaluate.Metric,), content)
