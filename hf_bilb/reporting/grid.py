"""A table: headings and rows of texts, with the best ones marked, as text, Markdown, HTML, LaTeX (booktabs) or CSV."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NEAR = "~"  # behind a value that is as good as the best one, as far as anybody can tell


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and whether it is the best of its kind or, as far as the seeds tell, as good."""

    text: str
    best: bool = False
    near: bool = False

    @property
    def mark(self) -> str:
        """What stands behind the text where nothing can be bold."""
        return "*" if self.best else NEAR if self.near else " "


@dataclass(frozen=True)
class Column:
    """A column: its heading, aligned to the left or to the right.

    Attributes:
        marked: in text, every cell has room for a mark behind it.
        marked_heading: the heading, too.
    """

    heading: str
    left: bool = False
    marked: bool = False
    marked_heading: bool = False


@dataclass(frozen=True)
class Grid:
    """`columns [C]`, `body [R][C]`, and `summary`, rows that stand below a rule of their own; `caption` may be empty.

    Each form ends with a line's end; what is not a table (notes, headings of a document) is the caller's.
    """

    columns: tuple[Column, ...]
    body: tuple[tuple[Cell, ...], ...]
    summary: tuple[tuple[Cell, ...], ...] = ()
    caption: str = ""

    @property
    def headings(self) -> list[str]:
        """The first line."""
        return [column.heading for column in self.columns]

    def to_text(self) -> str:
        """For a terminal: columns aligned, the best values with a `*`; without the caption."""
        head = [c.heading + (" " if c.marked_heading else "") for c in self.columns]
        rows = [
            [cell.text + (cell.mark if column.marked else "") for cell, column in zip(row, self.columns, strict=True)]
            for row in (*self.body, *self.summary)
        ]
        widths = [max(map(len, texts)) for texts in zip(head, *rows, strict=True)]
        title, *lines = ("  ".join(self._aligned(row, widths)) for row in (head, *rows))
        rule, end = "-" * len(title), len(self.body)
        lines = [line.rstrip() for line in lines]
        first = title.rstrip() if self.columns[-1].left else title
        below = [rule, *lines[end:]] if self.summary else []
        return "\n".join([first, rule, *lines[:end], *below]) + "\n"

    def _aligned(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            text.ljust(width) if column.left else text.rjust(width)
            for text, width, column in zip(row, widths, self.columns, strict=True)
        ]

    def to_markdown(self) -> str:
        """A Markdown table, the best values bold; without the caption."""
        rules = ["---" if column.left else "---:" for column in self.columns]
        rows = [[f"**{c.text}**" if c.best else c.text + c.mark.rstrip() for c in row] for row in self._rows]
        return "".join(f"{_markdown_row(row)}\n" for row in (self.headings, rules, *rows))

    def to_html(self) -> str:
        """A `table` element with the caption, the best values bold; every text is escaped."""
        classes = [' class="left"' if column.left else "" for column in self.columns]
        heads = "".join(
            f'<th scope="col"{kind}>{html_text(text)}</th>' for text, kind in zip(self.headings, classes, strict=True)
        )
        rows, end = [_html_row(row, classes) for row in self._rows], len(self.body)
        caption = f"<caption>{html_text(self.caption)}</caption>" if self.caption else ""
        foot = f"<tfoot>{''.join(rows[end:])}</tfoot>" if self.summary else ""
        return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{''.join(rows[:end])}</tbody>{foot}</table>\n"

    def to_latex(self) -> str:
        """A `table` environment for the package booktabs, with the caption; the best values bold."""
        rows = [[_latex_cell(cell) for cell in row] for row in self._rows]
        lines = [
            r"\begin{table}[t]", r"\centering", r"\small", rf"\caption{{{latex(self.caption)}.}}",
            rf"\begin{{tabular}}{{{''.join('l' if column.left else 'r' for column in self.columns)}}}", r"\toprule",
            " & ".join(map(latex, self.headings)) + r" \\", r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows), r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """Headings and texts, without marks and caption."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([self.headings, *([cell.text for cell in row] for row in self._rows)])
        return file.getvalue()

    @property
    def _rows(self) -> tuple[tuple[Cell, ...], ...]:
        return (*self.body, *self.summary)


def plain_grid(headings: Iterable[str], rows: Iterable[Sequence[str]], caption: str = "") -> Grid:
    """A table of texts without marks, aligned to the left."""
    columns = tuple(Column(heading, left=True) for heading in headings)
    return Grid(columns, tuple(tuple(map(Cell, row)) for row in rows), caption=caption)


# ---------------------------------------------------------------------------------------------------- numbers


def number(value: float | None) -> str:
    """Four significant digits without an exponent for everyday sizes: `0.4567`, `12.34`, `12340`; `-` for None."""
    if value is None:
        return "-"
    scientific = f"{value:.3e}"
    exponent = int(scientific.partition("e")[2])  # of the rounded number: 0.99996 is 1.000
    if not -4 <= exponent < 7:
        return scientific
    digits = 3 - exponent
    return f"{round(value, digits):.{max(digits, 0)}f}"


def exact(value: float | None) -> str:
    """All digits; empty for None."""
    return "" if value is None else repr(value)


# ---------------------------------------------------------------------------------------------------- signs


#: Characters that turn the direction of what stands behind them, too.
_TURNS = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\N{REPLACEMENT CHARACTER}")


def html_text(text: str) -> str:
    """`text` as HTML that shows it, in an element or an attribute in double quotes, and is never markup."""
    return html.escape(text.translate(_TURNS))


def _markdown_row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("~", "\\~") for text in texts) + " |"


def _html_row(row: Sequence[Cell], classes: Sequence[str]) -> str:
    """The first cell names the row."""
    first, *others = zip(row, classes, strict=True)
    name = f'<th scope="row"{first[1]}>{_html_cell(first[0])}</th>'
    return f"<tr>{name}{''.join(f'<td{kind}>{_html_cell(cell)}</td>' for cell, kind in others)}</tr>"


def _html_cell(cell: Cell) -> str:
    text = html_text(cell.text)
    return f"<strong>{text}</strong>" if cell.best else text + cell.mark.rstrip()


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"$\sim$", "^": r"\textasciicircum{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "Δm": r"$\Delta_m$", "Delta_m": r"$\Delta_m$",
}  # fmt: skip


def latex(text: str) -> str:
    """`text` with what LaTeX takes for commands escaped, and the signs of the tables as mathematics."""
    result, at = [], 0
    while at < len(text):
        key = next(key for key in ("Delta_m", "Δm", text[at]) if text.startswith(key, at))
        result.append(_LATEX.get(key, key))
        at += len(key)
    return "".join(result)


def _latex_cell(cell: Cell) -> str:
    text = latex(cell.text)
    return rf"\textbf{{{text}}}" if cell.best else text + (r"$^{\sim}$" if cell.near else "")
