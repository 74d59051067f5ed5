"""Write the cards whose configuration nobody types: python model_cards/make.py [--prior FOLDER].

- the three priors of "Pre-Train Your Loss": names and shapes from torchvision's architectures, the covariance from the
  paper's convention, how to obtain and convert the files from recipes/NAME.md. Not converted here: no hashes, no figures.
- cifar10-resnet20-prior: from its own prior_config.json (--prior, the folder that benchmarks/transfer/run.py made) or the one
  that is beside its card already, with the figures of benchmarks/transfer/results/cifar.csv.

A person's text around the rendered part stays. tests/test_model_cards.py fails if a card is not what this writes.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from prior_hub import PriorConfig
from prior_hub.learning.references import reference_model
from prior_hub.priors.legacy import convention_weights
from prior_hub.priors.matching import canonical_parameters, persistent_buffers
from prior_hub.registry.card import render_card, update_card

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "transfer" / "results" / "cifar.csv"  # the grid that ran with this prior
METHODS = {
    "frozen": "frozen features, fitted head",
    "plain": "plain fine-tuning, weight decay",
    "zero-mean": "zero-mean isotropic prior",
    "at the mean": "isotropic prior at this prior's mean",
    "low rank": "this prior",
    "low rank, auto": 'this prior, prior_scale="auto"',
}
LEARNED = "cifar10-resnet20-prior"
REPOSITORY = "https://github.com/hsouri/BayesianTransferLearning"
SUPERVISED, SIMCLR = "supervised classification", "SimCLR (self-supervised)"
PAPERS = {
    "resnet50-simclr-prior": ("torchvision:resnet50", SIMCLR),
    "resnet50-supervised-prior": ("torchvision:resnet50", SUPERVISED),
    "resnet101-supervised-prior": ("torchvision:resnet101", SUPERVISED),
}
SCALE, EPS, ROWS = 1e10, 0.1, 5  # defaults of the paper's code: --prior_scale, --prior_eps, --number_of_samples_prior
MARKS = (
    "<!-- figures of benchmarks/transfer/results/cifar.csv, by model_cards/make.py -->",
    "<!-- end of figures -->",
)


def papers_config(name: str) -> PriorConfig:
    """What `prior-hub import --convention paper --reference ARCHITECTURE` writes, but for what only the files know."""
    architecture, objective = PAPERS[name]
    model = reference_model(architecture)
    shapes = {n: tuple(p.shape) for n, p in canonical_parameters(model).items()}
    head = tuple(n for n in shapes if n.startswith("fc."))
    return PriorConfig(
        parameters={n: shape for n, shape in shapes.items() if n not in head},
        rank=ROWS,
        **convention_weights("paper", SCALE, EPS, ROWS),
        head_parameters=head,
        buffers=tuple(persistent_buffers(model)),
        model_type=type(model).__name__,
        license="unknown",
        source={
            "objective": objective,
            "dataset": "ILSVRC/imagenet-1k",
            "architecture": f"{architecture.removeprefix('torchvision:')} of torchvision, without its fc layer",
            "repository": REPOSITORY,
        },
        estimator={
            "name": "swag",
            "imported_from": "four files of Pre-Train Your Loss (mean, variance, covmat, model)",
            "convention": "paper",
            "imported_scale": SCALE,
            "rows": f"the first {ROWS}, oldest first",
            "recentred": False,
        },
    )


def learned_config(prior: Path | None) -> PriorConfig:
    """Its own configuration, with what the run did not know: where its weights are from, and that no licence is known."""
    path = HERE / f"{LEARNED}.json" if prior is None else prior / "prior_config.json"
    config = PriorConfig.from_json(path.read_bytes(), where=str(path))
    source = {
        **config.source,
        "dataset_part": "10,000 of its 50,000 training images, 1,000 a class",
        "dataset_license": "none given (published for research)",
        "initial_weights": "akamaster/pytorch_resnet_cifar10 @ d5489e8 (BSD-2-Clause), trained on all 50,000",
    }
    return config.replace(source=source, license="unknown")


def figures(results: Path = RESULTS) -> str:
    """Test accuracy, NLL and ECE of the transfer grid, for every n that is complete: means and spreads over seeds."""
    with results.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "final" and row["method"] in METHODS]
    lines = ["| n | method | strength | learning rate | accuracy | NLL (nats) | ECE |", "|---|---|---|---|---|---|---|"]
    seeds = sorted({int(row["seed"]) for row in rows})
    winners, sizes = list[str](), list[str]()
    for n in sorted({int(row["n"]) for row in rows}):
        by = {m: [r for r in rows if r["method"] == m and int(r["n"]) == n] for m in METHODS}
        if any(sorted(int(r["seed"]) for r in mine) != seeds for mine in by.values()):
            continue
        best = min(by, key=lambda m: fmean(float(r["nll"]) for r in by[m]))
        winners.append(best)
        sizes.append(str(n))
        for method, mine in by.items():
            accuracy, nll, ece = (_spread(float(r[key]) for r in mine) for key in ("accuracy", "nll", "ece"))
            chosen = sorted({float(row["scale"] if method.endswith("auto") else row["strength"]) for row in mine})
            rate = f"{float(mine[0]['learning_rate']):g}"
            strength, rate = (
                ("-", "-") if method == "frozen" else (", ".join(f"{float(f'{value:.2g}'):g}" for value in chosen), rate)
            )
            shown = f"**{nll}**" if method == best else nll
            lines.append(f"| {n} | {METHODS[method]} | {strength} | {rate} | {accuracy} | {shown} | {ece} |")
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for row in rows})
    won = dict.fromkeys(winners)
    told = (
        "Lowest NLL: "
        + ", ".join(
            f"{METHODS[m]} at n = {' and '.join(n for w, n in zip(winners, sizes, strict=True) if w == m)}" for m in won
        )
        + "."
    )
    if not any(METHODS[m].startswith("this prior") for m in won):
        told += " This prior has it nowhere: try plain fine-tuning and a zero-mean prior first."
    told += f"\n\nSeeds {', '.join(map(str, seeds))}; measured on {'; '.join(machines)}."
    return "\n\n".join([MARKS[0], "\n".join(lines), told, MARKS[1]])


def _spread(values: Iterable[float]) -> str:
    found = list(values)
    return f"{fmean(found):.3f}" + (f" ± {stdev(found):.3f}" if len(found) > 1 else "")


def card(name: str, config: PriorConfig, existing: str | None) -> str:
    """The whole card: rendered part, a person's text, figures."""
    recipe = HERE / "recipes" / f"{name}.md"
    text = recipe.read_text() if recipe.exists() else None
    result = update_card(existing, render_card(config, repo_id=name if text else f"prior-hub/{name}", recipe=text))
    if name != LEARNED:
        return result
    marked = f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}"
    if re.search(marked, result, re.DOTALL):
        return re.sub(marked, lambda _: figures(), result, flags=re.DOTALL)
    told = (
        "From CIFAR-10 to CIFAR-100's 20 superclasses with n images: mean ± sample standard deviation over seeds on 3,000\n"
        "test images; bold: the lowest NLL. Each method's setting was chosen on a fifth of the first seed's images\n"
        "(benchmarks/transfer/README.md has the design, the command, and what is wrong with this prior)."
    )
    return f"{result.rstrip()}\n\n## Measured\n\n{told}\n\n{figures()}\n"


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, help=f"folder of {LEARNED}; default: the configuration beside its card")
    options = parser.parse_args()
    configs = {name: papers_config(name) for name in PAPERS} | {LEARNED: learned_config(options.prior)}
    for name, config in configs.items():
        path = HERE / f"{name}.md"
        path.with_suffix(".json").write_text(config.to_json())
        path.write_text(card(name, config, path.read_text() if path.exists() else None))


if __name__ == "__main__":
    main()
