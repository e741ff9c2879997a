"""`hf-bilb compare`: what it checks before it starts, what it leaves alone, and how it goes on.

Most tests run a stand-in for `hf_bilb train` that writes the results of a cell at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hf_bilb.cli import main
from hf_bilb.data import DATA_SETS, DataSetSpec
from hf_bilb.errors import OptionError
from hf_bilb.experiments import child_process, compare
from hf_bilb.experiments.plan import ComparisonPlan, parse_balancers, parse_seeds, plan_comparison, state_of
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.reporting.results import read_results, write_results
from hf_bilb.trainer import checkpointing
from tests.cli.made_up import RECIPE, TASKS, MadeUpOptions, load_made_up
from tests.reporting.made_up_comparison import cell as results_of_cell

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Options(MadeUpOptions):
    """Those of the made-up set, and which tasks."""

    tasks: tuple[str, ...] | None = None
    seed: int = 0


#: Behaves as `-m hf_bilb train RECIPE OVERRIDES [--resume]` does, as far as its caller sees it.
STAND_IN = """
import json, pathlib, sys, time
assert sys.argv[1:4] == ["-m", "hf_bilb", "train"]
here = pathlib.Path(__file__).parent
folder = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("trainer.output_dir="))
folder = pathlib.Path(json.loads(folder))
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps(sys.argv[4:]) + "\\n")
(folder / "recipe.yaml").write_text((here / "planned" / str(folder).replace("/", "+")).read_text())
behaviour = json.loads((here / "behaviour.json").read_text()).get(str(folder), "finish")
print("loading", flush=True)
sys.stderr.write("\\r 10%|#         |\\r 90%|######### |\\x1b[A\\r100%|##########|\\n")
if behaviour == "fail":
    sys.exit("it went\\nwrong here")
if behaviour == "hang":
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "MARKER").write_text('{"format": 1, "files": {}}')
    time.sleep(60)
(folder / "results.json").write_text((here / "planned" / (str(folder).replace("/", "+") + ".json")).read_text())
(folder / "trainer_state.json").write_text(json.dumps({"log_history": [
    {"step": i, "eval_loss": 1 / i, "training_seconds": 2.0 * i} for i in (1, 2)]}))
""".replace("MARKER", checkpointing.MARKER)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a recipe for the made-up data set."""
    monkeypatch.setitem(DATA_SETS, "made_up", DataSetSpec(options=Options, load=load_made_up))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "behaviour.json").write_text("{}")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "planned").mkdir()
    return tmp_path


def prepare(plan: ComparisonPlan, error: float = 40.0) -> ComparisonPlan:
    """Write down what the stand-in leaves in each cell's folder; ls's errors are `error`, the others' half of it."""
    for cell in plan.runs:
        value = error * (1.0 if cell.label == "ls" else 0.5) + 0.1 * cell.seed
        tasks = [cell.task] if cell.task else TASKS
        made = results_of_cell(cell.recipe.balancer["name"], [value] * len(tasks), {}, tasks)
        made = dataclasses.replace(made, settings=cell.recipe.to_dict())
        name = Path("planned") / str(cell.folder).replace("/", "+")
        name.write_text(json.dumps(cell.recipe.to_dict()))
        Path("work").mkdir(exist_ok=True)
        write_results(made, Path("work")).replace(f"{name}.json")
    return plan


def planned(balancers: str = "ls,bilb", seeds: str = "0,1", overrides=(), **options) -> ComparisonPlan:
    launcher = f"{sys.executable} stand_in.py"
    return prepare(
        plan_comparison("small.yaml", overrides, balancers=balancers, seeds=seeds, launcher=launcher, **options)
    )


def behave(**cells: str) -> None:
    """Let cells of the folder run_compare `fail` or `hang`: `behave(bilb="fail")` is seed 0 of bilb."""
    behaviours = {f"run_compare/{label}/seed-0": behaviour for label, behaviour in cells.items()}
    Path("behaviour.json").write_text(json.dumps(behaviours))


def calls() -> list[list[str]]:
    path = Path("calls.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["compare", "small.yaml", *arguments], catch_exceptions=False)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.fullmatch(r"hf-bilb: error: [^\n]+\n", result.stderr)
    return result.stderr.removeprefix("hf-bilb: error: ").rstrip("\n")


# ---------------------------------------------------------------------------------------------------- what is asked for


def test_balancers_with_and_without_options():
    own = {"name": "bilb", "preset": None, "learning_rate": 0.5}
    asked = parse_balancers("ls, bilb,bilb:preset=qm9,bilb:{preset: qm9, learning_rate: 1e-2}", own)
    assert [b.label for b in asked] == ["ls", "bilb", "bilb-preset=qm9", "bilb-preset=qm9,learning_rate=0.01"]
    assert [dict(b.section) for b in asked] == [
        {"name": "ls"},
        own,  # the recipe's own options
        {"name": "bilb", "preset": "qm9"},
        {"name": "bilb", "preset": "qm9", "learning_rate": 0.01},
    ]
    (odd,) = parse_balancers("x:{y: [1, 'a/b']}", own)
    assert re.fullmatch(r"[\w.,=+-]+", odd.label)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--balancers", "ls,ls"], "--balancers: 'ls' stands twice"),
        (["--balancers", "ls,"], "--balancers: '' is not valid, expected NAME, NAME:KEY=VALUE or NAME:{KEY: VALUE}"),
        (["--balancers", "bilb:qm9"], "--balancers: 'bilb:qm9' is not valid, expected NAME, NAME:KEY=VALUE or"),
        (["--balancers", "ls,blb"], "balancer.name: 'blb' is not known (did you mean \"bilb\"?)"),
        (["--balancers", "ls,bilb:{presett: qm9}"], "balancer.presett: unknown option, value 'qm9' (did you mean"),
        (["--balancers", "ls", "--seeds", "0,-1"], "--seeds: '0,-1' is not valid, expected whole numbers >= 0"),
        (["--balancers", "ls", "--seeds", "0,1,0"], "--seeds: 0 stands twice"),
        (["--balancers", "ls,bilb", "--base", "uw"], "--base: 'uw' is none of ls, bilb"),
        (["--balancers", "ls", "--launcher", "no-such-command x"], "--launcher: 'no-such-command x' begins with no"),
        (["trainer.sed=1", "--balancers", "ls"], 'trainer.sed: unknown option, value 1 (did you mean "seed"?)'),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, arguments, line):
    assert refused(*arguments).startswith(line)
    assert not (folder / "run_compare").exists() and calls() == []


def test_seeds():
    assert parse_seeds("2, 0,11") == (2, 0, 11)


def test_every_cell_is_the_recipe_with_its_balancer_seed_and_folder(folder):
    plan = planned("ls,bilb,bilb:preset=qm9", overrides=["balancer.learning_rate=0.5", "data.rows=100"])
    assert [str(cell.folder) for cell in plan.runs] == [
        "run_compare/ls/seed-0", "run_compare/bilb/seed-0", "run_compare/bilb-preset=qm9/seed-0",
        "run_compare/ls/seed-1", "run_compare/bilb/seed-1", "run_compare/bilb-preset=qm9/seed-1",
    ]  # fmt: skip
    own, preset = plan.runs[1].recipe, plan.runs[2].recipe
    assert own.balancer["learning_rate"] == 0.5 and preset.balancer["learning_rate"] != 0.5
    assert preset.balancer["preset"] == "qm9"
    assert [cell.recipe.trainer["seed"] for cell in plan.runs] == [0, 0, 0, 1, 1, 1]
    for cell in plan.runs:
        assert cell.recipe.data == {"name": "made_up", "rows": 100, "poison": False, "tasks": None, "seed": 0}
    by_split = planned(split_by_seed=True)
    assert [cell.recipe.data["seed"] for cell in by_split.runs] == [0, 0, 1, 1]


def test_single_tasks_are_cells_of_one_task_each(folder):
    plan = planned("bilb", "4", single_tasks=True)
    single = [cell for cell in plan.runs if cell.task]
    assert [list(cell.recipe.data["tasks"]) for cell in single] == [[task] for task in TASKS]
    assert {cell.recipe.balancer["name"] for cell in single} == {"ls"}
    assert {cell.recipe.trainer["seed"] for cell in single} == {4}
    assert str(single[0].folder) == "run_compare/stl/easy/seed-4"
    subset = planned("bilb", "4", overrides=["data.tasks=[noise, easy]"], single_tasks=True)
    assert [cell.task for cell in subset.runs if cell.task] == ["noise", "easy"]


def test_a_data_set_without_a_choice_of_tasks_has_no_single_tasks(folder, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "made_up", DataSetSpec(options=MadeUpOptions, load=load_made_up))
    line = refused("--balancers", "ls", "--stl")
    assert line == "--stl: the data set 'made_up' has no option data.tasks to train one task with"


# ---------------------------------------------------------------------------------------------------- running


def test_cells_run_through_the_launcher_and_tables_and_plots_are_written(folder, capsys):
    comparison, failed = compare.run_comparison(planned(single_tasks=True))
    assert failed == [] and len(calls()) == 2 * (2 + 3)
    recipe, *overrides = calls()[0]
    assert read_recipe(recipe, overrides).to_dict() == read_results("run_compare/ls/seed-0").settings
    written = {path.name for path in (folder / "run_compare").iterdir() if path.is_file()}
    names = {f"comparison.{suffix}" for suffix in ("html", "md", "csv", "tex", "json")} | {"tasks.png", "progress.png"}
    assert written == names | {"small.yaml"}
    out = capsys.readouterr().out
    assert re.search(r"\[4/10\] stl steep, seed 0: begins \(\d s so far, about \d+ s to go\)", out)
    assert "Δm relates to this comparison's models of one task each" in out and "single task" in out
    assert comparison.methods[0].name == "ls" and comparison.reference == "ls"
    assert "loading" not in out, "the cells' own output belongs to the log where there is no terminal"
    log = (folder / "run_compare/ls/seed-0/train.log").read_text().splitlines()
    assert log[0].startswith("$ ") and log[1:] == ["loading", "100%|##########|"]


def test_finished_cells_stay_and_more_seeds_join_them(folder, capsys):
    compare.run_comparison(planned(seeds="0"))
    before = (folder / "run_compare/ls/seed-0/results.json").stat().st_mtime_ns
    compare.run_comparison(planned(seeds="0,1"))
    assert (folder / "run_compare/ls/seed-0/results.json").stat().st_mtime_ns == before
    assert len(calls()) == 4
    assert "[1/4] ls, seed 0: is finished" in capsys.readouterr().out


def test_a_failed_cell_is_named_and_the_others_go_on(folder, capsys):
    plan = planned()
    behave(bilb="fail")
    comparison, failed = compare.run_comparison(plan)
    out = capsys.readouterr().out
    assert [cell.title for cell in failed] == ["bilb, seed 0"]
    assert "[2/4] bilb, seed 0: FAILED with exit code 1; the last lines of run_compare/bilb/seed-0/train.log:" in out
    assert "    it went\n    wrong here\n" in out
    assert len(calls()) == 4
    assert [method.seeds for method in comparison.methods] == [(0, 1), (1,)]
    assert any(note.startswith("not finished, so not in here: bilb seed 0") for note in comparison.notes)
    behave()
    assert compare.run_comparison(plan)[1] == []
    assert len(calls()) == 5


def test_the_command_ends_with_exit_code_1_after_a_failed_cell(folder):
    planned(seeds="0")
    behave(bilb="fail")
    arguments = ["small.yaml", "--balancers", "ls,bilb", "--launcher", f"{sys.executable} stand_in.py"]
    result = CliRunner().invoke(main, ["compare", *arguments], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stderr == "hf-bilb: error: 1 of 2 runs failed: bilb, seed 0\n"
    assert "test MAE of small" in result.stdout
    behave()
    assert CliRunner().invoke(main, ["compare", *arguments], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_cell_is_stopped_and_goes_on_from_its_checkpoint(folder, number):
    plan = planned(seeds="0")
    behave(bilb="hang")

    def interrupt():
        while not Path("run_compare/bilb/seed-0/checkpoint-3").is_dir():
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    with pytest.raises(child_process.Interrupted, match=r"stopped in \[2/2\] bilb, seed 0: the same command goes on"):
        compare.run_comparison(plan)
    assert time.monotonic() - started < 30
    assert signal.getsignal(number) is before
    assert not Path("run_compare/bilb/seed-0/results.json").exists()
    behave()
    assert compare.run_comparison(plan)[1] == []
    assert [("--resume" in call) for call in calls()] == [False, False, True]


def test_a_folder_is_compared_in_by_one_at_a_time(folder):
    plan = planned(seeds="0")
    Path("run_compare").mkdir()
    with (
        compare._alone(Path("run_compare")),
        pytest.raises(OptionError, match="--output: in 'run_compare' a comparison is running"),
    ):
        compare.run_comparison(plan)


def test_a_cell_that_outlives_its_comparison_still_holds_the_lock(folder):
    with compare._alone(folder) as lock:
        probe = f"import os; os.fstat({lock})"  # fails for a file that the process does not hold
        assert child_process.run_process((sys.executable, "-c", probe), folder / "probe" / "train.log", lock).code == 0


# ---------------------------------------------------------------------------------------------------- folders


def test_other_settings_than_the_folders_are_one_line_before_anything_runs(folder):
    compare.run_comparison(planned(seeds="1"))
    with pytest.raises(OptionError) as refusal:
        compare.run_comparison(planned(seeds="0,1", overrides=["trainer.learning_rate=0.5"]))
    assert str(refusal.value) == (
        "run_compare/ls/seed-1: holds a run with another setting, trainer.learning_rate: 0.1 -> 0.5: another --output "
        "begins a new comparison"
    )
    assert len(calls()) == 2


def test_a_started_cell_with_other_settings_is_refused_too(folder):
    plan = planned(seeds="0")
    cell = plan.runs[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "recipe.yaml").write_text(json.dumps(planned(seeds="7").runs[0].recipe.to_dict()))
    with pytest.raises(OptionError, match=r"another setting, trainer\.seed: 7 -> 0"):
        state_of(cell)


def test_a_comparison_that_was_moved_is_still_the_same(folder):
    compare.run_comparison(planned(seeds="0"))
    (folder / "run_compare").rename(folder / "moved")
    assert {state_of(cell) for cell in planned(seeds="0", output=str(folder / "moved")).runs} == {"finished"}


def test_what_is_lost_without_a_word_is_nothing_of_value(folder):
    cell = planned(seeds="0").runs[0]
    assert state_of(cell) == "fresh"
    cell.folder.mkdir(parents=True)
    for name in ("train.log", "task_vectors.jsonl", ".recipe.yaml.123"):
        (cell.folder / name).touch()
    (cell.folder / "recipe.yaml").write_text(json.dumps(cell.recipe.to_dict()))
    (cell.folder / checkpointing.STAGING / "checkpoint-5").mkdir(parents=True)
    assert state_of(cell) == "fresh"
    (cell.folder / "model.safetensors").touch()
    with pytest.raises(OptionError, match=r"holds 'model.safetensors', but neither results.json nor a checkpoint"):
        state_of(cell)
    (cell.folder / "checkpoint-5").mkdir()
    with pytest.raises(checkpointing.CheckpointError, match="has no complete checkpoint"):
        state_of(cell)
    (cell.folder / "checkpoint-5" / checkpointing.MARKER).write_text('{"format": 1, "files": {}}')
    assert state_of(cell) == "resume"


def test_the_recipe_may_change_while_its_cells_run(folder):
    plan = planned(seeds="0")
    Path("small.yaml").write_text(RECIPE.replace("learning_rate: 1e-1", "learning_rate: 9"))
    compare.run_comparison(plan)
    for recipe, *overrides in calls():
        assert read_recipe(recipe, overrides).trainer["learning_rate"] == 0.1


# ---------------------------------------------------------------------------------------------------- in earnest

LAUNCHER = """
import sys
sys.path.insert(0, ROOT)
from hf_bilb.cli import main
from hf_bilb.data import DATA_SETS
from tests.cli.made_up import MADE_UP

DATA_SETS["made_up"] = MADE_UP
if sys.argv[1] == "-m":
    sys.argv[1:3] = []
main()
"""


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_to_its_end(tmp_path):
    (tmp_path / "launch.py").write_text(LAUNCHER.replace("ROOT", repr(str(ROOT))))
    (tmp_path / "small.yaml").write_text(RECIPE.replace("num_train_epochs: 4", "num_train_epochs: 40"))
    launch = [sys.executable, "launch.py"]
    command = [*launch, "compare", "small.yaml", "--balancers", "ls,bilb", "--launcher", " ".join(launch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {
        "cwd": tmp_path,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    process = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run_compare/bilb/seed-0/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "hf-bilb: stopped in [2/2] bilb, seed 0: the same command goes on from there"
    assert not (tmp_path / "run_compare/bilb/seed-0/results.json").exists(), "it was to be stopped in the middle"

    done = subprocess.run(command, **options, timeout=200)
    assert done.returncode == 0, done.stdout
    assert "[1/2] ls, seed 0: is finished" in done.stdout and "one seed: cannot be told" in done.stdout
    resumed = read_results(tmp_path / "run_compare/bilb/seed-0")
    assert resumed.training["resumed_from"].startswith("checkpoint-")
    assert resumed.training["steps"] == 480
    log = json.loads((tmp_path / "run_compare/bilb/seed-0/trainer_state.json").read_text())["log_history"]
    seconds = [entry["training_seconds"] for entry in log if "eval_loss" in entry]
    assert len(seconds) == 40 and seconds == sorted(seconds) and seconds[0] > 0
    assert resumed.training["training_seconds"] == pytest.approx(seconds[-1], abs=0.002)
    assert 0 < resumed.training["step_seconds"] < seconds[-1] / 100
    assert resumed.training["peak_memory_bytes"] > 100e6
    assert (tmp_path / "run_compare/progress.png").stat().st_size > 8_000
