"""One MAP solution or an average over the posterior? CIFAR-10 ResNet-20 prior -> few-shot CIFAR-100, three ways.

    python examples/cifar_posterior.py --prior example_output/prior --target uoft-cs/cifar100

The prior is a folder or a name on the Hub: `examples/cifar_resnet20.py` learns one from pre-trained weights and leaves it in
OUTPUT/prior. For each number n of labelled images of CIFAR-100's 20 superclasses, from the prior's mean and a new head:

1. plain fine-tuning (weight decay), the baseline that has to be beaten;
2. MAP: PriorTrainer, one solution under the learned prior;
3. average: PriorTrainer(sampler="baoa"), the mean of the predictions of posterior samples, at --temperature.

Each has as many candidates for its strength (weight decay, or scale of the prior), chosen by NLL on a fifth of the first seed's
n images, then all n are fitted again; the test set is used once. All take the same number of steps. With one candidate each
(--weight-decays 0.01 --scales 1000) nothing is chosen.

Prints accuracy, NLL and calibration error on the test set, mean and standard deviation over seeds, and paired differences.
Writes OUTPUT/posterior.json, OUTPUT/reliability.png and OUTPUT/samples.png (what each further sample brings).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from cifar_resnet20 import Images, ResNet20, load, train
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer

from prior_hub import PriorModel, PriorTrainer, PriorTrainingArguments
from prior_hub.inference.diagnostics import disagreement
from prior_hub.inference.metrics import accuracy, expected_calibration_error, negative_log_likelihood
from prior_hub.plots import plot_average, plot_reliability

PLAIN, MAP, AVERAGE = METHODS = ("plain fine-tuning", "MAP", "average")


def batches(images: Images) -> list[dict[str, Tensor]]:
    """The images without augmentation."""
    plain = Images(images.pixels, images.labels, augment=False)
    return [{"pixel_values": plain.batch(part)} for part in torch.arange(len(plain)).split(250)]


def single(model: torch.nn.Module, images: Images) -> Tensor:
    """(n, classes) log-probabilities of one model."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(**batch)["logits"].log_softmax(1) for batch in batches(images)])


def finetune(
    method: str, prior: PriorModel, strength: float, fit: Images, on: Images, options: argparse.Namespace, seed: int
) -> Tensor:
    """Train on `fit`; (members, n, classes) log-probabilities on `on`, one member unless it is an average."""
    torch.manual_seed(seed)
    model = ResNet20(20)
    prior.initialize(model)
    settings: dict[str, Any] = {
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": min(options.batch_size, len(fit)),
        "seed": seed,
    }
    if method == PLAIN:
        train(Trainer, model, settings | {"weight_decay": strength}, fit)
        return single(model, on)[None]
    settings |= {"prior_initialize": False, "prior_head_variance": 1.0, "prior_scale": strength}
    if method == MAP:
        train(PriorTrainer, model, settings, fit, prior=prior)
        return single(model, on)[None]
    settings |= {
        "sampler": "baoa",
        "learning_rate": options.sampler_learning_rate,
        "temperature": options.temperature,
        "sampling_schedule": options.schedule,
        "num_cycles": options.cycles,
        "samples_per_cycle": options.samples // options.cycles,
        "exploration": options.exploration,
    }
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        args = PriorTrainingArguments(folder, dataloader_pin_memory=False, log_level="error", **quiet, **settings)
        trainer = PriorTrainer(model=model, args=args, train_dataset=fit, prior=prior)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        with trainer.averaging() as average:
            return average.function_values(batches(on), progress=False)


def averaged(members: Tensor) -> Tensor:
    """Log of the mean probability of (members, n, classes) log-probabilities."""
    return members.double().logsumexp(0) - torch.tensor(float(len(members))).log()


def scores(members: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, NLL in nats, calibration error of the average, and how often two members disagree."""
    mean = averaged(members)
    return {
        "accuracy": accuracy(mean, labels),
        "nll": negative_log_likelihood(mean, labels, from_logits=True),
        "ece": expected_calibration_error(mean, labels, from_logits=True),
        "disagreement": disagreement(members.exp()).argmax if len(members) > 1 else 0.0,
        "members": len(members),
    }


def compare(options: argparse.Namespace, prior: PriorModel, pool: Images, test: Images) -> tuple[list[dict[str, Any]], Any]:
    """Rows of all runs, and the test predictions of the last n's first seed by method."""
    rows, kept = [], {}
    strengths = {PLAIN: options.weight_decays, MAP: options.scales, AVERAGE: options.scales}
    tuning = sum(len(found) for found in strengths.values() if len(found) > 1)
    bar = tqdm(total=len(options.n) * (tuning + len(METHODS) * len(options.seeds)), desc="fine-tuning")
    for n in options.n:
        sets = {s: pool.part(torch.randperm(len(pool), generator=torch.Generator().manual_seed(s))[:n]) for s in options.seeds}
        first = sets[options.seeds[0]]
        fit, validation = first.part(torch.arange(n // 5, n)), first.part(torch.arange(n // 5))
        for method in METHODS:
            tried = {strengths[method][0]: 0.0}
            for strength in strengths[method] if len(strengths[method]) > 1 else ():
                members = finetune(method, prior, strength, fit, validation, options, options.seeds[0])
                tried[strength] = scores(members, validation.labels)["nll"]
                bar.update()
            best = min(tried, key=tried.__getitem__)
            for seed, images in sets.items():
                members = finetune(method, prior, best, images, test, options, seed)
                bar.update()
                row = {"method": method, "n": n, "seed": seed, "strength": best, **scores(members, test.labels)}
                parts = range(1, len(members) + 1) if method == AVERAGE else ()
                row["by_samples"] = [scores(members[:k], test.labels) for k in parts]
                rows.append(row)
                write(rows, options)
                if seed == options.seeds[0]:
                    kept[method] = averaged(members)
    bar.close()
    return rows, kept


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """All rows so far, with the settings."""
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    (options.output / "posterior.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def summary(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def table(rows: list[dict[str, Any]]) -> str:
    """A row per n and method, in Markdown."""
    lines = ["| n | method | chosen | accuracy | NLL (nats) | ECE | NLL - MAP |", "|---|---|---|---|---|---|---|"]
    for n in dict.fromkeys(row["n"] for row in rows):
        base = {row["seed"]: row["nll"] for row in rows if row["n"] == n and row["method"] == MAP}
        for method in METHODS:
            mine = [row for row in rows if row["n"] == n and row["method"] == method]
            cells = [summary([row[key] for row in mine]) for key in ("accuracy", "nll", "ece")]
            difference = "" if method == MAP else summary([row["nll"] - base[row["seed"]] for row in mine])
            lines.append(f"| {n} | {method} | {mine[0]['strength']:g} | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", required=True, help="folder or Hub name of a prior over ResNet-20 (cifar_resnet20.py)")
    parser.add_argument("--target", default="uoft-cs/cifar100", help="Hub data set or local parquet folder (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("example_output"), help="folder for numbers and figures")
    parser.add_argument("--n", type=int, nargs="+", default=[100, 500], help="labelled images (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="few-shot sets (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of SGD, plain and MAP (default: %(default)s)")
    parser.add_argument(
        "--sampler-learning-rate",
        type=float,
        default=0.5,
        help="of the sampler, in units in which the prior has variance 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--weight-decays", type=float, nargs="+", default=[1e-3, 1e-2, 3e-2], help="of plain fine-tuning (default: %(default)s)"
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[100.0, 1e3, 1e4],
        help="of the prior, MAP and average (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=float, default=0.03, help="of the posterior (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=12, help="posterior samples (default: %(default)s)")
    parser.add_argument("--schedule", default="constant", choices=["constant", "cyclical"], help="default: %(default)s")
    parser.add_argument("--cycles", type=int, default=1, help="cycles of a cyclical schedule (default: %(default)s)")
    parser.add_argument("--exploration", type=float, default=0.4, help="share of steps at temperature 0 (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images: shows the path, not the result")
    options = parser.parse_args(arguments)
    if options.quick:
        options.n, options.seeds, options.steps, options.samples = [20], [1], 8, 4
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    started = time.perf_counter()
    prior = PriorModel.from_pretrained(options.prior)
    limit = 60 if options.quick else None
    pool = load(options.target, "train", limit=limit, augment=True)
    test = load(options.target, "test", limit=limit, augment=False)
    rows, predictions = compare(options, prior, pool, test)
    shown = {name: (values.exp(), test.labels) for name, values in predictions.items()}
    plot_reliability(shown, options.output / "reliability.png", title=f"CIFAR-100 superclasses, n = {options.n[-1]}")
    by_samples = [
        {"method": f"n = {row['n']}", "samples": k, **one} for row in rows for k, one in enumerate(row["by_samples"], start=1)
    ]
    plot_average(by_samples, options.output / "samples.png", title="Average over posterior samples")
    print(f"\nCIFAR-100 superclasses, {len(test):,} test images, seeds {options.seeds}:\n\n{table(rows)}\n")
    different = [row["disagreement"] for row in rows if row["method"] == AVERAGE]
    print(f"two samples name different classes for {100 * fmean(different):.0f} % of the test images")
    print(f"{time.perf_counter() - started:.0f} s; numbers and figures are in {options.output}")


if __name__ == "__main__":
    main()
