"""`prior-hub check`: is this prior whole, and what will a reader miss?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from typing import TYPE_CHECKING, Any

from prior_hub.cli.common import (
    add_command,
    json_argument,
    prior_argument,
)

if TYPE_CHECKING:
    from prior_hub.priors.config import PriorConfig

__all__ = ["add_commands"]

_MOST_ITERATED = 100_000_000  # values; Lanczos' iteration holds three vectors of them and reads the prior some 40 times


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    check = add_command(
        commands,
        "check",
        _check,
        "check a prior's files, names, shapes and values, and say what is wrong",
        "Reads everything: format, hashes, shapes, types, NaN, positive variances, and the factor of the covariance. Exit code "
        "1 and one sentence on what is wrong and what to do; notes on what a reader will miss (licence, base model, data set).",
        "examples:\n  prior-hub check ./my_prior\n  prior-hub check org/name --json",
    )
    prior_argument(check)
    json_argument(check)


def _check(arguments: argparse.Namespace) -> int:
    from prior_hub.model import PriorModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = PriorModel.from_pretrained(arguments.prior, revision=arguments.revision, subfolder=arguments.subfolder)
        diagnosis = prior.diagnose()
        if bounded := prior.num_parameters > _MOST_ITERATED:
            smallest = diagnosis.variance_range[0]  # Sigma >= A, so that no precision is above 1 / (the smallest entry of A)
            stiffest = 1 / (prior.scale * prior.gaussian.diagonal_weight * smallest + prior.gaussian.eps)
        else:
            stiffest = prior.gaussian.largest_precision()
    remarks = [str(item.message) for item in caught] + _remarks(prior.config) + list(diagnosis.remarks)
    finite = "hashes, names, shapes, types and values are right"
    if arguments.json:
        print(
            json.dumps(
                {
                    "ok": True,
                    "prior": arguments.prior,
                    "commit": prior.commit_hash,
                    "largest_precision": stiffest,
                    "largest_precision_is_a_bound": bounded,
                    "diagnosis": {key: value for key, value in dataclasses.asdict(diagnosis).items() if key != "remarks"},
                    "remarks": remarks,
                }
            )
        )
    else:
        print(f"{arguments.prior}: {prior!r}: {finite}; largest precision {'at most ' if bounded else ''}{stiffest:.3g}")
        print("\n".join(f"  {line}" for line in str(dataclasses.replace(diagnosis, remarks=())).splitlines()))
        for remark in remarks:
            print(f"  note: {remark}")
    return 0


def _remarks(config: PriorConfig) -> list[str]:
    """What a reader of this prior will miss; nothing here makes it unusable."""
    notes = []
    for name, value in (
        ("license", config.license),
        ("base_model", config.base_model),
        ("source data set", config.source.get("dataset")),
    ):
        if not value:
            notes.append(f"no {name} is recorded")
    if config.num_snapshots is not None and config.num_snapshots < 10:
        notes.append(f"it was taken over {config.num_snapshots} snapshots only")
    return notes
