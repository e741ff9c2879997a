"""The pages under docs: their Python runs as printed, their YAML is valid, and what they state of the library holds."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hf_bilb import build_balancer
from hf_bilb.balancers import resolve_options
from hf_bilb.engine.objective import Derivatives, differentiate

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
#: Pages whose Python needs a server, another library or what another command has left; their own test runs it.
WITH_A_TEST_OF_THEIR_OWN = {
    "hub.md": "tests/hub/test_docs_hub.py",
    "coming_from.md": "tests/test_docs_coming_from.py",
    "export.md": "tests/inference/test_export.py",
    "pixels.md": "tests/test_docs_pixels.py",
    "when_something_fails.md": "tests/test_docs_failures.py",
}
BILB = PAGES["bilb_exactly.md"]


def blocks(language: str) -> list:
    found = re.compile(rf"^```{language}\n(.*?)^```$", flags=re.M | re.S)
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, page in PAGES.items()
        if language != "python" or name not in WITH_A_TEST_OF_THEIR_OWN
        for number, block in enumerate(found.findall(page))
    ]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs_as_printed(block, tmp_path):
    (tmp_path / "example.py").write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout


def assert_holds(found, given, path):
    """Every value of the nested mapping `given` stands in `found`, a mapping or an object, under the same keys."""
    for key, value in given.items():
        there = found[key] if isinstance(found, Mapping) else getattr(found, key)
        if isinstance(value, Mapping):
            assert_holds(there, value, f"{path}.{key}")
        else:
            assert there == value, f"{path}.{key}"


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_arrives_in_the_recipe_and_in_the_training_arguments(block, tmp_path):
    from hf_bilb.config.yaml import load_yaml
    from hf_bilb.experiments.build import training_arguments
    from hf_bilb.experiments.recipe import parse_recipe

    printed = load_yaml(block, "page")
    trainer = {**printed.get("trainer", {}), "output_dir": str(tmp_path), "use_cpu": True}
    sections = {"model": {"name": "qm9_mlp"}, "data": {"name": "qm9"}, "balancer": {"name": "bilb"}, **printed}
    recipe = parse_recipe({**sections, "trainer": trainer}, "page")
    assert_holds(recipe.to_dict(), {**sections, "trainer": trainer}, "recipe")
    assert_holds(training_arguments(recipe), {**trainer, "balancer": sections["balancer"]}, "arguments")


def sections(page: Path) -> list[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", PAGES)
def test_files_named_on_a_page_exist(name):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name]):
        path, _, section = link.partition("#")
        target = ROOT / "docs" / (path or name)
        assert target.exists(), link
        assert not section or section in sections(target), link
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|yaml))`", PAGES[name])
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_one_loop_on_the_page_runs_all_four_presets():
    (example,) = (block.values[0] for block in blocks("python") if "preset" in block.values[0])
    assert all(preset in example for preset in ("cityscapes", "nyuv2", "celeba", "qm9"))


def test_table_of_presets_is_what_the_presets_say():
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in BILB.splitlines() if "|" in line]
    start = next(i for i, row in enumerate(rows) if row[:2] == ["", "cityscapes"])
    presets = rows[start][1:]
    options = {row[0]: row[1:] for row in rows[start:] if row[0] in resolve_options("bilb", {}).__dict__}
    assert len(options) == 10
    for column, preset in enumerate(presets):
        written = {key: yaml.safe_load(cells[column]) for key, cells in options.items()}
        official = dataclasses.replace(resolve_options("bilb", {"preset": preset}), preset=None)
        assert resolve_options("bilb", written) == official, preset


# ------------------------------------------------------------------------------------------------------ the formulas


class Page:
    """The formulas of the page in NumPy: coefficients and the router's gradient at one point."""

    def __init__(self, options, losses, references, logits):
        self.o, self.l, self.l0, self.w = options, losses, references, logits
        soft = np.exp(logits - logits.max())
        self.q = soft / soft.sum()
        sigmoid = 1 / (1 + np.exp(-(np.maximum(logits, 0) if options.activation == "sigmoid_relu" else logits)))
        raw = self.q if options.activation == "softmax" else sigmoid
        low, high = options.clamp or (0, np.inf)
        self.inside = ((raw > low) & (raw < high)).astype(float)
        self.sigma = raw.clip(low, high)
        self.d = 1.0 if options.weight_denominator == "none" else self.sigma.sum()
        self.tau = np.ones_like(losses) if options.tau == "one" else self.sigma
        self.lt, self.n = self.normalised()

    def normalised(self):
        ratio, p = self.l / self.l0, self.o.power
        r = self.l0 / self.l0.min()
        return {
            "none": (self.l, np.ones_like(self.l)),
            "rescaled": (self.l / r, 1 / r),
            "log": (np.log(ratio), 1 / self.l),
            "power": (ratio**p / p, ratio**p / self.l),
        }[self.o.normalization]

    @property
    def s(self):
        v, k = self.tau * self.lt, len(self.l)
        if self.o.pairs == "all":
            return np.array([2 / k * ((v < v[i]).sum() - (v > v[i]).sum()) for i in range(k)])
        slopes = np.zeros(k)
        for i, j in itertools.pairwise(range(k)):
            slopes[i] += np.sign(v[i] - v[j])
            slopes[j] += np.sign(v[j] - v[i])
        return slopes

    @property
    def edge(self):
        k = len(self.l)
        most = np.full(k, 2 * (k - 1) / k) if self.o.pairs == "all" else np.array([1, *[2] * (k - 2), 1])
        return (self.sigma / (self.d * self.tau * most)).min()

    @property
    def weight_of_f(self):
        given = self.o.discrepancy_weight
        return given if isinstance(given, float) else given.edge_fraction * self.edge

    @property
    def coefficients(self):
        return self.n * (self.sigma / self.d + self.weight_of_f * self.tau * self.s)

    @property
    def router_gradient(self):
        """dF/dw [K]."""
        g = (self.sigma * self.lt).sum()
        h = (self.lt - g / self.d) / self.d if self.o.weight_denominator == "sum" else self.lt / self.d
        if self.o.tau == "weights":
            h = h + self.weight_of_f * self.s * self.lt
        if self.o.activation == "softmax":
            return self.q * (self.inside * h - (self.q * self.inside * h).sum())
        alive = self.w > 0 if self.o.activation == "sigmoid_relu" else 1.0
        return self.sigma * (1 - self.sigma) * h * alive


def library(options: dict, losses, references, logits, features=None) -> tuple[Derivatives, object]:
    """The same from the library, its references taken in a first step, its router set to the logits."""
    routed = {} if features is None else {"num_features": len(features)}
    balancer = build_balancer("bilb", len(losses), dtype=torch.float64, **options, **routed)
    with torch.no_grad():
        if features is None:
            balancer.objective.router.logits.copy_(torch.from_numpy(logits))
        else:
            balancer.objective.router.bias.copy_(
                torch.from_numpy(logits - balancer.objective.router.weight.numpy() @ features)
            )
    rows = None if features is None else torch.from_numpy(features)
    for point in (references, losses):
        batch = torch.tensor(point, requires_grad=True)
        balancer.backward(batch, router_features=None if rows is None else rows.expand(4, -1))
    assert torch.equal(batch.grad, balancer.coefficients)
    active = torch.ones(len(losses), dtype=torch.bool)
    return differentiate(balancer.objective, balancer.normalization, batch, active, rows), balancer.objective.router


VARIANTS = {"cityscapes": 2, "nyuv2": 3, "celeba": 40, "qm9": 11, None: 7}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preset", VARIANTS)
def test_formulas_of_the_page(preset, seed):
    random = np.random.default_rng(seed)
    num_tasks = VARIANTS[preset]
    options = {} if preset is None else {"preset": preset}
    losses, references = random.uniform(0.1, 2, num_tasks), random.uniform(0.1, 2, num_tasks)
    logits = random.normal(0, 1.2, num_tasks)
    features = random.normal(size=5) if preset in ("cityscapes", "nyuv2") else None
    page = Page(resolve_options("bilb", options), losses, references, logits)
    ours, router = library(options, losses, references, logits, features)

    np.testing.assert_allclose(ours.output.weights, page.sigma, rtol=1e-12)
    np.testing.assert_allclose(ours.coefficients, page.coefficients, rtol=1e-10)
    np.testing.assert_allclose(ours.output.edge_ratio, page.weight_of_f / page.edge, rtol=1e-7)
    if features is None:
        np.testing.assert_allclose(ours.parameter_gradients[0], page.router_gradient, rtol=1e-9, atol=1e-14)
    else:
        weight, bias = ours.parameter_gradients
        np.testing.assert_allclose(bias, page.router_gradient, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(weight, np.outer(page.router_gradient, features), rtol=1e-9, atol=1e-14)
        into_model = router.weight.detach().numpy().T @ page.router_gradient
        np.testing.assert_allclose(ours.feature_gradient, into_model, rtol=1e-9, atol=1e-14)


def test_below_the_edge_every_weight_goes_the_way_of_its_loss():
    random = np.random.default_rng(0)
    for preset in ("celeba", "qm9", None):
        options = {} if preset is None else {"preset": preset}
        for _ in range(20):
            losses, references = random.uniform(0.1, 2, (2, VARIANTS[preset]))
            ours, _ = library(options, losses, references, random.uniform(0.2, 1, VARIANTS[preset]))
            page = Page(resolve_options("bilb", options), losses, references, np.ones(VARIANTS[preset]))
            assert float(ours.output.edge_ratio) < 1
            assert np.array_equal(np.sign(ours.parameter_gradients[0].numpy()), np.sign(page.lt))


@pytest.mark.parametrize(
    ("preset", "logits", "edge"),
    [
        ("celeba", np.ones(40), 0.0171),
        ("qm9", np.full(11, 0.6), 0.0704),
        ("qm9", np.full(11, 40.0), 0.0455),
        ("nyuv2", np.zeros(3), 0.5),
        ("nyuv2", np.array([9.0, 0.0, 0.0]), 0.4167),
        ("cityscapes", np.zeros(2), 0.5),
        ("cityscapes", np.array([9.0, 0.0]), 0.2),
    ],
)
def test_edges_named_on_the_page(preset, logits, edge):
    options = resolve_options("bilb", {"preset": preset})
    features = np.ones(3) if preset in ("cityscapes", "nyuv2") else None
    losses = np.linspace(0.5, 1, len(logits))
    ours, _ = library({"preset": preset}, losses, losses, logits, features)
    assert options.discrepancy_weight / float(ours.output.edge_ratio) == pytest.approx(edge, abs=5e-5)
