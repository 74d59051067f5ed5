"""Commands that move priors: `pull`, `push`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from prior_hub.cli.common import (
    add_command,
    as_text,
    json_argument,
    non_negative,
    prior_argument,
)

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    pull = add_command(
        commands,
        "pull",
        _pull,
        "download a prior and check it",
        "Downloads into the Hub client's cache (or takes the cached copy), compares every file with its sha256 and every value "
        "with what a prior may hold. With --output also writes a copy.",
        "examples:\n  prior-hub pull org/resnet50-simclr-prior\n  prior-hub pull org/name --revision v1.0 --output ./prior",
    )
    prior_argument(pull)
    pull.add_argument("--output", type=Path, metavar="FOLDER", help="also write the prior here")
    pull.add_argument("--rank", type=non_negative, metavar="K", help="keep only the K most recent deviations")
    pull.add_argument("--cache-dir", metavar="FOLDER", help="cache to use instead of HF_HOME's")
    pull.add_argument("--force-download", action="store_true", help="download again even if cached")
    json_argument(pull)

    push = add_command(
        commands,
        "push",
        _push,
        "publish a prior's folder on the Hub, card included, in one commit",
        "The folder is checked first; nothing is sent if it is not a whole prior. A card that is already in the repository "
        "keeps what a person wrote in it. Log in with `hf auth login`, or set HF_TOKEN.",
        "examples:\n  prior-hub push ./my_prior me/my-prior\n  prior-hub push ./my_prior org/name --tag v1.0\n"
        "  prior-hub push ./my_prior org/name --create-pr",
    )
    push.add_argument("folder", type=Path, help="folder that save_pretrained wrote")
    push.add_argument("repo_id", help="organisation/name, or a name under your own account")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    push.add_argument("--subfolder", metavar="FOLDER", help="folder of the repository, beside a model for example")
    push.add_argument(
        "--private", action="store_true", help="make a new repository private; refused if it exists and is public"
    )
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--tag", metavar="TAG", help="tag the commit, for example v1.0")
    push.add_argument("--message", metavar="TEXT", help="commit message")
    json_argument(push)


def _pull(arguments: argparse.Namespace) -> int:
    from prior_hub.model import PriorModel

    prior = PriorModel.from_pretrained(
        arguments.prior,
        revision=arguments.revision,
        subfolder=arguments.subfolder,
        cache_dir=arguments.cache_dir,
        force_download=arguments.force_download,
        rank=arguments.rank,
    )
    if arguments.output is not None:
        prior.save_pretrained(arguments.output, repo_id=arguments.prior if prior.repo_id else None)
    result = {"ok": True, "prior": arguments.prior, "commit": prior.commit_hash, "folder": as_text(arguments.output)}
    if arguments.json:
        print(json.dumps(result))
    else:
        place = f"written to {arguments.output}" if arguments.output else "in the local cache"
        print(f"{prior!r}, checked, {place}" + (f" (commit {prior.commit_hash[:8]})" if prior.commit_hash else ""))
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from prior_hub.model import push_prior_to_hub

    result = push_prior_to_hub(
        arguments.folder,
        arguments.repo_id,
        revision=arguments.revision,
        subfolder=arguments.subfolder,
        private=True if arguments.private else None,
        create_pr=arguments.create_pr,
        commit_message=arguments.message,
        tag=arguments.tag,
    )
    if arguments.json:
        print(json.dumps({"ok": True, **dataclasses.asdict(result)}))
    else:
        print(f"pushed to {result.pull_request_url or result.commit_url}" + (f", tagged {result.tag}" if result.tag else ""))
    return 0
