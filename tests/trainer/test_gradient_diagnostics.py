"""`diagnostics.gradients`: norms and cosines of the tasks' gradients; training goes on as without, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer, OptionError
from hf_bilb.cli import main
from hf_bilb.data import DATA_SETS
from tests.cli.made_up import MADE_UP, RECIPE
from tests.synthetic import SyntheticData, build_data
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    Recorder,
    Run,
    arguments,
    batches,
    build_model,
    flat_parameters,
    run,
    untimed,
)
from tests.trainer.models import NoisyModel, NormalisedModel, build
from tests.trainer.test_double_loop import DOUBLE, with_plugin
from tests.trainer.test_models import bert
from tests.trainer.test_models import rows as bert_rows
from tests.trainer.test_single_task import feature_rows, ordinary
from tests.trainer.test_window import Passes

LOOK: dict[str, Any] = {"gradients": {"every_n_steps": 1}}
STEPS = 6
PAIRS = [(a, b) for a in range(4) for b in range(a + 1, 4)]


def data(missing: float = 0.0, steps: int = STEPS) -> SyntheticData:
    return build_data(steps * BATCH, dtype=FLOAT, missing=missing)


def looks(found: Run | BilevelMTLTrainer) -> list[dict[str, float]]:
    trainer = found.trainer if isinstance(found, Run) else found
    return [entry for entry in trainer.state.log_history if any(key.startswith("gradient_") for key in entry)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gradients.jsonl").read_text(encoding="utf-8").splitlines()]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what is logged, and when -------------------------------------------------------------------------------------


def test_keys_and_steps(tmp_path: Path) -> None:
    found = run(tmp_path, data=data(steps=7), balancer="ls", diagnostics={"gradients": {"every_n_steps": 3}})
    assert [entry["step"] for entry in looks(found)] == [1, 4, 7], "from the first step on"
    keys = {f"gradient_norm/{task}" for task in TASK_NAMES}
    keys |= {f"gradient_cosine/{TASK_NAMES[a]}/{TASK_NAMES[b]}" for a, b in PAIRS}
    keys |= {"gradient_cosine_mean", "gradient_cosine_min", "gradient_conflicts"}
    assert all(entry.keys() == keys | {"step", "epoch"} for entry in looks(found))
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 7]
    for line, entry in zip(lines(tmp_path), looks(found), strict=True):
        assert line["tasks"] == TASK_NAMES and line["epoch"] == entry["epoch"]
        assert line["norms"] == [entry[f"gradient_norm/{task}"] for task in TASK_NAMES]
        for a, b in PAIRS:
            cosine = entry[f"gradient_cosine/{TASK_NAMES[a]}/{TASK_NAMES[b]}"]
            assert line["cosines"][a][b] == line["cosines"][b][a] == cosine
        assert [line["cosines"][k][k] for k in range(4)] == pytest.approx([1.0] * 4, abs=1e-15)


@pytest.mark.parametrize(
    ("tasks", "pairs", "norms"), [(8, 28, 8), (9, 0, 9), (33, 0, 3)], ids=["pairs", "tasks", "summary"]
)
def test_with_more_tasks_the_log_becomes_a_summary(tasks: int, pairs: int, norms: int, tmp_path: Path) -> None:
    names = [f"task_{k}" for k in range(tasks)]
    rows = build_data(2 * BATCH, num_tasks=tasks, dtype=FLOAT)
    found = run(tmp_path, build_model(FLOAT, task_names=names), rows, balancer="ls", diagnostics=LOOK)
    (line, _), (entry, _) = lines(tmp_path), looks(found)
    assert sum(key.startswith("gradient_cosine/") for key in entry) == pairs
    assert sum(key.startswith("gradient_norm/") for key in entry) == norms
    cosines = [line["cosines"][a][b] for a in range(tasks) for b in range(a)]
    assert entry["gradient_cosine_mean"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)
    assert entry["gradient_cosine_min"] == min(cosines)
    assert entry["gradient_conflicts"] == sum(cosine < 0 for cosine in cosines) / len(cosines) > 0
    if tasks == 33:
        keys = ("gradient_norm/min", "gradient_norm/mean", "gradient_norm/max")
        expected = (min(line["norms"]), sum(line["norms"]) / tasks, max(line["norms"]))
        assert [entry[key] for key in keys] == pytest.approx(expected, rel=1e-12)


def test_one_task_has_a_norm_and_an_ordinary_model_nothing(tmp_path: Path) -> None:
    rows = build_data(2 * BATCH, num_tasks=1, dtype=FLOAT)
    found = run(tmp_path, build_model(FLOAT, task_names=["only"]), rows, balancer="ls", diagnostics=LOOK)
    assert [entry.keys() for entry in looks(found)] == [{"gradient_norm/only", "step", "epoch"}] * 2
    trainer = BilevelMTLTrainer(
        model=ordinary(), args=arguments(tmp_path / "ordinary", diagnostics=LOOK), train_dataset=feature_rows()
    )
    trainer.train()
    assert trainer.state.global_step > 1 and looks(trainer) == []


def test_a_dropped_update_is_not_looked_at(tmp_path: Path) -> None:
    rows = data()
    rows.labels[2 * BATCH, 1] = torch.inf
    settings: dict[str, Any] = {"data": rows, "balancer": "bilb", "nonfinite_loss": "skip"}
    found = run(tmp_path, diagnostics=LOOK, **settings)
    assert [entry["step"] for entry in looks(found)] == [1, 2, 4, 5, 6]
    assert torch.equal(found.parameters, run(tmp_path, **settings).parameters)


# --- the numbers --------------------------------------------------------------------------------------------------


def losses_at(model: nn.Module, batch: dict[str, Tensor]) -> dict[int, Tensor]:
    """The mean squared error of each task that has a label."""
    logits, labels = model(batch["features"]).logits, batch["labels"]
    there = labels.isfinite()
    return {k: (logits[there[:, k], k] - labels[there[:, k], k]).square().mean() for k in range(4) if there[:, k].any()}


def gradients_at(x: Tensor, batch: dict[str, Tensor], names: str) -> dict[int, Tensor]:
    """By plain loops over the tasks and `torch.autograd.grad`; of the parameters whose name begins so."""
    model = build_model(FLOAT)
    torch.nn.utils.vector_to_parameters(x, model.parameters())
    parameters = [p for name, p in model.named_parameters() if name.startswith(names)]
    return {
        k: torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
        for k, loss in losses_at(model, batch).items()
    }


def assert_as_defined(entry: dict[str, float], gradients: dict[int, Tensor]) -> None:
    expected = {f"gradient_norm/{TASK_NAMES[k]}": float(g.norm()) for k, g in gradients.items()}
    pairs = {
        f"gradient_cosine/{TASK_NAMES[a]}/{TASK_NAMES[b]}": float(
            torch.nn.functional.cosine_similarity(gradients[a], gradients[b], dim=0)
        )
        for a, b in PAIRS
        if a in gradients and b in gradients
    }
    expected |= pairs
    if pairs:
        values = list(pairs.values())
        expected |= {
            "gradient_cosine_mean": sum(values) / len(values),
            "gradient_cosine_min": min(values),
            "gradient_conflicts": sum(value < 0 for value in values) / len(values),
        }
    assert entry.keys() - {"step", "epoch"} == expected.keys()
    for key, value in expected.items():
        assert entry[key] == pytest.approx(value, rel=1e-11, abs=1e-14), key


SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "batch": (4, {}),
    "micro_batches": (16, {"gradient_accumulation_steps": 4}),
    "window": (16, {"gradient_accumulation_steps": 4, "balance_over": "window"}),
    "clipped": (4, {"max_grad_norm": 0.01}),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("balancer", ["ls", "mgda"])
def test_the_values_of_plain_gradients(balancer: str, name: str, tmp_path: Path) -> None:
    size, settings = SETTINGS[name]
    rows = build_data(6 * size, dtype=FLOAT, missing=0.3)
    rows.labels[:size, 1] = torch.nan  # first seen in the second update
    rows.labels[3 * size : 4 * size, 1:] = torch.nan  # one task alone
    found = run(tmp_path, data=rows, balancer=balancer, diagnostics=LOOK, **settings)
    x = [flat_parameters(build_model(FLOAT)), *found.record.parameters[:-1]]
    assert len(looks(found)) == len(x) == 6
    for entry, at, batch in zip(looks(found), x, batches(rows, size), strict=True):
        assert_as_defined(entry, gradients_at(at, batch, "trunk"))
    assert all(math.isfinite(value) for entry in looks(found) for value in entry.values())


def test_the_cosine_by_finite_differences(tmp_path: Path) -> None:
    found = run(tmp_path, data=data(), balancer="bilb", diagnostics=LOOK)
    batch, x, step = batches(data())[0], flat_parameters(build_model(FLOAT)), 1e-6
    model = build_model(FLOAT)
    size = sum(p.numel() for p in model.trunk.parameters())
    slopes = torch.zeros(4, size, dtype=FLOAT)
    for i in range(size):
        for sign in (1, -1):
            moved = x.clone()
            moved[i] += sign * step
            torch.nn.utils.vector_to_parameters(moved, model.parameters())
            losses = torch.stack(list(losses_at(model, batch).values()))
            slopes[:, i] += sign * losses.detach() / (2 * step)
    entry = looks(found)[0]
    for k, task in enumerate(TASK_NAMES):
        assert entry[f"gradient_norm/{task}"] == pytest.approx(float(slopes[k].norm()), rel=1e-7)
    cosine = slopes[0] @ slopes[2] / slopes[0].norm() / slopes[2].norm()
    assert entry["gradient_cosine/alpha/gamma"] == pytest.approx(float(cosine), abs=1e-7)


@pytest.mark.parametrize(
    ("patterns", "names"), [(["trunk.3.*"], "trunk.3"), (["trunk.0.weight"], "trunk.0.weight"), (["heads.*"], "heads")]
)
def test_chosen_parameters(patterns: list[str], names: str, tmp_path: Path) -> None:
    rows = data(0.2)
    options = {"gradients": {"every_n_steps": 1, "parameters": patterns}}
    found = run(tmp_path, data=rows, balancer="ls", diagnostics=options)
    x = [flat_parameters(build_model(FLOAT)), *found.record.parameters[:-1]]
    for entry, at, batch in zip(looks(found), x, batches(rows), strict=True):
        assert_as_defined(entry, gradients_at(at, batch, names))


class Contradiction(nn.Module):
    """The gradient of the second task is zero; the others contradict each other."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2, dtype=FLOAT))

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        total = self.theta.sum()
        return {"losses": torch.stack([total, 0 * total, 5 - 2 * total])}


def test_what_has_no_direction_has_no_cosine(tmp_path: Path) -> None:
    found = run(tmp_path, Contradiction(), data(steps=1), task_names=["a", "b", "c"], balancer="ls", diagnostics=LOOK)
    (entry,) = looks(found)
    assert entry["gradient_norm/b"] == 0 and entry["gradient_cosine/a/c"] == pytest.approx(-1, abs=1e-15)
    assert entry["gradient_cosine_mean"] == entry["gradient_cosine_min"] == entry["gradient_cosine/a/c"]
    assert entry["gradient_conflicts"] == 1.0
    assert not {"gradient_cosine/a/b", "gradient_cosine/b/c"} & entry.keys()
    (line,) = lines(tmp_path)
    assert line["cosines"][0][1] is None and line["cosines"][1] == [None] * 3


# --- training goes on as without ----------------------------------------------------------------------------------

BALANCERS: dict[str, Any] = {
    "ls": "ls",
    "bilb": {"name": "bilb", "learning_rate": 0.1, "preset": "qm9"},
    "double_loop": DOUBLE,
    "famo": "famo",
    "marigold": "marigold",
    "mgda": "mgda",
    "pcgrad": "pcgrad",
    "rlw": "rlw",
}
AS_WITHOUT: dict[str, dict[str, Any]] = {
    "batch": {"optim": "adamw_torch"},
    "window": {"gradient_accumulation_steps": 2, "balance_over": "window"},
    "micro_batch": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
}


#: Refused with micro-batches that are balanced on their own.
OVER_WINDOWS = ("double_loop", "famo", "marigold")
CASES = [(b, s) for b in BALANCERS for s in AS_WITHOUT if s != "micro_batch" or b not in OVER_WINDOWS]


@pytest.mark.parametrize(("balancer", "settings"), CASES)
def test_bit_for_bit_as_without(balancer: str, settings: str, tmp_path: Path) -> None:
    def train(name: str, **more: Any) -> tuple[Run, Tensor]:
        model = build(NormalisedModel, dropout=0.3)
        rows = data(0.3, 12)
        found = run(tmp_path / name, model, rows, balancer=BALANCERS[balancer], **AS_WITHOUT[settings], **more)
        return found, torch.rand(3)

    (plain, draw), (found, again) = train("plain"), train("found", diagnostics=LOOK)
    assert len(looks(found)) == found.trainer.state.global_step >= 6
    assert same(dict(plain.trainer.model.state_dict()), dict(found.trainer.model.state_dict()))
    assert same(plain.trainer.balancer.state_dict(), found.trainer.balancer.state_dict())
    assert torch.equal(draw, again), "the random generators are where they would be"
    without = [entry for entry in found.trainer.state.log_history if entry not in looks(found)]
    assert untimed(without) == untimed(plain.trainer.state.log_history)


def test_other_generators_and_the_same_dropout_masks(tmp_path: Path) -> None:
    """Draws from torch, Python and numpy: the look's losses are those of the update."""
    seen: list[Tensor] = []

    class Seen(NoisyModel):
        def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
            found = super().forward(features, labels)
            seen.append(found.losses.detach().clone())
            return found

    plain = run(tmp_path, build(NoisyModel, dropout=0.3), data(), balancer="ls")
    found = run(tmp_path, build(Seen, dropout=0.3), data(), balancer="ls", diagnostics=LOOK)
    assert torch.equal(plain.parameters, found.parameters)
    # The first look runs the model twice: which parameters are shared is found out.
    assert len(seen) == 2 * STEPS + 1
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert all(torch.equal(seen[i], seen[i + 1]) for i in range(3, len(seen), 2))


@pytest.mark.parametrize("logging_steps", [2, 4])
def test_the_log_of_training_is_what_it_was(logging_steps: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": data(), "balancer": "bilb", "logging_steps": logging_steps}
    both = {"lower_level": {"every_n_steps": 2, "inner_steps": 1}, "gradients": {"every_n_steps": 1}}
    found, plain = run(tmp_path, diagnostics=both, **settings), run(tmp_path, **settings)
    extra = [e for e in found.trainer.state.log_history if e in looks(found) or "bilevel/gradient_ratio" in e]
    assert len(extra) == STEPS + STEPS // 2
    assert untimed([e for e in found.trainer.state.log_history if e not in extra]) == untimed(
        plain.trainer.state.log_history
    )


def test_passes(tmp_path: Path) -> None:
    # One forward pass more of each micro-batch, at looks alone; one more at the first one. `backward` as ever.
    for parts in (1, 4):
        passes = Passes()
        trainer = BilevelMTLTrainer(
            model=build_model(FLOAT),
            args=arguments(
                tmp_path,
                balancer="ls",
                diagnostics={"gradients": {"every_n_steps": 2}},
                per_device_train_batch_size=16 // parts,
                gradient_accumulation_steps=parts,
            ),
            train_dataset=build_data(64, dtype=FLOAT),
            callbacks=[passes],
        )
        passes.watch(trainer)
        trainer.train()
        counted = parts if parts > 1 else 0  # of the first window
        assert passes.counts == [
            (3 * parts, counted, parts),
            (parts, 0, parts),
            (2 * parts, 0, parts),
            (parts, 0, parts),
        ]


def test_activation_checkpointing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": bert_rows(), "balancer": "ls"}
    plain = run(tmp_path, bert(), diagnostics=LOOK, **settings)
    again = run(tmp_path, bert(), diagnostics=LOOK, activation_checkpointing=True, **settings)
    assert torch.equal(plain.parameters, again.parameters) and len(looks(again)) > 1
    for one, other in zip(looks(plain), looks(again), strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-9)


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_writes_its_lines_once(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": data(steps=12), "balancer": "bilb", "diagnostics": LOOK}
    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=5, **settings)
    expected = (tmp_path / "whole" / "gradients.jsonl").read_text(encoding="utf-8")
    with (tmp_path / "whole" / "gradients.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 13, "cosi')  # cut short by a kill
    args = arguments(tmp_path / "whole", balancer="bilb", diagnostics=LOOK)
    resumed = BilevelMTLTrainer(model=build_model(FLOAT, seed=1), args=args, train_dataset=data(steps=12))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert torch.equal(flat_parameters(resumed.model), whole.parameters)
    assert (tmp_path / "whole" / "gradients.jsonl").read_text(encoding="utf-8") == expected
    assert looks(resumed) == looks(whole)


def test_another_training_begins_the_file_anew(tmp_path: Path) -> None:
    args = arguments(tmp_path, balancer="ls", diagnostics=LOOK)
    trainer = BilevelMTLTrainer(model=build_model(FLOAT), args=args, train_dataset=data())
    trainer.train()
    first = lines(tmp_path)
    trainer.train()
    assert [line["step"] for line in lines(tmp_path)] == [line["step"] for line in first] == list(range(1, STEPS + 1))
    assert lines(tmp_path) != first
    trainer.args.diagnostics = None
    trainer.train()
    assert looks(trainer) == [] and not any("Gradient" in type(c).__name__ for c in trainer.callback_handler.callbacks)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "lower", "gradients"),
    [
        (None, None, None),
        ({}, (100, 10), None),
        ({"every_n_steps": 7}, (7, 10), None),
        ({"lower_level": {"every_n_steps": 7}}, (7, 10), None),
        ({"gradients": {}}, None, (100, None)),
        ({"gradients": {"every_n_steps": "5", "parameters": ["a.*"]}}, None, (5, ["a.*"])),
        ({"inner_steps": 3, "gradients": {"every_n_steps": 2}}, (100, 3), (2, None)),
        ({"lower_level": {"inner_steps": 3}, "gradients": {"every_n_steps": 2}}, (100, 3), (2, None)),
        ({"lower_level": None, "gradients": {}}, None, (100, None)),
        ({"gradients": None}, None, None),
    ],
)
def test_forms(given: Any, lower: Any, gradients: Any, tmp_path: Path) -> None:
    options = arguments(tmp_path, diagnostics=given).diagnostics_options()
    found = None if options is None else options.lower_level
    assert (None if found is None else (found.every_n_steps, found.inner_steps)) == lower
    looked = None if options is None else options.gradients
    assert (None if looked is None else (looked.every_n_steps, looked.parameters)) == gradients


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"gradients": {"every_n_steps": 0}},
            "diagnostics.gradients.every_n_steps: 0 is not valid, expected an integer >= 1",
        ),
        (
            {"gradients": {"every_n_step": 5}},
            'diagnostics.gradients.every_n_step: unknown option, value 5 (did you mean "every_n_steps"?)',
        ),
        ({"gradient": {}}, 'diagnostics.gradient: unknown option, value {} (did you mean "gradients"?)'),
        (
            {"gradients": 5},
            "diagnostics.gradients: 5 is not valid, expected a mapping with every_n_steps, parameters or null",
        ),
        (
            {"gradients": {"parameters": []}},
            "diagnostics.gradients.parameters: [] is not valid, expected names or patterns, or null",
        ),
        (
            {"gradients": {"parameters": "trunk.*"}},
            "diagnostics.gradients.parameters: 'trunk.*' is not valid, expected a list (a string each) or null",
        ),
        (
            {"lower_level": {"every_n": 5}},
            'diagnostics.lower_level.every_n: unknown option, value 5 (did you mean "every_n_steps"?)',
        ),
        (
            {"lower_level": {}, "inner_steps": 5},
            "diagnostics.inner_steps: stands next to diagnostics.lower_level, expected in it",
        ),
    ],
)
def test_mistakes(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        arguments(tmp_path, diagnostics=given)
    assert str(caught.value) == message


def refusal(tmp_path: Path, model: nn.Module | None = None, **settings: Any) -> str:
    args = arguments(tmp_path, **{"balancer": "ls", "diagnostics": LOOK, **settings})
    with pytest.raises(OptionError) as caught:
        BilevelMTLTrainer(model=build_model(FLOAT) if model is None else model, args=args)
    return str(caught.value)


def test_a_pattern_that_fits_nothing(tmp_path: Path) -> None:
    given = {"gradients": {"parameters": ["trunk.*", "heads.wieght"]}}
    expected = (
        "diagnostics.gradients.parameters: 'heads.wieght' means no parameter of the model "
        '(did you mean "heads.weight"?)'
    )
    assert refusal(tmp_path, diagnostics=given) == expected


def test_the_lower_level_in_its_section_is_refused_there(tmp_path: Path) -> None:
    expected = "diagnostics.lower_level: balancer 'ls' has no lower level to look at, expected bilb"
    assert refusal(tmp_path, diagnostics={"lower_level": {}, "gradients": {}}) == expected


@pytest.mark.parametrize(
    ("settings", "kind", "problem"),
    [
        ({}, "fsdp", "FSDP, which shards the parameters"),
        ({}, "deepspeed", "DeepSpeed, which shards the parameters"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            None,
            "use_reentrant: true, under which torch gives no gradients of single tasks; expected false",
        ),
        ({"fp16": True}, None, "fp16, whose scaled gradients would be those of no task; use bf16 or float32"),
        ({"optim": "adalomo"}, None, "optim: adalomo, which steps in the backward pass"),
    ],
    ids=["fsdp", "deepspeed", "reentrant", "fp16", "adalomo"],
)
def test_refused_when_the_trainer_is_built(
    settings: Any, kind: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is not None:
        with_plugin(kind)(monkeypatch)
    message = refusal(tmp_path, bert(), **settings)
    assert message == f"diagnostics.gradients: a look at the gradients of the tasks is not valid with {problem}"


def test_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA_SETS, "made_up", MADE_UP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)

    def hf_bilb(*words: str) -> Any:
        return CliRunner().invoke(main, ["train", "small.yaml", *words], catch_exceptions=False)

    refused = hf_bilb("trainer.diagnostics={gradients: {every_step: 5}}")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "trainer.diagnostics.gradients.every_step: unknown option, value 5" in refused.stderr
    assert not (tmp_path / "run").exists()
    options = "trainer.diagnostics={gradients: {every_n_steps: 5}}"
    assert hf_bilb(options, "trainer.num_train_epochs=1", "balancer=mgda").exit_code == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 6, 11]
    assert (tmp_path / "run" / "gradient_conflicts.png").stat().st_size > 8000


def test_a_recorder_sees_no_more_steps(tmp_path: Path) -> None:
    recorder = Recorder()
    run(tmp_path, data=data(), balancer="ls", diagnostics=LOOK, trainer_arguments={"callbacks": [recorder]})
    assert len(recorder.coefficients) == STEPS
