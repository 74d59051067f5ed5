"""Commands that make a prior: `demo`, `learn`, `compress`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from prior_hub.cli.common import (
    add_command,
    as_size,
    as_text,
    json_argument,
    non_negative,
    positive,
    prior_argument,
    read_config_of,
)
from prior_hub.cli.look import show_info
from prior_hub.cli.share import allow_incomplete_argument, publish

__all__ = ["add_commands"]

_LEARN_NAMES = (
    *("output", "estimator", "objective", "subset", "split", "image_column", "text_column", "label_column", "max_examples"),
    *("steps", "batch_size", "learning_rate", "optimizer", "weight_decay", "augment", "max_length", "rank", "start"),
    *(
        "every_n_steps",
        "variance_floor",
        "labels",
        "prior_precision",
        "variance",
        "head",
        "revision",
        "license",
        "dataset_license",
        "seed",
    ),
    *("use_cpu", "progress"),
)


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    demo = add_command(
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
        "--seeds", type=positive, default=3, metavar="N", help="repetitions of each fine-tuning (default: %(default)s)"
    )
    demo.add_argument("--quick", action="store_true", help="a much smaller run that shows the path, not the result")
    demo.add_argument("--progress", action="store_true", help="show progress bars even where the output is no terminal")

    learn = add_command(
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

    compress = add_command(
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
    prior_argument(compress)
    compress.add_argument(
        "--explained", type=float, default=0.99, metavar="SHARE", help="of the low-rank variance to keep (default: %(default)s)"
    )
    compress.add_argument("--rank", type=positive, metavar="K", help="keep so many directions, whatever they hold")
    compress.add_argument("--output", type=Path, metavar="FOLDER", help="write the prior here; without it only the table")
    json_argument(compress)


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
    from prior_hub.registry.completeness import check_complete, missing_metadata

    if arguments.push_to is not None and not arguments.allow_incomplete:  # before hours of learning
        estimator = arguments.estimator if arguments.estimator == "isotropic" else None
        local = Path(arguments.base_model).is_dir()  # which means nothing to others, and is not recorded
        base_model = f"./{arguments.base_model}" if local else arguments.base_model
        known = {"license": arguments.license, "base_model": base_model, "dataset": arguments.dataset}
        check_complete(missing_metadata(**known, estimator=estimator))
    given = {name: value for name, value in vars(arguments).items() if name in _LEARN_NAMES and value is not None}
    learn_prior(arguments.base_model, arguments.dataset, **given)
    folder = str(arguments.output)
    pushed = None
    if arguments.push_to is not None:
        pushed = publish(arguments.output, arguments.push_to, allow_incomplete=arguments.allow_incomplete)
    if arguments.json:
        config, _, _ = read_config_of(argparse.Namespace(prior=folder, subfolder=None, revision=None))
        result = {"ok": True, "folder": folder, "config": json.loads(config.to_json())}
        print(json.dumps(result | ({} if pushed is None else {"pushed": dataclasses.asdict(pushed)})))
        return 0
    show_info(*read_config_of(argparse.Namespace(prior=folder, subfolder=None, revision=None)))
    licence = "" if arguments.license else " --license ID"
    push = f"\n      prior-hub push {folder} YOUR-NAME/NAME{licence}" if pushed is None else ""
    print(f"\nnext: prior-hub check {folder}{push}")
    if pushed is not None:
        print(f"pushed to {pushed.pull_request_url or pushed.commit_url}")
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
    sizes = [p.config.stored_bytes["deviations"] for p in (prior, smaller)]
    if arguments.json:
        result = {"ok": True, "prior": arguments.prior, "commit": prior.commit_hash, "folder": as_text(arguments.output)}
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
        f"(scale {prior.scale:g}): deviations {as_size(sizes[0])} -> {as_size(sizes[1])}{place}"
    )
    return 0


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
    add("--max-examples", type=positive, metavar="N", help="use a random draw of N examples")
    add("--steps", type=non_negative, metavar="N", help="optimizer steps (default: 1000; fisher: 0 unless the head is new)")
    add("--batch-size", type=positive, metavar="N", help="examples per step (default: 32)")
    add("--learning-rate", type=float, metavar="X", help="constant (default: 0.01 for images, 2e-5 for texts)")
    add("--optimizer", choices=("sgd", "adamw"), help="default: sgd for images, adamw for texts")
    add("--weight-decay", type=float, metavar="X", help="default: 0")
    add("--no-augment", dest="augment", action="store_const", const=False, help="do not flip and shift images")
    add("--max-length", type=positive, metavar="N", help="tokens that texts are cut to (default: 128)")
    add("--rank", type=non_negative, metavar="K", help="deviations that swag keeps (default: 20)")
    add("--start", type=_step_or_share, metavar="X", help="first step of snapshots, or a share of training (default: 0.5)")
    add("--every-n-steps", type=positive, metavar="N", help="steps between snapshots")
    add("--variance-floor", type=float, metavar="X", help="least variance (default: 1e-12)")
    add("--labels", choices=("model", "expectation", "data"), help="labels of the Fisher (default: drawn from the model)")
    add("--prior-precision", type=float, metavar="X", help="of the source task's prior, for fisher (default: 1)")
    add("--variance", type=float, metavar="X", help="of isotropic (default: 1)")
    add("--head", nargs="+", metavar="MODULE", help="modules of the source task's head (default: asks the model)")
    add("--revision", metavar="REV", help="branch, tag or commit of the base model")
    add("--license", metavar="ID", help="licence of the prior, a Hub identifier such as apache-2.0")
    add("--dataset-license", metavar="ID", help="licence of the data set, where it does not say it itself")
    add("--seed", type=non_negative, metavar="N", help="default: 0")
    add("--cpu", dest="use_cpu", action="store_const", const=True, help="do not use an accelerator that is there")
    add("--progress", action="store_const", const=True, help="show progress bars even where the output is no terminal")
    add("--push-to", metavar="REPO", help="also publish it on the Hub under this name; needs --license")
    allow_incomplete_argument(parser)
    json_argument(parser)


def _step_or_share(text: str) -> int | float:
    return float(text) if any(mark in text for mark in ".e") else int(text)
