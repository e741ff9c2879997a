"""docs/recipe_keys.md lists every key that a recipe can have, with what it means."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hf_bilb.config.registry import DATA_SETS, MODELS
from hf_bilb.experiments.recipe_keys import page

PAGE = Path(__file__).parents[2] / "docs" / "recipe_keys.md"


def test_page_is_what_the_options_say():
    assert PAGE.read_text(encoding="utf-8") == page() + "\n"


def test_every_key_says_what_it_means():
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row[0] for row in rows if len(row[-1].strip(" |")) < 4] == []


@pytest.mark.parametrize(("section", "registry"), [("model", MODELS), ("data", DATA_SETS)])
def test_every_option_of_what_is_registered_is_on_the_page(section, registry):
    text = page()
    for name in registry:
        part = text.partition(f"### {section}.name: {name}\n")[2].partition("\n##")[0]
        listed = set(re.findall(r"^\| `(\w+)`", part, flags=re.M))
        assert {field.name for field in dataclasses.fields(registry[name].options)} <= listed, name
