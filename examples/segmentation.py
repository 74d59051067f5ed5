"""Semantic segmentation from few labelled images: a prior learned by classification, under a segmentation head.

    python examples/segmentation.py --source FOLDER_OR_NAME --target FOLDER_OR_NAME

FOLDER_OR_NAME is a data set of the Hub or a local folder of parquet files: `--source` with an image and a label column
(uoft-cs/cifar10), `--target` with an image and a mask column of class numbers, 255 where a pixel is not to count.

1. A small ResNet learns to classify the source images. On the way, at a constant learning rate, `SwagCallback` learns a
   Gaussian over its weights, the prior, which is stored in OUTPUT/prior and read back.
2. The target is fine-tuned with n labelled images: UperNet, whose backbone is that ResNet (names match by themselves,
   'resnet.' becomes 'backbone.') and whose head is new. Four ways, all from the prior's mean: plainly; under an isotropic
   prior at the mean; under the learned prior (one MAP solution each); and by sampling the posterior under the learned prior
   with `sampler="baoa"`, whose predictions are the average over the samples.
3. Each method has four settings to choose from (learning rate or temperature, and strength: weight decay, or the typical
   variance of a weight under the prior). The choice is by pixel NLL on a fifth of the n images, held out; then it is fitted
   again to all n. The test set is used once, for the table.

The loss is a mean over pixels, so it must be said what one observation is (`prior_count`): here "{count}".

Prints mean IoU, pixel accuracy, NLL per pixel and calibration error (ECE) on the test set, mean and standard deviation over
seeds. Writes OUTPUT/results.json, and OUTPUT/segmentation.png: for some test images what the average predicts, its entropy
(all of its uncertainty) and the mutual information (where the samples disagree: what more data would settle).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from prior_hub import (
    PriorModel,
    PriorTrainer,
    PriorTrainingArguments,
    SwagCallback,
    isotropic_prior,
    segmentation_metrics,
)
from prior_hub.inference.average import BayesianModelAverage
from prior_hub.plots import plot_segmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORED = 255
COUNT = "labels"  # what counts as one observation: every pixel
BACKBONE = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}
PLAIN, ISOTROPIC, LEARNED, AVERAGE = METHODS = (
    "plain fine-tuning",
    "isotropic at the mean",
    "learned prior",
    "learned prior, average",
)
# (learning rate, weight decay), (learning rate, typical variance of a weight) or (temperature, typical variance of a weight)
SETTINGS = {
    PLAIN: list(itertools.product((2e-3, 6e-3), (0.0, 0.1))),
    ISOTROPIC: list(itertools.product((2e-3, 6e-3), (1e-3, 1e-1))),
    LEARNED: list(itertools.product((2e-3, 6e-3), (1e-3, 1e-1))),
    AVERAGE: list(itertools.product((1.0, 10.0), (1e-2, 1e-1))),
}


class Images(torch.utils.data.Dataset):
    """Images in memory, (n, 3, H, W) uint8, with labels (n,) or masks (n, H, W); flipped at random if `augment`."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, augment: bool, size: tuple[int, int] | None = None) -> None:
        self.pixels, self.labels, self.augment, self.size = pixels, labels, augment, size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, index: list[int]) -> list[dict[str, Tensor]]:
        x, y = self.pixels[index].float() / 255, self.labels[index]
        x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        if self.size is not None:
            x = nn.functional.interpolate(x, size=self.size, mode="bilinear", align_corners=False)
        if self.augment:
            flip = torch.rand(len(x)) < 0.5
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
            y = torch.where(flip.view(-1, 1, 1), y.flip(2), y) if y.ndim == 3 else y
        return [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def part(self, index: Tensor | slice, *, augment: bool) -> Images:
        """The images at `index`."""
        return Images(self.pixels[index], self.labels[index], augment=augment, size=self.size)


def rows(name: str, split: str, limit: int | None) -> Any:
    """A split of a Hub data set or a local folder of parquet files; the first `limit` rows."""
    data = load_dataset(name, split=split)
    return data if limit is None else data.select(range(min(limit, len(data))))


def load_source(name: str, *, limit: int | None = None, side: int = 48) -> Images:
    """Images with one label each, `side` x `side` pixels."""
    data = rows(name, "train", limit)
    column = next(c for c in ("image", "img") if c in data.column_names)
    found = [np.asarray(x.convert("RGB")) for x in tqdm(data[column], desc=f"{Path(name).name} train", leave=False)]
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)
    return Images(pixels, torch.tensor(data["label"]), augment=True, size=(side, side))


def load_target(name: str, split: str, *, limit: int | None = None, size: tuple[int, int] = (72, 96)) -> Images:
    """Images and masks, all of one size."""
    data = rows(name, split, limit)
    mask = next(c for c in ("mask", "label", "annotation") if c in data.column_names)
    whole = size[::-1]  # PIL has the width first
    pixels, labels = [], []
    for row in tqdm(data, desc=f"{Path(name).name} {split}", leave=False):
        pixels.append(np.asarray(row["image"].convert("RGB").resize(whole, Image.Resampling.BILINEAR)))
        labels.append(np.asarray(row[mask].resize(whole, Image.Resampling.NEAREST), dtype=np.int64))
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels)), augment=False)


def train(model: nn.Module, images: Images, folder: str | Path, *, prior: PriorModel | None = None, **settings: Any) -> Trainer:
    """Train, with none of Trainer's own output; the trainer evaluates afterwards."""
    more = {"callbacks": settings.pop("callbacks", None), "compute_metrics": settings.pop("compute_metrics", None)}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    size = min(settings.pop("batch_size"), len(images))
    settings = {
        **quiet,
        "log_level": "error",
        "dataloader_pin_memory": False,
        "dataloader_drop_last": True,  # UperNet pools to one pixel: a last batch of one image would have no statistics there
        "batch_eval_metrics": more["compute_metrics"] is not None,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        **settings,
    }
    args = PriorTrainingArguments(str(folder), **settings)
    trainer = PriorTrainer(model=model, args=args, train_dataset=images, prior=prior, **more)  # without prior it is Trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    args.dataloader_drop_last = False  # evaluation would drop images too
    return trainer


def learn_prior(options: argparse.Namespace, images: Images) -> PriorModel:
    """A classifier from scratch, and SWAG over the last part of its training."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**BACKBONE, num_labels=int(images.labels.max()) + 1))
    callback = SwagCallback(options.rank, start=options.swag_start, variance_floor=options.variance_floor)
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(
            model,
            images,
            folder,
            callbacks=[callback],
            max_steps=options.source_steps,
            learning_rate=options.source_learning_rate,
            lr_scheduler_type="constant",
            batch_size=64,
            optim="sgd",
            optim_args="momentum=0.9",
            seed=0,
        )
        part = images.part(slice(0, 1000), augment=False)
        logits = torch.from_numpy(trainer.predict(part).predictions)
    print(f"source: accuracy {(logits.argmax(1) == part.labels).double().mean():.3f} on 1,000 of its training images")
    local = Path(options.source)  # a path of this machine means nothing to others
    prior = callback.prior(objective="supervised classification", dataset=local.name if local.exists() else options.source)
    prior.save_pretrained(options.output / "prior")
    return PriorModel.from_pretrained(options.output / "prior")


def segmenter(classes: int) -> UperNetForSemanticSegmentation:
    """UperNet over the same ResNet; without the auxiliary head, whose loss would be a second likelihood."""
    stages = [f"stage{i + 1}" for i in range(len(BACKBONE["depths"]))]
    backbone = ResNetConfig(**BACKBONE, out_features=stages)
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=24, use_auxiliary_head=False, num_labels=classes, loss_ignore_index=IGNORED
        )
    )


def under(method: str, learned: PriorModel, variance: float) -> PriorModel:
    """The prior of a method, with `variance` the typical (median) variance of a weight."""
    if method == ISOTROPIC:
        return isotropic_prior(learned, variance=variance)
    middle = median(torch.cat([v.flatten() for v in learned.rescaled(1.0).gaussian.marginal_variance().values()]).tolist())
    return learned.rescaled(variance / middle)


def finetune(
    method: str,
    learned: PriorModel,
    setting: tuple[float, float],
    images: Images,
    classes: int,
    options: argparse.Namespace,
    seed: int,
    folder: str | Path,
) -> Trainer:
    """One fine-tuning from the learned prior's mean."""
    torch.manual_seed(seed)
    model = segmenter(classes)
    learned.initialize(model)
    first, strength = setting
    settings: dict[str, Any] = {
        "max_steps": options.steps,
        "batch_size": options.batch_size,
        "seed": seed,
        "compute_metrics": segmentation_metrics(classes, IGNORED),
    }
    if method == AVERAGE:
        settings |= {
            "sampler": "baoa",
            "learning_rate": options.sampler_learning_rate,
            "temperature": first,
            "num_cycles": options.cycles,
            "samples_per_cycle": options.samples_per_cycle,
        }
    else:
        settings |= {"learning_rate": first, "lr_scheduler_type": "cosine", "optim": "adamw_torch"}
    if method == PLAIN:
        return train(model, images, folder, weight_decay=strength, **settings)
    settings |= {"prior_initialize": False, "prior_count": COUNT, "prior_head_variance": options.head_variance}
    return train(model, images, folder, prior=under(method, learned, strength), **settings)


def measured(trainer: Trainer, images: Images) -> dict[str, float]:
    """Metrics of the model, or of the average over the samples where there are any."""
    found = trainer.evaluate(images)
    prefix = "eval_bma_" if "eval_bma_loss" in found else "eval_"
    return {name: found[prefix + name] for name in ("mean_iou", "pixel_accuracy", "nll", "ece")}


def compare(
    options: argparse.Namespace, learned: PriorModel, pool: Images, test: Images, classes: int, n: int
) -> Iterator[dict[str, Any]]:
    """Choose each method's setting on held-out images of the first seed, then fit and test it on every seed."""
    subsets = [torch.randperm(len(pool), generator=torch.Generator().manual_seed(s))[:n] for s in range(options.seeds)]
    fitting = pool.part(subsets[0][max(1, n // 5) :], augment=True)
    validation = pool.part(subsets[0][: max(1, n // 5)], augment=False)
    bar = tqdm(total=sum(len(SETTINGS[m]) + options.seeds for m in METHODS), desc=f"fine-tuning, n = {n}")
    for method in METHODS:
        scores: dict[tuple[float, float], float] = {}
        for setting in SETTINGS[method]:
            with tempfile.TemporaryDirectory() as folder:
                trainer = finetune(method, learned, setting, fitting, classes, options, 0, folder)
                scores[setting] = measured(trainer, validation)["nll"]
            bar.update()
        best = min(scores, key=scores.__getitem__)
        for seed, subset in enumerate(subsets):
            with tempfile.TemporaryDirectory() as folder:
                trainer = finetune(method, learned, best, pool.part(subset, augment=True), classes, options, seed, folder)
                found = measured(trainer, test)
                if method == AVERAGE and seed == 0:
                    draw(options, trainer, test, n)
            bar.update()
            held_out = {" ".join(f"{x:g}" for x in setting): score for setting, score in scores.items()}
            yield {"method": method, "n": n, "seed": seed, "setting": best, "held_out_nll": held_out, **found}
    bar.close()


def draw(options: argparse.Namespace, trainer: Any, test: Images, n: int) -> None:
    """OUTPUT/segmentation.png; of several n the last one's stays."""
    shown = test.part(slice(0, options.pictures), augment=False)
    average = BayesianModelAverage.from_folder(trainer.samples_folder, trainer.model)
    found = average.predict(torch.utils.data.DataLoader(shown, batch_size=options.batch_size), progress=False)
    plot_segmentation(
        shown.pixels.float() / 255,
        shown.labels,
        found.log_probabilities.argmax(1),
        found.entropy,
        found.mutual_information,
        options.output / "segmentation.png",
        title=f"average over {len(average)} posterior samples, {n} labelled images",
    )


def table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    lines = [f"{'':<24}{'mean IoU':>16}{'pixel accuracy':>18}{'NLL (nats/pixel)':>19}{'ECE':>16}   chosen"]
    for method in dict.fromkeys(row["method"] for row in found):
        mine = [row for row in found if row["method"] == method]
        line = f"{method:<24}"
        for key, width in (("mean_iou", 16), ("pixel_accuracy", 18), ("nll", 19), ("ece", 16)):
            values = [row[key] for row in mine]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            line += f"{fmean(values):.3f}{spread}".rjust(width)
        lines.append(f"{line}   {' '.join(f'{x:g}' for x in mine[0]['setting'])}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    description = (__doc__ or "").format(count=COUNT)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="uoft-cs/cifar10", help="classification images (default: %(default)s)")
    parser.add_argument("--target", required=True, help="images and masks, splits train and test")
    parser.add_argument("--prior", help="Hub name or folder of a prior learned before: step 1 is left out")
    parser.add_argument("--output", type=Path, default=Path("example_output"), help="folder for what is written")
    parser.add_argument("--n", type=int, nargs="+", default=[20], help="labelled target images (default: 20)")
    parser.add_argument("--seeds", type=int, default=2, help="few-shot sets and head initialisations (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="of each fine-tuning (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of the target (default: %(default)s)")
    parser.add_argument("--source-steps", type=int, default=1000, help="of 64 source images (default: %(default)s)")
    parser.add_argument("--source-learning-rate", type=float, default=0.05, help="constant (default: %(default)s)")
    parser.add_argument("--swag-start", type=float, default=0.6, help="share of the source steps before SWAG (%(default)s)")
    parser.add_argument("--rank", type=int, default=10, help="deviations kept (default: %(default)s)")
    parser.add_argument("--variance-floor", type=float, default=1e-8, help="smallest variance (default: %(default)s)")
    parser.add_argument("--head-variance", type=float, default=1.0, help="prior of the new head (default: %(default)s)")
    parser.add_argument("--sampler-learning-rate", type=float, default=0.1, help="of 'baoa' (default: %(default)s)")
    parser.add_argument("--cycles", type=int, default=2, help="of exploring and sampling (default: %(default)s)")
    parser.add_argument("--samples-per-cycle", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=6, help="test images in segmentation.png (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images: shows the path, not the result")
    options = parser.parse_args(arguments)
    if options.quick:
        options.n, options.seeds, options.steps, options.source_steps, options.rank = [6], 1, 4, 6, 2
        options.cycles, options.samples_per_cycle, options.pictures, options.batch_size = 1, 2, 2, 2
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    limit = 64 if options.quick else None
    if options.prior is None:
        learned = learn_prior(options, load_source(options.source, limit=limit))
    else:
        learned = PriorModel.from_pretrained(options.prior)
    print(learned)
    pool, test = (load_target(options.target, split, limit=limit) for split in ("train", "test"))
    classes = int(torch.cat([m[m != IGNORED] for m in (pool.labels, test.labels)]).max()) + 1
    print(learned.match(segmenter(classes)))
    found: list[dict[str, Any]] = []
    for n in options.n:
        part = list(compare(options, learned, pool, test, classes, n))
        found += part
        print(f"\n{Path(options.target).name}, n = {n}, {len(test):,} test images, {options.seeds} seeds:\n{table(part)}")
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        (options.output / "results.json").write_text(json.dumps({"settings": settings, "rows": found}, indent=2) + "\n")
    print(f"{time.perf_counter() - started:.0f} s; every number is in {options.output / 'results.json'}")


if __name__ == "__main__":
    main()
