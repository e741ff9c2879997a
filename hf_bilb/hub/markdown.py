"""Texts of a user's in Markdown: shown as they are, never markup."""

from __future__ import annotations

import re

from hf_bilb.errors import one_line

#: Entities, and no backslashes: a table escapes its own signs by backslashes, and two of them are none.
_SIGNS = {ord(sign): f"&#{ord(sign)};" for sign in "\\`*[]<>&|~$#!{}"}
_LONGEST = 200
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside a word it is no markup
_ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")


def plain(text: object, longest: int = _LONGEST) -> str:
    """A text as one line of Markdown that shows it, in a paragraph or in a cell of a table."""
    escaped = one_line(text, longest).translate(_SIGNS)
    return _UNDERSCORE.sub("&#95;", escaped)


def code(text: object) -> str:
    """A name in Markdown as code, in a paragraph or in a cell of a table."""
    shown = one_line(text, _LONGEST)
    return f"`{shown}`" if not set(shown) & set("`|~") else plain(shown)


def fenced(text: str, language: str = "") -> str:
    """A block of code, whatever stands in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def with_arxiv_links(text: str) -> str:
    """`plain(text)` with a link at each number of arXiv, which the Hub makes a tag of."""
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", plain(text, 600))
