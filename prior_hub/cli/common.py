"""What the commands share: arguments, how figures are written, and where a prior's configuration comes from."""

from __future__ import annotations

import argparse
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prior_hub.priors.config import PriorConfig

__all__ = [
    "add_command",
    "as_size",
    "as_text",
    "covariance",
    "json_argument",
    "non_negative",
    "positive",
    "print_rows",
    "print_table",
    "printable",
    "prior_argument",
    "read_config_of",
]


def add_command(commands: Any, name: str, run: Any, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser for one command; `epilog` begins with "examples:"."""
    width = min(shutil.get_terminal_size().columns, 100)

    def formatter(prog: str) -> argparse.HelpFormatter:
        return _Formatter(prog, width=width)

    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=formatter
    )
    parser.set_defaults(run=run)
    return parser


class _Formatter(argparse.HelpFormatter):
    """Wraps the description, leaves the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def prior_argument(parser: argparse.ArgumentParser) -> None:
    """The prior: a name on the Hub with its revision and sub-folder, or a folder."""
    parser.add_argument("prior", help="organisation/name on the Hub, or a folder (a folder of that name wins)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    parser.add_argument("--subfolder", metavar="FOLDER", help="folder of the repository the prior lies in")


def json_argument(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, errors too")


def positive(text: str) -> int:
    """An integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def non_negative(text: str) -> int:
    """An integer, 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


def read_config_of(arguments: argparse.Namespace) -> tuple[PriorConfig, str, str | None]:
    """(configuration, where it is from, its commit) of `prior_argument`; no weights are downloaded."""
    from prior_hub.priors.storage import read_config
    from prior_hub.registry.download import download_config

    path = Path(arguments.prior).expanduser()
    if path.is_dir():
        folder = path / arguments.subfolder if arguments.subfolder else path
        return read_config(folder), str(folder), None
    config, commit = download_config(arguments.prior, revision=arguments.revision, subfolder=arguments.subfolder)
    return config, arguments.prior, commit


def covariance(config: PriorConfig) -> str:
    """The formula of Sigma with its numbers."""
    low_rank = f" + {config.low_rank_weight:g} D^T D" if config.rank else ""
    eps = f" + {config.eps:g} I" if config.eps else ""
    return f"Sigma = scale ({config.diagonal_weight:g} diag(variance){low_rank}){eps}"


def as_size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def as_text(value: Any) -> str:
    """A value in a line of text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(as_text(item) for item in value)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """A text without what a terminal obeys: control characters and marks of direction are written as escapes.

    What a prior says of itself is a stranger's text, and may hold sequences that move the cursor or turn a line around.
    """
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co") else ascii(char)[1:-1]
        for char in text
    )


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    rows = list(rows)
    width = max(len(key) for key, _ in rows)
    print("\n".join(f"{printable(key):<{width}}  {printable(value)}" for key, value in rows))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns, each as wide as its widest cell."""
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print("\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines))
