"""A comparison, or one run, as ONE page of HTML: style, script, curves and pictures are in the file itself.

The page needs no network and may use none: its Content-Security-Policy allows pictures in the file, and the one script
and style that were written into it, by their hashes. Every name in it is a user's text and is escaped; the curves'
names and numbers are JSON, which the script writes as text alone. What the page looks like is in `page.css`, what it
does in `page.js`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_bilb.errors import OptionError
from hf_bilb.reporting.comparison import Comparison
from hf_bilb.reporting.comparison_tables import grids
from hf_bilb.reporting.gallery import FILE_NAME as GALLERY_FILE
from hf_bilb.reporting.gradient_plots import CONFLICTS_FILE
from hf_bilb.reporting.grid import NEAR, Cell, Column, Grid, html_text, number
from hf_bilb.reporting.page_curves import QUANTITIES, Curve, points_per_curve, read_curves, thinned
from hf_bilb.reporting.page_summary import Verdict, sentences, verdicts
from hf_bilb.reporting.results import RunResults
from hf_bilb.reporting.side_by_side import runs_grid
from hf_bilb.storage.writing import write_text

#: Pictures of a run's folder that a page shows, and what they are.
RUN_PICTURES = {
    CONFLICTS_FILE: "conflicts between the tasks' gradients",
    "levels.png": "upper and lower level",
    GALLERY_FILE: "gallery",
}
#: Pictures of a comparison.
FIGURES = {
    "comparison.png": "errors relative to those of the predictor that sees no input",
    "tasks.png": "errors of each task",
    "progress.png": "validation over the time spent in updates",
}
#: Of all pictures of a page; those that do not fit are named instead.
MOST_PICTURE_BYTES = 8_000_000
#: With more runs, their pictures are folded away.
_MOST_OPEN = 3


@dataclass(frozen=True)
class PageRun:
    """A run on a page: its title (no two alike), the method that it belongs to, what it measured, and its folder."""

    title: str
    method: str
    results: RunResults
    folder: Path


def write_page(
    path: Path, comparison: Comparison, tables: Sequence[Grid], runs: Sequence[PageRun], figures: Sequence[Path] = ()
) -> Path:
    """Write the page; a file of a run that is missing or cannot be read is said on the page.

    Args:
        path: of the file.
        comparison: for the summary and the notes.
        tables: as in the Markdown.
        runs: whose curves and pictures are shown.
        figures: PNG files of the comparison.

    Returns:
        The path.
    """
    notes: list[str] = []
    data = _curves(runs, comparison.reference, notes)
    sections = {
        "Summary": _summary(comparison),
        "Results": "".join(_scrolling(grid.to_html()) for grid in tables) + _marks(tables),
        "Curves": _curves_section(data),
        "Pictures": _pictures(runs, figures, path.parent, notes),
        "Runs": _scrolling(_runs_grid(runs, path.parent).to_html()),
    }
    sections["Notes"] = _items([*comparison.notes, *notes])
    write_text(path, _page(_title(comparison), {name: body for name, body in sections.items() if body}, data))
    return path


def write_runs_page(path: Path, comparison: Comparison, folders: Sequence[str | Path], figures: Sequence[Path]) -> Path:
    """The page of single runs side by side (`hf_bilb.reporting.side_by_side.compare_runs`); `folders` are theirs."""
    runs = [
        PageRun(name, name, run, Path(folder))
        for name, by_seed, folder in zip(comparison.names, comparison.runs, folders, strict=True)
        for run in by_seed.values()
    ]
    return write_page(path, comparison, [runs_grid(comparison)], runs, figures)


def write_methods_page(
    path: Path, comparison: Comparison, folders: Mapping[str, Mapping[int, Path]], figures: Sequence[Path]
) -> Path:
    """The page of methods with their seeds; `folders`: method -> seed -> the run's folder."""
    runs = [
        PageRun(f"{name}, seed {seed}", name, run, folders[name][seed])
        for name, by_seed in zip(comparison.names, comparison.runs, strict=True)
        for seed, run in by_seed.items()
    ]
    return write_page(path, comparison, grids(comparison), runs, figures)


# ---------------------------------------------------------------------------------------------------- the page


def _page(title: str, sections: dict[str, str], data: dict[str, Any] | None) -> str:
    style, script = (_packaged(name) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    body = "".join(
        f'<section id="{name.lower()}"><h2>{name}</h2>\n{inner}</section>\n' for name, inner in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="hf-bilb">
<title>{html_text(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{html_text(title)}</h1><nav aria-label="Sections">{links}</nav></header>
<main>
{body}</main>
<script type="application/json" id="data">{_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def _packaged(name: str) -> str:
    return importlib.resources.files("hf_bilb.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Any) -> str:
    """JSON that cannot end the `script` element that it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(comparison: Comparison) -> str:
    recipes = {run.recipe for runs in comparison.runs for run in runs.values()}
    data = next(iter(comparison.runs[0].values())).data
    return f"{comparison.recipe if len(recipes) == 1 else data}: {', '.join(comparison.names)}"


def _scrolling(inner: str) -> str:
    """A box that scrolls by itself, by the keyboard, too."""
    return f'<div class="scroll" tabindex="0">{inner}</div>\n'


def _items(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html_text(text)}.</li>' for text in texts)}</ul>\n" if texts else ""


# ---------------------------------------------------------------------------------------------------- summary


def _marks(tables: Sequence[Grid]) -> str:
    """What the signs in the tables mean, of those that are there."""
    cells = [cell for table in tables for row in table.body for cell in row]
    texts = [*(cell.text for cell in cells), *(heading for table in tables for heading in table.headings)]
    said = ["A click on a heading sorts."]
    if any(cell.best for cell in cells):
        said.append("Bold: the best value.")
    if any(cell.near for cell in cells):
        said.append(f"{NEAR}: the seeds do not tell it from the best one.")
    if any(text.endswith(("↓", "↑")) for text in texts):
        said.append("↓: lower is better, ↑: higher is better.")
    return f'<p class="hint">{" ".join(said)}</p>\n'


def _summary(comparison: Comparison) -> str:
    said = "".join(f"<p>{html_text(sentence)}</p>\n" for sentence in sentences(comparison))
    items = "".join(_verdict_item(verdict, comparison.reference) for verdict in verdicts(comparison))
    return f'{said}<ul class="verdicts">{items}</ul>\n' if items else said


def _verdict_item(verdict: Verdict, reference: str | None) -> str:
    said = verdict.verdict or ("reference" if verdict.method == reference else "")
    kind = verdict.verdict if verdict.verdict in ("better", "worse") else "open"
    against = f" than {reference}" if kind != "open" else ""
    return (
        f'<li><b>{html_text(verdict.method)}</b> <span class="verdict {kind}">{html_text(said + against)}</span>'
        f"<br>{html_text(verdict.figures)}</li>\n"
    )


# ---------------------------------------------------------------------------------------------------- curves


def _curves(runs: Sequence[PageRun], reference: str | None, notes: list[str]) -> dict[str, Any] | None:
    """Tasks, quantities, and of each run the curves; None without any. What cannot be drawn goes into `notes`. The run
    shown first is not one of the reference, whose weights are seldom of interest."""
    tasks = list(dict.fromkeys(task for run in runs for task in task_names(run.results)))
    found: list[tuple[PageRun, dict[str, list[Curve]]]] = []
    missing = []
    for run in runs:
        try:
            curves = read_curves(run.folder, task_names(run.results))
        except OptionError as error:
            notes.append(f"no curves of {run.title}: {error}")
            continue
        if curves:
            found.append((run, curves))
        else:
            missing.append(run.title)
    if missing:
        notes.append(f"no curves of {', '.join(missing)}: the folder holds no log of the tasks")
    if not found:
        return None
    limit = points_per_curve(sum(len(of_key) for _, curves in found for of_key in curves.values()))
    longest = max(len(steps) for _, curves in found for of_key in curves.values() for steps, _ in of_key)
    pool: dict[tuple[int, ...], int] = {}
    drawn = [_run_json(run, curves, tasks, limit, pool) for run, curves in found]
    return {
        "tasks": tasks,
        "quantities": {key: said for key, said in QUANTITIES.items() if any(key in of["curves"] for of in drawn)},
        "runs": drawn,
        "first": next((i for i, (run, _) in enumerate(found) if run.method != reference), 0),
        "steps": [list(steps) for steps in pool],
        "points": limit,
        "thinned": longest > limit,
    }


def _run_json(
    run: PageRun, curves: dict[str, list[Curve]], tasks: Sequence[str], limit: int, pool: dict[tuple[int, ...], int]
) -> dict[str, Any]:
    """A curve is the number of its steps in `pool`, which curves share, and its values; None for a task without one."""
    made: dict[str, list[Any]] = {}
    for key, of_key in curves.items():
        made[key] = [None] * len(tasks)
        for task, curve in zip(task_names(run.results), of_key, strict=True):
            steps, values = thinned(curve, limit)
            if steps:
                made[key][tasks.index(task)] = [pool.setdefault(tuple(steps), len(pool)), values]
    return {"name": run.title, "method": run.method, "curves": made}


def task_names(results: RunResults) -> list[str]:
    """The K tasks of a run, in the order of its losses; where it has none, of its metrics."""
    of_metrics = list(dict.fromkeys(metric.task for metric in results.metrics if metric.task))
    losses = [key for key in results.losses.get(results.split, {}) if key != "mean"]
    return of_metrics if "mean" in of_metrics else losses or of_metrics


def _curves_section(data: dict[str, Any] | None) -> str:
    if data is None:
        return ""
    said = (
        f"Curves are thinned to at most {data['points']} points: of each stretch of steps the lowest and the highest "
        "value are kept, so that no peak is lost."
        if data["thinned"]
        else "All logged points are drawn."
    )
    return f"""<div id="charts"><noscript>The curves need JavaScript; the tables do not.</noscript></div>
<p class="hint">Move over a chart for its values, drag to zoom (a flat drag: the steps alone), double click to see all
again; by the keyboard <kbd>+</kbd> <kbd>-</kbd> <kbd>←</kbd> <kbd>→</kbd> <kbd>0</kbd>. All charts show the same steps.
A gap: the value was no finite number. The coefficient of
a loss is what it is multiplied with. {said}</p>
"""


# ---------------------------------------------------------------------------------------------------- pictures


def _pictures(runs: Sequence[PageRun], figures: Sequence[Path], base: Path, notes: list[str]) -> str:
    """The comparison's figures, then each run's, one of every method first, as far as the bytes last."""
    left = MOST_PICTURE_BYTES
    shown: dict[str, list[str]] = {}
    left_out = []
    for run, caption, path in _picture_files(runs, figures):
        content = path.read_bytes()
        if len(content) > left:
            left_out.append(os.path.relpath(path, base))
            continue
        left -= len(content)
        shown.setdefault(run, []).append(_figure(caption, content))
    if left_out:
        notes.append(f"to keep the page small, it does not show {', '.join(left_out)}")
    own = "".join(shown.pop("", []))
    state = " open" if len(shown) <= _MOST_OPEN else ""
    return own + "".join(
        f"<details{state}><summary>{html_text(run)}</summary>{''.join(made)}</details>\n" for run, made in shown.items()
    )


def _picture_files(runs: Sequence[PageRun], figures: Sequence[Path]) -> Iterator[tuple[str, str, Path]]:
    """Run (empty: of all), caption and file."""
    yield from (("", FIGURES.get(path.name, path.stem), path) for path in figures if path.is_file())
    first = {run.method: run for run in reversed(runs)}.values()
    for run in sorted(runs, key=lambda run: run not in first):
        for name, what in RUN_PICTURES.items():
            if (run.folder / name).is_file():
                yield run.title, f"{run.title}: {what}", run.folder / name


def _figure(caption: str, content: bytes) -> str:
    source, said = f"data:image/png;base64,{base64.b64encode(content).decode()}", html_text(caption)
    return (
        f'<figure><figcaption>{said}</figcaption><div class="scroll picture" tabindex="0"><img src="{source}" '
        f'alt="{said}"></div></figure>\n'
    )


# ---------------------------------------------------------------------------------------------------- runs


def _runs_grid(runs: Sequence[PageRun], base: Path) -> Grid:
    """What each run is and what it cost; without absolute paths, so that the page can be given to others."""
    left = ("run", "recipe", "model", "balancer")
    right = ("seed", "steps", "epochs", "training s", "ms / step", "peak memory MB", "parameters")
    columns = [Column(heading, left=heading not in right) for heading in (*left, *right, "device", "folder")]
    return Grid(tuple(columns), tuple(tuple(map(Cell, _run_texts(run, base))) for run in runs))


def _run_texts(run: PageRun, base: Path) -> list[str]:
    results, facts = run.results, run.results.training

    def scaled(key: str, factor: float) -> str:
        value = facts.get(key)
        return number(None if value is None else value * factor)

    def plain(value: Any) -> str:
        return "-" if value is None else f"{value:.10g}" if isinstance(value, (int, float)) else str(value)

    return [
        run.title,
        results.recipe,
        results.model,
        results.balancer,
        plain(results.settings.get("trainer", {}).get("seed")),
        plain(facts.get("steps")),
        plain(facts.get("epochs")),
        scaled("seconds", 1),
        scaled("step_seconds", 1e3),
        scaled("peak_memory_bytes", 1e-6),
        plain(facts.get("parameters")),
        plain(facts.get("device")),
        os.path.relpath(run.folder, base),
    ]
