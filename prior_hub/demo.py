"""The whole idea on real data: learn a prior, store it, load it, fine-tune under it, and compare.

    source  handwritten digits 0-4, each in four orientations (20 classes), a timm model trained from scratch with SGD;
            SwagCallback takes snapshots, the prior goes to output/prior
    target  handwritten digits 5-9 upright (5 classes), n = 10, 25, 50 labelled images
    three ways from the same start (the prior's mean), with the same optimizer, steps, augmentation, few-shot sets and heads:
            plain Trainer        weight decay
            isotropic prior      N(mean, v I)
            learned prior        N(mean, scale * SWAG covariance)

Every method has a learning rate and one strength to choose, and the same number of candidates. They are tried on development
sets (few-shot sets and validation images that no reported number ever sees), two for each n, and the candidate with the
lowest NLL, averaged over all of them, is used for every reported run. The typical variance of a weight takes the same values
for both priors: the scale of the learned one is that value / the median of its marginal variances.

The images are scikit-learn's copy of the "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak 1998, UCI,
CC BY 4.0; 1,797 images of 8 x 8 pixels), so nothing is downloaded.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from prior_hub import __version__
from prior_hub.finetuning.arguments import PriorTrainingArguments
from prior_hub.finetuning.trainer import PriorTrainer
from prior_hub.learning.callback import SwagCallback
from prior_hub.learning.isotropic import isotropic_prior
from prior_hub.model import PriorModel, library_versions
from prior_hub.plots import plot_comparison, plot_prior

if find_spec("matplotlib") is None:
    raise ImportError("No module named 'matplotlib'")

__all__ = ["DemoResult", "DigitsClassifier", "run_demo"]

PLAIN, ISOTROPIC, LEARNED = METHODS = ("plain fine-tuning", "isotropic prior", "learned prior")
ARCHITECTURE = "test_efficientnet"  # timm's smallest: 0.1 million parameters
CLASSES = 5
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # two-sided 95 % quantiles for 1, 2, ... degrees of freedom


@dataclass(frozen=True)
class _Plan:
    """Sizes and settings of one run of the demo.

    Found by trial: on development sets, in part of another random cut of the same digits, so that the design as a whole has
    seen images of today's test set. What a run chooses, it chooses on its development sets alone.
    """

    pixels: int = 24
    source_steps: int = 600
    source_batch: int = 32
    source_learning_rate: float = 0.05  # constant, and high enough that the weights keep moving
    rank: int = 20
    variance_floor: float = 1e-5
    steps: int = 60
    batch: int = 25
    numbers: tuple[int, ...] = (10, 25, 50)
    learning_rates: tuple[float, ...] = (0.03, 0.1)
    weight_decays: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    variances: tuple[float, ...] = (0.1, 0.3, 1.0)  # typical variance of a weight under a prior
    head_variance: float = 1.0
    development_sets: int = 2  # for each n


_QUICK = _Plan(
    pixels=16,
    source_steps=24,
    rank=4,
    steps=4,
    numbers=(10, 20),
    learning_rates=(0.03,),
    weight_decays=(1e-2,),
    variances=(1.0,),
    development_sets=1,
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it lies.

    Attributes:
        prior: folder of the learned prior.
        figure: accuracy and NLL against n.
        results: every number, as JSON.
        rows: one per reported run: method, n, seed, accuracy (a share), nll (nats per image).
        settings: what was chosen for each method.
        table: the printed table.
        verdict: the printed comparison.
        seconds: wall time.
    """

    prior: Path
    figure: Path
    results: Path
    rows: tuple[dict[str, Any], ...]
    settings: dict[str, dict[str, float]]
    table: str
    verdict: str
    seconds: float


class DigitsClassifier(nn.Module):
    """A timm model as `Trainer` wants it: pixel_values and labels in, loss and logits out.

    Args:
        classes: size of the head.
        freeze_statistics: keep BatchNorm's running statistics in training too; those of ten images are worth little.
    """

    def __init__(self, classes: int, *, freeze_statistics: bool = False) -> None:
        super().__init__()
        self.timm_model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=classes, in_chans=1)
        self.freeze_statistics = freeze_statistics

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """pixel_values (B, 1, S, S), labels (B,) -> mean NLL and logits (B, classes)."""
        logits = self.timm_model(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def train(self, mode: bool = True) -> DigitsClassifier:
        """As every module; BatchNorm stays in evaluation mode where its statistics are frozen."""
        super().train(mode)
        if self.freeze_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def run_demo(output: Path, *, seeds: int = 3, quick: bool = False, progress: bool = True) -> DemoResult:
    """Run it, print the table, and write output/prior, output/demo.png, output/prior.png and output/results.json.

    Args:
        output: folder to write into; created if missing.
        seeds: reported runs per method and n, each with another few-shot set and another new head.
        quick: a much smaller run that shows the path, not the result.
        progress: show progress bars.

    Raises:
        ValueError: `seeds` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, expected 1 or more.")
    plan = _QUICK if quick else _Plan()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prior-hub-demo-") as scratch, _steady_process():
        source, target = _tasks(plan.pixels)
        print(
            f"1. Source task: digits 0-4 in four orientations, timm {ARCHITECTURE} from scratch, {plan.source_steps} SGD steps"
        )
        prior, source_accuracy = _learn(source, plan, scratch, progress)
        prior.save_pretrained(output / "prior")
        prior = PriorModel.from_pretrained(output / "prior")
        size = sum(file.stat().st_size for file in (output / "prior").glob("*.safetensors")) / 1e6
        print(f"   accuracy on held-out digits 0-4: {100 * source_accuracy:.1f} % of 20 classes")
        print(
            f"   {prior}, {prior.config.num_snapshots} snapshots, {size:.1f} MB in {output / 'prior'}, loaded back from there\n"
        )

        runner = _Runner(prior, target, plan, scratch)
        print(runner.describe())
        settings, tried = _choose(runner, plan, progress)
        for method in METHODS:
            print(f"   {method:18s} {_in_words(method, settings[method])}")

        print(f"\n3. Reported runs: {len(METHODS)} methods x n = {_listed(plan.numbers)} x {_plural(seeds, 'seed')}")
        rows = _report(runner, settings, plan, seeds, progress)
    table, verdict = _table(rows), _verdict(rows)
    few = "Digits 5-9 after learning digits 0-4"
    figure = plot_comparison(rows, output / "demo.png", title=few, chance=1 / CLASSES)
    plot_prior(prior, output / "prior.png")
    results = output / "results.json"
    seconds = time.monotonic() - began
    record = {
        "prior_hub": __version__,
        "libraries": library_versions(("scikit-learn", "numpy")),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine()},
        "quick": quick,
        "plan": asdict(plan),
        "source": {"accuracy": source_accuracy},
        "test_images": len(target.test),
        "settings": settings,
        "development": tried,
        "runs": rows,
        "summary": _summary(rows),
        "spread": "sample standard deviation over seeds",
        "seconds": round(seconds, 1),
    }
    results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if quick:
        verdict += "\n\nThis was the quick run: it shows the path, its numbers mean nothing."
    elif seeds < 10:
        verdict += (
            f"\n\n{_plural(seeds, 'seed')} can tell only large differences apart; `prior-hub demo --seeds 12` tells more."
        )
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    print(f"\nTest accuracy and NLL on {len(target.test)} images of digits 5-9, {spread}\n\n{table}\n\n{verdict}\n")
    print(f"figure {figure}, numbers {results}, {seconds:.0f} s")
    return DemoResult(
        prior=output / "prior",
        figure=figure,
        results=results,
        rows=tuple(rows),
        settings=settings,
        table=table,
        verdict=verdict,
        seconds=seconds,
    )


# ----------------------------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class _Source:
    """images (M, 1, S, S) and labels (M,), 0-19: digit + 5 * quarter turns."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class _Target:
    """Digits 5-9, labels 0-4, cut once into four parts; the lists hold indices.

    Attributes:
        images: (M, 1, S, S).
        labels: (M,).
        development: few-shot sets for choosing settings are drawn from it.
        validation: settings are chosen by the NLL here.
        training: reported few-shot sets are drawn from it.
        test: reported numbers are measured here, and nothing else is.
    """

    images: Tensor
    labels: Tensor
    development: list[int]
    validation: list[int]
    training: list[int]
    test: list[int]

    def few(self, pool: Sequence[int], n: int, seed: int) -> list[int]:
        """n indices from `pool`, equally many of each class."""
        generator = torch.Generator().manual_seed(seed)
        order = [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]
        classes = [[i for i in order if int(self.labels[i]) == c][: n // CLASSES] for c in range(CLASSES)]
        return list(itertools.chain.from_iterable(classes))


def _tasks(pixels: int) -> tuple[_Source, _Target]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8), 0 to 1
    images = nn.functional.interpolate(images, size=(pixels, pixels), mode="bilinear", align_corners=False)
    images = (images - 0.3) / 0.35  # the mean and standard deviation of these images, roughly
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)

    old = torch.nonzero(labels < CLASSES).flatten()
    old = old[torch.randperm(len(old), generator=generator)]
    kept, held_out = old[150:], old[:150]
    turned = [_four_orientations(images[part], labels[part]) for part in (kept, held_out)]
    source = _Source(*turned[0], *turned[1])

    new = torch.nonzero(labels >= CLASSES).flatten()
    new = new[torch.randperm(len(new), generator=generator)]
    order = list(range(len(new)))
    parts = (order[:130], order[130:300], order[300:450], order[450:])
    return source, _Target(images[new], labels[new] - CLASSES, *parts)


def _four_orientations(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    turned = [torch.rot90(images, quarter, (2, 3)) for quarter in range(4)]
    return torch.cat(turned), torch.cat([labels + CLASSES * quarter for quarter in range(4)])


def _examples(images: Tensor, labels: Tensor, indices: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
    chosen = range(len(labels)) if indices is None else indices
    return [{"pixel_values": images[i], "labels": labels[i]} for i in chosen]


def _distorted(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch, each image turned, sheared, scaled and shifted a little at random, with pixel noise."""
    batch: dict[str, Tensor] = default_data_collator(features)
    images = batch["pixel_values"]
    turn, scale, shear, right, down = (2 * torch.rand(5, len(images)) - 1).unbind()
    angle, factor = 0.35 * turn, torch.exp(-0.2 * scale)
    rows = [
        torch.stack([factor * angle.cos(), -factor * angle.sin() + 0.2 * shear, 0.15 * right], dim=1),
        torch.stack([factor * angle.sin(), factor * angle.cos(), 0.15 * down], dim=1),
    ]
    grid = nn.functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return batch | {"pixel_values": moved + 0.1 * torch.randn_like(moved)}


# --------------------------------------------------------------------------------------------------------- the training


def _learn(source: _Source, plan: _Plan, scratch: str, progress: bool) -> tuple[PriorModel, float]:
    """Train on the source task; (the prior, accuracy of the last weights on held-out source images)."""
    torch.manual_seed(0)
    model = DigitsClassifier(4 * CLASSES)
    swag = SwagCallback(rank=plan.rank, start=0.5, variance_floor=plan.variance_floor)
    arguments = TrainingArguments(
        **_common(scratch, seed=0),
        max_steps=plan.source_steps,
        per_device_train_batch_size=plan.source_batch,
        learning_rate=plan.source_learning_rate,
        lr_scheduler_type="constant",
        weight_decay=1e-4,
    )
    with tqdm(total=plan.source_steps, desc="   source task", unit="step", disable=not progress, leave=False) as bar:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_examples(source.images, source.labels),
            data_collator=_distorted,
            callbacks=[swag, _Advance(bar)],
            optimizer_cls_and_kwargs=_sgd(plan.source_learning_rate),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    accuracy, _ = _evaluate(model, source.held_out_images, source.held_out_labels)
    prior = swag.prior(
        objective="supervised classification of digit and orientation",
        dataset="handwritten digits 0-4 (scikit-learn load_digits)",
        dataset_license="cc-by-4.0",
        license="cc-by-4.0",
        source={"architecture": f"timm {ARCHITECTURE}, one input channel, {plan.pixels} x {plan.pixels} pixels"},
    )
    return prior, accuracy


class _Runner:
    """Fine-tunes one model: a method with its setting, on one few-shot set."""

    def __init__(self, prior: PriorModel, target: _Target, plan: _Plan, scratch: str) -> None:
        self.target, self.plan, self.scratch = target, plan, scratch
        self.priors = {ISOTROPIC: isotropic_prior(prior), LEARNED: prior}  # the isotropic one has variance 1
        marginal = torch.cat([v.flatten() for v in prior.rescaled(1.0).gaussian.marginal_variance().values()])
        self.typical = median(marginal.tolist())

    def describe(self) -> str:
        """The heading of the second part."""
        count = len(self.plan.learning_rates) * len(self.plan.variances)
        return (
            f"2. Settings: {count} per method tried on development images of digits 5-9 (none of them is reported on),\n"
            f"   lowest mean NLL chosen. SGD with momentum 0.9, {self.plan.steps} steps, cosine schedule, augmentation; "
            f"head variance {self.plan.head_variance:g} under both priors"
        )

    def candidates(self, method: str) -> list[dict[str, float]]:
        """The settings to try."""
        if method == PLAIN:
            return [
                {"learning_rate": rate, "weight_decay": decay}
                for rate, decay in itertools.product(self.plan.learning_rates, self.plan.weight_decays)
            ]
        unit = 1.0 if method == ISOTROPIC else self.typical
        return [
            {"learning_rate": rate, "typical_variance": variance, "prior_scale": variance / unit}
            for rate, variance in itertools.product(self.plan.learning_rates, self.plan.variances)
        ]

    def run(self, method: str, setting: Mapping[str, float], chosen: Sequence[int], measured: Sequence[int], seed: int) -> Any:
        """Fine-tune on the images `chosen`; (accuracy, NLL) on the images `measured`."""
        torch.manual_seed(seed)  # the same new head for every method
        model = DigitsClassifier(CLASSES, freeze_statistics=True)
        settings = {
            **_common(self.scratch, seed=seed),
            "max_steps": self.plan.steps,
            "per_device_train_batch_size": self.plan.batch,
            "learning_rate": setting["learning_rate"],
            "lr_scheduler_type": "cosine",
        }
        shared: dict[str, Any] = {
            "model": model,
            "train_dataset": _examples(self.target.images, self.target.labels, chosen),
            "data_collator": _distorted,
            "optimizer_cls_and_kwargs": _sgd(setting["learning_rate"]),
        }
        if method == PLAIN:
            self.priors[LEARNED].initialize(model)  # the same start
            trainer = Trainer(args=TrainingArguments(**settings, weight_decay=setting["weight_decay"]), **shared)
        else:
            arguments = PriorTrainingArguments(
                **settings, prior_scale=setting["prior_scale"], prior_head_variance=self.plan.head_variance
            )
            trainer = PriorTrainer(prior=self.priors[method], args=arguments, **shared)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return _evaluate(model, self.target.images[measured], self.target.labels[measured])


def _choose(runner: _Runner, plan: _Plan, progress: bool) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """For each method the candidate with the lowest development NLL, averaged over n; and all that was tried."""
    target = runner.target
    work = [(method, setting) for method in METHODS for setting in runner.candidates(method)]
    tried: list[dict[str, Any]] = []
    with tqdm(
        total=len(work) * len(plan.numbers) * plan.development_sets,
        desc="   settings",
        unit="run",
        disable=not progress,
        leave=False,
    ) as bar:
        for method, setting in work:
            for n, repeat in itertools.product(plan.numbers, range(plan.development_sets)):
                seed = 1000 * (1 + repeat) + n
                few = target.few(target.development, n, seed)
                accuracy, nll = runner.run(method, setting, few, target.validation, seed)
                tried.append({"method": method, **setting, "n": n, "seed": seed, "accuracy": accuracy, "nll": nll})
                bar.update()
    chosen = {}
    for method in METHODS:
        mine = [row for row in tried if row["method"] == method]
        options = [s for s in runner.candidates(method) if any(s.items() <= row.items() for row in mine)]
        chosen[method] = min(options, key=lambda s: fmean(r["nll"] for r in mine if s.items() <= r.items()))
    return chosen, tried


def _report(
    runner: _Runner, settings: Mapping[str, Mapping[str, float]], plan: _Plan, seeds: int, progress: bool
) -> list[dict[str, Any]]:
    target = runner.target
    work = list(itertools.product(plan.numbers, METHODS, range(seeds)))
    rows = []
    for n, method, seed in tqdm(work, desc="   reported runs", unit="run", disable=not progress, leave=False):
        few = target.few(target.training, n, seed)
        accuracy, nll = runner.run(method, settings[method], few, target.test, seed)
        rows.append({"method": method, "n": n, "seed": seed, "accuracy": accuracy, "nll": nll})
    return rows


@torch.no_grad()
def _evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(accuracy, mean NLL in nats)."""
    model.eval()
    logits = torch.cat([model(pixel_values=part).logits for part in torch.split(images, 256)]).double()
    correct = (logits.argmax(dim=1) == labels).double().mean()
    return float(correct), float(nn.functional.cross_entropy(logits, labels))


def _common(scratch: str, *, seed: int) -> dict[str, Any]:
    """Arguments of every Trainer here: on the CPU, silent, nothing saved."""
    return {
        "output_dir": scratch,
        "seed": seed,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }


def _sgd(learning_rate: float) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    return torch.optim.SGD, {"lr": learning_rate, "momentum": 0.9}


class _Advance(TrainerCallback):
    """Moves a progress bar by one at every optimizer step."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        del args, kwargs
        self.bar.update()


@contextmanager
def _steady_process() -> Iterator[None]:
    """One thread (more gain little on so small a model, lose much on a busy machine, and change the sums), cheap collections.

    Every `Trainer.train` ends in a full garbage collection, which takes longer than ten training steps here because it
    visits everything that was ever imported; frozen objects are not visited.
    """
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)  # which a Trainer's log_level sets for the whole process


# --------------------------------------------------------------------------------------------------------- the results


def _group(rows: Sequence[Mapping[str, Any]], method: str, n: int, key: str) -> list[float]:
    return [float(row[key]) for row in rows if row["method"] == method and row["n"] == n]


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over seeds (None for one seed), per n and method."""
    found = []
    for n in sorted({row["n"] for row in rows}):
        for method in METHODS:
            entry: dict[str, Any] = {"method": method, "n": n}
            for key in ("accuracy", "nll"):
                values = _group(rows, method, n, key)
                entry |= {f"{key}_mean": fmean(values), f"{key}_spread": stdev(values) if len(values) > 1 else None}
            found.append(entry)
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'n':>4}   {'method':18}   {'accuracy [%]':>14}   {'NLL [nats]':>15}"]
    lines.append("-" * len(lines[0]))
    previous = None
    for entry in _summary(rows):
        if previous not in (None, entry["n"]):
            lines.append("")
        number = "" if entry["n"] == previous else entry["n"]
        previous = entry["n"]
        accuracy = _with_spread(100 * entry["accuracy_mean"], _times(entry["accuracy_spread"], 100), 1)
        nll = _with_spread(entry["nll_mean"], entry["nll_spread"], 3)
        lines.append(f"{number:>4}   {entry['method']:18}   {accuracy:>14}   {nll:>15}")
    return "\n".join(lines)


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who is best at each n, and the learned prior against both others on the same few-shot sets, seed by seed."""
    lines = [
        "Best by the mean. Below it the learned prior minus the others over the same few-shot sets, mean ± standard deviation;",
        "better or worse where a paired t-test at 95 % tells them apart:",
    ]
    summary = _summary(rows)
    for n in sorted({row["n"] for row in rows}):
        entries = [entry for entry in summary if entry["n"] == n]
        accurate = max(entry["accuracy_mean"] for entry in entries)
        likely = min(entry["nll_mean"] for entry in entries)
        first = " and ".join(entry["method"] for entry in entries if entry["accuracy_mean"] == accurate)
        second = " and ".join(entry["method"] for entry in entries if entry["nll_mean"] == likely)
        lines.append(f"  n = {n:<3} best accuracy: {first}; best NLL: {second}")
        for rival in (PLAIN, ISOTROPIC):
            parts = []
            for key, unit, digits, better in (("accuracy", 100, 1, 1), ("nll", 1, 3, -1)):
                pairs = zip(_group(rows, LEARNED, n, key), _group(rows, rival, n, key), strict=True)
                parts.append(_difference([unit * (mine - theirs) for mine, theirs in pairs], digits, better))
            lines.append(f"          learned - {rival + ':':19}accuracy {parts[0]}, NLL {parts[1]}")
    return "\n".join(lines)


def _difference(values: Sequence[float], digits: int, better: int) -> str:
    """A mean difference, its spread, and what that says; `better` is the sign of a gain."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f} (one seed)"
    spread = stdev(values)
    quantile = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1]
    apart = abs(mean) > quantile * spread / math.sqrt(len(values))
    words = "not told apart" if not apart else "better" if mean * better > 0 else "worse"
    return f"{mean:+.{digits}f} ± {spread:.{digits}f} ({words})"


def _with_spread(value: float, spread: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _in_words(method: str, setting: Mapping[str, float]) -> str:
    rate = f"learning rate {setting['learning_rate']:g}"
    if method == PLAIN:
        return f"{rate}, weight decay {setting['weight_decay']:g}"
    scale = f", prior_scale {setting['prior_scale']:.3g}" if method == LEARNED else ""
    return f"{rate}, typical variance {setting['typical_variance']:g}{scale}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
