"""What is read from a file or an override is YAML 1.2, strictly."""

from __future__ import annotations

import math

import pytest

from hf_bilb.config.yaml import load_yaml
from hf_bilb.errors import OptionError
from hf_bilb.experiments.recipe import apply_override, differences


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5E4", 5e4),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("1", 1),
        ("-7", -7),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        (".inf", math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
        ("'1e-3'", "1e-3"),
        ("e3", "e3"),
        ("[1e-4, no, {a: 2e1}]", [1e-4, "no", {"a": 20.0}]),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    loaded = load_yaml(text, "here")
    assert loaded == value
    assert type(loaded) is type(value)


def test_anchors_and_merge_keys_work_and_may_be_overridden():
    text = "base: &base {a: 1, b: 2}\nmore:\n  <<: *base\n  b: 3\n"
    assert load_yaml(text, "here")["more"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  seed: 1\n  seed: 2\n", 'x.yaml, line 3: the key "seed" stands twice (first in line 2)'),
        ("a: 1\nb: 2\na: 3\n", 'x.yaml, line 3: the key "a" stands twice (first in line 1)'),
        ("a: 1\n  b: 2\n", "x.yaml, line 2: mapping values are not allowed here"),
        ("a: [1, 2\nb: 3\n", "x.yaml, line 2: expected ',' or ']', but got ':'"),
        ("a: !!python/object/apply:os.getcwd []\n", "x.yaml, line 1: could not determine a constructor for the tag"),
        ("a: *nowhere\n", "x.yaml, line 1: found undefined alias 'nowhere'"),
        ("a: 1\n---\nb: 2\n", "x.yaml, line 2: but found another document"),
        ("a: \x00\n", "x.yaml: unacceptable character"),
        ("? [1, 2]\n: 3\n", "x.yaml, line 1: found unhashable key"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_line_number(text, message):
    with pytest.raises(OptionError) as caught:
        load_yaml(text, "x.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.learning_rate=5e-4", {"trainer": {"learning_rate": 5e-4, "seed": 1}, "balancer": "bilb"}),
        ("trainer.run_name=a=b", {"trainer": {"run_name": "a=b", "seed": 1}, "balancer": "bilb"}),
        ("trainer.report_to=[tensorboard]", {"trainer": {"report_to": ["tensorboard"], "seed": 1}, "balancer": "bilb"}),
        ("trainer.seed=", {"trainer": {"seed": None}, "balancer": "bilb"}),
        ("balancer={name: ls}", {"trainer": {"seed": 1}, "balancer": {"name": "ls"}}),
        ("balancer.pairs=all", {"trainer": {"seed": 1}, "balancer": {"name": "bilb", "pairs": "all"}}),
        ("evaluation.split=test", {"trainer": {"seed": 1}, "balancer": "bilb", "evaluation": {"split": "test"}}),
        (
            "balancer.discrepancy_weight.edge_fraction=0.3",
            {"trainer": {"seed": 1}, "balancer": {"name": "bilb", "discrepancy_weight": {"edge_fraction": 0.3}}},
        ),
    ],
)
def test_overrides_are_laid_over_the_file(override, expected):
    raw = {"trainer": {"seed": 1}, "balancer": "bilb"}
    apply_override(raw, override)
    assert raw == expected


@pytest.mark.parametrize("override", ["trainer.seed", "=3", "trainer..seed=1", ".seed=1", "trainer.=1"])
def test_an_override_without_path_or_value_is_refused(override):
    with pytest.raises(OptionError, match=r"is no override, expected KEY\.PATH=VALUE"):
        apply_override({}, override)


def test_an_override_through_a_value_is_refused():
    raw = {"trainer": {"seed": 1}}
    with pytest.raises(OptionError, match=r"^trainer\.seed\.x: trainer\.seed is 1, no mapping to set 'x' in$"):
        apply_override(raw, "trainer.seed.x=2")
    assert raw == {"trainer": {"seed": 1}}


def test_an_override_with_broken_yaml_names_the_path():
    with pytest.raises(OptionError, match=r"^override balancer, line 1: "):
        apply_override({}, "balancer={name: ls")


def test_differences_name_the_key_paths():
    old = {"trainer": {"seed": 1, "lr": 0.1}, "balancer": {"name": "ls"}}
    new = {"trainer": {"seed": 1, "lr": 0.2, "steps": 3}, "balancer": {"name": "ls"}}
    assert differences(old, new) == ["trainer.lr: 0.1 -> 0.2", "trainer.steps: None -> 3"]
    assert differences(old, old) == []
