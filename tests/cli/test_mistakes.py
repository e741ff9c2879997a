"""Whatever stands in a recipe, an override or a file: one line that fits a terminal, exit code 2, never a traceback."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from hf_bilb.cli import main
from hf_bilb.config.options import check_value, shown
from hf_bilb.config.yaml import load_yaml
from hf_bilb.data import DATA_SETS, DataSetSpec
from hf_bilb.data.molecules.molecule_net import GraphRows, task_data
from hf_bilb.data.rows import VectorRows
from hf_bilb.data.splits import split_rows
from hf_bilb.data.tables.sarcos import squared_errors
from hf_bilb.data.text.glue import GlueOptions
from hf_bilb.errors import HfBilbError, OptionError, StorageError, one_line
from hf_bilb.experiments import plan
from hf_bilb.reporting.results import as_json, read_results
from tests.cli.made_up import MADE_UP, RECIPE, MadeUpOptions, load_made_up

ROOT = Path(__file__).parents[2]
LONGEST_LINE = 600


def hf_bilb(*arguments: str):
    return CliRunner().invoke(main, arguments)


def refused(result, exit_code: int = 2) -> str:
    """The one line on stderr."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == exit_code, result.output
    assert re.fullmatch(r"hf-bilb: error: [^\n]+\n", result.stderr), result.stderr
    assert len(result.stderr) <= LONGEST_LINE
    return result.stderr.removeprefix("hf-bilb: error: ").rstrip("\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "made_up", MADE_UP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


# --- what is read ----------------------------------------------------------------------------------------------------

STAIRS = "k0: &k0 [x]\n" + "".join(f"k{i}: &k{i} [*k{i - 1}]\n" for i in range(1, 40))
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
)
NASTY = {
    "empty": (b"", "r.yaml: a recipe is a mapping with the sections"),
    "a list": (b"- a\n", "r.yaml: a recipe is a mapping"),
    "utf-16": (RECIPE.encode("utf-16"), "r.yaml: cannot be read, expected text in UTF-8"),
    "no text": (b"\x80\x81", "r.yaml: cannot be read, expected text in UTF-8"),
    "NUL": (b"a: \x00\n", "r.yaml: unacceptable character"),
    "NUL, escaped": (b'a: "x\\0"\n', "r.yaml, line 1: 'x\\x00' holds the character U+0000"),
    "half a character": (b'\na: "\\ud800"\n', "r.yaml, line 2: '\\ud800' holds the character U+D800"),
    "no character": (b'a: "\\UFFFFFFFF"\n', "r.yaml: is no YAML"),
    "brackets": (b"[" * 20_000, "r.yaml, line 1: is nested deeper than 30 levels"),
    "braces": (b"{a: " * 3_000, "r.yaml, line 1: is nested deeper than 30 levels"),
    "lists": (b"- " * 3_000, "r.yaml, line 1: is nested deeper than 30 levels"),
    "billions": (LAUGHS.encode(), "stands for more than 100,000 values"),
    "levels of aliases": (STAIRS.encode(), "r.yaml, line 30: is nested deeper than 30 levels"),
    "itself": (b"a: &a [*a]\n", "r.yaml, line 1: an alias stands within what it is an alias of"),
    "itself, merged": (b"<<: &a {<<: *a}\n", "an alias stands within what it is an alias of"),
    "!!int x": (b"a: !!int x\n", "r.yaml, line 1: 'x' is no !!int"),
    "!!int nothing": (b"a: !!int ''\n", "r.yaml, line 1: '' is no !!int"),
    "!!int 1_0": (b"a: !!int '1_0'\n", "r.yaml, line 1: '1_0' is no !!int"),
    "!!bool x": (b"a: !!bool x\n", "r.yaml, line 1: 'x' is no !!bool"),
    "!!float x": (b"a: !!float x\n", "r.yaml, line 1: 'x' is no !!float"),
    "!!null x": (b"a: !!null x\n", "r.yaml, line 1: 'x' is no !!null"),
    "!!int list": (b"a: !!int [1]\n", "r.yaml, line 1: expected a scalar node, but found sequence"),
    "date": (b"a: !!timestamp 2001-01-01\n", "r.yaml, line 1: could not determine a constructor for the tag"),
    "set": (b"a: !!set {a}\n", "r.yaml, line 1: could not determine a constructor for the tag"),
    "bytes": (b"a: !!binary aGVsbG8=\n", "r.yaml, line 1: could not determine a constructor for the tag"),
    "object": (b"a: !!python/object/apply:os.getcwd []\n", "r.yaml, line 1: could not determine a constructor"),
    "merge of a number": (b"<<: 3\n", "r.yaml, line 1: expected a mapping or list of mappings for merging"),
    "many digits": (b"a: " + b"9" * 5_000, f"r.yaml, line 1: '{'9' * 37}...{'9' * 38}' is longer than any number"),
    "many hex digits": (b"a: 0x" + b"f" * 5_000, "is longer than any number (400 characters)"),
    "too large": (b"a: 1e400\n", "r.yaml, line 1: '1e400' is beyond all floating-point numbers (infinity is .inf)"),
    "a long key": (b"a:\n  ? " + b"k" * 5_000 + b"\n  : 1\n" + b"b: 1", "a: unknown section, value {'kkkk"),
    "a long key twice": (b"? " + b"k" * 5_000 + b"\n? " + b"k" * 5_000, "stands twice (first in line 1)"),
    "a key of another kind": (b"{null: 1}", "None: unknown section, value 1"),
    "a long value": (b"what: '" + b"y" * 9_000 + b"'", f"what: unknown section, value '{'y' * 37}...{'y' * 38}'"),
}


@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_recipe_is_one_line(folder, name):
    content, begins = NASTY[name]
    (folder / "r.yaml").write_bytes(content)
    assert begins in refused(hf_bilb("show", "r.yaml"))


OVERRIDES = [
    ("trainer.seed=" + "9" * 5_000, "override trainer.seed, line 1: '999"),
    ("trainer.seed=99999999999999999999", "99999999999999999999 is not valid, expected an integer of at most 64 bits"),
    ("trainer.seed='1e400'", "trainer.seed: '1e400' is not valid, expected an integer"),
    ("trainer.seed=4294967296", "trainer.seed: 4294967296 is not valid, expected an integer from 0 to 4294967295"),
    ("trainer.seed=true", "trainer.seed: True is not valid, expected an integer"),
    ("trainer.seed=null", "trainer.seed: None is not valid, expected an integer"),
    ("trainer.seed=!!int x", "override trainer.seed, line 1: 'x' is no !!int"),
    ("trainer.seed=" + "[" * 3_000, "override trainer.seed, line 1: is nested deeper than 30 levels"),
    ("trainer.seed=\ud800", "override trainer.seed: unacceptable character"),
    ("trainer.\ud800=1", "trainer.\\ud800: unknown option, value 1"),
    ("trainer.a\nb=1", "trainer.a b: unknown option, value 1"),
    (".".join("trainer" for _ in range(500)) + "=1", "is nested deeper than 30 levels"),
    ("x" * 5_000 + "=1", "unknown section, value 1 (sections:"),
    ("y" * 5_000, f"'{'y' * 37}...{'y' * 38}' is no override"),
    ("trainer.learning_rate=1e999", "is beyond all floating-point numbers"),
    (
        "trainer.learning_rate=" + "1" * 399,
        "trainer.learning_rate: a number of about 398 digits is not valid, expected a number",
    ),
    ("trainer.learning_rate=.inf", "trainer.learning_rate: inf is not valid, expected a number, 0 or more"),
    (
        "trainer.learning_rate=" + "z" * 5_000,
        f"trainer.learning_rate: '{'z' * 37}...{'z' * 38}' is not valid, expected",
    ),
    ("trainer.num_train_epochs=0", "trainer.num_train_epochs: 0.0 is not valid, expected a number above 0"),
    ("trainer.per_device_eval_batch_size=0", "per_device_eval_batch_size: 0 is not valid, expected 1 or more"),
    ("trainer.output_dir=", "trainer.output_dir: is required"),
    ("trainer.output_dir=''", "trainer.output_dir: is required"),
    ("trainer.task_sampling=x", "trainer.task_sampling: 'x' is not a mapping of options"),
    ("trainer=[1]", "trainer: [1] is not valid, expected a mapping of options"),
    ("evaluation=[]", "evaluation: [] is not a mapping of options"),
    ("evaluation=false", "evaluation: False is not a mapping of options"),
    ("model.hidden_size=2026-01-02", "model.hidden_size: '2026-01-02' is not valid, expected an integer"),
    ("data.name=" + "x" * 3_000, "is not known; known:"),
    ("balancer={name: {a: [[[[[[1]]]]]]}}", "balancer.name: {'a': [[[[...]]]]} is not known"),
]


@pytest.mark.parametrize(("override", "says"), OVERRIDES, ids=[override[:40] for override, _ in OVERRIDES])
def test_a_nasty_override_is_one_line(folder, override, says):
    assert says in refused(hf_bilb("show", "small.yaml", override))


@pytest.mark.parametrize(
    "override",
    ["trainer.run_name=\U0001f600 \u00e9", 'trainer.run_name="a\\nb\\x07"', "trainer.max_grad_norm=.inf"],
)
def test_what_is_unusual_but_allowed_is_shown_so_that_it_reads_back_equal(folder, override):
    shown_once = hf_bilb("show", "small.yaml", override)
    assert shown_once.exit_code == 0, shown_once.output
    (folder / "again.yaml").write_text("\ufeff" + shown_once.stdout, encoding="utf-8")  # a mark in front is no harm
    assert hf_bilb("show", "again.yaml").stdout == shown_once.stdout


def test_a_merged_mapping_may_be_merged_again_before_it_is_read_itself():
    text = "a: &a {x: 2}\nd: {y: {z: &b {<<: *a, x: 1}}}\nc: {<<: *b}\n"
    assert load_yaml(text, "here") == {"a": {"x": 2}, "d": {"y": {"z": {"x": 1}}}, "c": {"x": 1}}


# --- random mutations ------------------------------------------------------------------------------------------------

ATOMS = [None, True, 0, -1, 1e308, -1e-320, float("nan"), float("inf"), 10**30, "", " ", "x" * 5_000, "\0", "a:b"]
ATOMS += ["os:system", "../x.py:f", [], [[]], {}, {"a": {"b": []}}, [1, "a", None], {1: 2}, {None: None}, "bilb", "{"]
WRITTEN = ["!!python/name:os.system", "&a [*a]", "*undefined", "!!set {a}", "!!binary aGVsbG8=", "!!omap [a: 1]"]
WRITTEN += ["? {a: b}\n: c", "!!str", "!!int x", "!!int '1_0'", "!!float x", "!!bool x", "!!null x", "0x", "<<: 3"]
WRITTEN += ["{<<: [1]}", "1e999", "9" * 30, '"\\ud800"', "!local x", "!!int ''", "=", "!!merge x", "9" * 5_000]
BYTES = [b"{", b"]", b"\t", b"&a ", b"*a", b"!!", b"\x00", b"\xff", b"'", b": ", b"- "]


def places(tree, path=()):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(text: str, draw: random.Random) -> bytes:
    """A recipe with a value, a line or some bytes replaced."""
    kind = draw.randrange(3)
    if kind == 0:
        tree = yaml.safe_load(text)
        *way, last = draw.choice(list(places(tree)))
        inner = tree
        for key in way:
            inner = inner[key]
        inner[last] = copy.deepcopy(draw.choice(ATOMS))
        return yaml.dump(tree, allow_unicode=True).encode()
    if kind == 1:
        lines = text.split("\n")
        number = draw.choice([i for i, line in enumerate(lines) if ":" in line and not line.strip().startswith("#")])
        lines[number] = f"{lines[number].split(':')[0]}: {draw.choice(WRITTEN)}"
        return "\n".join(lines).encode()
    raw = bytearray(text.encode())
    for _ in range(draw.randint(1, 6)):
        at, how = draw.randrange(len(raw)), draw.random()
        if how < 0.4:
            raw[at] = draw.randrange(256)
        elif how < 0.7:
            del raw[at : at + draw.randint(1, 30)]
        else:
            raw[at:at] = draw.choice(BYTES)
    return bytes(raw)


def test_random_mutations_of_the_recipes_are_one_line_or_are_shown_and_read_back_equal(tmp_path, monkeypatch):
    recipes = [path.read_text() for path in sorted(ROOT.glob("recipes/*/*.yaml"))]
    monkeypatch.chdir(tmp_path)
    draw = random.Random(13)
    fine = 0
    for _ in range(120):
        (tmp_path / "r.yaml").write_bytes(mutated(draw.choice(recipes), draw))
        result = hf_bilb("show", "r.yaml")
        if result.exit_code != 0:
            refused(result)
            continue
        fine += 1
        (tmp_path / "again.yaml").write_text(result.stdout, encoding="utf-8")
        assert hf_bilb("show", "again.yaml").stdout == result.stdout
    assert 5 < fine < 60  # both ways are tried


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_value_in_a_message_is_short_whatever_it_is():
    itself: list[object] = []
    itself.append(itself)
    deep: object = 1
    for _ in range(5_000):
        deep = {"k": deep}
    laughs: object = ["x"] * 20
    for _ in range(9):
        laughs = [laughs] * 20
    for value in (itself, deep, laughs, 10**5_000, "x" * 10**6, list(range(10**5)), {str(i): i for i in range(999)}):
        assert len(shown(value)) <= 80
    assert shown({"b": 1, "a": [2, None, "x"]}) == "{'b': 1, 'a': [2, None, 'x']}"
    assert shown(10**5_000) == "a number of about 5000 digits"
    assert shown(2**63) == "9223372036854775808"


def test_every_message_is_one_line_of_bounded_length():
    assert str(HfBilbError("a\n  b\x00\ud800\tc")) == "a b\\x00\\ud800 c"
    assert str(OptionError("two  spaces")) == "two  spaces"
    long = str(StorageError("begin " + "x" * 9_000 + " end"))
    assert len(long) == 560 and long.startswith("begin x") and long.endswith("x end") and " ... " in long
    assert one_line("abc", longest=560) == "abc"


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 1e308, "1e308", 10**400, "9" * 5_000, "nan", "1e400"])
def test_an_integer_has_64_bits_at_most(value):
    with pytest.raises(OptionError, match=r"^key: .* is not valid, expected an integer"):
        check_value(value, int, "key")


def test_integers_are_exact_up_to_64_bits():
    assert check_value(2**63 - 1, int, "key") == 2**63 - 1
    assert check_value("9007199254740993", int, "key") == 9007199254740993  # no float is
    assert check_value("1e3", int, "key") == 1000


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(folder, monkeypatch):
    """The data set must not be loaded."""

    def load(options):
        raise AssertionError("the data were loaded")

    monkeypatch.setitem(DATA_SETS, "made_up", DataSetSpec(MadeUpOptions, load))
    (folder / "file").write_text("x")
    (folder / "link").symlink_to("nowhere")
    return folder


COMMANDS = {
    "train": lambda output: ["train", "small.yaml", f"trainer.output_dir={output}"],
    "compare": lambda output: ["compare", "small.yaml", "--balancers", "ls", "--output", output],
    "report": lambda output: ["report", "nowhere", "--output", output],
    "prepare": lambda output: ["prepare", "nyuv2", "nowhere.mat", "--output", output],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("file", "'file' cannot be written to, which is a file, expected a folder"),
        ("file/a/b", "/file' is a file, expected a folder"),
        ("link", "'link' cannot be written to, which is a link to what is not there, expected a folder"),
        ("x" * 300, "is no name that a folder can have"),
    ],
)
def test_an_output_that_cannot_be_a_folder_is_one_line_before_data_are_loaded(unloaded, command, output, cause):
    line = refused(hf_bilb(*COMMANDS[command](output)))
    assert line.startswith("trainer.output_dir: " if command == "train" else "--output: ") and cause in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_may_not_be_written_to_is_one_line_before_data_are_loaded(unloaded, monkeypatch, command):
    (unloaded / "mine").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("mine"))  # root may write anywhere
    assert "/mine' may not be written to" in refused(hf_bilb(*COMMANDS[command]("mine/run")))


def test_a_folder_that_cannot_be_made_is_one_line_before_data_are_loaded(unloaded):
    assert refused(hf_bilb(*COMMANDS["train"]("/proc/nothing/run"))).startswith(
        "trainer.output_dir: '/proc/nothing/run'"
    )


# --- code of one's own, memory, and what is nobody's mistake ----------------------------------------------------------

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, how, inputs, outputs):
        super().__init__()
        self.how, self.linear = how, nn.Linear(inputs, outputs)
    def forward(self, features):
        if self.how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.how == "file":
            open("nowhere.txt")
        return self.linear(features[:, 1:] if self.how == "shape" else features)

def build(num_features, num_tasks, how):
    if how == "factory":
        raise KeyError("two\\nlines")
    if how == "exit":
        raise SystemExit(3)
    return Net(how, num_features, num_tasks)
"""


@pytest.fixture
def own(folder, monkeypatch):
    """Train the network of `net.py` in one of its ways."""
    (folder / "net.py").write_text(NET)
    spec = DataSetSpec(MadeUpOptions, lambda o: dataclasses.replace(load_made_up(o), task_loss_func=squared_errors))
    monkeypatch.setitem(DATA_SETS, "made_up", spec)

    def train(how, *before):
        model = f"{{name: torch_module, factory: 'net.py:build', arguments: {{how: {how}}}}}"
        return hf_bilb(*before, "train", "small.yaml", f"model={model}", "trainer.disable_tqdm=true")

    return train


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("factory", "model: net.py:18: KeyError: 'two\\nlines'"),
        ("exit", "model: net.py:20: SystemExit: 3"),
        ("shape", "net.py:14: RuntimeError: mat1 and mat2 shapes cannot be multiplied (16x4 and 5x3)"),
        ("file", "net.py:13: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.txt'"),
    ],
)
def test_what_ones_own_code_raises_is_named_by_file_and_line(own, how, line):
    assert refused(own(how)) == f"{line} (HF_BILB_TRACEBACK=1 shows where it comes from)"


def test_the_traceback_is_there_when_it_is_asked_for(own, monkeypatch):
    by_option = own("factory", "--traceback")
    monkeypatch.setenv("HF_BILB_TRACEBACK", "1")
    by_environment = own("factory")
    for result in (by_option, by_environment):
        assert result.exit_code == 2
        assert 'net.py", line 18, in build' in result.stderr
        assert result.stderr.splitlines()[-1].startswith("hf-bilb: error: model: net.py:18: KeyError")


def test_no_memory_left_is_one_line_that_says_what_takes_less(own):
    line = refused(own("memory"), exit_code=1)
    assert line.startswith(
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; a smaller trainer.per_device"
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("import os\n\n1 / 0\n", "ZeroDivisionError: division by zero (line 3)"),
        ("def x(:\n", "(line 1)"),
        ("import sys\nsys.exit(4)\n", "SystemExit: 4 (line 2)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line_with_its_line(folder, content, line):
    (folder / "mine.py").write_text(content)
    assert line in refused(hf_bilb("show", "small.yaml", "imports=[mine.py]"))


def test_a_fault_after_the_first_step_keeps_its_traceback_and_one_before_is_a_line(folder, monkeypatch):
    class Faulty(VectorRows):
        calls = 0

        def __getitems__(self, indices):
            Faulty.calls += 1
            if Faulty.calls > 2:
                raise ZeroDivisionError("ours")
            return super().__getitems__(indices)

    def load(options):
        data = load_made_up(options)
        return dataclasses.replace(data, train=Faulty(data.train.columns))

    monkeypatch.setitem(DATA_SETS, "made_up", DataSetSpec(MadeUpOptions, load))
    result = hf_bilb("train", "small.yaml")
    assert isinstance(result.exception, ZeroDivisionError)
    line = refused(hf_bilb("train", "small.yaml", "trainer.optim_args=xx"))
    assert line.startswith("trainer: ValueError: not enough values to unpack")


def test_losses_that_do_not_keep_the_contract_are_one_line(folder, monkeypatch):
    (folder / "net.py").write_text(NET)

    def load(options):
        return dataclasses.replace(load_made_up(options), task_loss_func=lambda outputs, batch: torch.ones(2))

    monkeypatch.setitem(DATA_SETS, "made_up", DataSetSpec(MadeUpOptions, load))
    model = "model={name: torch_module, factory: 'net.py:build', arguments: {how: plain}}"
    line = refused(hf_bilb("train", "small.yaml", model, "trainer.disable_tqdm=true"))
    assert line == "losses: got shape (2,), expected a tensor [3] or a dict, one loss for each of easy, steep, noise"


# --- data without rows, and tasks that are left out -------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_part_without_rows_is_one_line_before_training(folder, monkeypatch, part):
    def load(options):
        data = load_made_up(options)
        nothing = VectorRows({name: column[:0] for name, column in data.train.columns.items()})
        return dataclasses.replace(data, **{part: nothing})

    monkeypatch.setitem(DATA_SETS, "made_up", DataSetSpec(MadeUpOptions, load))
    name = {"train": "training"}.get(part, part)
    assert refused(hf_bilb("train", "small.yaml")) == f"data: the {name} part has no rows"


def test_a_table_without_rows_is_named(tmp_path):
    from hf_bilb.data.tables.adult import LAYOUT, AdultOptions, load_adult

    for name in ("adult.data", "adult.test"):
        (tmp_path / name).write_text(",".join(LAYOUT.columns) + "\n")
    with pytest.raises(OptionError, match=r"^data: .*adult\.data has no rows$"):
        load_adult(AdultOptions(str(tmp_path)))


def test_a_task_without_a_training_label_is_one_line():
    from hf_bilb.data.molecules.graphs import MoleculeGraphs

    labels = torch.tensor([[1.0, torch.nan]] * 9 + [[0.0, 1.0]])
    rows = split_rows(10, 0, 6, 2, 2)
    rows = dataclasses.replace(rows, train=rows.train[rows.train != 9])
    one = torch.ones(10, dtype=torch.int64).numpy()
    graphs = MoleculeGraphs(one, one[:, None], one * 0, one[:0, None].repeat(2, 1), one[:0, None])
    assert len(GraphRows(graphs, rows.train, labels[rows.train])) >= 5
    with pytest.raises(OptionError, match=r"^data\.tasks: the training part has no label of second, leave them out$"):
        task_data(graphs, labels, rows, ["first", "second"])


def test_a_limit_for_a_task_that_is_left_out_names_both():
    with pytest.raises(OptionError, match=r"^max_train\.mnli: the task 'mnli' is none of tasks \(cola, sst2\)$"):
        GlueOptions(folder="x", tasks=("cola", "sst2"), max_train={"cola": 5, "mnli": 3})
    with pytest.raises(OptionError, match=r"^max_train: 'sst' is not known \(did you mean \"sst2\"\?\)"):
        GlueOptions(folder="x", tasks=("cola", "sst2"), max_train={"sst": 3})


# --- other commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "9" * 5_000], "--seeds: '999"),
        (["--seeds", "4294967296"], "trainer.seed: 4294967296 is not valid"),
        (["--launcher", "'"], '--launcher: "\'" is no command: No closing quotation'),
        (["--launcher", "nowhere"], "--launcher: 'nowhere' begins with no command that is found"),
        (["--base", "x" * 5_000], f"--base: '{'x' * 37}...{'x' * 38}' is none of ls"),
        (["trainer.output_dir=."], "--output: is required, since trainer.output_dir '.' has no name"),
        (["--nothing"], "No such option '--nothing'"),
    ],
)
def test_what_compare_is_asked_for_wrongly_is_one_line(folder, arguments, says):
    assert says in refused(hf_bilb("compare", "small.yaml", "--balancers", "ls", *arguments))


@pytest.mark.parametrize(
    "arguments", [["train"], ["frob"], ["prepare", "frob"], ["compare", "x"], ["balancers", "ls", "--format", "x"]]
)
def test_an_argument_that_is_missing_or_unknown_is_one_line(arguments):
    assert refused(hf_bilb(*arguments)).endswith("--help says more)")


def test_a_cell_has_the_value_that_was_asked_for_beyond_16_bits(folder):
    asked = plan.parse_balancers("ls", {"name": "ls"})
    (cell,) = plan.plan_runs("small.yaml", [], Path("\U0001f600"), asked, [0])
    assert cell.folder == Path("\U0001f600/ls/seed-0")


GOOD = {"format": 1, "recipe": "r", "model": "m", "data": "d", "balancer": "b", "split": "test", "metrics": []}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
        (json.dumps(GOOD).replace('"r"', "9" * 5_000), "cannot be read: Exceeds the limit"),
        (json.dumps(GOOD | {"losses": {"test": {"mean": float("inf")}}}), "'Infinity' is no finite number"),
        (json.dumps(GOOD | {"losses": {"test": {"mean": 7}}}).replace("7", "1e999"), "'1e999' is no finite number"),
        (json.dumps(GOOD | {"recipe": ["x" * 5_000]}), "results.json.recipe: ['xxx"),
    ],
)
def test_results_that_are_damaged_are_one_line(folder, content, says):
    (folder / "results.json").write_text(content)
    assert says in refused(hf_bilb("report", "."))


def test_infinite_settings_are_written_and_told_apart(folder):
    result = hf_bilb(
        "train", "small.yaml", "trainer.max_grad_norm=.inf", "trainer.max_steps=2", "evaluation.plots=false"
    )
    assert result.exit_code == 0, result.output
    assert read_results("run").settings["trainer"]["max_grad_norm"] == ".inf"
    assert as_json({"a": (1.5, -float("inf"), float("nan")), 2: None}) == {"a": [1.5, "-.inf", ".nan"], "2": None}
