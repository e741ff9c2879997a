"""The command in the header of each of the papers' recipes that trains every method: it is planned as it is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hf_bilb import list_balancers
from hf_bilb.experiments.plan import plan_comparison

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("data_set", ["qm9", "celeba", "nyuv2", "cityscapes"])
def test_the_command_of_the_header_takes_every_method(data_set: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    header = re.sub(r"^# ?", "", (ROOT / f"recipes/{data_set}/ls.yaml").read_text(encoding="utf-8"), flags=re.M)
    (command,) = re.findall(r"^ +(hf-bilb compare \S+ --seeds [^']*'[^']*')$", header, flags=re.M)
    program, verb, recipe, *options = shlex.split(command)
    assert (program, verb, recipe) == ("hf-bilb", "compare", f"recipes/{data_set}/ls.yaml")
    given = dict(zip(options[::2], options[1::2], strict=True))
    plan = plan_comparison(
        recipe, (), balancers=given.pop("--balancers"), seeds=given.pop("--seeds"), output=str(tmp_path)
    )
    assert not given and len(plan.runs) == 3 * len(plan.labels)
    # torchjd is a package of methods, none of the papers'.
    assert {run.recipe.balancer["name"] for run in plan.runs} == {*list_balancers()} - {"torchjd"}
    assert f"bilb-preset={data_set}" in plan.labels and plan.reference == "ls"
