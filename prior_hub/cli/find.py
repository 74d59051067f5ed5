"""Commands that find priors on the Hub: `list`, `search`, `fits`. No weights are ever downloaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prior_hub.cli.common import (
    add_command,
    as_size,
    json_argument,
    non_negative,
    positive,
    print_table,
)

if TYPE_CHECKING:
    from prior_hub.registry.search import PriorInfo

__all__ = ["add_commands"]

_WIDEST = 44  # characters of a cell
_ANYWHERE = "`prior-hub search WORD` looks in names, base models, tasks and data sets"
_OWN = "`prior-hub learn` makes one"


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    found = add_command(
        commands,
        "list",
        _list,
        "list the priors on the Hub, filtered",
        "All filters given must hold; what a prior's card does not say does not pass a filter. Private priors are listed to "
        "those who may see them (`hf auth login`, HF_TOKEN).",
        "examples:\n  prior-hub list --base-model microsoft/resnet-50 --min-rank 5\n"
        "  prior-hub list --estimator swag --task 'image classification' --sort downloads\n"
        "  prior-hub list --author org --json",
    )
    found.add_argument("--base-model", metavar="MODEL", help="Hub name of the model the prior is over")
    found.add_argument("--author", metavar="NAME", help="user or organisation")
    found.add_argument("--estimator", metavar="NAME", help="how it was learned: swag, fisher, isotropic, ...")
    found.add_argument("--task", metavar="WORDS", help="words of the source task's objective")
    found.add_argument("--dataset", metavar="NAME", help="a source data set, with or without its owner")
    found.add_argument("--license", metavar="ID", help="Hub licence identifier")
    found.add_argument("--min-rank", type=non_negative, metavar="K", help="least number of deviations")
    found.add_argument("--search", metavar="TEXT", help="part of the repository's name")
    orders = ("downloads", "likes", "last_modified", "created_at", "trending_score")
    found.add_argument("--sort", choices=orders, help="largest first (default: the Hub's order)")
    _limit(found)
    json_argument(found)

    search = add_command(
        commands,
        "search",
        _search,
        "search the priors on the Hub by words",
        "Every word must be in the prior's name, base model, estimator, task, data sets or tags; case and punctuation do not "
        "matter (resnet50 finds microsoft/resnet-50). Best matches first.",
        "examples:\n  prior-hub search resnet50 simclr\n  prior-hub search cifar10 swag --limit 5 --json",
    )
    search.add_argument("query", nargs="+", metavar="WORD", help="words, in any order")
    _limit(search)
    json_argument(search)

    fits = add_command(
        commands,
        "fits",
        _fits,
        "which published priors fit a model",
        "The model is made from its configuration, without weights. Priors with the same names and shapes come first (one "
        "request finds them, however many priors there are), then others over the same base model; where nothing fits exactly, "
        "or with --all, the configurations of other priors are read too.",
        "examples:\n  prior-hub fits resnet18\n  prior-hub fits torchvision:resnet50 --limit 3 --json\n"
        "  prior-hub fits ./my_model --all",
    )
    fits.add_argument(
        "model",
        help="Hub name or local folder of a transformers or timm model, or timm:NAME, torchvision:NAME",
    )
    fits.add_argument(
        "--min-coverage", type=float, default=0.5, metavar="SHARE", help="of a prior that must have a place (0.5)"
    )
    fits.add_argument("--revision", metavar="REV", help="branch, tag or commit of the model on the Hub")
    fits.add_argument("--all", action="store_true", help="read the configurations of all other priors too")
    _limit(fits)
    json_argument(fits)


def _limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=positive, default=20, metavar="N", help="at most this many (20)")


def _list(arguments: argparse.Namespace) -> int:
    from prior_hub.registry.search import list_priors

    names = ("base_model", "author", "estimator", "task", "dataset", "license", "min_rank", "search")
    filters = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    found = list(list_priors(**filters, sort=arguments.sort, limit=arguments.limit))
    said = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in filters.items())
    fewer = f"Leave out a filter ({said}); {_ANYWHERE}." if filters else f"The Hub has none that you may see: {_OWN}."
    return _show(found, arguments, fewer)


def _search(arguments: argparse.Namespace) -> int:
    from prior_hub.registry.search import search_priors

    found = search_priors(" ".join(arguments.query), limit=arguments.limit)
    return _show(found, arguments, "Every word must be found: try fewer or shorter ones, or `prior-hub list`.")


def _show(found: Sequence[PriorInfo], arguments: argparse.Namespace, advice: str) -> int:
    if arguments.json:
        print(json.dumps({"ok": True, "priors": [info.to_dict() for info in found]}, indent=2))
    elif not found:
        print(f"no prior found. {advice}")
    else:
        print_table(_HEADER, [_row(info) for info in found])
        if len(found) == arguments.limit:
            print(f"(the first {arguments.limit}; --limit N shows more)")
    return 0


def _fits(arguments: argparse.Namespace) -> int:
    from prior_hub.learning.references import named_model
    from prior_hub.registry.search import priors_for

    model = named_model(arguments.model, revision=arguments.revision)
    found = priors_for(
        model, limit=arguments.limit, min_coverage=arguments.min_coverage, others=True if arguments.all else None
    )
    if arguments.json:
        fits = [fit.to_dict() for fit in found]
        print(json.dumps({"ok": True, "model": arguments.model, "fits": fits}, indent=2))
    elif not found:
        less = f" --min-coverage below {arguments.min_coverage:g} shows what fits in part;" if arguments.min_coverage else ""
        print(f"no prior found that fits {arguments.model}:{less} `prior-hub list` shows all, {_OWN}.")
    else:
        rows = [
            (*_row(fit.info)[:2], *_row(fit.info)[4:6], "exact" if fit.exact else "in part", f"{fit.coverage:.0%}", fit.why)
            for fit in found
        ]
        print_table(("PRIOR", "BASE MODEL", "RANK", "SIZE", "FIT", "COVERED", "WHY"), rows)
    return 0


_HEADER = ("PRIOR", "BASE MODEL", "ESTIMATOR", "TASK", "RANK", "SIZE", "LICENCE", "DOWNLOADS", "UPDATED")


def _row(info: PriorInfo) -> tuple[str, ...]:
    place = f"{info.repo_id}/{info.subfolder}" if info.subfolder else info.repo_id
    marks = [mark for mark, true in (("private", info.private), ("gated", bool(info.gated))) if true]
    return (
        place + (f" ({', '.join(marks)})" if marks else ""),
        _cell(info.base_model),
        _cell(info.estimator),
        _cell(info.task),
        _cell(info.rank),
        "-" if info.stored_bytes is None else as_size(info.stored_bytes),
        _cell(info.license),
        _cell(info.downloads),
        "-" if info.last_modified is None else f"{info.last_modified:%Y-%m-%d}",
    )


def _cell(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
