"""The registered balancers as a table, and one of them in full: text, Markdown, JSON. Plain values, no torch."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_bilb.reporting.grid import plain_grid

_HEADER = ("name", "paper", "cost", "extra memory", "state", "options")
_WIDTHS = (11, 33, 26, 14, 28)  # of the columns in a terminal; options stand below them, with the whole width
_NARROWEST = sum(_WIDTHS) + 2 * (len(_WIDTHS) - 1)
_GAP = "  "

LOSS_TITLE = "Loss balancers: coefficients from the losses alone, one backward pass or few."
GRADIENT_TITLE = "Gradient methods: coefficients, or a direction, from the gradients of the K tasks, K backward passes."

LEGEND = (
    "cost: passes of the model in an update of one batch, F forward and B backward. `balance_over: window` adds one F "
    "for each micro-batch.",
    "extra memory: in addition to one step's graph and gradients; d is the number of trainable parameters.",
    "state: with the default options, K tasks; an optimizer keeps two more numbers for each trained one (Adam).",
)

GRADIENT_LEGEND = (
    "gradient methods: K backward passes to the shared parameters, of which there are d (what `moco` remembers is of "
    "all trainable ones). With `gradients: features` K passes through the heads, one through the rest, no K d numbers; "
    "with `every_n_steps: n` 1F + 1B in the steps between; with `balance_over: window` 1F + KB more for each "
    "micro-batch.",
)
_OF_A_MODEL = "once a model is bound, shared_parameters.known [K] and shared_parameters.owners [trainable parameters]"


@dataclass(frozen=True)
class OptionEntry:
    """An option: its default as in a recipe (`required` without one), what it accepts, what it means."""

    name: str
    default: str
    accepts: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.name}: {self.default}"


@dataclass(frozen=True)
class CostEntry:
    """What an update costs: `passes` such as `2F + 1B`, extra `memory`, `when` empty or the options it is for."""

    passes: str
    memory: str
    when: str


@dataclass(frozen=True)
class BalancerEntry:
    """A registered method.

    Attributes:
        name, paper: as registered.
        family: `loss`, or `gradient` for one that looks at the gradients of the tasks.
        costs: one for each choice of options that changes them.
        state: `logits [K] (trained)`, ...; empty without any, None where the method cannot be built without options.
        options: its own, those of its family, and the common ones whose default it changes.
        presets: name -> options.
        equation: the docstring of its module.
        summary: the docstring of its class.
        source: the class, and the file that it is in.
    """

    name: str
    family: Literal["loss", "gradient"]
    paper: str
    costs: tuple[CostEntry, ...]
    state: tuple[str, ...] | None
    options: tuple[OptionEntry, ...]
    presets: Mapping[str, Mapping[str, Any]]
    equation: str
    summary: str
    source: str

    @property
    def state_lines(self) -> tuple[str, ...]:
        """`state`, in words where there is none."""
        return ("depends on its options",) if self.state is None else self.state or ("none",)


@dataclass(frozen=True)
class Catalogue:
    """All methods, and the options and the state that every one of them, or every gradient method, has."""

    balancers: tuple[BalancerEntry, ...]
    common_options: tuple[OptionEntry, ...]
    common_state: tuple[str, ...]
    gradient_options: tuple[OptionEntry, ...]
    gradient_state: tuple[str, ...]

    @property
    def families(self) -> list[tuple[str, list[BalancerEntry]]]:
        """Title and methods of each family that there is."""
        titles = {"loss": LOSS_TITLE, "gradient": GRADIENT_TITLE}
        found = [(title, [e for e in self.balancers if e.family == family]) for family, title in titles.items()]
        return [(title, entries) for title, entries in found if entries]

    def own_options(self, entry: BalancerEntry) -> list[OptionEntry]:
        """What stands in the method's row: its options without those that it has as every method of its family."""
        return [option for option in entry.options if option not in self.gradient_options]

    def family_options(self, entry: BalancerEntry) -> list[OptionEntry]:
        """The options that it has as every method of its family."""
        return [option for option in entry.options if option in self.gradient_options]

    @property
    def gradient_state_line(self) -> str:
        """`gradient_state` and what a bound model adds to it."""
        return f"{', '.join(self.gradient_state)}; {_OF_A_MODEL}"


# ---------------------------------------------------------------------------------------------------- the table


def render_table_text(catalogue: Catalogue, width: int = _NARROWEST) -> str:
    """The table for a terminal, by family, the options of all at the end; narrower than 120 columns its lines are
    broken."""
    width = max(width, _NARROWEST)
    lines: list[str] = []
    for title, entries in catalogue.families:
        lines += [title, "", *_side_by_side([[title] for title in _HEADER[:-1]]), "-" * width]
        for entry in entries:
            lines += _table_lines(entry, catalogue, width)
    lines += _wrapped([*LEGEND, *GRADIENT_LEGEND], width)
    lines += ["", "Options that every gradient method has:", *_option_lines(catalogue.gradient_options, width)]
    lines += ["", "Options that every balancer has:", *_option_lines(catalogue.common_options, width)]
    lines += ["", *_wrapped(_state_notes(catalogue), width)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _table_lines(entry: BalancerEntry, catalogue: Catalogue, width: int) -> list[str]:
    costs: list[str] = []
    memories: list[str] = []
    for cost in entry.costs:
        of_cost = _wrapped([cost.passes, *([f"  {cost.when}"] if cost.when else [])], _WIDTHS[2])
        of_memory = _wrapped([cost.memory], _WIDTHS[3])
        height = max(len(of_cost), len(of_memory))
        costs += of_cost + [""] * (height - len(of_cost))
        memories += of_memory + [""] * (height - len(of_memory))
    lines = _side_by_side([[entry.name], [entry.paper], costs, memories, entry.state_lines])
    own = catalogue.own_options(entry)
    options = ", ".join(f"{option.name}={option.default}" for option in own) or "none of its own"
    return [*lines, *_wrapped([f"{' ' * (_WIDTHS[0] + len(_GAP))}options: {options}"], width), ""]


def _state_notes(catalogue: Catalogue) -> list[str]:
    return [
        f"State that every balancer has: {', '.join(catalogue.common_state)}.",
        f"State that every gradient method has, too: {catalogue.gradient_state_line}.",
    ]


def render_table_markdown(catalogue: Catalogue) -> str:
    """The same as Markdown tables."""
    parts = [
        f"{title}\n\n{plain_grid(_HEADER, [_markdown_cells(entry, catalogue) for entry in entries]).to_markdown()}"
        for title, entries in catalogue.families
    ]
    notes = "".join(f"* {note}\n" for note in [*LEGEND, *GRADIENT_LEGEND, *_state_notes(catalogue)])
    options = [
        f"Options that every gradient method has:\n\n{_options_markdown(catalogue.gradient_options)}",
        f"Options that every balancer has:\n\n{_options_markdown(catalogue.common_options)}",
    ]
    return "\n".join([*parts, notes, *options])


def _markdown_cells(entry: BalancerEntry, catalogue: Catalogue) -> list[str]:
    """A method's line of the table, in the order of the headings."""
    costs = [f"{cost.passes} with `{cost.when}`" if cost.when else cost.passes for cost in entry.costs]
    memories = _once([cost.memory for cost in entry.costs])
    options = [f"`{option}`" for option in catalogue.own_options(entry)] or ["none of its own"]
    return [
        "<br>".join(cell) for cell in ([f"`{entry.name}`"], [entry.paper], costs, memories, entry.state_lines, options)
    ]


def render_table_json(catalogue: Catalogue) -> str:
    """Everything, as `Catalogue` has it."""
    return json.dumps(dataclasses.asdict(catalogue), indent=2, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------------------------------------------- one in full


def render_one_text(entry: BalancerEntry, catalogue: Catalogue, width: int = 120) -> str:
    """One method in full for a terminal."""
    costs = [
        f"  {cost.passes}, extra memory: {cost.memory}{f', with {cost.when}' if cost.when else ''}"
        for cost in entry.costs
    ]
    lines = [f"{entry.name}: {entry.paper}", "", entry.equation, "", f"{entry.source}:", "", entry.summary, ""]
    lines += ["Cost of an update:", *costs, "", "State:", *(f"  {line}" for line in entry.state_lines)]
    if entry.family == "gradient":
        lines += _wrapped([f"  as every gradient method: {catalogue.gradient_state_line}"], width)
    lines += ["", "Options:", *(_option_lines(catalogue.own_options(entry), width) or ["  none of its own"]), ""]
    if entry.presets:
        lines += [
            "Presets:",
            *_wrapped([f"  {name}: {_inline(preset)}" for name, preset in entry.presets.items()], width),
        ]
        lines += [""]
    if of_family := catalogue.family_options(entry):
        lines += ["Options that every gradient method has:", *_option_lines(of_family, width), ""]
    lines += ["Options that every balancer has:", *_option_lines(_others(entry, catalogue), width), ""]
    lines += _wrapped(_legend(entry), width)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def render_one_markdown(entry: BalancerEntry, catalogue: Catalogue) -> str:
    """The same as Markdown."""
    costs = [[cost.passes, cost.memory, f"`{cost.when}`" if cost.when else "always"] for cost in entry.costs]
    presets = [[f"`{name}`", f"`{_inline(preset)}`"] for name, preset in entry.presets.items()]
    source = f"{entry.source[0].upper()}{entry.source[1:]}"
    own, of_family = catalogue.own_options(entry), catalogue.family_options(entry)
    of_all = f"; as every gradient method: {catalogue.gradient_state_line}" if entry.family == "gradient" else ""
    parts = [
        f"# {entry.name}\n",
        f"{entry.paper}. {source}.\n",
        f"```text\n{entry.equation}\n```\n",
        f"{entry.summary}\n",
        plain_grid(["cost", "extra memory", "when"], costs).to_markdown(),
        f"State: {', '.join(entry.state_lines)}{of_all}.\n",
        *([_options_markdown(own)] if own else []),
        *([plain_grid(["preset", "options"], presets).to_markdown()] if presets else []),
        *(["Options that every gradient method has:\n", _options_markdown(of_family)] if of_family else []),
        "Options that every balancer has:\n",
        _options_markdown(_others(entry, catalogue)),
        "".join(f"* {line}\n" for line in _legend(entry)),
    ]
    return "\n".join(parts)


def render_one_json(entry: BalancerEntry, catalogue: Catalogue) -> str:
    """One method as `BalancerEntry` has it, with the common options and state."""
    return render_table_json(dataclasses.replace(catalogue, balancers=(entry,)))


# ---------------------------------------------------------------------------------------------------- small things


def flow(value: Any) -> str:
    """A plain value as it stands in a recipe, on one line: `null`, `true`, `[0.2, 0.8]`, `{edge_fraction: 0.4}`."""
    if isinstance(value, Mapping):
        return f"{{{_inline(value)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(flow, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _legend(entry: BalancerEntry) -> tuple[str, ...]:
    return (*LEGEND, *GRADIENT_LEGEND) if entry.family == "gradient" else LEGEND


def _others(entry: BalancerEntry, catalogue: Catalogue) -> list[OptionEntry]:
    """The common options whose default is not the method's own."""
    own = {option.name for option in entry.options}
    return [option for option in catalogue.common_options if option.name not in own]


def _once(items: Sequence[str]) -> Sequence[str]:
    """`items`, or one of them where all are the same."""
    return items if len(set(items)) > 1 else items[:1]


def _inline(mapping: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {flow(value)}" for key, value in mapping.items())


def _wrapped(items: Sequence[str], width: int) -> list[str]:
    """Each item on lines of its own, those after its first indented."""
    lines = []
    for item in items:
        indent = " " * (len(item) - len(item.lstrip()) + 2)
        lines += textwrap.wrap(item, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return lines


def _side_by_side(cells: Sequence[Sequence[str]]) -> list[str]:
    columns = [_wrapped(cell, width) for cell, width in zip(cells, _WIDTHS, strict=True)]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    rows = zip(*padded, strict=True)
    return [_GAP.join(text.ljust(w) for text, w in zip(row, _WIDTHS, strict=True)) for row in rows]


def _option_lines(options: Sequence[OptionEntry], width: int) -> list[str]:
    lines = []
    for option in options:
        lines += _wrapped([f"  {option} ({option.accepts})"], width)
        lines += textwrap.wrap(option.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _options_markdown(options: Sequence[OptionEntry]) -> str:
    rows = [[f"`{option.name}`", f"`{option.default}`", option.accepts, option.meaning] for option in options]
    return plain_grid(["option", "default", "accepts", "meaning"], rows).to_markdown()
