"""Small changes of behaviour, each of which the tests should notice.

A mutation names a text that stands exactly once below `hf_bilb/`, wherever the file lies, and what is put in its place;
so it survives moves of files. Where the text is gone, the campaign says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        name: what is broken, in words.
        old, new: the text that stands once in the package, and what replaces it.
        tests: folders and files below `tests/` that could notice, the cheapest first.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


ENGINE = ("contract/test_derivatives.py", "engine/test_standalone.py", "contract/test_every_balancer.py", "engine")
GRADIENT_LOOKS = ("trainer/test_gradient_diagnostics.py", "distributed/test_gradient_looks.py")
TRAINER = tuple(
    f"trainer/test_{name}.py"
    for name in (
        "losses",
        "logs",
        "evaluation",
        "nonfinite",
        "learning_rate",
        "phases",
        "looks",
        "window",
        "diagnostics",
    )
)
RANKS = ("distributed/test_absent_tasks.py", "distributed/test_data_parallel.py")


def method(name: str) -> tuple[str, ...]:
    """The tests of one method."""
    return (f"balancers/test_{name}.py", "balancers/test_parity.py", "contract")


GRADIENTS = ("engine/test_task_gradients.py", "contract/test_gradient_balancers.py", "trainer/test_gradient_methods.py")
GRADIENT_RANKS = ("distributed/test_gradient_methods.py", "distributed/test_methods.py")
BILB = ("engine", "contract", "balancers/test_parity.py")

MUTATIONS: tuple[Mutation, ...] = (
    # --- differentiation ---
    Mutation(
        "progress compares the losses with themselves",
        "before=normalization(step.before), after=normalization(step.after)",
        "before=normalization(step.before), after=normalization(step.before)",
        ("balancers/test_famo.py", *ENGINE),
    ),
    Mutation(
        "a method's own gradient has the wrong sign",
        "of_losses, *of_parameters = gradients",
        "of_losses, *of_parameters = gradients[0], *(-g for g in gradients[1:])",
        ("contract/test_derivatives.py",),
    ),
    # --- a rank's share, and what is reported ---
    Mutation(
        "a share over a count of zero",
        "return batch.num_items / weighting.num_items.clamp(min=1) if share is None else share.local",
        "return batch.num_items / weighting.num_items if share is None else share.local",
        ("engine/test_absent_tasks.py", *RANKS),
    ),
    Mutation(
        "the factor of the ranks is missing",
        "of_all_ranks = coefficients if weighting.ranks == 1 else weighting.ranks * coefficients",
        "of_all_ranks = coefficients",
        RANKS,
    ),
    Mutation(
        "the factor of the ranks is missing for router features",
        "rows = weighting.ranks if share is None else weighting.ranks * share.rows",
        "rows = 1 if share is None else share.rows",
        ("distributed/test_feature_routers.py",),
    ),
    Mutation(
        "the value of the loss is not F",
        "return _Given.apply(value, gradients, *tensors)",
        "return _Given.apply(torch.zeros_like(value), gradients, *tensors)",
        ("engine/test_standalone.py", "trainer/test_losses.py"),
    ),
    Mutation(
        "a NaN loss without items reaches the graph",
        "return torch.where(batch.num_items > 0, batch.losses, 0.0)",
        "return batch.losses",
        ("engine/test_passes.py", "engine"),
    ),
    Mutation(
        "the last known loss of an absent task is overwritten",
        "self.last_losses = torch.where(present, losses, self.last_losses)",
        "self.last_losses = losses",
        ("engine/test_standalone.py", "engine/test_absent_tasks.py"),
    ),
    Mutation(
        "a micro-batch's part of F ignores its tasks",
        "return weighting.value * share.fraction + torch.dot(weighting.coefficients * weighting.losses, of_tasks)",
        "return weighting.value * share.fraction",
        ("trainer/test_window.py", *TRAINER, "distributed/test_windows.py"),
    ),
    Mutation(
        "the auxiliary loss counts once for every micro-batch",
        "torch.ones_like(batch.auxiliary_loss) / parts",
        "torch.ones_like(batch.auxiliary_loss)",
        ("trainer/test_window.py", *TRAINER),
    ),
    # --- coefficients ---
    Mutation(
        "the floor is a share of the sum, not of the mean",
        "floor = self.floor * applied.abs().sum() / count.clamp(min=1)",
        "floor = self.floor * applied.abs().sum()",
        ("engine/test_coefficients.py", "engine"),
    ),
    Mutation(
        "priors are reported twice",
        "((self.task_priors - 1) * applied",
        "(self.task_priors * applied",
        ("engine/test_coefficients.py", "engine"),
    ),
    Mutation(
        "the scale counts present tasks, not those that F runs over",
        'target = 1.0 if self.scale == "sum_to_one" else active.sum()',
        'target = 1.0 if self.scale == "sum_to_one" else present.sum()',
        ("engine/test_coefficients.py", "engine"),
    ),
    Mutation(
        "the scale sums with signs",
        "            total = applied.abs().sum()\n",
        "            total = applied.sum()\n",
        ("engine/test_coefficients.py", "engine"),
    ),
    # --- normalization ---
    Mutation(
        "a running mean is off by one",
        "1 / (self.observations + 1)",
        "1 / (self.observations + 2)",
        ("engine/test_normalization.py", "engine"),
    ),
    Mutation(
        "references are formed one step too long",
        "return ~self.seen if frozen else self.observations < self.window",
        "return ~self.seen if frozen else self.observations <= self.window",
        ("engine/test_normalization.py", "engine"),
    ),
    Mutation(
        "references are formed while frozen",
        "return ~self.seen if frozen else self.observations < self.window",
        "return self.observations < self.window",
        ("engine/test_phases.py", "trainer/test_phases.py"),
    ),
    Mutation(
        "rescaled by the largest reference",
        "smallest = torch.where(self.seen, reference, torch.inf).min()",
        "smallest = torch.where(self.seen, reference, -torch.inf).max()",
        ("engine/test_normalization.py", "engine"),
    ),
    Mutation(
        "log without a reference",
        '        if self.kind == "log":\n            return torch.log(ratio)',
        '        if self.kind == "log":\n            return torch.log(losses)',
        ("engine/test_normalization.py", "engine"),
    ),
    Mutation(
        "power without its factor",
        "above = ratio.clamp(min=SOLVED).pow(self.power) / self.power",
        "above = ratio.clamp(min=SOLVED).pow(self.power)",
        ("engine/test_normalization.py", "engine"),
    ),
    Mutation(
        "an epoch takes no new references",
        "            self.observations.zero_()",
        "            pass",
        ("engine/test_normalization.py", "engine"),
    ),
    Mutation(
        "a loss of zero is let into a logarithm",
        "return present & (losses <= 0)",
        "return present & (losses < 0)",
        ("engine/test_normalization.py",),
    ),
    # --- the decision ---
    Mutation(
        "a lone task is never compared with held ones",
        "return torch.where(present.sum() == 1, held, present)",
        "return present",
        ("engine/test_absent_tasks.py", "engine"),
    ),
    Mutation(
        "a loss of the warm-up counts as a reference",
        'held = self._memory.seen if self._normalization.kind == "none" else self._normalization.seen',
        "held = self._memory.seen",
        ("engine/test_absent_tasks.py::test_a_loss_of_the_warm_up_is_not_compared_before_it_has_a_reference",),
    ),
    Mutation(
        "a coefficient that overflows is valid",
        "evidence=evidence_of(torch.dot(known, coefficients), whole, positive),",
        "evidence=evidence_of(known.sum(), whole, positive),",
        (
            "engine/test_standalone.py",
            "trainer/test_nonfinite.py",
            "engine/test_large_losses.py",
            "contract/test_every_balancer.py",
        ),
    ),
    Mutation(
        "a refused batch leaves its losses behind",
        "            self.rollback({**self.snapshot(), **self._kept})",
        "            pass",
        ("engine/test_standalone.py", "trainer/test_nonfinite.py", "contract/test_every_balancer.py"),
    ),
    Mutation(
        "held tasks have coefficients",
        "        if active is not whole.present:\n",
        "        if False:\n",
        ("engine/test_absent_tasks.py::test_hold_compares_with_the_last_losses_by_hand",),
    ),
    Mutation(
        "a frozen method learns",
        "        if balancing:\n            # A follower",
        '        if self.phase != "warmup":\n            # A follower',
        ("engine/test_phases.py", "engine"),
    ),
    Mutation(
        "an infinite sum is finite",
        "return (total - total) == 0",
        "return total == total",
        ("engine/test_standalone.py", "contract/test_every_balancer.py"),
    ),
    Mutation(
        "the auxiliary loss is not looked at",
        "        total = total + whole.auxiliary_loss\n",
        "        pass\n",
        ("trainer/test_nonfinite.py", "trainer/test_losses.py"),
    ),
    # --- a step of the balancer ---
    Mutation(
        "every call of on_epoch_begin begins an epoch",
        "        if epoch != self._epoch:\n",
        "        if True:\n",
        ("engine/test_phases.py", "trainer/test_phases.py", "engine", "contract/test_every_balancer.py"),
    ),
    Mutation(
        "a dropped step keeps its gradient",
        "            self.rollback({**self.snapshot(), **self._kept})\n        self._optimizer.discard()\n",
        "            self.rollback({**self.snapshot(), **self._kept})\n",
        (
            "engine/test_standalone.py",
            "trainer/test_nonfinite.py",
            "trainer/test_grad_scaler.py",
            "engine",
            "contract/test_every_balancer.py",
        ),
    ),
    Mutation(
        "a refused batch leaves a record",
        "                self.rollback({**self.snapshot(), **before})",
        "                pass",
        (
            "engine/test_standalone.py",
            "balancers/test_go4align.py",
            "balancers/test_dwa.py",
            "balancers/test_famo.py",
            "engine",
            "contract/test_every_balancer.py",
        ),
    ),
    Mutation(
        "a step without a batch ends an update",
        'if self._history is not None and self._open and self.phase != "warmup":',
        'if self._history is not None and self.phase != "warmup":',
        ("balancers/test_rlw.py", "engine/test_standalone.py", "contract/test_every_balancer.py", "balancers"),
    ),
    Mutation(
        "a look at a loss leaves its coefficients",
        "self._last, self._whole, self._ran_over, self._kept = last, whole, ran_over, kept",
        "pass",
        ("trainer/test_looks.py", "engine", *TRAINER),
    ),
    Mutation(
        "z does not start again",
        "            self._lower_level.started = False\n",
        "            pass\n",
        ("engine/test_double_loop.py", "trainer/test_double_loop.py"),
    ),
    Mutation(
        "another run's last losses are compared with",
        'name.startswith(("guards.", "progress."))',
        'name.startswith("guards.")',
        (
            "engine/test_phases.py::test_start_from_does_not_compare_with_the_other_runs_losses",
            "engine/test_phases.py",
            "trainer/test_phases.py",
        ),
    ),
    Mutation(
        "the epoch is not restored",
        '        self._epoch = int(snapshot["epoch"])\n',
        "",
        ("contract/test_every_balancer.py::test_resume_from_a_file_is_bit_identical", "engine/test_phases.py"),
    ),
    # --- looks at the gradients ---
    Mutation(
        "a look at the gradients changes the buffers",
        "        with unchanged(model), _eager():\n            return self._measure(runs, group)",
        "        with _eager():\n            return self._measure(runs, group)",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "a look at the gradients takes the step's own log away",
        "        control.should_log = due\n        if state.is_world_process_zero:\n",
        "        if state.is_world_process_zero:\n",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "a look at the gradients finds no shared parameters",
        "if self._finds and not bool(self._shared.known.all()):",
        "if False:",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "a look at the gradients takes the first micro-batch alone",
        "        for run in runs:\n            running.add(run(), inputs, of_features=False, tasks_per_pass=1)",
        "        for run in runs[:1]:\n            running.add(run(), inputs, of_features=False, tasks_per_pass=1)",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "a look at the gradients is at this rank's batch",
        "return _report(reduce_gradients([running], group, alone=False))",
        "return _report(reduce_gradients([running], group, alone=True))",
        ("distributed/test_gradient_looks.py",),
    ),
    Mutation(
        "every rank writes the gradients",
        "        if state.is_world_process_zero:\n            _append(",
        "        if True:\n            _append(",
        ("distributed/test_gradient_looks.py",),
    ),
    Mutation(
        "an absent task's gradient is zero",
        "[:, None], found.gramian, torch.nan).cpu()",
        "[:, None], found.gramian, 0.0).cpu()",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "the gradients are looked at after n steps",
        "if state.global_step % self._options.every_n_steps:",
        "if (state.global_step + 1) % self._options.every_n_steps:",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "a resumed run keeps the looks after its step",
        "            truncate_vectors(args.output_dir, state.global_step, GRADIENTS_FILE)",
        "            pass",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "the patterns of a look are not taken",
        "GradientLook(len(self._trainer.task_names), self._options.parameters)",
        "GradientLook(len(self._trainer.task_names), None)",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "looks at gradients are never refused",
        "    if looks.gradients is not None:\n        optimizer",
        "    if False:\n        optimizer",
        GRADIENT_LOOKS,
    ),
    Mutation(
        "a pair that is missing at a look has no mean",
        "return np.nanmean(self.values, axis=0)",
        "return np.mean(self.values, axis=0)",
        ("reporting/test_gradient_plots.py",),
    ),
    Mutation(
        "the colours of the cosines are not centred",
        "vmin=-limit, vmax=limit)",
        "vmin=-1, vmax=limit)",
        ("reporting/test_gradient_plots.py",),
    ),
    # --- reduction ---
    Mutation(
        "the mean of means instead of the items' mean",
        "sums = _sum([loss * count for loss, count in zip(local, items, strict=True)])",
        "sums = _sum(local)",
        ("engine/test_standalone.py", "trainer/test_window.py", *RANKS),
    ),
    Mutation(
        "the auxiliary loss is a sum over micro-batches",
        "auxiliary = auxiliary.reshape(()) / (ranks * len(micro_batches))",
        "auxiliary = auxiliary.reshape(()) / ranks",
        ("trainer/test_window.py", *TRAINER),
    ),
    Mutation(
        "features are summed, not averaged",
        "mean, num_rows = (features[0] / features[1].clamp(min=1), features[1])",
        "mean, num_rows = (features[0], features[1])",
        ("engine/test_feature_router.py",),
    ),
    Mutation(
        "features of several ranks are summed, not averaged",
        "mean, num_rows = (rest[:-1] / rest[-1].clamp(min=1), rest[-1])",
        "mean, num_rows = (rest[:-1], rest[-1])",
        ("trainer/test_window.py", "distributed/test_feature_routers.py"),
    ),
    Mutation(
        "a reduction writes into its argument",
        "    total = values.detach().clone()\n    dist.all_reduce",
        "    total = values.detach()\n    dist.all_reduce",
        ("distributed/test_factors.py", "distributed/test_windows.py"),
    ),
    Mutation(
        "every reached parameter counts as not reached",
        "    reached.add(number)",
        "    pass",
        ("distributed/test_data_parallel.py",),
    ),
    # --- the balancer's optimizer ---
    Mutation(
        "micro-batches are averaged without their items",
        "mean + ratio.to(mean.dtype) * (new - mean)",
        "mean + 0.5 * (new - mean)",
        ("balancers/test_uw.py",),
    ),
    Mutation(
        "the double loop adds what it should take off",
        "self._mean = [mean - factor * gradient for",
        "self._mean = [mean + factor * gradient for",
        ("engine/test_double_loop.py",),
    ),
    Mutation(
        "a gradient that is not finite is taken",
        "[torch.where(usable, gradient, self._zero) for gradient in gradients]",
        "gradients",
        ("engine/test_large_losses.py", "engine"),
    ),
    Mutation(
        "follow_model does not follow",
        'group["lr"] = self._model_optimizer.param_groups[0]["lr"]',
        "pass",
        (
            "balancers/test_parity.py",
            "engine/test_phases.py",
            "trainer/test_learning_rate.py",
            "checkpoints/test_changed.py",
        ),
    ),
    Mutation(
        "moments are not restored",
        "        self._load(moments)\n        self.discard()",
        "        self.discard()",
        ("contract/test_every_balancer.py::test_resume_from_a_file_is_bit_identical",),
    ),
    Mutation(
        "weight decay is lost",
        "self._optimizer = cls(self._parameters, lr=rate, weight_decay=weight_decay)",
        "self._optimizer = cls(self._parameters, lr=rate)",
        ("balancers/test_famo.py", "balancers/test_parity.py"),
    ),
    # --- guards ---
    Mutation(
        "every lambda is beyond its edge",
        "ratio > 1 + 1e-6",
        "ratio > 0",
        ("engine/test_guards.py", "engine/test_edge.py"),
    ),
    Mutation(
        "a refused step is counted",
        "self._before_trials, self._kept, self._shown = False, False, None, None, []",
        "self._before_trials, self._kept = False, False, None, None",
        ("engine/test_guards.py", "engine", "contract"),
    ),
    Mutation(
        "one step is enough for domination",
        "if steps >= MIN_STEPS and share",
        "if share",
        ("engine/test_guards.py", "engine"),
    ),
    Mutation(
        "steps that wait to be counted are not in the state",
        "    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:\n        self._count_steps()",
        "    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:\n        pass",
        ("engine/test_guards.py", "engine/test_absent_tasks.py"),
    ),
    Mutation(
        "references settle while they are being formed",
        "bool((self.seen & (self.observations >= self.window)).all())",
        "bool((self.observations >= 0).all())",
        ("engine/test_normalization.py", "engine"),
    ),
    Mutation(
        "settled references stay so when a state is loaded",
        "        super()._load_from_state_dict(*args, **kwargs)\n        self.settled, self._asked = False, 0",
        "        super()._load_from_state_dict(*args, **kwargs)",
        ("engine/test_normalization.py", "engine"),
    ),
    Mutation(
        "a closed form stands for another F",
        'if "forward" in vars(cls) and "closed_form" not in vars(cls):',
        "if False:",
        ("contract/test_derivatives.py",),
    ),
    Mutation(
        "uw: the closed form has another slope",
        "torch.where(active, 0.5 - 0.5 * scaled, nothing)",
        "torch.where(active, 0.5 - scaled, nothing)",
        ("contract/test_derivatives.py",),
    ),
    Mutation(
        "famo: the closed form is not scaled",
        "coefficients = scale.reciprocal() * weights / distances",
        "coefficients = weights / distances",
        ("contract/test_derivatives.py",),
    ),
    # --- replay ---
    Mutation(
        "buffers are not put back",
        "            buffer.copy_(value)\n            # A forward pass",
        "            # A forward pass",
        ("trainer/test_window.py", "engine/test_double_loop.py"),
    ),
    Mutation(
        "the wrapper believes that buffers were sent",
        "self._wrapper.require_forward_param_sync = self._due",
        "pass",
        ("distributed/test_double_loop.py", "distributed/test_windows.py"),
    ),
    Mutation(
        "a replayed pass takes new random numbers",
        "    with torch.random.fork_rng(devices):\n        yield",
        "    yield",
        ("engine/test_double_loop.py", "balancers/test_marigold.py", "trainer/test_double_loop.py"),
    ),
    Mutation(
        "the last micro-batch's gradient is taken for all",
        "total[i] = old if new is None else new if old is None else old + new",
        "total[i] = old if new is None else new",
        ("engine/test_double_loop.py", "trainer/test_double_loop.py"),
    ),
    Mutation(
        "Python's random numbers are not put back",
        "        random.setstate(self.python)\n        if self.numpy is not",
        "        if self.numpy is not",
        ("trainer/test_window.py",),
    ),
    Mutation(
        "a trial step on several ranks is too large",
        "one / (ranks * loss_scale)",
        "one / loss_scale",
        ("distributed/test_methods.py",),
    ),
    Mutation(
        "a trial step leaves the optimizer's state",
        "                _bring_back(optimizer.state[key], self._state[key])",
        "                pass",
        ("balancers/test_marigold.py", "trainer/test_marigold.py"),
    ),
    Mutation(
        "a trial step leaves what it allocated",
        "                del optimizer.state[key]",
        "                pass",
        ("balancers/test_marigold.py", "trainer/test_marigold.py"),
    ),
    # --- the double loop ---
    Mutation(
        "z climbs",
        "alpha=-inner_learning_rate",
        "alpha=inner_learning_rate",
        ("engine/test_double_loop.py",),
    ),
    Mutation(
        "g is taken of sums of losses, not of means",
        "per_task = derivatives.coefficients / whole.num_items.clamp(min=1)",
        "per_task = derivatives.coefficients",
        ("engine/test_double_loop.py",),
    ),
    Mutation(
        "z is x, not a copy of it",
        "            self.z = [x.detach().clone() for x in self._x]\n            self.started",
        "            self.z = [x.detach() for x in self._x]\n            self.started",
        ("engine/test_double_loop.py", "trainer/test_double_loop.py"),
    ),
    Mutation(
        "z follows one rank's gradient",
        "found = summed_over_ranks(found, self._x, group)",
        "found = list(found)",
        ("distributed/test_double_loop.py",),
    ),
    # --- methods that follow the losses ---
    Mutation(
        "a task is compared with a step in which it was absent",
        "compared = active & progress.active",
        "compared = active",
        ("balancers/test_famo.py", "engine/test_absent_tasks.py", "contract/test_every_balancer.py"),
    ),
    Mutation(
        "the zero gradient of F is averaged in",
        "if self._follower is None and result.parameter_gradients:",
        "if result.parameter_gradients:",
        ("balancers/test_famo.py", "balancers/test_parity.py"),
    ),
    Mutation(
        "the last update is compared with every micro-batch",
        "            progress.due = False\n",
        "",
        ("trainer/test_famo.py", "balancers/test_famo.py", "distributed/test_methods.py"),
    ),
    # --- losses ---
    Mutation(
        "a mean over all rows, missing ones included",
        "return sums / num_items.clamp(min=1).to(values.dtype), num_items",
        "return sums / len(mask), num_items",
        ("engine/test_masked_losses.py",),
    ),
    Mutation(
        "a NaN label reaches the graph",
        "return mask, torch.where(mask, labels, 0).to(predictions.dtype)",
        "return mask, labels.to(predictions.dtype)",
        ("engine/test_masked_losses.py",),
    ),
    Mutation(
        "-100 is a label",
        "return present & ~labels.isnan()",
        "return ~labels.isnan()",
        ("engine/test_masked_losses.py", "trainer/test_item_counts.py"),
    ),
    Mutation(
        "cross-entropy over all labels",
        "return total / num_items.clamp(min=1).to(logits.dtype), num_items",
        "return total / labels.numel(), num_items",
        ("engine/test_masked_losses.py",),
    ),
    Mutation(
        "a task without a loss has items",
        "counts = counts * torch.tensor([name in losses for name in names], device=vector.device)",
        "pass",
        ("engine/test_task_losses.py", "engine"),
    ),
    Mutation(
        "counts that are not given are one",
        "counts = torch.full((len(names),), default_items, dtype",
        "counts = torch.full((len(names),), 1.0, dtype",
        ("engine/test_task_losses.py", "trainer/test_losses.py"),
    ),
    Mutation(
        "labels are not shifted",
        "return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)",
        "return labels",
        ("engine/test_token_losses.py",),
    ),
    Mutation(
        "tokens of every task are counted together",
        "groups * num_blocks + blocks",
        "blocks",
        ("engine/test_token_losses.py",),
    ),
    Mutation(
        "the cosine is not taken from one",
        "return _mean(1 - (predictions * labels).sum(dim=1), mask)",
        "return _mean(-(predictions * labels).sum(dim=1), mask)",
        ("engine/test_dense_losses.py",),
    ),
    Mutation(
        "short vectors have a direction",
        "return vectors / torch.where(lengths > _SHORTEST, lengths, 1)",
        "return vectors / lengths.clamp(min=_SHORTEST)",
        ("engine/test_dense_losses.py",),
    ),
    # --- bilb ---
    Mutation(
        "router_gradient: upper descends g",
        "            return sigma.detach()\n",
        "            return sigma\n",
        ("contract/test_derivatives.py::test_upper_lets_the_router_descend_the_discrepancy_alone",),
    ),
    Mutation(
        "the denominator is not detached",
        'total = (weights if kind == "sum" else weights.detach()).sum()',
        "total = weights.sum()",
        ("engine/test_bilb_options.py", *BILB),
    ),
    Mutation(
        "weights of absent tasks are in the denominator",
        "weights = torch.where(active, sigma, zero(sigma.dtype, sigma.device))",
        "weights = sigma",
        (
            "contract/test_every_balancer.py::test_skip_is_the_balancer_of_the_present_tasks",
            "engine/test_absent_tasks.py",
        ),
    ),
    Mutation(
        "the edge forgets the factor of g",
        "chosen, edge = self.options.discrepancy_weight, self._penalised(edge)",
        "chosen = self.options.discrepancy_weight",
        (
            "engine/test_double_loop.py",
            "engine/test_bilb_options.py",
            "engine/test_edge.py",
            "contract/test_every_balancer.py",
        ),
    ),
    Mutation(
        "f of the weights where it is of the losses",
        'values = sigma * losses if self.options.tau == "weights" else losses',
        "values = sigma * losses",
        ("engine/test_bilb_options.py", *BILB),
    ),
    Mutation(
        "the clamp is lost",
        "return weights if self.clamp is None else weights.clamp(*self.clamp)",
        "return weights",
        ("engine/test_router.py", *BILB),
    ),
    Mutation(
        "features reach the model though detached",
        "return self.router(features.detach() if features is not None and self.options.detach_features else features)",
        "return self.router(features)",
        ("contract/test_derivatives.py", *BILB),
    ),
    Mutation(
        "half of all pairs",
        "return 2 / torch.arange(",
        "return 1 / torch.arange(",
        ("engine/test_discrepancy.py", "engine"),
    ),
    Mutation(
        "neighbours do not bridge a gap",
        "last_active = torch.where(active, positions, -1).cummax(dim=0).values",
        "last_active = torch.where(active, positions, -1)",
        ("engine/test_discrepancy.py", "contract"),
    ),
    Mutation(
        "the first task has two neighbours",
        "(place > 1).to(dtype)",
        "(place >= 1).to(dtype)",
        ("engine/test_edge.py", "engine"),
    ),
    Mutation(
        "ties have a slope",
        "torch.searchsorted(ordered, fixed) + torch.searchsorted(ordered, fixed, right=True) - count",
        "2 * torch.searchsorted(ordered, fixed) + 1 - count",
        ("engine/test_discrepancy.py", "engine"),
    ),
    # --- the other methods ---
    Mutation(
        "famo: progress has the wrong sign",
        "return self._distances(step.before, there).log() - self._distances(step.after, there).log()",
        "return self._distances(step.after, there).log() - self._distances(step.before, there).log()",
        method("famo"),
    ),
    Mutation(
        "famo: the scale is not detached",
        "weights, scale = (constant.detach() for constant in self._constants(distances, active))",
        "weights, scale = self._constants(distances, active)",
        method("famo"),
    ),
    Mutation(
        "famo: min_losses are added",
        "losses - self.min_losses + EPSILON",
        "losses + self.min_losses + EPSILON",
        method("famo"),
    ),
    Mutation(
        "uw: the penalty has the wrong sign",
        "value = 0.5 * masked_sum(precision * losses + self.log_variance, active)",
        "value = 0.5 * masked_sum(precision * losses - self.log_variance, active)",
        ("balancers/test_parity.py", "contract"),
    ),
    Mutation(
        "uw: twice the weight",
        "return ObjectiveValue(value, weights=0.5 * precision)",
        "return ObjectiveValue(value, weights=precision)",
        ("balancers/test_uw.py",),
    ),
    Mutation(
        "imtl_l: the penalty has the wrong sign",
        "masked_sum(scale * losses - self.log_scale, active)",
        "masked_sum(scale * losses + self.log_scale, active)",
        method("imtl_l"),
    ),
    Mutation(
        "gls: the root counts absent tasks",
        "torch.exp(total / count.clamp(min=1))",
        "torch.exp(total / len(active))",
        method("gls"),
    ),
    Mutation(
        "dwa: weights count absent tasks",
        "return number * masked_softmax(",
        "return len(active) * masked_softmax(",
        method("dwa"),
    ),
    Mutation(
        "dwa: weights begin one loss early",
        "self.observations > self._window + 1)",
        "self.observations >= self._window + 1)",
        method("dwa"),
    ),
    Mutation(
        "dwa: the older mean over the newer one",
        "return _ratios(last, before, self.epochs >= 2)",
        "return _ratios(before, last, self.epochs >= 2)",
        method("dwa"),
    ),
    Mutation(
        "stch: a late task's nadir is taken one epoch early",
        "late = (self.passed > self._warmup_epochs) & (self.items == 0)",
        "late = (self.passed >= self._warmup_epochs) & (self.items == 0)",
        (
            "balancers/test_parity.py",
            "trainer/test_history_methods.py",
            "balancers/test_stch.py",
            "contract/test_every_balancer.py",
        ),
    ),
    Mutation(
        "stch: no ideal point",
        "preference * (losses - self.ideal_point) / self._mu",
        "preference * losses / self._mu",
        method("stch"),
    ),
    Mutation(
        "stch: the schedule begins one epoch early",
        "return torch.where(self.passed > self._warmup_epochs, smooth, warm_up)",
        "return torch.where(self.passed >= self._warmup_epochs, smooth, warm_up)",
        method("stch"),
    ),
    Mutation(
        "go4align: past losses raise a weight",
        "torch.where(active, -self._step_size * self.loss_sums, nothing)",
        "torch.where(active, self._step_size * self.loss_sums, nothing)",
        method("go4align"),
    ),
    Mutation(
        "go4align: a group ends one value late",
        "end = (first - 1).clamp(min=0)",
        "end = first.clamp(min=0)",
        method("go4align"),
    ),
    Mutation(
        "marigold: the estimate lacks the number of tasks",
        "slope = number / options.perturbation * at * self.direction",
        "slope = 1 / options.perturbation * at * self.direction",
        method("marigold"),
    ),
    Mutation(
        "marigold: rho descends",
        "slopes += [torch.where(step.compared, -risen,",
        "slopes += [torch.where(step.compared, risen,",
        method("marigold"),
    ),
    Mutation(
        "marigold: two points make twice the slope",
        "at = (at - upper(step.opposite, known)) / 2",
        "at = at - upper(step.opposite, known)",
        method("marigold"),
    ),
    Mutation(
        "marigold: a frozen method perturbs",
        'return 1.0 if self.training and self.options.mode != "exact" else 0.0',
        'return 1.0 if self.options.mode != "exact" else 0.0',
        ("balancers/test_marigold.py", "engine/test_phases.py", "balancers", "contract"),
    ),
    Mutation(
        "random numbers are not restored",
        "self._updates = int(state)",
        "pass",
        ("contract/test_every_balancer.py::test_resume_from_a_file_is_bit_identical", "balancers/test_rlw.py"),
    ),
    # --- the Trainer ---
    Mutation(
        "the warm-up is one step too long",
        "if step < self.args.balancer_warmup_steps:",
        "if step <= self.args.balancer_warmup_steps:",
        ("trainer/test_phases.py",),
    ),
    Mutation(
        "frozen one step late",
        'return "balancing" if last is None or step < last else "frozen"',
        'return "balancing" if last is None or step <= last else "frozen"',
        ("trainer/test_phases.py",),
    ),
    Mutation(
        "a resumed run begins with a fresh balancer",
        "        if not self._restored:\n            self.balancer.restart",
        "        if True:\n            self.balancer.restart",
        ("trainer/test_phases.py", *TRAINER),
    ),
    Mutation(
        "the pass that counts has other dropout masks",
        "            self._random_states[self.number].restore()\n",
        "            pass\n",
        ("trainer/test_window.py",),
    ),
    Mutation(
        "a dropped step leaves the balancer's state",
        "        self._balancer.rollback(self._before)\n",
        "",
        ("trainer/test_nonfinite.py", *TRAINER),
    ),
    Mutation(
        "a dropped step leaves the buffers",
        "        self._buffers.restore()",
        "        pass",
        ("trainer/test_nonfinite.py", *TRAINER),
    ),
    Mutation(
        "micro-batches count alike whatever their items",
        "fraction = everywhere.sum() / self.everywhere.sum().clamp(min=1)",
        "fraction = everywhere.new_ones(()) / len(self.local)",
        ("trainer/test_logs.py", "distributed/test_methods.py", "trainer/test_window.py"),
    ),
    Mutation(
        "a rank takes all ranks' share",
        "local = self.local[micro_batch] / totals",
        "local = self.everywhere[micro_batch] / totals",
        ("distributed/test_windows.py", "distributed/test_data_parallel.py"),
    ),
    Mutation(
        "logged losses are not weighted by their items",
        "torch.cat([losses * items, items,",
        "torch.cat([losses, items,",
        ("trainer/test_logs.py", *TRAINER),
    ),
    Mutation(
        "a dropped step is not counted",
        "self.dropped[task] = self.dropped.get(task, 0) + 1",
        "pass",
        ("trainer/test_nonfinite.py", *TRAINER),
    ),
    Mutation(
        "repeated examples count in the evaluation",
        "own = max(0, min(batch_size, remainder - rank * batch_size))",
        "own = min(batch_size, remainder)",
        ("distributed/test_item_counts.py", "trainer/test_evaluation.py"),
    ),
    Mutation(
        "evaluation losses are means of batch means",
        "here, batch.losses.detach().to(self._sums.dtype) * batch.num_items, torch",
        "here, batch.losses.detach().to(self._sums.dtype), torch",
        ("trainer/test_evaluation.py",),
    ),
    Mutation(
        "the router steps though the optimizer did not",
        "if self.accelerator.optimizer_step_was_skipped:",
        "if False:",
        ("trainer/test_grad_scaler.py", *TRAINER),
    ),
    Mutation(
        "a look counts in the evaluation",
        "            self._to_be_evaluated = False  # a second call for the same batch is a look\n",
        "",
        ("trainer/test_looks.py", "trainer/test_evaluation.py", *TRAINER),
    ),
    Mutation(
        "the second pass of a step is learned from",
        "        if step.calls != 1:\n",
        "        if False:\n",
        ("trainer/test_looks.py", *TRAINER),
    ),
    Mutation(
        "the batch's evaluation loss counts absent tasks",
        "return losses.sum() / present.sum().clamp(min=1)",
        "return losses.mean()",
        ("trainer/test_evaluation.py",),
    ),
    Mutation(
        "the learning rate falls every update",
        "update // (options.epochs * updates_per_epoch)",
        "update // updates_per_epoch",
        ("trainer/test_learning_rate.py", *TRAINER),
    ),
    Mutation(
        "labels of many entries count along the batch alone",
        "valid.sum(dim=(0, *range(2, valid.ndim)))",
        "valid.flatten(2).any(dim=2).sum(dim=0) if valid.ndim > 2 else valid.sum(dim=0)",
        ("trainer/test_item_counts.py", *TRAINER),
    ),
    Mutation(
        "the balancer is not told the epoch",
        "        self._trainer.balancer.on_epoch_begin(epoch)\n",
        "",
        ("trainer/test_history_methods.py", *TRAINER),
    ),
    Mutation(
        "the running log is not restored",
        "checkpointing.load_balancer(checkpoint, self.balancer, self._running_log)",
        "checkpointing.load_balancer(checkpoint, self.balancer)",
        ("checkpoints/test_kill_and_resume.py",),
    ),
    Mutation(
        "a trial step is not clipped",
        "before_step=clip, ",
        "",
        ("trainer/test_marigold.py", *TRAINER),
    ),
    Mutation(
        "a trial step takes fp16's scale for the gradient",
        "scale = 1.0 if scaler is None else scaler.get_scale()",
        "scale = 1.0",
        ("trainer/test_grad_scaler.py", "trainer/test_marigold.py"),
    ),
    Mutation(
        "a gradient that is not finite is stepped with",
        "if not all(map(math.isfinite, numbers)):",
        "if False:",
        ("trainer/test_nonfinite_gradient.py", *TRAINER),
    ),
    # --- between the parts ---
    Mutation(
        "a step stays begun",
        "        step.begun = False\n",
        "",
        ("trainer/test_callback_lists.py", *TRAINER),
    ),
    Mutation(
        "a rollback leaves what the step under way would teach",
        "        self._learns, self._kept, self._shown = False, None, []\n        self._epoch = int",
        "        self._kept, self._shown = None, []\n        self._epoch = int",
        ("engine/test_phases.py", "engine", "trainer/test_nonfinite.py", "balancers", "trainer"),
    ),
    Mutation(
        "a look at a loss changes what the step under way teaches",
        "self._counted, self._open, self._learns, self._shown = counted, is_open, learns, shown",
        "self._counted, self._open, self._shown = counted, is_open, shown",
        ("trainer/test_looks.py", "engine", "balancers", "trainer"),
    ),
    Mutation(
        "methods that look back see no batch",
        "self._begins = self.needs_model or compares or self._history is not None",
        "self._begins = False",
        ("balancers/test_dwa.py", "balancers"),
    ),
    Mutation(
        "nobody knows of the auxiliary loss",
        "has_auxiliary=whole.has_auxiliary,",
        "has_auxiliary=False,",
        ("trainer/test_logs.py", "trainer/test_losses.py", "trainer"),
    ),
    Mutation(
        "a short window is not filled up",
        "return [Filler() for _ in range(num_batches - len(batches))] + batches",
        "return batches",
        ("trainer/test_window.py", "trainer/test_streams.py", "trainer"),
    ),
    Mutation(
        "ranges are not looked at",
        "        if not bounds.hold(value):",
        "        if False:",
        ("config", "contract"),
    ),
    Mutation(
        "private names are not looked for",
        "    missing = missing_names(untested)\n",
        "    missing: list[str] = []\n",
        ("trainer/test_compat.py", "trainer"),
    ),
    Mutation(
        "the weighting forgets the ranks",
        "            ranks=whole.ranks,\n",
        "            ranks=1,\n",
        RANKS,
    ),
    Mutation(
        "every micro-batch has the first one's share",
        "step.window.share(max(step.number, 0))",
        "step.window.share(0)",
        ("trainer/test_window.py", *TRAINER),
    ),
    # --- the gradients of the tasks ---
    Mutation(
        "gradients: zero gradients hide what is reached",
        "probe = torch.full_like(loss, torch.nan)",
        "probe = torch.ones_like(loss)",
        GRADIENTS,
    ),
    Mutation(
        "gradients: two owners of an entry are none",
        "torch.where(other, SHARED, task)",
        "task",
        GRADIENTS,
    ),
    Mutation(
        "gradients: ranks do not agree on what is shared",
        "        if ranks > 1:\n            self._agree(group)\n",
        "",
        GRADIENT_RANKS,
    ),
    Mutation(
        "gradients: a look marks tasks as known",
        "        finally:\n            self.restore(before)\n",
        "        finally:\n            pass\n",
        (*GRADIENT_RANKS, *GRADIENTS),
    ),
    Mutation(
        "gradients: each rank has its own Jacobian",
        "        counts, *parts = all_reduce_sum(flat, group).split(sizes)",
        "        counts, *parts = flat.split(sizes)",
        GRADIENT_RANKS,
    ),
    Mutation(
        "gradients: a Gramian of features is one rank's",
        "            gramian, items = all_reduce_sum(torch.cat([gramian, items.to(gramian.device)]), group).split(",
        "            gramian, items = torch.cat([gramian, items.to(gramian.device)]).split(",
        GRADIENT_RANKS,
    ),
    Mutation(
        "gradients: micro-batches are not weighted by their items",
        "self.rows = self.rows.plus(rows.times(items))",
        "self.rows = self.rows.plus(rows)",
        GRADIENTS,
    ),
    Mutation(
        "gradients: the last micro-batch is the window",
        "self.rows = self.rows.plus(rows.times(items))",
        "self.rows = rows.times(items)",
        GRADIENTS,
    ),
    Mutation(
        "gradients: a part of the shared parameters stands for all",
        "        return self.options.shared_parameters is None or len",
        "        return True or len",
        GRADIENTS,
    ),
    Mutation(
        "gradients: heads descend the weighted sum whatever is asked",
        'heads = weighting.coefficients if self.options.heads == "weights" else self._plain(found, weighting)',
        "heads = weighting.coefficients",
        GRADIENTS,
    ),
    Mutation(
        "gradients: clipping is forgotten",
        "return (limit / (norm + 1e-6)).clamp(max=1.0).to(self.dtype)",
        "return torch.ones_like(norm).to(self.dtype)",
        GRADIENTS,
    ),
    Mutation(
        "gradients: held tasks have no gradients",
        "            if not all(host.present):\n",
        "            if False:\n",
        GRADIENTS,
    ),
    Mutation(
        "gradients: the weights are found in every step",
        'return self.phase != "warmup" and self._memory_of_gradients.steps % self.options.every_n_steps == 0',
        'return self.phase != "warmup"',
        GRADIENTS,
    ),
    Mutation(
        "gradients: the first sample is descended",
        "if share is None or share.number % 3 != 2:",
        "if share is None or share.number % 3 != 0:",
        GRADIENTS,
    ),
    Mutation(
        "gradients: the wrapper's copies of the features are looked at",
        "    return tensor if inner is None else GradientEdge(inner, number)",
        "    return tensor",
        GRADIENT_RANKS,
    ),
    Mutation(
        "gradients: slopes of the normalization are left out",
        "chosen = gramian * slopes * slopes[:, None]",
        "chosen = gramian",
        GRADIENTS,
    ),
    Mutation(
        "gradients: a frozen method keeps new weights",
        '        if self.phase == "balancing":\n            memory.remember(numbers, weights)',
        "        if True:\n            memory.remember(numbers, weights)",
        GRADIENTS,
    ),
    Mutation(
        "gradients: a direction is not shared out over micro-batches",
        "for factor in (clip, None if share is None else share.fraction):",
        "for factor in (clip,):",
        ("distributed/test_methods.py",),
    ),
    Mutation(
        "gradients: MoCo remembers the heads' gradients",
        "found.get(id(p), rows[0].new_zeros(1, 1)",
        "found.get(id(p), rows[0].new_ones(1, 1)",
        GRADIENTS,
    ),
)
