"""Commands that look at a prior: `info`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from prior_hub.cli.common import (
    BYTES,
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

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    info = add_command(
        commands,
        "info",
        _info,
        "show what a prior is: base model, source task, rank, scale, size",
        "Reads the configuration only; no weights are downloaded.",
        "examples:\n  prior-hub info org/resnet50-simclr-prior\n  prior-hub info ./my_prior --json",
    )
    prior_argument(info)
    json_argument(info)


def _info(arguments: argparse.Namespace) -> int:
    config, where, commit = read_config_of(arguments)
    if arguments.json:
        print(json.dumps({"ok": True, "prior": where, "commit": commit, "config": json.loads(config.to_json())}, indent=2))
        return 0
    show_info(config, where, commit)
    return 0


def show_info(config: PriorConfig, where: str, commit: str | None) -> None:
    """Print what a prior is, from its configuration."""
    source = ", ".join(f"{key.replace('_', ' ')} {as_text(value)}" for key, value in config.source.items())
    estimator = ", ".join(f"{key.replace('_', ' ')} {as_text(value)}" for key, value in config.estimator.items())
    base = config.base_model or "not recorded"
    stored = sum(
        config.num_parameters * copies * BYTES[config.dtype[kind]]
        for kind, copies in (("mean", 1), ("variance", 1), ("deviations", config.rank))
    )
    rows = [
        ("prior", where + (f" @ {commit[:8]}" if commit else "")),
        ("base model", f"{base}{f' @ {config.base_model_revision[:8]}' if config.base_model_revision else ''}"),
        ("model type", config.model_type or "not recorded"),
        ("source task", source or "not recorded"),
        ("estimator", estimator or "not recorded"),
        ("parameters", f"{len(config.parameters)} tensors, {config.num_parameters:,} values"),
        ("head (left out)", ", ".join(config.head_parameters) or "none"),
        ("rank K", str(config.rank)),
        ("covariance", covariance(config)),
        ("scale", f"{config.scale:g}"),
        ("variance floor", f"{config.variance_floor:g}"),
        ("snapshots", "not recorded" if config.num_snapshots is None else str(config.num_snapshots)),
        ("weights", f"{as_size(stored)} in {len(config.weight_files)} file{'s' if len(config.weight_files) != 1 else ''}"),
        ("licence", config.license or "not recorded"),
        ("format", f"{config.format_version}, written by prior_hub {config.prior_hub_version or '?'}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in config.libraries.items()) or "not recorded"),
    ]
    print_rows(rows)
