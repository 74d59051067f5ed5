"""Commands that move priors: `pull`, `push`, and the `card` that goes with them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prior_hub.cli.common import (
    add_command,
    as_size,
    as_text,
    json_argument,
    non_negative,
    print_table,
    printable,
    prior_argument,
)

if TYPE_CHECKING:
    from prior_hub.registry.upload import PushPlan, PushResult

__all__ = ["add_commands", "allow_incomplete_argument", "publish"]


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
        "publish a prior's folder on the Hub, card and pictures included, in one commit",
        "The folder is checked first; nothing is sent if it is not a whole prior, or if its licence, base model or source data "
        "set is not known: --license, --base-model and --dataset fill them in. --dry-run shows every file, what is new in the "
        "card, and what stands against the push, and sends nothing. A card that is there already keeps what a person wrote in "
        "it, and its list of versions grows. Log in with `hf auth login`, or set HF_TOKEN.",
        "examples:\n  prior-hub push ./my_prior me/my-prior --dry-run\n"
        "  prior-hub push ./my_prior me/my-prior --license apache-2.0 --base-model org/model --dataset org/data\n"
        "  prior-hub push ./my_prior org/name --tag v1.0 --message 'twice the snapshots' --collection 'My priors'\n"
        "  prior-hub push ./my_prior org/name --compute hardware_used='1 H100' --compute hours=3.5\n"
        "  prior-hub push ./my_prior org/name --create-pr",
    )
    push.add_argument("folder", type=Path, help="folder that save_pretrained wrote")
    push.add_argument("repo_id", help="organisation/name, or a name under your own account")
    push.add_argument(
        "--dry-run", action="store_true", help="only show what would be uploaded; exit code 1 if it would be refused"
    )
    where = push.add_argument_group("where")
    where.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    where.add_argument("--subfolder", metavar="FOLDER", help="folder of the repository, beside a model for example")
    where.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    where.add_argument("--tag", metavar="TAG", help="tag the commit, for example v1.0")
    where.add_argument("--message", metavar="TEXT", help="commit message, shown in the card's list of versions too")
    where.add_argument("--collection", metavar="SLUG_OR_TITLE", help="also put it into a collection, made if there is none")
    who = push.add_argument_group("who may have it")
    who.add_argument("--private", action="store_true", help="make a new repository private; refused if it exists and is public")
    who.add_argument("--gated", choices=("auto", "manual"), help="readers accept terms first; manual: and you let them in")
    who.add_argument(
        "--resource-group", metavar="ID", help="resource group of an Enterprise organisation, for a new repository"
    )
    what = push.add_argument_group("what the card says")
    metadata_arguments(what)
    card_arguments(what)
    what.add_argument("--no-pictures", dest="pictures", action="store_false", help="without pictures (they need matplotlib)")
    json_argument(push)

    card = add_command(
        commands,
        "card",
        _card,
        "print the model card of a prior, rendered anew, or write it",
        "The card says what prior_config.json says; a person's text in the README.md of the folder stays. --write puts it into "
        "the folder, where `prior-hub push` takes it from. Says what the Hub would not accept in it; exit code 1 then.",
        "examples:\n  prior-hub card ./my_prior\n  prior-hub card ./my_prior --compute hours=3.5 --write",
    )
    card.add_argument("folder", type=Path, help="folder that save_pretrained wrote")
    card_arguments(card)
    card.add_argument("--write", action="store_true", help="write it into the folder's README.md")
    json_argument(card)


def metadata_arguments(parser: Any) -> None:
    """What a published prior must say of itself."""
    parser.add_argument("--license", metavar="ID", help="the prior's licence, a Hub identifier such as apache-2.0")
    parser.add_argument("--base-model", metavar="NAME", help="Hub name of the model whose weights the prior is over")
    parser.add_argument("--dataset", metavar="NAME", help="the source task's data set")
    parser.add_argument("--dataset-license", metavar="ID", help="its licence, which may bind who uses the prior")
    allow_incomplete_argument(parser)


def allow_incomplete_argument(parser: Any) -> None:
    """--allow-incomplete."""
    parser.add_argument(
        "--allow-incomplete", action="store_true", help="publish without licence, base model or source data set"
    )


def card_arguments(parser: Any) -> None:
    """What only who publishes it knows."""
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="JSON with results of models fine-tuned under the prior: what trainer.evaluate() returned, "
        '{"task": ..., "dataset": ..., "metrics": {...}}, or a list of these',
    )
    parser.add_argument("--evaluation-dataset", metavar="NAME", help="data set of --evaluation, where the file names none")
    parser.add_argument(
        "--evaluation-task",
        metavar="TASK",
        help="task of --evaluation, such as image-classification, where the file names none",
    )
    parser.add_argument(
        "--compute",
        action="append",
        type=_key_value,
        metavar="KEY=VALUE",
        help="what the prior cost: emissions (g of CO2 equivalent), source (of that number), training_type, "
        "geographical_location, hardware_used, hours",
    )


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, float(value) if key in ("emissions", "hours") else value
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{key} is {value!r}, expected a number") from error


def read_evaluation(path: Path | None) -> Any:
    """The JSON of --evaluation; None without it.

    Raises:
        PriorFormatError: it is no JSON.
    """
    from prior_hub.priors.config import parse_json
    from prior_hub.priors.storage import read_bounded

    return None if path is None else parse_json(read_bounded(path), where=str(path))


@contextlib.contextmanager
def pictures_of(folder: Path, wanted: bool = True) -> Iterator[tuple[dict[Path, str] | None, str | None]]:
    """(pictures of a prior's card, why there are none): files that are there as long as the block runs."""
    if not wanted:
        yield None, None
        return
    try:
        from prior_hub.plots import card_pictures
    except ImportError:
        yield None, _NO_PICTURES
        return
    from prior_hub.model import PriorModel
    from prior_hub.registry.upload import push_folder

    with push_folder(10**6) as place:  # pictures are small; what a killed process leaves is removed by the next push
        try:
            texts = card_pictures(PriorModel.from_pretrained(folder), place)
        except ImportError:
            yield None, _NO_PICTURES
            return
        yield {place / name: text for name, text in texts.items()}, None


_NO_PICTURES = "the card has no pictures: they need pip install 'prior-hub[plots]'"


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


def publish(folder: Path, repo_id: str, *, pictures: bool = True, **arguments: Any) -> PushResult:
    """Push a folder with the pictures of its prior; a note on stderr if matplotlib is missing."""
    from prior_hub.model import push_prior_to_hub

    with pictures_of(folder, pictures) as (files, note):
        result: PushResult = push_prior_to_hub(folder, repo_id, pictures=files, **arguments)
    if note:
        print(f"prior-hub: note: {note}", file=sys.stderr)
    return result


def _push(arguments: argparse.Namespace) -> int:
    from prior_hub.model import push_prior_to_hub
    from prior_hub.priors.storage import read_config
    from prior_hub.registry.upload import PushOptions

    options: dict[str, Any] = {
        "revision": arguments.revision,
        "subfolder": arguments.subfolder,
        "private": True if arguments.private else None,
        "gated": arguments.gated,
        "resource_group_id": arguments.resource_group,
        "create_pr": arguments.create_pr,
        "commit_message": arguments.message,
        "tag": arguments.tag,
        "license": arguments.license,
        "base_model": arguments.base_model,
        "dataset": arguments.dataset,
        "dataset_license": arguments.dataset_license,
        "allow_incomplete": arguments.allow_incomplete,
        "evaluation": read_evaluation(arguments.evaluation),
        "evaluation_dataset": arguments.evaluation_dataset,
        "evaluation_task": arguments.evaluation_task,
        "compute": dict(arguments.compute) if arguments.compute else None,
    }
    config = read_config(arguments.folder)  # a folder, whatever the Hub has of that name
    if arguments.dry_run:
        with pictures_of(arguments.folder, arguments.pictures) as (files, note):
            plan = push_prior_to_hub(arguments.folder, arguments.repo_id, dry_run=True, pictures=files, **options)
        return _show_plan(plan, arguments, note)
    PushOptions(**options).config(config)  # refused before pictures are drawn
    options["collection"] = arguments.collection
    result = publish(arguments.folder, arguments.repo_id, pictures=arguments.pictures, **options)
    if arguments.json:
        print(json.dumps({"ok": True, **dataclasses.asdict(result)}))
    else:
        print(f"pushed to {result.pull_request_url or result.commit_url}" + (f", tagged {result.tag}" if result.tag else ""))
        if result.collection_url:
            print(f"in the collection {result.collection_url}")
    return 0


def _show_plan(plan: PushPlan, arguments: argparse.Namespace, note: str | None) -> int:
    ok = not plan.problems
    if arguments.json:
        answer = dataclasses.asdict(plan) | {"dry_run": True, "collection": arguments.collection, "note": note}
        print(json.dumps({"ok": ok, **answer}))
        return 0 if ok else 1
    access = {True: "private", False: "public", None: "public unless the owner's default is private"}[plan.private]
    state = (
        f"at {plan.head[:8]}, {access}"
        if plan.head
        else f"not there yet, or not seen by this token: it would be made, {access}"
    )
    print(f"dry run: nothing is sent\nrepository  {plan.repo_id} ({state})")
    rows = [("branch", plan.branch + (", by a pull request" if plan.create_pr else ""))]
    rows += [
        (name, value)
        for name, value in (("tag", plan.tag), ("gated", plan.gated), ("collection", arguments.collection))
        if value
    ]
    rows += [("metadata", "complete" if not plan.missing else f"{len(plan.missing)} missing")]
    print("\n".join(f"{name:<12}{value}" for name, value in rows) + "\n")
    print_table(
        ["file", "size", "status"], [(f.path, as_size(f.size) if f.status != "deleted" else "", f.status) for f in plan.files]
    )
    print(f"\n{printable(plan.card_diff.rstrip())}" if plan.card_diff else "\nthe card stays as it is")
    for problem in plan.problems:
        print(f"\nwould be refused: {problem}")
    if note:
        print(f"\nnote: {note}")
    return 0 if ok else 1


def _card(arguments: argparse.Namespace) -> int:
    from prior_hub.priors.storage import CARD_NAME, read_config
    from prior_hub.registry.card import card_problems, check_compute, read_card, render_card, update_card
    from prior_hub.registry.evaluation import eval_results

    folder = arguments.folder.expanduser()
    config, path = read_config(folder), folder / CARD_NAME
    results = eval_results(
        read_evaluation(arguments.evaluation), dataset=arguments.evaluation_dataset, task=arguments.evaluation_task
    )
    rendered = render_card(config, evaluation=results, compute=check_compute(dict(arguments.compute or ())))
    there = read_card(path) if path.is_file() else None
    text = update_card(there, rendered, previous=config, config=config)
    problems = card_problems(text)
    if arguments.write:
        path.write_bytes(text.encode())
    if arguments.json:
        print(json.dumps({"ok": not problems, "card": text, "problems": problems, "written": arguments.write}))
    else:
        print(f"{'written' if text != there else 'unchanged'}: {path}" if arguments.write else text.rstrip())
        for problem in problems:
            print(f"prior-hub: the Hub would not accept this card: {problem}", file=sys.stderr)
    return 1 if problems else 0
