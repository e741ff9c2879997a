"""The model card: what a repository of the Hub says of itself, as Markdown with a head of YAML.

Whoever has a model fills in `CardFacts`; what it does not know is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_bilb.hub.markdown import code, fenced, plain, with_arxiv_links
from hf_bilb.reporting.grid import number, plain_grid
from hf_bilb.reporting.results import MetricResult

CARD_FILE = "README.md"
LIBRARY = "hf_bilb"
#: A card without this line was written by somebody else, and stays.
MARKER = (
    "<!-- Written by hf-bilb. Delete this line to keep what you change: hf-bilb push then leaves the card alone. -->"
)
#: Cards of programs, which nobody wrote: of peft, and of Trainer.
_TEMPLATES = (
    "# Model Card for Model ID",
    "This model card has been generated automatically according to the information",
)


@dataclass(frozen=True)
class CardTask:
    """A task: its type, such as `classification`, and what more there is to say (classes, unit)."""

    name: str
    type: str = ""
    about: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: of the model.
        balancer: of the run, its name in recipes.
        tasks: in the order of the model's outputs.
        metrics: of each task, the trivial predictor's next to them.
        measured_on: part of the data, `test`.
        trivial_predictor: its name.
        data: name of the data set.
        data_files: names of its files, without their folders.
        hub_data: its name on the Hub; None: it is from somewhere else.
        rows: part of the data -> number of rows.
        paper, equation: of the balancer.
        balance: quantity (`weight`, `coefficient`) -> task -> its last value.
        balance_when: what the values are of, as the end of a sentence.
        training: what (`Time per step`) and how much.
        versions: of Python and the libraries.
        images: file in the repository and what it shows.
        snippet: Python code that loads the model.
        without_package: the same for the network alone, by transformers; empty where it cannot.
        recipe: the recipe as YAML.
        pipeline_tag: the Hub's word for what the model does; None: it has none that fits.
        base_model: the model on the Hub that this one was made from.
        adapters: only adapters and heads are in the repository.
        license: the Hub's word for it.
        tags: further tags.
        language: of the texts, the Hub's words.
    """

    name: str
    balancer: str
    tasks: tuple[CardTask, ...]
    metrics: tuple[MetricResult, ...] = ()
    measured_on: str = ""
    trivial_predictor: str = ""
    data: str = ""
    data_files: tuple[str, ...] = ()
    hub_data: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    paper: str = ""
    equation: str = ""
    balance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    balance_when: str = ""
    training: Sequence[tuple[str, str]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    images: Sequence[tuple[str, str]] = ()
    snippet: str = ""
    without_package: str = ""
    recipe: str = ""
    pipeline_tag: str | None = None
    base_model: str | None = None
    adapters: bool = False
    license: str | None = None
    tags: tuple[str, ...] = ()
    language: tuple[str, ...] = ()


def card_text(facts: CardFacts) -> str:
    """The card, head included."""
    parts = [f"---\n{card_head(facts)}---", MARKER, f"# {plain(facts.name)}", _summary(facts)]
    for heading, body in (
        ("How to use it", _use(facts)),
        ("Tasks", _tasks(facts)),
        ("Results", _results(facts)),
        ("Data", _data(facts)),
        ("How the tasks were balanced", _balance(facts)),
        ("Training", _training(facts)),
    ):
        if body:
            parts += [f"## {heading}", body]
    return "\n\n".join(parts) + "\n"


def is_written_by_hand(card: str) -> bool:
    """Whether somebody has made this card his own."""
    return MARKER not in card and not any(words in card for words in _TEMPLATES)


# ---------------------------------------------------------------------------------------------------- head


def card_head(facts: CardFacts) -> str:
    """The metadata as YAML, in the form that the Hub reads."""
    from huggingface_hub import ModelCardData

    tags = ["multi-task-learning", "loss-balancing", facts.balancer, *(["lora"] if facts.adapters else []), *facts.tags]
    relation = None if facts.base_model is None else "adapter" if facts.adapters else "finetune"
    data = ModelCardData(
        language=list(facts.language) or None,
        license=facts.license,
        library_name=LIBRARY,
        pipeline_tag=facts.pipeline_tag,
        tags=list(dict.fromkeys(tags)),
        base_model=facts.base_model,
        base_model_relation=relation,
        datasets=None if facts.hub_data is None else [facts.hub_data],
        model_name=one_name(facts.name),
        eval_results=_eval_results(facts) or None,
    )
    return f"{data.to_yaml()}\n"


def one_name(name: str) -> str:
    """A name on one line, never empty."""
    return " ".join(name.split()) or "model"


def _eval_results(facts: CardFacts) -> list[Any]:
    from huggingface_hub import EvalResult

    data = facts.data or "unknown"
    return [
        EvalResult(
            task_type=facts.pipeline_tag or "other",
            dataset_type=facts.hub_data or data,
            dataset_name=data,
            dataset_split=facts.measured_on or None,
            metric_type=metric.name.lower().replace(" ", "_") or metric.key,
            metric_name=" ".join(filter(None, (metric.task, metric.name, f"({metric.unit})" if metric.unit else ""))),
            metric_value=metric.value,
        )
        for metric in facts.metrics
        if metric.value is not None
    ]


# ---------------------------------------------------------------------------------------------------- body


def _summary(facts: CardFacts) -> str:
    count = "one task" if len(facts.tasks) == 1 else f"{len(facts.tasks)} tasks"
    said = f"One model for {count}, trained with `{LIBRARY}`; the tasks' losses were balanced by "
    base = f" It was made from [{plain(facts.base_model)}](https://huggingface.co/{facts.base_model})." * bool(
        facts.base_model
    )
    kind = " The repository holds adapters and heads; the base model is loaded with them." * facts.adapters
    return f"{said}{code(facts.balancer)}.{base}{kind}"


def _use(facts: CardFacts) -> str:
    parts = [fenced(facts.snippet, "python")] if facts.snippet else []
    if facts.without_package:
        peft = ", and `peft`," * facts.adapters
        code = "" if "trust_remote_code" not in facts.without_package else " with the code in this repository"
        parts += [
            f"Without `{LIBRARY}` installed, `transformers`{peft} loads the network{code}. It takes the tensors of a "
            "batch and gives `logits`; `hf_bilb.json` says how rows become inputs, and what the outputs mean.",
            fenced(facts.without_package, "python"),
        ]
    return "\n\n".join(parts)


def _tasks(facts: CardFacts) -> str:
    if not any(task.type or task.about for task in facts.tasks):
        return ", ".join(plain(task.name) for task in facts.tasks)
    rows = [[plain(task.name), task.type.replace("_", " "), plain(task.about)] for task in facts.tasks]
    return plain_grid(("task", "type", "outputs"), rows).to_markdown().rstrip()


def _results(facts: CardFacts) -> str:
    if not facts.metrics:
        return ""
    compared = any(metric.trivial is not None for metric in facts.metrics)
    heads = ["task", "metric", "this model"]
    heads += [plain(facts.trivial_predictor), "better than that"] if compared else []
    rows = [_result(metric, compared) for metric in facts.metrics]
    on = f"Measured on the {plain(facts.measured_on)} part" if facts.measured_on else "Measured"
    size = facts.rows.get(facts.measured_on)
    on += f" ({size:,} rows)" if size is not None else ""
    trivial = (
        f" The {plain(facts.trivial_predictor)} sees no input: it is what a model has to beat." if compared else ""
    )
    directed = any(_arrow(metric) for metric in facts.metrics)
    arrows = " ↑: higher is better, ↓: lower is better." if directed else ""
    return f"{on}.{arrows}{trivial}\n\n{plain_grid(heads, rows).to_markdown().rstrip()}"


def _result(metric: MetricResult, compared: bool) -> list[str]:
    unit = f" ({metric.unit})" if metric.unit else ""
    row = [plain(metric.task or "all tasks"), plain(f"{metric.name}{unit}") + _arrow(metric), number(metric.value)]
    if not compared:
        return row
    verdict = "-" if metric.trivial is None else "yes" if metric.beats_trivial else "**no**"
    return [*row, number(metric.trivial), verdict]


def _arrow(metric: MetricResult) -> str:
    # Nobody has told of a metric of a user's own which way up it is; it comes without a trivial predictor, too.
    return "" if metric.trivial is None else " ↑" if metric.higher_is_better else " ↓"


def _data(facts: CardFacts) -> str:
    if not facts.data and not facts.rows:
        return ""
    where = f"[{plain(facts.hub_data)}](https://huggingface.co/datasets/{facts.hub_data})" if facts.hub_data else ""
    name = f"{code(facts.data)}" if facts.data else ""
    files = f"files {', '.join(code(name) for name in facts.data_files)}" if facts.data_files else ""
    first = ", ".join(filter(None, (name, where, files)))
    lines = [f"{first}." if first else ""]
    if facts.rows:
        lines.append(
            plain_grid(("part", "rows"), [[plain(k), f"{n:,}"] for k, n in facts.rows.items()]).to_markdown().rstrip()
        )
    return "\n\n".join(filter(None, lines))


def _balance(facts: CardFacts) -> str:
    lines = [f"{code(facts.balancer)}: {with_arxiv_links(facts.paper)}." if facts.paper else code(facts.balancer)]
    if facts.equation:
        lines.append(fenced(_formulas(facts.equation), "text"))
    if facts.balance:
        names = list(facts.balance)
        rows = [
            [plain(task.name), *(number(facts.balance[name].get(task.name)) for name in names)] for task in facts.tasks
        ]
        meaning = {
            "weight": "weight (what the method has learned)",
            "coefficient": "coefficient (what the task's loss is multiplied with)",
        }
        when = f"Values {facts.balance_when}:" if facts.balance_when else "Last values:"
        lines += [when, plain_grid(["task", *(meaning.get(n, n) for n in names)], rows).to_markdown().rstrip()]
    lines += [f"![{caption}]({file})" for file, caption in facts.images]
    return "\n\n".join(lines)


def _formulas(text: str) -> str:
    """The first paragraph of a method's description, and those that are indented: its equations and symbols."""
    first, *others = text.split("\n\n")
    return "\n\n".join([first, *(part for part in others if part.startswith("    "))])


def _training(facts: CardFacts) -> str:
    return "\n\n".join(_training_parts(facts))


def _training_parts(facts: CardFacts) -> Iterator[str]:
    if facts.training:
        yield plain_grid(("", ""), [[what, plain(value)] for what, value in facts.training]).to_markdown().rstrip()
    if facts.versions:
        yield f"Versions: {', '.join(f'{plain(name)} {plain(v)}' for name, v in facts.versions.items())}."
    if facts.recipe:
        yield f"<details>\n<summary>The recipe</summary>\n\n{fenced(facts.recipe, 'yaml')}\n\n</details>"
