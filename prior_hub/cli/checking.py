"""`prior-hub check`: is this prior whole, and what will a reader miss?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prior_hub.cli.common import (
    add_command,
    json_argument,
    printable,
    prior_argument,
)

if TYPE_CHECKING:
    from prior_hub.model import PriorModel
    from prior_hub.priors.config import PriorConfig
    from prior_hub.priors.diagnosis import Diagnosis
    from prior_hub.registry.audit import Finding

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
        "1 and one sentence on what is wrong and what to do; notes on what a reader will miss (licence, base model, data set). "
        "--strict is for publishers: that, the card, the files beside the prior and the repository's tags must be in order.",
        "examples:\n  prior-hub check ./my_prior\n  prior-hub check org/name --json",
    )
    prior_argument(check)
    check.add_argument("--strict", action="store_true", help="exit code 1 where anything a reader needs is missing or doubtful")
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
    if arguments.strict:
        return _report(arguments, prior, *_audit(arguments, prior, diagnosis, [str(item.message) for item in caught]))
    remarks = [str(item.message) for item in caught] + _remarks(prior.config) + [*diagnosis.remarks, *diagnosis.notes]
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
                    "diagnosis": {
                        key: value for key, value in dataclasses.asdict(diagnosis).items() if key not in ("remarks", "notes")
                    },
                    "remarks": remarks,
                }
            )
        )
    else:
        print(f"{arguments.prior}: {prior!r}: {finite}; largest precision {'at most ' if bounded else ''}{stiffest:.3g}")
        print("\n".join(f"  {line}" for line in str(dataclasses.replace(diagnosis, remarks=(), notes=())).splitlines()))
        for remark in remarks:
            print(f"  note: {printable(remark)}")
    return 0


def _audit(
    arguments: argparse.Namespace, prior: PriorModel, diagnosis: Diagnosis, warned: list[str]
) -> tuple[list[Finding], list[str]]:
    """(what to put right, what is worth knowing)."""
    from prior_hub.registry import audit

    found, notes = audit.audit_config(prior.config), list(diagnosis.notes)
    found += audit.audit_values(prior.gaussian, diagnosis, prior.config.variance_floor)
    found += [audit.Finding(warning.rstrip("."), "save the prior again with this version of prior_hub") for warning in warned]
    if prior.repo_id is None:
        folder = Path(arguments.prior).expanduser() / (arguments.subfolder or "").strip("/")
        text, problem = audit.local_card(folder)
        found += audit.audit_files([path.name for path in folder.iterdir()], prior.config, folder=folder)
    else:
        state, problem = audit.hub_state(prior.repo_id, str(prior.commit_hash), subfolder=arguments.subfolder)
        text = state.card
        found += audit.audit_files(state.files, prior.config)
        of_hub, of_the_hub = audit.audit_hub(state)
        found += of_hub
        notes += of_the_hub
    return [*found, *audit.audit_card(text, prior.config, problem=problem)], notes


def _report(arguments: argparse.Namespace, prior: PriorModel, found: list[Finding], notes: list[str]) -> int:
    if arguments.json:
        result = {
            "ok": not found,
            "prior": arguments.prior,
            "commit": prior.commit_hash,
            "findings": [dataclasses.asdict(finding) for finding in found],
            "notes": notes,
        }
        print(json.dumps(result))
    else:
        things = f"{len(found)} thing{'s'[: len(found) != 1]} to put right" if found else "ready to be published"
        print(f"{arguments.prior}: {prior!r}: whole; {things}")
        print("".join(f"  {printable(str(finding))}\n" for finding in found), end="")
        print("".join(f"  note: {note}\n" for note in notes), end="")
    return 1 if found else 0


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
