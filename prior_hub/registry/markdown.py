"""Pieces of Markdown that a model card is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["plain", "table", "table_rows"]


def plain(value: Any) -> str:
    """A value as one cell of a table: on one line, and never an HTML comment, which could be taken for one of ours."""
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        text = ", ".join(plain(item) for item in value)
    else:
        text = str(value)
    text = re.sub(r"(?<!\\)\|", r"\\|", text).replace("<!--", "&lt;!--")
    return " ".join(text.split())


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ("", "")) -> str:
    """A table; the cells are Markdown already, see `plain`."""

    def line(cells: Sequence[str]) -> str:
        return re.sub(r" +(?=\|)", " ", "| " + " | ".join(cells) + " |")

    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in rows)])


def table_rows(text: str) -> list[list[str]]:
    """The cells of every line that is a row of a table, header and rule left out."""
    rows = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return [row for row in cells[1:] if not all(re.fullmatch(":?-+:?", cell) for cell in row)]
