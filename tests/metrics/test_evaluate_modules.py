"""The `evaluate` modules: from a built and unpacked wheel, in a process that may not touch the network; and in here."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics import EVALUATE_MODULES, load, module_path

evaluate = pytest.importorskip("evaluate")
stats = pytest.importorskip("scipy.stats", reason="the references are scikit-learn and scipy")
sklearn = pytest.importorskip("sklearn.metrics", reason="the references are scikit-learn and scipy")

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = np.random.default_rng(0)
CLASSES = (GENERATOR.integers(0, 2, 60).tolist(), GENERATOR.integers(0, 2, 60).tolist())
VALUES = (np.round(GENERATOR.normal(size=60), 1).tolist(), np.round(GENERATOR.normal(size=60), 1).tolist())
SCORES = (VALUES[0], CLASSES[1])
#: Predictions and references of each module of examples, and what is expected of them.
CASES: dict[str, tuple[tuple[list[Any], list[Any]], float]] = {
    "accuracy": (CLASSES, sklearn.accuracy_score(*CLASSES)),
    "f1": (CLASSES, sklearn.f1_score(CLASSES[1], CLASSES[0])),
    "matthews_correlation": (CLASSES, sklearn.matthews_corrcoef(*CLASSES)),
    "mean_absolute_error": (VALUES, sklearn.mean_absolute_error(*VALUES)),
    "pearson": (VALUES, stats.pearsonr(*VALUES).statistic),
    "roc_auc": (SCORES, sklearn.roc_auc_score(SCORES[1], SCORES[0])),
    "spearman": (VALUES, stats.spearmanr(*VALUES).statistic),
}

#: Modules of figures over all tasks: they take metrics, not examples.
OVER_ALL_TASKS = {"delta_m", "mean_rank"}

IN_A_WHEEL = """
import json, os, sys
from pathlib import Path

touched = []

def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        touched.append((event, str(arguments[1:] or arguments)))
        raise OSError("no network in this process")

sys.addaudithook(forbid)

import evaluate
import hf_bilb.metrics

found = {"package": hf_bilb.__file__}
for how, load in (
    ("load", hf_bilb.metrics.load),
    ("evaluate.load", lambda name: evaluate.load(hf_bilb.metrics.module_path(name))),
):
    found[how] = {}
    for name, (predictions, references) in json.loads(sys.argv[1]).items():
        module = load(name)
        for start in range(0, len(predictions), 7):
            module.add_batch(predictions=predictions[start : start + 7], references=references[start : start + 7])
        found[how][name] = module.compute()[name]
    found[f"code copied by {how}"] = len(list(Path(os.environ["HF_HOME"]).rglob("*/*.py")))
found["attempts"] = touched.copy()
try:
    evaluate.load("accuracy")  # the hub's: proves that the hook works
except Exception:
    found["attempts for the hub"] = len(touched)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip would install it, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_bilb", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The build backend itself: pip would fetch it anew.
    build = "import sys, setuptools.build_meta; setuptools.build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def environment(home: Path, package: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {**kept, "HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}


def test_the_installed_package_loads_them_without_a_network(wheel: Path, tmp_path: Path) -> None:
    given = json.dumps({name: pair for name, (pair, _) in CASES.items()})
    done = subprocess.run(
        [sys.executable, "-c", IN_A_WHEEL, given],
        cwd=tmp_path,
        env=environment(tmp_path, wheel),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert Path(found["package"]).is_relative_to(wheel), "the source tree was imported, not the wheel"
    expected = {name: pytest.approx(value, rel=1e-12) for name, (_, value) in CASES.items()}
    assert found["load"] == expected and found["evaluate.load"] == expected
    assert found["attempts"] == [] and found["attempts for the hub"] > 0
    # Nothing but data goes through the cache: a package that was upgraded cannot meet an old copy of its modules.
    assert found["code copied by load"] == 0 and found["code copied by evaluate.load"] >= len(CASES)


# --- in this process ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for what is added, not that of the user."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    return tmp_path / "metrics"


def test_the_list_is_what_lies_there() -> None:
    folder = Path(module_path("accuracy")).parent
    assert sorted(path.parent.name for path in folder.glob("*/*.py") if path.stem == path.parent.name) == list(
        EVALUATE_MODULES
    )
    assert set(CASES) == set(EVALUATE_MODULES) - OVER_ALL_TASKS


@pytest.mark.parametrize("name", EVALUATE_MODULES)
def test_a_module_says_what_it_is(name: str) -> None:
    module = load(name)
    assert module.name == name and module.module_type == "metric"
    assert (
        module.description
        and module.citation.strip().startswith(("@article", "@inproceedings"))
        and "Returns:" in module.inputs_description
    )
    assert module.info.reference_urls[0].startswith("https://")


@pytest.mark.parametrize("name", EVALUATE_MODULES)
def test_the_example_in_the_documentation_is_true(name: str) -> None:
    import hf_bilb.metrics

    *call, printed = load(name).inputs_description.split("Example:")[1].strip().splitlines()
    code = "".join(line.strip().removeprefix(">>> ").removeprefix("... ") for line in call)
    result, expected = eval(code, {"hf_bilb": hf_bilb}), eval(printed)
    assert result.keys() == expected.keys() == {name}
    assert result[name] == pytest.approx(expected[name], rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_missing_references_arrays_and_tensors(name: str) -> None:
    (predictions, references), expected = CASES[name]
    more = [*predictions, 1, 0], [*references, math.nan, math.nan]
    for convert in (list, np.asarray, lambda values: torch.tensor(values, dtype=torch.float64)):
        found = load(name).compute(predictions=convert(more[0]), references=convert(more[1]))
        assert found == {name: pytest.approx(expected, rel=1e-12)} and type(found[name]) is float
    assert math.isnan(load(name).compute(predictions=[1, 0], references=[math.nan, math.nan])[name])


def test_options_of_f1() -> None:
    predictions, references = [0, 1, 2, 1, 0], [0, 2, 2, 1, 1]
    macro = load("f1").compute(predictions=predictions, references=references, average="macro")
    assert macro["f1"] == pytest.approx(sklearn.f1_score(references, predictions, average="macro"), rel=1e-12)
    of_class = load("f1").compute(predictions=predictions, references=references, pos_label=2)
    assert of_class["f1"] == pytest.approx(sklearn.f1_score(references, predictions, average=None)[2], rel=1e-12)
    with pytest.raises(OptionError, match="average: 'macra' is not valid"):
        load("f1").compute(predictions=predictions, references=references, average="macra")


def test_figures_over_all_tasks() -> None:
    measured, base, higher = [0.5, 30.0, 30.0], [0.4, 25.0, 25.0], [True, False, False]
    module = load("delta_m")
    assert module.compute(predictions=measured, references=base, higher_is_better=higher) == {
        "delta_m": pytest.approx((-25 + 20 + 20) / 3)
    }
    grouped = module.compute(predictions=measured, references=base, higher_is_better=higher, groups=["a", "b", "b"])
    assert grouped == {"delta_m": pytest.approx((-25 + 20) / 2)}
    ranks = load("mean_rank").compute(predictions=[measured, base], higher_is_better=higher)
    assert ranks == {"mean_rank": [pytest.approx(5 / 3), pytest.approx(4 / 3)]}
    with pytest.raises(MetricError, match=r"base\[0\]: 0 is not valid"):
        module.compute(predictions=[1.0], references=[0.0], higher_is_better=[True])


def test_several_together_as_for_mrpc() -> None:
    both = evaluate.combine([load("accuracy"), load("f1")])
    predictions, references = CLASSES
    found = both.compute(predictions=predictions, references=references)
    assert found == {name: pytest.approx(CASES[name][1], rel=1e-12) for name in ("accuracy", "f1")}


def test_a_share_is_no_class() -> None:
    with pytest.raises(MetricError, match=r"predictions: 0\.7 is not valid, expected class indices"):
        load("accuracy").compute(predictions=[0.7, 1.0], references=[1, 1])


def test_an_unknown_name_is_one_line_with_the_nearest() -> None:
    for function in (load, module_path):
        with pytest.raises(OptionError) as raised:
            function("mathews_correlation")
        message = str(raised.value)
        assert message.startswith("metric: 'mathews_correlation' is not known (did you mean \"matthews_correlation\"?)")
        assert "\n" not in message


@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
def test_a_folder_that_cannot_be_written_is_one_line(given: bool, tmp_path: Path, cache: Path) -> None:
    # A file where the folder should be: permissions would not stop root.
    folder = tmp_path / "other" if given else cache
    folder.write_text("")
    with pytest.raises(
        OptionError, match=r"cache_dir: '.*' cannot be written \(.*\), give another or set HF_METRICS_CACHE"
    ):
        load("accuracy", cache_dir=str(folder) if given else None)
    # The modules' code is not copied anywhere: another folder is all that is needed.
    module = load("accuracy", cache_dir=str(tmp_path / "free"), keep_in_memory=True)
    assert module.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
