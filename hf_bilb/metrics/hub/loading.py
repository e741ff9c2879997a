"""The metrics as modules of the library `evaluate`, from the installed package: no hub, no network."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, cast

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import evaluate

_FOLDERS = "hf_bilb.metrics.hub"
#: What `load` knows; names and results agree with each other, and with the function of the same name.
EVALUATE_MODULES = (
    "accuracy",
    "delta_m",
    "f1",
    "matthews_correlation",
    "mean_absolute_error",
    "mean_rank",
    "pearson",
    "roc_auc",
    "spearman",
)


def load(
    name: str,
    *,
    cache_dir: str | None = None,
    keep_in_memory: bool = False,
    num_process: int = 1,
    process_id: int = 0,
    experiment_id: str | None = None,
) -> evaluate.EvaluationModule:
    """A metric as `evaluate.load` gives it: `compute`, `add`, `add_batch`, `evaluate.combine`.

    Unlike `evaluate.load(module_path(name))`, which works too, it does not copy the module's code into the cache
    (`HF_MODULES_CACHE`) first, but takes it from where it is installed.

    Args:
        name: one of `EVALUATE_MODULES`.
        cache_dir: folder in which `evaluate` keeps what is added until it is computed; None for its default
            (`HF_METRICS_CACHE`, `HF_HOME/metrics`).
        keep_in_memory: keep it in memory instead (`evaluate` makes the folder all the same).
        num_process, process_id, experiment_id: as in `evaluate.load`, for several processes with one shared folder.

    Raises:
        OptionError: an unknown name; a folder that cannot be written.
    """
    _check_name(name)
    import evaluate

    cls = evaluate.loading.import_main_class(f"{_FOLDERS}.{name}.{name}")
    try:
        module = cls(
            cache_dir=cache_dir,
            keep_in_memory=keep_in_memory,
            num_process=num_process,
            process_id=process_id,
            experiment_id=experiment_id,
        )
    except OSError as error:
        folder = cache_dir or evaluate.config.HF_METRICS_CACHE
        raise OptionError(
            f"cache_dir: {str(folder)!r} cannot be written ({error.strerror}), give another or set HF_METRICS_CACHE"
        ) from None
    return cast("evaluate.EvaluationModule", module)


def module_path(name: str) -> str:
    """The installed module's folder, which `evaluate.load` takes.

    Raises:
        OptionError: an unknown name.
    """
    _check_name(name)
    return str(files(_FOLDERS) / name)


def _check_name(name: str) -> None:
    if name not in EVALUATE_MODULES:
        raise unknown_name("metric", name, EVALUATE_MODULES)
