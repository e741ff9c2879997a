"""The page as a file: what it says, that names are text, that it loads nothing, and that it stays small.

What it does in a browser: `test_html_page_in_chromium.py`.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from hf_bilb.reporting import html_page
from hf_bilb.reporting.grid import Cell, Column, Grid, html_text, plain_grid
from hf_bilb.reporting.html_page import write_runs_page
from hf_bilb.reporting.results import MetricResult
from hf_bilb.reporting.side_by_side import compare_runs
from tests.reporting.made_up_comparison import cell
from tests.reporting.made_up_pages import history, results, write_history, write_methods

TASKS = ["homo", "U0", "U"]
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")
NASTY = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", '"><b onclick=alert(3)>', "'&lt;&amp;",
    "<!--", "]]>", "\u2028\u202e任務 שלום", "a|b~*_`", "${alert(4)}", "mean",
]  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, the text outside of style and script, and the contents of the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts.append(data)
        elif self.cdata_elem is None:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self):
        return json.loads(self.scripts[0])

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def runs_page(tmp_path, runs, names=None, figures=(), folders=None) -> Page:
    names = names or [run.balancer for run in runs]
    folders = folders or [tmp_path / f"run-{i}" for i in range(len(runs))]
    return read(write_runs_page(tmp_path / "page.html", compare_runs(runs, names), folders, figures))


def test_the_summary_says_which_runs_and_how_they_stand(tmp_path):
    page = read(write_methods(tmp_path, ["ls", "bilb"], [0, 1, 2], TASKS))
    assert "6 runs of 2 methods: recipe small, model mlp, measured on the test part of made_up." in page.text
    assert "Balancers: ls, bilb; seeds 0, 1, 2; trained for 400 steps." in page.text
    assert "Better than the mean predictor in all 3 metrics." in page.text
    # errors 80, 81, 82 instead of 100, 101, 102 with seed 0: a fifth less, with every seed
    assert "bilb better than ls mean rank 1.00 of 2; mean error 0.8022 × ls's; better in 3 of 3 metrics" in page.text
    assert "ls reference mean rank 2.00 of 2" in page.text


def test_worse_and_not_told(tmp_path):
    page = read(write_methods(tmp_path, ["ls", "bilb"], [0], TASKS))
    assert "bilb one seed: cannot be told" in page.text
    runs = [results("ls", TASKS, [1.0, 2.0, 3.0]), results("bilb", TASKS, [600.0, None, 4.0])]
    page = runs_page(tmp_path, runs)
    assert "NOT better than the mean predictor: bilb in 2 of 3 metrics (homo MAE, U0 MAE)." in page.text


def test_the_signs_in_the_tables_are_explained_where_there_are_any(tmp_path):
    page = read(write_methods(tmp_path, ["ls", "bilb"], [0, 1, 2], TASKS))
    assert "A click on a heading sorts. Bold: the best value. ↓: lower is better, ↑: higher is better." in page.text
    assert "A click on a heading sorts. Curves" not in page.text
    page = runs_page(tmp_path, [results("bilb", TASKS, [1.0, 2.0, 3.0])])
    assert "A click on a heading sorts. Runs" in page.text


def test_the_title_names_the_recipe_or_of_several_the_data(tmp_path):
    runs = [results("ls", TASKS, [1.0, 2.0, 3.0]), results("bilb", TASKS, [1.0, 2.0, 3.0])]
    assert runs_page(tmp_path, runs).text.startswith("small: ls, bilb ")
    runs[1] = dataclasses.replace(runs[1], recipe="other")
    page = runs_page(tmp_path, runs)
    assert page.text.startswith("made_up: ls, bilb ") and "recipes other, small, model mlp" in page.text


def test_one_run_alone_is_related_to_nothing(tmp_path):
    write_history(tmp_path / "run-0", history(TASKS, [10, 20]))
    page = runs_page(tmp_path, [results("bilb", TASKS, [1.0, 2.0, 3.0], seed=7)])
    assert "1 run: recipe small, model mlp, measured on the test part of made_up." in page.text
    assert "Balancer: bilb; seed 7; trained for 400 steps." in page.text
    assert "related to" not in page.text and "reference" not in page.text
    assert [run["name"] for run in page.data["runs"]] == ["bilb"]


def test_a_run_without_a_log_or_with_a_broken_one_is_said(tmp_path):
    runs = [results(name, TASKS, [1.0, 2.0, 3.0]) for name in ("ls", "si", "bilb")]
    write_history(tmp_path / "run-2", history(TASKS, [10, 20]))
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "trainer_state.json").write_text("{")
    page = runs_page(tmp_path, runs)
    assert "no curves of ls: the folder holds no log of the tasks." in page.text
    assert re.search(r"no curves of si: \S*trainer_state.json: cannot be read", page.text)
    assert [run["name"] for run in page.data["runs"]] == ["bilb"]
    (tmp_path / "run-2" / "trainer_state.json").unlink()
    page = runs_page(tmp_path, runs)
    assert page.data is None and "Curves" not in page.text


def test_a_run_without_metrics_has_a_page(tmp_path):
    run = dataclasses.replace(cell("ls", [], tasks=[]), losses={"test": {"mean": 1.0, "a": 1.0}})
    write_history(tmp_path / "run-0", history(["a"], [10]))
    write_history(tmp_path / "run-1", history(["a"], [10]))
    page = runs_page(tmp_path, [run, run], ["x", "y"])
    assert page.data["tasks"] == ["a"] and "verdicts" not in str(page.tags)


def test_names_are_text_wherever_they_stand(tmp_path):
    plain = read(write_methods(tmp_path / "plain", [f"m{i}" for i in range(len(NASTY))], [0], TASKS))
    page = read(write_methods(tmp_path / "nasty", NASTY, [0], NASTY[:3]))
    shape = [(tag, sorted(attributes)) for tag, attributes in page.tags]
    assert shape == [(tag, sorted(attributes)) for tag, attributes in plain.tags]
    assert len(page.scripts) == 2
    assert page.data["tasks"] == NASTY[:3]
    assert [run["method"] for run in page.data["runs"]] == NASTY
    for name in NASTY:
        assert " ".join(name.replace("\u202e", "\ufffd").split()) in page.text


def test_a_task_named_like_the_mean_is_one_of_the_tasks(tmp_path):
    run = results("ls", ["mean", "b"], [1.0, 2.0])
    write_history(tmp_path / "run-0", history(["mean", "b"], [10]))
    assert runs_page(tmp_path, [run]).data["tasks"] == ["mean", "b"]
    metrics = [MetricResult("mae_b", "b", "MAE", "", False, 1.0, 2.0)]
    assert html_page.task_names(dataclasses.replace(run, metrics=metrics)) == ["b"]


def test_nothing_is_loaded_and_only_our_own_script_may_run(tmp_path):
    (tmp_path / "comparison.png").write_bytes(PNG)
    write_history(tmp_path / "run-0", history(TASKS, [10]))
    page = runs_page(tmp_path, [results("ls", TASKS, [1.0, 2.0, 3.0])], figures=[tmp_path / "comparison.png"])
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for tag, attributes in page.tags:
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#")), f"<{tag} {key}={attributes[key]}>"
        assert not any(key.startswith("on") or key == "style" for key in attributes)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "@import" not in text and "url(" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}


def test_pictures_are_in_the_page_one_of_each_method_first_as_far_as_they_fit(tmp_path, monkeypatch):
    page = write_methods(tmp_path, ["ls", "bilb"], [0, 1], TASKS)
    for i in range(2):
        for seed in range(2):
            (tmp_path / f"method-{i}/seed-{seed}/gallery.png").write_bytes(PNG)
            (tmp_path / f"method-{i}/seed-{seed}/gradient_conflicts.png").write_bytes(PNG)
    page = read(write_methods(tmp_path, ["ls", "bilb"], [0, 1], TASKS))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 8 and page.count("details") == 4
    assert all(base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG for image in images)
    assert [image["alt"] for image in images][:3:2] == [
        "ls, seed 0: conflicts between the tasks' gradients",
        "bilb, seed 0: conflicts between the tasks' gradients",
    ]
    monkeypatch.setattr(html_page, "MOST_PICTURE_BYTES", 5 * len(PNG))
    page = read(write_methods(tmp_path, ["ls", "bilb"], [0, 1], TASKS))
    assert page.count("img") == 5
    assert "it does not show method-0/seed-1/gallery.png, method-1/seed-1/gradient_conflicts.png, method-1" in page.text


@pytest.mark.slow
def test_twelve_methods_with_five_seeds_and_forty_tasks_stay_a_small_file(tmp_path):
    tasks = [f"attribute_{k}" for k in range(40)]
    methods = [f"m{i}" for i in range(12)]
    steps = list(range(1, 201))
    path = write_methods(tmp_path, methods, range(5), tasks, steps, loss=lambda k, step: ((step * 7919 + k) % 997) / 7)
    assert path.stat().st_size < 10_000_000
    page = read(path)
    assert len(page.data["runs"]) == 60 and page.data["thinned"] is True
    lengths = [len(curve[1]) for run in page.data["runs"] for curves in run["curves"].values() for curve in curves]
    assert max(lengths) <= page.data["points"] and max(lengths) >= 60
    assert f"Curves are thinned to at most {page.data['points']} points" in page.text


def test_a_curve_points_to_its_steps_and_has_a_null_where_there_is_no_number(tmp_path):
    page = read(
        write_methods(tmp_path, ["ls"], [0], ["a"], [1, 2, 3], loss=lambda k, step: float("nan") if step == 2 else 1.0)
    )
    steps, values = page.data["runs"][0]["curves"]["loss"][0]
    assert (page.data["steps"][steps], values) == ([1, 2, 3], [1.0, None, 1.0])
    assert "All logged points are drawn." in page.text


def test_the_page_names_no_absolute_path(tmp_path):
    text = write_methods(tmp_path, ["ls"], [0], TASKS).read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "method-0/seed-0" in text


# ---------------------------------------------------------------------------------------------------- tables


def test_a_grid_as_html():
    columns = (Column("task", left=True), Column("<i>ls"), Column("bilb"))
    body = ((Cell("a&b"), Cell("1.0", best=True), Cell("2.0", near=True)),)
    assert Grid(columns, body, ((Cell("mean"), Cell(""), Cell("-")),), "one > two").to_html() == (
        '<table><caption>one &gt; two</caption><thead><tr><th scope="col" class="left">task</th>'
        '<th scope="col">&lt;i&gt;ls</th><th scope="col">bilb</th></tr></thead>'
        '<tbody><tr><th scope="row" class="left">a&amp;b</th><td><strong>1.0</strong></td><td>2.0~</td></tr></tbody>'
        '<tfoot><tr><th scope="row" class="left">mean</th><td></td><td>-</td></tr></tfoot></table>\n'
    )
    assert "<tfoot>" not in plain_grid(["a"], [["b"]]).to_html()


@pytest.mark.parametrize(
    "sign", ["\u202a", "\u202b", "\u202c", "\u202d", "\u202e", "\u2066", "\u2067", "\u2068", "\u2069"]
)
def test_signs_that_turn_the_text_behind_them_are_shown_as_unknown(sign):
    assert html_text(f"a{sign}<") == "a\ufffd&lt;"
