"""Commands that look at a prior: `info`, `plot`, `diff`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prior_hub.cli.common import (
    add_command,
    as_size,
    as_text,
    covariance,
    json_argument,
    print_rows,
    prior_argument,
    read_config_of,
)

if TYPE_CHECKING:
    from prior_hub.priors.config import PriorConfig

__all__ = ["add_commands", "show_info"]

_WIDEST = 120


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    info = add_command(
        commands,
        "info",
        _info,
        "show what a prior is: base model, source task, rank, size, scale convention, provenance, and whether it fits a model",
        "Reads the configuration only; no weights are downloaded. With --model also says which parameters of that model are "
        "under the prior; it is built from its configuration, without weights. Exit code 1 if the prior does not fit it.",
        "examples:\n  prior-hub info org/resnet50-simclr-prior\n  prior-hub info ./my_prior --json\n"
        "  prior-hub info org/name --model microsoft/resnet-50",
    )
    prior_argument(info)
    info.add_argument(
        "--model", metavar="MODEL", help="a model on the Hub, a folder with its config.json, or timm's name of an architecture"
    )
    info.add_argument("--model-revision", metavar="REV", help="branch, tag or commit of the model")
    json_argument(info)

    plot = add_command(
        commands,
        "plot",
        _plot,
        "draw a prior: how far each weight may move, in which directions, and where in the network",
        "Writes one picture with three panels, or the one that --what names: the standard deviation of the weights by "
        "parameter tensor (variance), the share of the low-rank variance by direction (spectrum), and by block of the network "
        "the standard deviation in relation to the size of the weights (freedom). Needs pip install 'prior-hub[plots]'.",
        "examples:\n  prior-hub plot org/name --output prior.png\n"
        "  prior-hub plot ./my_prior --what freedom --output freedom.svg\n"
        "  prior-hub plot ./my_prior --scale 100 --output wide.png --json",
    )
    prior_argument(plot)
    plot.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write: .png, .svg or .pdf")
    plot.add_argument("--what", choices=("all", "variance", "spectrum", "freedom"), default="all", help="default: %(default)s")
    plot.add_argument("--scale", type=float, metavar="X", help="draw the prior at this scale instead of its own")
    json_argument(plot)

    diff = add_command(
        commands,
        "diff",
        _diff,
        "compare two priors of the same network: settings, means, directions, variances, divergence",
        "Names are matched as with a model, so that the priors may carry other prefixes; exit code 1 if they are not of the "
        "same network. Prints the settings that differ, the squared distance of the means in units of either prior, the "
        "Kullback-Leibler divergence in both directions in nats, the principal angles between the low-rank parts, and the "
        "ratio of the variances by block of the network. Exact; reads both priors twice, piece by piece.",
        "examples:\n  prior-hub diff ./my_prior org/resnet50-simclr-prior\n  prior-hub diff org/name org/name --revision v1.0\n"
        "  prior-hub diff ./my_prior org/name --scale 1 --json",
    )
    diff.add_argument("a", metavar="A", help="organisation/name on the Hub, or a folder (a folder of that name wins)")
    diff.add_argument("b", metavar="B", help="the other one")
    diff.add_argument("--revision", metavar="REV", help="branch, tag or commit of A (default: main)")
    diff.add_argument("--other-revision", metavar="REV", help="the same of B")
    diff.add_argument("--subfolder", metavar="FOLDER", help="folder of the repository that A lies in")
    diff.add_argument("--other-subfolder", metavar="FOLDER", help="the same of B")
    diff.add_argument("--scale", type=float, metavar="X", help="compare both at this scale instead of each at its own")
    json_argument(diff)


# --------------------------------------------------------------------------------------------------------------- info


def _info(arguments: argparse.Namespace) -> int:
    from prior_hub.priors.conventions import scale_convention

    config, where, commit = read_config_of(arguments)
    match = None if arguments.model is None else _match(config, arguments.model, arguments.model_revision)
    if arguments.json:
        result = {
            "ok": match is None or match["fits"],
            "prior": where,
            "commit": commit,
            "size": _size(config),
            "covariance": covariance(config),
            "convention": dataclasses.asdict(scale_convention(config)),
            "config": json.loads(config.to_json()),
        }
        print(json.dumps(result | ({} if match is None else {"match": match}), indent=2))
    else:
        show_info(config, where, commit, match)
    return 0 if match is None or match["fits"] else 1


def _match(config: PriorConfig, model: str, revision: str | None) -> dict[str, Any]:
    """Whether a prior fits a model, neither's weights being read; what `Match` says, or why it does not."""
    from prior_hub.errors import PriorMatchError
    from prior_hub.learning.references import named_model
    from prior_hub.model import PriorModel
    from prior_hub.priors.gaussian import LowRankGaussian

    target = named_model(model, revision=revision)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is remarked is in the report too
            match = PriorModel(LowRankGaussian({}, {}), config).match(target)
    except PriorMatchError as error:
        return {"model": model, "fits": False, "report": str(error)}
    facts = {key: value for key, value in vars(match).items() if key not in ("name_map", "flattened")}
    return {"model": model, "class": type(target).__name__, "fits": True, "report": match.report(), **facts}


def _size(config: PriorConfig) -> dict[str, Any]:
    """Bytes of the numbers, as they are stored; headers of files and BatchNorm statistics, a few kB, are not in the shapes."""
    total = sum(config.stored_bytes.values())
    return {"download_bytes": total, "memory_bytes": total, "files": len(config.weight_files), **config.stored_bytes}


def show_info(config: PriorConfig, where: str, commit: str | None, match: Mapping[str, Any] | None = None) -> None:
    """Print what a prior is, from its configuration, and how it fits a model where that was asked for."""
    from prior_hub.priors.conventions import scale_convention

    convention, size = scale_convention(config), _size(config)
    base = config.base_model or "not recorded"
    kinds = ", ".join(f"{kind} {as_size(size[kind])} ({config.dtype[kind]})" for kind in ("mean", "variance", "deviations"))
    files = f"{len(config.weight_files)} file{'s' if len(config.weight_files) != 1 else ''}"
    estimator = {key: value for key, value in config.estimator.items() if key != "name"}
    head = ", ".join(config.head_parameters[:6]) + (
        f", ... ({len(config.head_parameters)})" * (len(config.head_parameters) > 6)
    )
    rows = [
        ("prior", where + (f" @ {commit[:8]}" if commit else "")),
        ("base model", f"{base}{f' @ {config.base_model_revision[:8]}' if config.base_model_revision else ''}"),
        ("model type", config.model_type or "not recorded"),
        ("source task", _listed(config.source) or "not recorded"),
        ("parameters", f"{len(config.parameters)} tensors, {config.num_parameters:,} values"),
        ("head (left out)", head or "none"),
        ("rank K", str(config.rank)),
        ("size", f"{as_size(size['download_bytes'])} to download in {files}, as much in memory: {kinds}"),
        ("scale", f"{config.scale:g}"),
        ("scale convention", f"{convention.name}: {convention.words}"),
        ("", convention.formula),
        ("covariance", covariance(config)),
        ("variance floor", f"{config.variance_floor:g}"),
        ("estimator", as_text(config.estimator.get("name")) or "not recorded"),
        *([("", _listed(estimator))] if estimator else []),
        ("snapshots", "not recorded" if config.num_snapshots is None else str(config.num_snapshots)),
        ("licence", config.license or "not recorded"),
        ("format", f"{config.format_version}, written by prior_hub {config.prior_hub_version or '?'}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in config.libraries.items()) or "not recorded"),
    ]
    if match is not None:
        rows.append(("match", f"{match['model']}: {'' if match['fits'] else 'does not fit: '}{match['report']}"))
    width = max(len(key) for key, _ in rows) + 2
    wrapped = textwrap.TextWrapper(
        width=max(60, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns) - width),
        break_long_words=False,
        break_on_hyphens=False,
    )
    print_rows(
        (key if i == 0 else "", line) for key, value in rows for i, line in enumerate(wrapped.wrap(value) if value else [""])
    )


def _listed(values: Mapping[str, Any]) -> str:
    """Names and values in a line of text, also of what is nested."""

    def said(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"({_listed(value)})"
        return f"({as_text(value)})" if isinstance(value, (list, tuple)) and len(value) > 1 else as_text(value)

    return ", ".join(f"{str(key).replace('_', ' ')} {said(value)}" for key, value in values.items())


# ------------------------------------------------------------------------------------------------------ plot and diff


def _plot(arguments: argparse.Namespace) -> int:
    from prior_hub.model import PriorModel

    try:
        from prior_hub.plots import check_picture, plot_prior
        from prior_hub.priors.profile import profile

        check_picture(arguments.output)  # before a prior is downloaded
        place = {"revision": arguments.revision, "subfolder": arguments.subfolder}
        prior = PriorModel.from_pretrained(arguments.prior, scale=arguments.scale, **place)
        found = profile(prior.gaussian, title=arguments.prior) if arguments.json else None
        plot_prior(prior, arguments.output, what=arguments.what, found=found)
    except ImportError as error:
        raise ValueError(str(error)) from error
    if found is not None:
        drawn = {
            "scale": prior.scale,
            "low_rank_share": found.low_rank_share,
            "effective_rank": found.effective_rank,
            "spectrum": list(found.spectrum),
            "tensors": [dataclasses.asdict(tensor) for tensor in found.tensors],
            "blocks": [dataclasses.asdict(block) | {"freedom": block.freedom} for block in found.blocks()],
        }
        result = {"ok": True, "prior": arguments.prior, "commit": prior.commit_hash, "file": str(arguments.output)}
        print(json.dumps(result | {"what": arguments.what, **drawn}))
    else:
        print(f"{prior!r}, drawn in {arguments.output}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from prior_hub.model import PriorModel
    from prior_hub.priors.comparison import compare_priors

    a = PriorModel.from_pretrained(arguments.a, revision=arguments.revision, subfolder=arguments.subfolder)
    b = PriorModel.from_pretrained(arguments.b, revision=arguments.other_revision, subfolder=arguments.other_subfolder)
    found = compare_priors(a, b, scale=arguments.scale)
    if arguments.json:
        commits = {"commit_a": a.commit_hash, "commit_b": b.commit_hash}
        print(json.dumps({"ok": True, "a": arguments.a, "b": arguments.b, **commits, "comparison": found.to_dict()}))
        return 0
    for label, name, prior in (("A", arguments.a, a), ("B", arguments.b, b)):
        print(f"{label}: {name}{f' @ {prior.commit_hash[:8]}' if prior.commit_hash else ''}")
    print(found)
    return 0
