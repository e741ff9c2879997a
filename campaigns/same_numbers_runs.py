"""What `same_numbers.py` runs in each of two checkouts; by public names of the library alone, so that it runs in both.

    python same_numbers_runs.py '[[JOB, ARGUMENT, ...], ...]'

Each job runs in a process of its own, forked after the imports, which take far longer than most of them:

    ["train", RECIPE, "key=value", ...]    `hf-bilb train`
    ["methods", FOLDER]                    every method, and ways of accumulation, each in FOLDER/<case>; a third entry
                                           "--resume" goes on from FOLDER/<case>/checkpoint-<half>
    ["ranks", FOLDER]                      a few of them, under torchrun; "--resume" likewise
    ["own_loop", FOLDER]                   every method in a loop without the Trainer: the numbers of each step
    ["parity", FOLDER, FILE]               the trajectories that the parity tests in FILE compute
    ["arguments", FOLDER, FILE]            what each training_args.bin below FOLDER holds, into FILE as JSON
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments, build_balancer

#: Those that a checkout had before there were gradient methods, too.
METHODS = "bilb dwa famo gls go4align imtl_l ls marigold rlw si stch uw".split()

STEPS, HALF = 24, 12
NUM_TASKS, NUM_FEATURES, WIDTH, BATCH, ROWS = 4, 6, 8, 8, 96
TASKS = ["alpha", "beta", "gamma", "delta"]

BILB = {"name": "bilb", "learning_rate": 0.05}
DOUBLE = {**BILB, "lower_level": {"inner_steps": 2, "inner_learning_rate": 0.02}}
QM9 = {**BILB, "preset": "qm9"}
FEATURES = {**BILB, "router": "features", "initial_logits": None, "num_features": WIDTH}
MARIGOLD = {"name": "marigold", "learning_rate": 0.1, "perturbation": 0.1}
WINDOW = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2, "balance_over": "window"}
MICRO_BATCH = {**WINDOW, "balance_over": "micro_batch"}
#: Beside every method with its defaults: case -> training arguments.
CASES: dict[str, dict[str, Any]] = {
    "bilb_features": {"balancer": FEATURES},
    "bilb_qm9": {"balancer": QM9},
    "bilb_double_loop": {"balancer": DOUBLE},
    "bilb_double_loop_window": {"balancer": DOUBLE, **WINDOW},
    "bilb_hold": {"balancer": BILB, "absent_tasks": "hold"},
    "bilb_phases": {"balancer": BILB, "balancer_warmup_steps": 5, "balancer_freeze_after": 15},
    "bilb_priors": {"balancer": BILB, "task_priors": [1, 2, 1, 3]},
    "bilb_reference": {"balancer": {**BILB, "normalization": "initial", "reference": {"mean_of": 14}}},
    "bilb_scaled": {"balancer": {**BILB, "coefficient_scale": "sum_to_k", "coefficient_floor": 0.1}},
    "bilb_diagnostics": {
        "balancer": BILB,
        "diagnostics": {"every_n_steps": 4, "inner_steps": 2, "inner_learning_rate": 0.02},
    },
    "famo_next_batch": {"balancer": {"name": "famo", "reevaluate": "next_batch"}},
    "famo_window": {"balancer": "famo", **WINDOW},
    "marigold_exact": {"balancer": {**MARIGOLD, "mode": "exact"}},
    "marigold_commit": {"balancer": {**MARIGOLD, "mode": "commit"}},
    "marigold_lagged": {"balancer": {**MARIGOLD, "mode": "lagged"}},
    "marigold_two_point": {"balancer": {**MARIGOLD, "mode": "exact", "estimator": "two_point"}},
    "marigold_exact_window": {"balancer": {**MARIGOLD, "mode": "exact"}, **WINDOW},
    **{
        f"{name}_{settings['balance_over']}": {"balancer": name, **settings}
        for name in ("ls", "uw", "bilb", "stch", "dwa")
        for settings in (WINDOW, MICRO_BATCH)
    },
}  # fmt: skip
RANKS = {
    "bilb": {"balancer": BILB},
    "ls": {"balancer": "ls"},
    "famo": {"balancer": "famo"},
    "bilb_hold_window": {"balancer": QM9, "absent_tasks": "hold", **WINDOW},
    "bilb_micro_batch": {"balancer": BILB, **MICRO_BATCH},
    "bilb_double_loop": {"balancer": DOUBLE},
}


class Config(PretrainedConfig):
    model_type = "same_numbers"

    def __init__(self, task_names: list[str] | None = None, **kwargs: Any) -> None:
        self.task_names = list(task_names or TASKS)
        self.keys_to_ignore_at_inference = ["losses", "num_items", "router_features"]
        super().__init__(**kwargs)


@dataclass
class Output(ModelOutput):
    losses: Tensor | None = None
    num_items: Tensor | None = None
    logits: Tensor | None = None
    router_features: Tensor | None = None


class Network(PreTrainedModel):
    """A tanh network with dropout and one head layer; labels that are NaN are missing."""

    config_class = Config
    accepts_loss_kwargs = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.trunk = nn.Sequential(nn.Linear(NUM_FEATURES, WIDTH), nn.Tanh(), nn.Dropout(0.1))
        self.norm = nn.BatchNorm1d(WIDTH)  # its buffers must survive what is run more than once
        self.heads = nn.Linear(WIDTH, len(config.task_names))
        self.post_init()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Output:
        hidden = self.norm(self.trunk(features))
        logits = self.heads(hidden)
        if labels is None:
            return Output(logits=logits)
        valid = labels.isfinite()
        squares = torch.where(valid, logits - labels.nan_to_num(), 0.0).square()
        num_items = valid.sum(0)
        return Output(
            losses=squares.sum(0) / num_items.clamp(min=1), num_items=num_items, logits=logits, router_features=hidden
        )


def rows() -> list[dict[str, Tensor]]:
    """Smooth targets on scales of their own; a tenth of the labels is missing."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, NUM_FEATURES, generator=generator)
    mixing = torch.randn(NUM_FEATURES, NUM_TASKS, generator=generator)
    labels = torch.logspace(-0.3, 0.3, NUM_TASKS) * torch.sin(features @ mixing) + 0.1
    labels[torch.rand(ROWS, NUM_TASKS, generator=generator) < 0.1] = torch.nan
    return [{"features": one, "labels": other} for one, other in zip(features, labels, strict=True)]


def train(folder: Path, own: dict[str, Any], resume: bool) -> None:
    torch.manual_seed(0)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "seed": 3,
        "max_steps": STEPS,
        "save_steps": HALF,
        "eval_strategy": "steps",
        "eval_steps": HALF,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": BATCH,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        **own,
    }
    data = rows()
    trainer = BilevelMTLTrainer(
        model=Network(Config()),
        args=BilevelMTLTrainingArguments(**settings),
        train_dataset=data[:-16],
        eval_dataset=data[-16:],
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    trainer.save_model(str(folder))
    trainer.save_state()


def own_loop(folder: Path) -> None:
    """Losses, coefficients, parameters and the balancer's state after each step."""
    for name in METHODS:
        torch.manual_seed(0)
        model = Network(Config())
        balancer = build_balancer(name, task_names=TASKS)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        balancer.bind(model, optimizer)
        kept: dict[str, Tensor] = {}
        data = rows()
        for step in range(STEPS):
            if step % 10 == 0:
                balancer.on_epoch_begin(step // 10)
            part = [data[(step * BATCH + i) % ROWS] for i in range(BATCH)]
            batch = {key: torch.stack([row[key] for row in part]) for key in part[0]}
            optimizer.zero_grad()
            losses = model(**batch).losses
            balancer.backward(losses)
            optimizer.step()
            balancer.step(reevaluate=lambda model=model, batch=batch: model(**batch).losses)
            now = {"losses": losses, "coefficients": balancer.coefficients, **balancer.state_dict()}
            now["parameters"] = torch.cat([parameter.flatten() for parameter in model.parameters()])
            kept.update({f"{step:02d}.{key}": torch.as_tensor(value).detach().clone() for key, value in now.items()})
        save_file(kept, folder / f"{name}.safetensors")


def parity(folder: Path, file: Path) -> int:
    """Run the parity tests and save what each of them hands to `compare`."""
    import pytest

    class Recorder:
        @pytest.fixture(autouse=True)
        def note(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
            compare = request.module.compare

            def noting(name: str, ours: dict[str, Any], reference: dict[str, Any]) -> None:
                np.savez(folder / f"{request.node.name.replace('/', '_')}.npz", **ours)
                compare(name, ours, reference)

            monkeypatch.setattr(request.module, "compare", noting)

    return int(pytest.main([str(file), "-q", "-p", "no:cacheprovider"], plugins=[Recorder()]))


def arguments_below(folder: Path) -> dict[str, Any]:
    """Class and fields of every training_args.bin."""
    found = {}
    for path in sorted(folder.rglob("training_args.bin")):
        try:
            args = torch.load(path, weights_only=False)
        except (ImportError, AttributeError) as error:
            # One that the unchanged library wrote, copied to be resumed from: the same file, which is not compared.
            found[str(path.relative_to(folder))] = {"error": str(error)}
        else:
            found[str(path.relative_to(folder))] = {"class": type(args).__name__, **args.to_dict()}
    return found


def run(what: str, *arguments: str) -> int:
    """One job, in this process."""
    if what == "train":
        from hf_bilb.cli import main

        main(["train", *arguments], standalone_mode=False)
        return 0
    folder, *more = arguments
    Path(folder).mkdir(parents=True, exist_ok=True)
    if what == "arguments":
        Path(more[0]).write_text(json.dumps(arguments_below(Path(folder)), default=str))
    elif what == "parity":
        return parity(Path(folder).resolve(), Path(more[0]))
    elif what == "own_loop":
        own_loop(Path(folder))
    else:
        cases = RANKS if what == "ranks" else {**{name: {"balancer": name} for name in METHODS}, **CASES}
        for name, own in cases.items():
            train(Path(folder) / name, own, "--resume" in more)
    return 0


def in_a_process(job: list[str]) -> bool:
    """Whether the job, in a process forked for it, ended well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(*job)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def main() -> int:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    jobs = json.loads(sys.argv[1])
    if "WORLD_SIZE" in os.environ:
        return max(run(*job) for job in jobs)
    for job in jobs:
        if not in_a_process(job):
            print(f"failed: {job}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
