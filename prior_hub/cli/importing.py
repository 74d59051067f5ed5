"""`prior-hub import`: other people's prior files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from prior_hub.cli.common import (
    add_command,
    as_text,
    covariance,
    json_argument,
    non_negative,
    print_rows,
)
from prior_hub.cli.share import allow_incomplete_argument, publish

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    _import_arguments(commands)


def _import(arguments: argparse.Namespace) -> int:
    import torch

    from prior_hub.learning.references import reference_model
    from prior_hub.model import PriorModel
    from prior_hub.registry.completeness import check_complete, missing_metadata

    single = {kind: getattr(arguments, kind) for kind in ("mean", "variance", "covmat", "model") if getattr(arguments, kind)}
    if bool(single) == bool(arguments.files):
        raise ValueError(
            "name the files once: a folder, prefix, checkpoint or Hub repository, or --mean, --variance and so on."
        )
    if arguments.push_to and not arguments.allow_incomplete:
        known = {"license": arguments.license, "base_model": arguments.base_model, "dataset": arguments.dataset}
        check_complete(missing_metadata(**known, estimator=None))
    source = {"objective": arguments.objective, "dataset": arguments.dataset}
    with warnings.catch_warnings(record=arguments.json) as caught:  # as JSON they are part of the answer
        if arguments.json:
            warnings.simplefilter("always")
        prior = PriorModel.from_legacy(
            single or arguments.files,
            convention=arguments.convention,
            reference=reference_model(arguments.reference) if arguments.reference else None,
            head=tuple(name for name in arguments.head if name != "none") if arguments.head else "auto",
            rank=arguments.rank,
            scale=arguments.scale,
            eps=arguments.eps,
            covmat=arguments.form,
            recentre=arguments.recentre,
            variance_floor=arguments.variance_floor,
            deviations_dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            trust_order=arguments.trust_order,
            revision=arguments.revision,
            base_model=arguments.base_model,
            license=arguments.license,
            source={key: value for key, value in source.items() if value},
        )
        prior.save_pretrained(arguments.output, repo_id=arguments.push_to)
    pushed = None
    if arguments.push_to:
        private = True if arguments.private else None
        pushed = publish(arguments.output, arguments.push_to, private=private, allow_incomplete=arguments.allow_incomplete)
    config = prior.config
    if arguments.json:
        answer = {
            "ok": True,
            "folder": str(arguments.output),
            "config": json.loads(config.to_json()),
            "warnings": [str(item.message) for item in caught or ()],
            "pushed": None if pushed is None else dataclasses.asdict(pushed),
        }
        print(json.dumps(answer, indent=2))
        return 0
    rows = [("prior", f"{prior!r}"), ("covariance", covariance(config)), ("scale", f"{config.scale:g}")]
    rows += [(key.replace("_", " "), as_text(value)) for key, value in config.estimator.items() if key not in ("name", "files")]
    rows += [
        ("head (never binds by itself)", ", ".join(config.head_parameters) or "none"),
        ("BatchNorm statistics", f"{len(config.buffers)} buffers" if config.buffers else "none"),
        ("snapshots", "not known" if config.num_snapshots is None else str(config.num_snapshots)),
        *((f"sha256 of {name}", digest) for name, digest in config.estimator["files"].items()),
        ("written to", str(arguments.output)),
        *([("pushed to", pushed.commit_url)] if pushed else []),
    ]
    print_rows(rows)
    return 0


def _import_arguments(commands: Any) -> None:
    command = add_command(
        commands,
        "import",
        _import,
        "turn other people's prior files (*.pt) into a prior",
        "Reads the four files of 'Pre-Train Your Loss' (NAME_mean.pt, NAME_variance.pt, NAME_covmat.pt, NAME_model.pt), or a "
        "checkpoint of swa_gaussian, and writes a prior with its card. Files are read as tensors only, never unpickled. Works "
        "out the names of the parameters, whether the covmat is divided by sqrt(K-1) already, and whether all snapshots are "
        "there; prints and records what it decided, and refuses what does not fit together. Conventions: swag, the Gaussian of "
        "every other prior here (v/2 + D^T D/(2(k-1)), newest rows, re-centred on the final mean where that is possible); "
        "paper, s v + e and s^2 Q^T Q; paper-unscaled, s v + e and Q^T Q; tufts, s v/2 + e and s Q^T Q/(2(k-1)); tufts-elbo, "
        "s (v/2 + e) and s Q^T Q/(2(k-1)). The last four are what published code makes of the first k rows.",
        "examples:\n  prior-hub import ./resnet50_ssl_prior --output my_prior\n"
        "  prior-hub import ./resnet50_ssl_prior --convention paper --reference torchvision:resnet50 --output my_prior\n"
        "  prior-hub import ./swag-100.pt --dtype bfloat16 --output my_prior --push-to me/my-prior --license mit "
        "--base-model org/model --dataset org/data\n"
        "  prior-hub import --mean m.pt --variance v.pt --rank 0 --reference torchvision:resnet50 --output my_prior",
    )
    add = command.add_argument
    add("files", nargs="?", help="folder of the files, the beginning of their names, a checkpoint, or a Hub repository's name")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where to write the prior")
    for kind in ("mean", "variance", "covmat", "model"):
        add(f"--{kind}", type=Path, metavar="FILE", help=f"the {kind} file, where the names do not follow the pattern")
    add(
        "--convention",
        choices=("swag", "paper", "paper-unscaled", "tufts", "tufts-elbo"),
        default="swag",
        help="which Gaussian to make of the files (default: %(default)s)",
    )
    add(
        "--reference",
        metavar="LIBRARY:NAME",
        help="architecture that names the parameters: torchvision:resnet50, timm:resnet50 or transformers:ORG/NAME (default: "
        "the model file's names)",
    )
    add(
        "--head", action="append", metavar="MODULE", help="the source task's head, such as fc; none for no head (default: told)"
    )
    add("--rank", type=non_negative, metavar="K", help="rows to use (default: all for swag, else 5)")
    add("--scale", type=float, metavar="S", help="s (default: 1 for swag, else 1e10)")
    add("--eps", type=float, metavar="E", help="e (default: 0 for swag, else 0.1)")
    add("--covmat-form", dest="form", choices=("auto", "raw", "divided"), default="auto", help="whether the rows are divided")
    add(
        "--recentre",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="deviations from the final mean, where all snapshots are there (default: for swag)",
    )
    add("--variance-floor", type=float, metavar="V", help="raise variances to it")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="storage of the deviations (default: as in the file)")
    add("--trust-order", action="store_true", help="do not compare the mean with the model file")
    add("--base-model", metavar="NAME", help="Hub name of the model the prior is over, for the card")
    add("--objective", metavar="TEXT", help="the source task, for the card")
    add("--dataset", metavar="NAME", help="its data set, for the card")
    add("--license", metavar="ID", help="the prior's licence, for the card")
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub repository to import from")
    add("--push-to", metavar="REPO", help="also publish it on the Hub; needs --license, --base-model and --dataset")
    allow_incomplete_argument(command)
    add("--private", action="store_true", help="make the new repository private")
    json_argument(command)
