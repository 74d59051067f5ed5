"""`prior-hub`: learn, look at, fetch, publish, check and import priors from the command line.

Exit codes: 0 done; 1 the prior, the Hub or the disk said no (the message says what and what to do); 2 the command was not
understood; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from prior_hub import __version__
from prior_hub.cli import checking, find, importing, look, make, share
from prior_hub.cli.common import printable
from prior_hub.errors import PriorHubError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser("--json" in given).parse_args(given)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            return int(arguments.run(arguments))
    except (PriorHubError, OSError, ValueError) as error:
        if getattr(arguments, "json", False):
            _print_error(type(error).__name__, str(error))
        else:
            print(f"prior-hub: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if getattr(arguments, "json", False):
            _print_error("KeyboardInterrupt", "interrupted")
        print("prior-hub: interrupted", file=sys.stderr)
        return 130


def _print_error(kind: str, message: str) -> None:
    print(json.dumps({"ok": False, "error": kind, "message": message}))


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    print(f"prior-hub: {category.__name__}: {printable(str(message))}", file=sys.stderr)


def _parser(as_json: bool = False) -> argparse.ArgumentParser:
    """The parser of everything; `as_json`: what was not understood is told as JSON too."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            if as_json:
                _print_error("UsageError", f"{self.prog}: {message}")
            super().error(message)

    parser = Parser(
        prog="prior-hub",
        description="Pre-trained priors: what a source task knows about a model's weights, as a penalty for fine-tuning. "
        "Learn one, look at it, fetch it, publish it.",
        epilog="first steps: `prior-hub demo` shows the whole idea on real data in a few minutes, without network or account. "
        "In Python: PriorModel.from_pretrained('org/name') and PriorTrainer in place of Trainer.",
    )
    parser.add_argument("--version", action="version", version=f"prior-hub {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (make, find, look, share, checking, importing):
        module.add_commands(commands)
    return parser
