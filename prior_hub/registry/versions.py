"""The list of versions in a prior's card: one row for each push that changed the prior, newest first.

The card is part of the commit it describes, so that its row cannot name it: an untagged row says "newest" until the next push
asks the Hub which commit it was. Rows that are there are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prior_hub.priors.config import PriorConfig
from prior_hub.registry.markdown import plain, table, table_rows

__all__ = ["Version", "new_versions", "read_versions", "version_of", "versions_table"]

UNNAMED = "newest"
_HEADER = ("version", "date", "rank", "scale", "source", "what changed")


@dataclass(frozen=True)
class Version:
    """One row; every field is a cell of Markdown. version: a tag, or the first eight digits of a commit."""

    version: str
    date: str
    rank: str
    scale: str
    source: str
    change: str


def read_versions(part: str) -> list[Version]:
    """The rows of the card's section of versions; lines of another form are left out."""
    return [Version(*row) for row in table_rows(part) if len(row) == len(_HEADER)]


def versions_table(versions: Sequence[Version]) -> str:
    """The rows as a table."""
    return table([[v.version, v.date, v.rank, v.scale, v.source, v.change] for v in versions], _HEADER)


def version_of(config: PriorConfig, *, version: str, date: str, change: str) -> Version:
    """The row of a prior. Its source: the data set and the estimator."""
    source = [config.source.get("dataset"), config.estimator.get("name")]
    told = ", ".join(plain(value) for value in source if value)
    return Version(plain(version), date, str(config.rank), f"{config.scale:g}", told, plain(change))


def new_versions(
    rows: Sequence[Version],
    config: PriorConfig,
    previous: PriorConfig | None,
    *,
    last: tuple[str, str] | None,
    date: str,
    tag: str | None,
    message: str | None,
) -> list[Version]:
    """The rows after a push.

    Args:
        rows: those of the card that is there.
        config: the prior that is pushed.
        previous: the prior that is there, if there is one.
        last: (commit, date) of the prior that is there.
        date: of this push, as 2026-01-31.
        tag: its tag, if it gets one.
        message: what changed, in a person's words; told from the configurations when None.
    """
    rows = list(rows)
    if previous is not None and not rows and last is not None:  # published before cards had this list
        rows = [version_of(previous, version=last[0][:8], date=last[1], change="")]
    if previous == config and rows:
        if tag and rows[0].version == UNNAMED:
            rows[0] = replace(rows[0], version=plain(tag))
        elif tag and all(row.version != plain(tag) for row in rows):
            rows = [version_of(config, version=tag, date=date, change=message or "the same prior"), *_named(rows, last)]
        return rows
    row = version_of(config, version=tag or UNNAMED, date=date, change=message or _change(config, previous))
    return [row, *_named(rows, last)]


def _named(rows: Sequence[Version], last: tuple[str, str] | None) -> list[Version]:
    return [replace(row, version=last[0][:8]) if last is not None and row.version == UNNAMED else row for row in rows]


def _change(config: PriorConfig, previous: PriorConfig | None) -> str:
    if previous is None:
        return "first version"
    changes = [
        f"{name.replace('_', ' ')} {before:g} -> {after:g}"
        for name in ("rank", "scale", "eps", "diagonal_weight", "low_rank_weight")
        if (before := getattr(previous, name)) != (after := getattr(config, name))
    ]
    told = ("base_model", "license", "source", "estimator")
    changes += [f"the {name.replace('_', ' ')}" for name in told if getattr(previous, name) != getattr(config, name)]
    if previous.weight_files != config.weight_files and previous.rank == config.rank:
        changes.insert(0, "new weights")
    return ", ".join(changes) or "the description"
