"""A recipe is checked as a whole before anything is loaded; what is wrong is one line."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from hf_bilb.config.yaml import load_yaml
from hf_bilb.errors import OptionError
from hf_bilb.experiments.recipe import SECTIONS, dump_recipe, parse_recipe, read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
GOOD = {
    "model": {"name": "qm9_mlp"},
    "data": {"name": "qm9", "num_train": 1000},
    "balancer": {"name": "bilb"},
    "trainer": {"output_dir": "runs/x", "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "eval_strategy": "no"},
    "evaluation": {"split": "test"},
}


def changed(path, value):
    raw = copy.deepcopy(GOOD)
    *sections, key = path.split(".")
    target = raw
    for section in sections:
        target = target[section]
    target[key] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("trianer", {}, 'trianer: unknown section, value {} (did you mean "trainer"?)'),
        ("learning_rate", 1, 'learning_rate: unknown section, value 1 (did you mean "trainer.learning_rate"?)'),
        ("num_train", 5, 'num_train: unknown section, value 5 (did you mean "data.num_train"?)'),
        ("pairs", "all", "pairs: unknown section, value 'all' (did you mean \"balancer.pairs\"?)"),
        ("zzzzz", 5, "zzzzz: unknown section, value 5 (sections: model, data, balancer, trainer, evaluation)"),
        ("model", None, "model: this section is missing (a recipe has model, data, balancer, trainer, evaluation)"),
        ("trainer", [1], "trainer: [1] is not valid, expected a mapping of options"),
        ("data", 3, "data: 3 is not valid, expected a mapping of options"),
        ("model", {}, "model.name: is required, expected one of "),
        ("model", {"layers": 3}, "model.name: is required, expected one of "),
        ("model.name", "qm9_mpl", "model.name: 'qm9_mpl' is not known (did you mean \"qm9_mlp\"?)"),
        ("data.name", "qm8", "data.name: 'qm8' is not known (did you mean \"qm9\"?)"),
        ("data.name", 9, "data.name: 9 is not known"),
        ("data.num_trian", 5, 'data.num_trian: unknown option, value 5 (did you mean "num_train"?)'),
        ("data.num_train", "many", "data.num_train: 'many' is not valid, expected an integer"),
        ("data.num_train", 1.5, "data.num_train: 1.5 is not valid, expected an integer"),
        ("data.num_test", 130_831, "data.num_test: 130831 is not valid, expected 1 to "),
        ("balancer.name", "bilbo", "balancer.name: 'bilbo' is not known (did you mean \"bilb\"?)"),
        ("balancer.paris", "all", "balancer.paris: unknown option, value 'all' (did you mean \"pairs\"?)"),
        ("balancer.pairs", "al", 'balancer.pairs: \'al\' is not valid, expected one of "adjacent", "all"'),
        ("balancer.tau", True, "balancer.tau: True is not valid"),
        ("evaluation.split", "tset", 'evaluation.split: \'tset\' is not valid, expected one of "test", "validation"'),
        ("evaluation.spilt", "test", "evaluation.spilt: unknown option, value 'test' (did you mean \"split\"?)"),
        ("trainer.lerning_rate", 1, 'trainer.lerning_rate: unknown option, value 1 (did you mean "learning_rate"?)'),
        ("trainer.learning_rate", "fast", "trainer.learning_rate: 'fast' is not valid, expected a number"),
        ("trainer.learning_rate", True, "trainer.learning_rate: True is not valid, expected a number"),
        ("trainer.seed", True, "trainer.seed: True is not valid, expected an integer"),
        ("trainer.bf16", 1, "trainer.bf16: 1 is not valid, expected true or false"),
        ("trainer.bf16", "yes", "trainer.bf16: 'yes' is not valid, expected true or false"),
        (
            "trainer.eval_strategy",
            "epochs",
            "trainer.eval_strategy: 'epochs' is not valid, expected one of no, steps, epoch (did you mean \"epoch\"?)",
        ),
        ("trainer.lr_scheduler_type", "cosin", "trainer.lr_scheduler_type: 'cosin' is not valid, expected one of "),
        ("trainer.balancer", "ls", "trainer.balancer: belongs in the section \"balancer\", value 'ls'"),
        ("trainer.task_names", ["a"], "trainer.task_names: comes from the data set, value ['a']"),
        ("trainer.resume_from_checkpoint", "x", "trainer.resume_from_checkpoint: is the option --resume"),
    ],
)
def test_what_is_wrong_is_one_line_with_path_value_and_nearest_name(path, value, message):
    with pytest.raises(OptionError) as caught:
        parse_recipe(changed(path, value), "x")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_section_and_a_missing_folder_are_named():
    for section in SECTIONS[:-1]:
        with pytest.raises(OptionError, match=f"^{section}: this section is missing"):
            parse_recipe({key: value for key, value in GOOD.items() if key != section}, "x")
    with pytest.raises(OptionError, match=r"^trainer\.output_dir: is required"):
        parse_recipe(changed("trainer", {"seed": 1}), "x")


def test_defaults_are_filled_in_and_the_evaluation_section_may_be_left_out():
    recipe = parse_recipe({key: value for key, value in GOOD.items() if key != "evaluation"}, "x")
    assert recipe.evaluation.split == "test"
    assert recipe.data["num_test"] == 10_000
    assert recipe.balancer["discrepancy_weight"] == {"edge_fraction": 0.4}
    assert recipe.trainer == GOOD["trainer"]


def test_a_preset_is_resolved_into_its_options():
    recipe = parse_recipe(changed("balancer", {"name": "bilb", "preset": "qm9"}), "x")
    assert recipe.balancer["normalization"] == "log"
    assert recipe.balancer["discrepancy_weight"] == 0.05


def test_a_section_may_be_just_a_name():
    assert parse_recipe(changed("balancer", "ls"), "x") == parse_recipe(changed("balancer", {"name": "ls"}), "x")


def test_numbers_are_numbers_in_files_and_overrides(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(dump_recipe(parse_recipe(GOOD, "small")).replace("1.0e-03", "1e-3").replace("0.001", "1e-3"))
    assert "learning_rate: 1e-3" in path.read_text()
    recipe = read_recipe(path, ["trainer.weight_decay=1e-4", "trainer.num_train_epochs=2"])
    assert recipe.trainer["learning_rate"] == 1e-3
    assert recipe.trainer["weight_decay"] == 1e-4
    assert type(recipe.trainer["num_train_epochs"]) is float


@pytest.mark.parametrize("preset", [None, "celeba", "qm9"])
def test_the_resolved_recipe_reads_back_equal(tmp_path, preset):
    raw = changed("balancer", {"name": "bilb", "preset": preset, "clamp": [0.2, 0.8], "reference": {"mean_of": 5}})
    raw["trainer"].update(run_name="no", report_to=["none"], adam_epsilon=1e-8, logging_steps=0.1)
    recipe = parse_recipe(raw, "again")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert read_recipe(tmp_path / "again.yaml") == recipe


def test_words_that_yaml_1_1_would_read_as_something_else_are_quoted():
    text = dump_recipe(parse_recipe(GOOD, "x"))
    assert "eval_strategy: 'no'" in text
    assert load_yaml(text, "x")["trainer"]["eval_strategy"] == "no"


def test_a_recipe_that_is_not_there_is_one_line_with_the_nearest_file():
    path = ROOT / "recipes" / "qm9" / "mlp_blib.yaml"
    with pytest.raises(
        OptionError, match=r'mlp_blib\.yaml: there is no such recipe \(did you mean "mlp_bilb\.yaml"\?\)$'
    ):
        read_recipe(path)


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    (tmp_path / "odd.yaml").write_text(content)
    with pytest.raises(OptionError, match="a recipe is a mapping with the sections model, data"):
        read_recipe(tmp_path / "odd.yaml")


def test_every_recipe_of_the_project_is_found():
    assert [str(path.relative_to(ROOT)) for path in RECIPES] == [
        "recipes/adult/bilb.yaml",
        "recipes/adult/ls.yaml",
        "recipes/celeba/bilb.yaml",
        "recipes/celeba/bilb_small.yaml",
        "recipes/celeba/ls.yaml",
        "recipes/celeba/ls_small.yaml",
        "recipes/census/auxiliary_ls.yaml",
        "recipes/census/auxiliary_marigold.yaml",
        "recipes/census/bilb.yaml",
        "recipes/census/ls.yaml",
        "recipes/cityscapes/bilb.yaml",
        "recipes/cityscapes/famo.yaml",
        "recipes/cityscapes/ls.yaml",
        "recipes/cityscapes/marigold.yaml",
        "recipes/glue/bilb.yaml",
        "recipes/glue/ls.yaml",
        "recipes/glue/minilm_bilb.yaml",
        "recipes/glue/minilm_ls.yaml",
        "recipes/instructions/bilb.yaml",
        "recipes/instructions/bilb_small.yaml",
        "recipes/instructions/ls.yaml",
        "recipes/instructions/ls_small.yaml",
        "recipes/nyuv2/bilb.yaml",
        "recipes/nyuv2/bilb_small.yaml",
        "recipes/nyuv2/famo.yaml",
        "recipes/nyuv2/ls.yaml",
        "recipes/nyuv2/ls_small.yaml",
        "recipes/nyuv2/marigold.yaml",
        "recipes/nyuv2/scenes_bilb.yaml",
        "recipes/nyuv2/scenes_ls.yaml",
        "recipes/qm9/bilb.yaml",
        "recipes/qm9/bilb_small.yaml",
        "recipes/qm9/famo.yaml",
        "recipes/qm9/ls.yaml",
        "recipes/qm9/ls_small.yaml",
        "recipes/qm9/mlp_bilb.yaml",
        "recipes/qm9/mlp_ls.yaml",
        "recipes/qm9/si.yaml",
        "recipes/qm9/uw.yaml",
        "recipes/sarcos/bilb.yaml",
        "recipes/sarcos/ls.yaml",
        "recipes/sider/bilb.yaml",
        "recipes/sider/ls.yaml",
        "recipes/tox21/bilb.yaml",
        "recipes/tox21/ls.yaml",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_how_to_run_it(path):
    recipe = read_recipe(path)
    assert recipe.output_dir == Path("runs") / f"{path.parent.name}_{path.stem}"
    head = path.read_text().split("\nmodel:")[0]
    assert f"accelerate launch -m hf_bilb train {path.relative_to(ROOT)}" in head
    assert "Expect:" in head


@pytest.mark.parametrize(
    "pair",
    [
        "adult/{}", "celeba/{}", "celeba/{}_small", "census/{}", "census/auxiliary_{}", "cityscapes/{}", "glue/{}",
        "glue/minilm_{}", "instructions/{}", "instructions/{}_small", "nyuv2/{}",
        "nyuv2/{}_small", "nyuv2/scenes_{}", "qm9/{}", "qm9/mlp_{}", "qm9/{}_small", "sarcos/{}",
        "sider/{}", "tox21/{}",
    ],
)  # fmt: skip
def test_two_recipes_that_are_compared_differ_only_in_balancer_and_folder(pair):
    names = ("ls", "marigold" if "auxiliary" in pair else "bilb")
    ls, other = (read_recipe(ROOT / "recipes" / f"{pair.format(name)}.yaml").to_dict() for name in names)
    for recipe in (ls, other):
        del recipe["balancer"], recipe["trainer"]["output_dir"]
    assert ls == other
