"""Parts of a model by name."""

from __future__ import annotations

import pytest

from hf_bilb.config.patterns import check_patterns, matches
from hf_bilb.errors import OptionError

NAMES = ["base_model.model.encoder.layer.0.weight", "encoder.layer.1.bias", "head_stars.weight", "head_topic.bias"]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("encoder", [0, 1]),
        ("encoder.layer.1", [1]),
        ("layer.*.weight", [0]),
        ("head_*", [2, 3]),
        ("head_stars.weight", [2]),
        ("*.bias", [1, 3]),
        ("bias", [1, 3]),
        ("*", [0, 1, 2, 3]),
        ("head", []),
        ("enc", []),
    ],
)
def test_a_pattern_is_a_name_or_a_module_at_any_depth(pattern: str, meant: list[int]) -> None:
    assert [i for i, name in enumerate(NAMES) if matches(name, pattern)] == meant


def test_a_pattern_that_means_nothing_names_the_nearest_part() -> None:
    check_patterns(["head_*", "encoder"], NAMES, "freeze")
    with pytest.raises(
        OptionError, match=r'^freeze: \'encodr\' means no parameter of the model \(did you mean "encoder"\?\)'
    ):
        check_patterns(["head_*", "encodr"], NAMES, "freeze")


def test_a_pattern_near_to_nothing_lists_the_parts_of_the_model() -> None:
    names = [f"part_{i}.weight" for i in range(14)]
    with pytest.raises(OptionError) as error:
        check_patterns(["zzz"], names, "freeze")
    listed = ", ".join(f"part_{i}" for i in range(12))
    assert str(error.value) == f"freeze: 'zzz' means no parameter of the model (its parts: {listed}, ...)"
