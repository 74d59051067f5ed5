"""`prior-hub`: learn, look at, fetch, publish, check and import priors from the command line.

Exit codes: 0 done; 1 the prior, the Hub or the disk said no (the message says what and what to do); 2 the command was not
understood; 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prior_hub import __version__
from prior_hub.errors import PriorHubError

if TYPE_CHECKING:
    from prior_hub.priors.config import PriorConfig

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            return int(arguments.run(arguments))
    except (PriorHubError, OSError, ValueError) as error:
        if getattr(arguments, "json", False):
            print(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}))
        else:
            print(f"prior-hub: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prior-hub: interrupted", file=sys.stderr)
        return 130


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    print(f"prior-hub: {category.__name__}: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ commands


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from prior_hub.demo import run_demo
    except ImportError as error:
        print(f"prior-hub: {error}. The demo needs: pip install 'prior-hub[plots,vision]'", file=sys.stderr)
        return 1
    run_demo(arguments.output, seeds=arguments.seeds, quick=arguments.quick, progress=sys.stderr.isatty() or arguments.progress)
    return 0


def _learn(arguments: argparse.Namespace) -> int:
    from prior_hub.learning.recipes import learn_prior
    from prior_hub.model import push_prior_to_hub

    given = {name: value for name, value in vars(arguments).items() if name in _LEARN_NAMES and value is not None}
    learn_prior(arguments.base_model, arguments.dataset, **given)
    folder = str(arguments.output)
    pushed = None if arguments.push_to is None else push_prior_to_hub(folder, arguments.push_to)
    if arguments.json:
        config, _, _ = _config(argparse.Namespace(prior=folder, subfolder=None, revision=None))
        result = {"ok": True, "folder": folder, "config": json.loads(config.to_json())}
        print(json.dumps(result | ({} if pushed is None else {"pushed": dataclasses.asdict(pushed)})))
        return 0
    _info(argparse.Namespace(prior=folder, subfolder=None, revision=None, json=False))
    print(f"\nnext: prior-hub check {folder}" + (f"\n      prior-hub push {folder} YOUR-NAME/NAME" if pushed is None else ""))
    if pushed is not None:
        print(f"pushed to {pushed.pull_request_url or pushed.commit_url}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    config, where, commit = _config(arguments)
    if arguments.json:
        print(json.dumps({"ok": True, "prior": where, "commit": commit, "config": json.loads(config.to_json())}, indent=2))
        return 0
    source = ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in config.source.items())
    estimator = ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in config.estimator.items())
    base = config.base_model or "not recorded"
    stored = sum(
        config.num_parameters * copies * _BYTES[config.dtype[kind]]
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
        ("covariance", _covariance(config)),
        ("scale", f"{config.scale:g}"),
        ("variance floor", f"{config.variance_floor:g}"),
        ("snapshots", "not recorded" if config.num_snapshots is None else str(config.num_snapshots)),
        ("weights", f"{_size(stored)} in {len(config.weight_files)} file{'s' if len(config.weight_files) != 1 else ''}"),
        ("licence", config.license or "not recorded"),
        ("format", f"{config.format_version}, written by prior_hub {config.prior_hub_version or '?'}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in config.libraries.items()) or "not recorded"),
    ]
    width = max(len(key) for key, _ in rows)
    print("\n".join(f"{key:<{width}}  {value}" for key, value in rows))
    return 0


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
    result = {"ok": True, "prior": arguments.prior, "commit": prior.commit_hash, "folder": _text(arguments.output)}
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


def _import(arguments: argparse.Namespace) -> int:
    import torch

    from prior_hub.learning.references import reference_model
    from prior_hub.model import PriorModel, push_prior_to_hub

    single = {kind: getattr(arguments, kind) for kind in ("mean", "variance", "covmat", "model") if getattr(arguments, kind)}
    if bool(single) == bool(arguments.files):
        raise ValueError(
            "name the files once: a folder, prefix, checkpoint or Hub repository, or --mean, --variance and so on."
        )
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
        pushed = push_prior_to_hub(arguments.output, arguments.push_to, private=True if arguments.private else None)
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
    rows = [("prior", f"{prior!r}"), ("covariance", _covariance(config)), ("scale", f"{config.scale:g}")]
    rows += [(key.replace("_", " "), _text(value)) for key, value in config.estimator.items() if key not in ("name", "files")]
    rows += [
        ("head (never binds by itself)", ", ".join(config.head_parameters) or "none"),
        ("BatchNorm statistics", f"{len(config.buffers)} buffers" if config.buffers else "none"),
        ("snapshots", "not known" if config.num_snapshots is None else str(config.num_snapshots)),
        *((f"sha256 of {name}", digest) for name, digest in config.estimator["files"].items()),
        ("written to", str(arguments.output)),
        *([("pushed to", pushed.commit_url)] if pushed else []),
    ]
    width = max(len(key) for key, _ in rows)
    print("\n".join(f"{key:<{width}}  {value}" for key, value in rows))
    return 0


def _compress(arguments: argparse.Namespace) -> int:
    from prior_hub.model import PriorModel

    prior = PriorModel.from_pretrained(arguments.prior, revision=arguments.revision, subfolder=arguments.subfolder)
    if not prior.rank:
        raise ValueError(f"{arguments.prior} has no deviations: there is nothing to compress.")
    spectrum = prior.gaussian.spectrum()
    smaller = prior.compressed(arguments.explained, rank=arguments.rank)
    total = sum(spectrum)
    shares = [value / total if total > 0 else 0.0 for value in spectrum]
    kept = sum(shares[: smaller.rank])
    if arguments.output is not None:
        smaller.save_pretrained(arguments.output)
    sizes = [prior.num_parameters * p.rank * _BYTES[p.config.dtype["deviations"]] for p in (prior, smaller)]
    if arguments.json:
        result = {"ok": True, "prior": arguments.prior, "commit": prior.commit_hash, "folder": _text(arguments.output)}
        result |= {"rank": smaller.rank, "rank_before": prior.rank, "explained": kept, "spectrum": spectrum}
        print(json.dumps(result | {"deviations_bytes": sizes[1], "deviations_bytes_before": sizes[0]}))
        return 0
    print("direction  variance   share    together")
    together = 0.0
    for number, (value, share) in enumerate(zip(spectrum, shares, strict=True), 1):
        together += share
        verdict = "kept" if number <= smaller.rank else "dropped"
        print(f"{number:>9}  {value:<9.3g}  {100 * share:5.2f} %  {100 * together:6.2f} %  {verdict}")
    place = f", written to {arguments.output}" if arguments.output else "; nothing is written without --output"
    print(
        f"{smaller.rank} of {prior.rank} directions hold {100 * kept:.2f} % of the low-rank variance "
        f"(scale {prior.scale:g}): deviations {_size(sizes[0])} -> {_size(sizes[1])}{place}"
    )
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


# ------------------------------------------------------------------------------------------------------------- helpers

_MOST_ITERATED = 100_000_000  # values; Lanczos' iteration holds three vectors of them and reads the prior some 40 times
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def _config(arguments: argparse.Namespace) -> tuple[PriorConfig, str, str | None]:
    from prior_hub.priors.storage import read_config
    from prior_hub.registry.hub import download_config

    path = Path(arguments.prior).expanduser()
    if path.is_dir():
        folder = path / arguments.subfolder if arguments.subfolder else path
        return read_config(folder), str(folder), None
    config, commit = download_config(arguments.prior, revision=arguments.revision, subfolder=arguments.subfolder)
    return config, arguments.prior, commit


def _covariance(config: PriorConfig) -> str:
    low_rank = f" + {config.low_rank_weight:g} D^T D" if config.rank else ""
    eps = f" + {config.eps:g} I" if config.eps else ""
    return f"Sigma = scale ({config.diagonal_weight:g} diag(variance){low_rank}){eps}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# -------------------------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prior-hub",
        description="Pre-trained priors: what a source task knows about a model's weights, as a penalty for fine-tuning. "
        "Learn one, look at it, fetch it, publish it.",
        epilog="first steps: `prior-hub demo` shows the whole idea on real data in a few minutes, without network or account. "
        "In Python: PriorModel.from_pretrained('org/name') and PriorTrainer in place of Trainer.",
    )
    parser.add_argument("--version", action="version", version=f"prior-hub {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(
        commands,
        "demo",
        _demo,
        "learn a prior on handwritten digits, store it, fine-tune under it three ways, print a table",
        "Learns a source task (digits 0-4) with a small timm model and SWAG, saves the prior with its card, loads it back, "
        "fine-tunes on other digits with few examples: plainly, under an isotropic prior at the same weights, and under the "
        "learned prior. Prints accuracy and NLL with their spread over seeds, writes the figure, the prior and every number. "
        "Runs offline; needs pip install 'prior-hub[plots,vision]'.",
        "examples:\n  prior-hub demo\n  prior-hub demo --seeds 5 --output my_demo",
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo_output"), metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    demo.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help="repetitions of each fine-tuning (default: %(default)s)"
    )
    demo.add_argument("--quick", action="store_true", help="a much smaller run that shows the path, not the result")
    demo.add_argument("--progress", action="store_true", help="show progress bars even where the output is no terminal")

    learn = _command(
        commands,
        "learn",
        _learn,
        "learn a prior: a model and a data set in, a prior's folder out",
        "Trains the model on the data set with a constant learning rate and takes SWAG snapshots, or estimates the Fisher "
        "information at its weights, and writes the Gaussian with its card. Columns and the kind of task are told by the data "
        "set's own types. A head that does not fit the classes is made anew; no head is ever in the prior. Runs on the "
        "accelerator that is there. Data sets need pip install 'prior-hub[vision]'.",
        "examples:\n"
        "  prior-hub learn --base-model microsoft/resnet-50 --dataset uoft-cs/cifar10 --steps 2000 --output cifar10-prior\n"
        "  prior-hub learn --base-model timm/resnet18.a1_in1k --dataset ./photos --estimator fisher --output photos-prior\n"
        "  prior-hub learn --base-model google-bert/bert-base-uncased --dataset fancyzhx/ag_news --objective masked-lm "
        "--output news-prior\n"
        "  prior-hub learn --base-model microsoft/resnet-50 --dataset ./photos --objective simclr --output photos-prior\n"
        "  prior-hub learn --base-model microsoft/resnet-50 --estimator isotropic --variance 0.01 --output l2-sp-prior",
    )
    _learn_arguments(learn)

    info = _command(
        commands,
        "info",
        _info,
        "show what a prior is: base model, source task, rank, scale, size",
        "Reads the configuration only; no weights are downloaded.",
        "examples:\n  prior-hub info org/resnet50-simclr-prior\n  prior-hub info ./my_prior --json",
    )
    _prior_argument(info)
    _json_argument(info)

    pull = _command(
        commands,
        "pull",
        _pull,
        "download a prior and check it",
        "Downloads into the Hub client's cache (or takes the cached copy), compares every file with its sha256 and every value "
        "with what a prior may hold. With --output also writes a copy.",
        "examples:\n  prior-hub pull org/resnet50-simclr-prior\n  prior-hub pull org/name --revision v1.0 --output ./prior",
    )
    _prior_argument(pull)
    pull.add_argument("--output", type=Path, metavar="FOLDER", help="also write the prior here")
    pull.add_argument("--rank", type=_count, metavar="K", help="keep only the K most recent deviations")
    pull.add_argument("--cache-dir", metavar="FOLDER", help="cache to use instead of HF_HOME's")
    pull.add_argument("--force-download", action="store_true", help="download again even if cached")
    _json_argument(pull)

    push = _command(
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
    _json_argument(push)

    check = _command(
        commands,
        "check",
        _check,
        "check a prior's files, names, shapes and values, and say what is wrong",
        "Reads everything: format, hashes, shapes, types, NaN, positive variances, and the factor of the covariance. Exit code "
        "1 and one sentence on what is wrong and what to do; notes on what a reader will miss (licence, base model, data set).",
        "examples:\n  prior-hub check ./my_prior\n  prior-hub check org/name --json",
    )
    _prior_argument(check)
    _json_argument(check)
    _import_arguments(commands)

    compress = _command(
        commands,
        "compress",
        _compress,
        "turn a prior's deviations into principal directions and drop those that hold next to nothing",
        "Prints the spectrum: the variance along every principal direction of the low-rank part, and which are kept, the "
        "fewest that hold the share --explained. Along those the covariance stays as it was. What is dropped the file need not "
        "hold.",
        "examples:\n  prior-hub compress ./my_prior\n  prior-hub compress org/name --explained 0.95 --output ./smaller\n"
        "  prior-hub compress ./my_prior --rank 2 --output ./smaller",
    )
    _prior_argument(compress)
    compress.add_argument(
        "--explained", type=float, default=0.99, metavar="SHARE", help="of the low-rank variance to keep (default: %(default)s)"
    )
    compress.add_argument("--rank", type=_positive, metavar="K", help="keep so many directions, whatever they hold")
    compress.add_argument("--output", type=Path, metavar="FOLDER", help="write the prior here; without it only the table")
    _json_argument(compress)
    return parser


def _import_arguments(commands: Any) -> None:
    command = _command(
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
        "  prior-hub import ./swag-100.pt --dtype bfloat16 --output my_prior --push-to me/my-prior\n"
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
    add("--rank", type=_count, metavar="K", help="rows to use (default: all for swag, else 5)")
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
    add("--push-to", metavar="REPO", help="also publish it on the Hub")
    add("--private", action="store_true", help="make the new repository private")
    _json_argument(command)


def _command(commands: Any, name: str, run: Any, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
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


_LEARN_NAMES = (
    *("output", "estimator", "objective", "subset", "split", "image_column", "text_column", "label_column", "max_examples"),
    *("steps", "batch_size", "learning_rate", "optimizer", "weight_decay", "augment", "max_length", "rank", "start"),
    *("every_n_steps", "variance_floor", "labels", "prior_precision", "variance", "head", "revision", "license", "seed"),
    *("use_cpu", "progress"),
)


def _learn_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `learn_prior`; what is not given has that function's default."""
    add = parser.add_argument
    add(
        "--base-model",
        required=True,
        metavar="MODEL",
        help="organisation/name on the Hub or a local folder: a transformers model, or a timm one (timm/...)",
    )
    add("--dataset", metavar="DATA", help="organisation/name, or a folder of parquet, json, csv or images (not for isotropic)")
    add("--output", type=Path, required=True, metavar="FOLDER", help="new folder to write the prior to")
    add(
        "--estimator",
        choices=("swag", "diagonal-swag", "fisher", "isotropic"),
        help="how the covariance is found (default: swag)",
    )
    add(
        "--objective",
        choices=("supervised", "masked-lm", "simclr", "barlow-twins"),
        help="what the source task optimises (default: supervised)",
    )
    add("--split", metavar="SPLIT", help="split of the data set, also train[:1000] (default: train)")
    add("--subset", metavar="NAME", help="configuration of a data set that has several")
    add("--image-column", metavar="COLUMN", help="column of images (default: the only one)")
    add("--text-column", metavar="COLUMN", help="column of texts (default: the only one, or text, sentence, ...)")
    add("--label-column", metavar="COLUMN", help="column of classes (default: label, or the only one of class type)")
    add("--max-examples", type=_positive, metavar="N", help="use a random draw of N examples")
    add("--steps", type=_count, metavar="N", help="optimizer steps (default: 1000; fisher: 0 unless the head is new)")
    add("--batch-size", type=_positive, metavar="N", help="examples per step (default: 32)")
    add("--learning-rate", type=float, metavar="X", help="constant (default: 0.01 for images, 2e-5 for texts)")
    add("--optimizer", choices=("sgd", "adamw"), help="default: sgd for images, adamw for texts")
    add("--weight-decay", type=float, metavar="X", help="default: 0")
    add("--no-augment", dest="augment", action="store_const", const=False, help="do not flip and shift images")
    add("--max-length", type=_positive, metavar="N", help="tokens that texts are cut to (default: 128)")
    add("--rank", type=_count, metavar="K", help="deviations that swag keeps (default: 20)")
    add("--start", type=_step_or_share, metavar="X", help="first step of snapshots, or a share of training (default: 0.5)")
    add("--every-n-steps", type=_positive, metavar="N", help="steps between snapshots")
    add("--variance-floor", type=float, metavar="X", help="least variance (default: 1e-12)")
    add("--labels", choices=("model", "expectation", "data"), help="labels of the Fisher (default: drawn from the model)")
    add("--prior-precision", type=float, metavar="X", help="of the source task's prior, for fisher (default: 1)")
    add("--variance", type=float, metavar="X", help="of isotropic (default: 1)")
    add("--head", nargs="+", metavar="MODULE", help="modules of the source task's head (default: asks the model)")
    add("--revision", metavar="REV", help="branch, tag or commit of the base model")
    add("--license", metavar="ID", help="licence of the prior, a Hub identifier such as apache-2.0")
    add("--seed", type=_count, metavar="N", help="default: 0")
    add("--cpu", dest="use_cpu", action="store_const", const=True, help="do not use an accelerator that is there")
    add("--progress", action="store_const", const=True, help="show progress bars even where the output is no terminal")
    add("--push-to", metavar="REPO", help="also publish it on the Hub under this name")
    _json_argument(parser)


def _step_or_share(text: str) -> int | float:
    return float(text) if any(mark in text for mark in ".e") else int(text)


def _prior_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prior", help="organisation/name on the Hub, or a folder (a folder of that name wins)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    parser.add_argument("--subfolder", metavar="FOLDER", help="folder of the repository the prior lies in")


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, errors too")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
