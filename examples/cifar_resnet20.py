"""A prior from a real pre-trained model: CIFAR-10 ResNet-20 -> SWAG on CIFAR-10 -> few-shot CIFAR-100.

    python examples/cifar_resnet20.py --weights cifar10_resnet20.safetensors --source uoft-cs/cifar10 --target uoft-cs/cifar100

1. Starting from the pre-trained weights, training goes on for a while on the source data, with augmentation and a constant
   learning rate, and SwagCallback takes snapshots: the prior, saved to OUTPUT/prior with its card.
2. The target task, CIFAR-100's 20 superclasses with n labelled images, is fine-tuned five ways from the same start (the
   prior's mean): plainly, under a zero-mean isotropic prior, an isotropic prior at the mean, and the learned prior with and
   without its low-rank part.
3. The strength of each (weight decay, or the typical variance of a weight under the prior) is chosen on a fifth of the n
   images, held out; then it is fitted again to all n. The test set is used once, for the table.

Prints accuracy and NLL on the test set, mean and standard deviation over seeds, and writes OUTPUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments

from prior_hub import PriorModel, PriorTrainer, PriorTrainingArguments, SwagCallback, isotropic_prior

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHT_DECAYS = (0.0, 1e-3, 1e-2)
VARIANCES = (1e-3, 1e-2, 1e-1)  # typical variance of a weight under a prior
PLAIN, ZERO, ISOTROPIC, DIAGONAL, LOW_RANK = METHODS = (
    "plain fine-tuning",
    "zero-mean isotropic",
    "isotropic at the mean",
    "learned, diagonal",
    "learned, low rank",
)


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters (option A of He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.pad = stride, outside // 4 if inside != outside else 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/stride, W/stride)."""
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + shortcut).relu()


class ResNet20(nn.Module):
    """CIFAR ResNet-20, 269,722 parameters with 10 classes; pixel_values and labels in, loss and logits out."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for i, (inside, outside) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            blocks = [Block(inside, outside, 1 if i == 1 else 2), Block(outside, outside, 1), Block(outside, outside, 1)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """pixel_values (B, 3, 32, 32) -> logits (B, classes)."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(pixel_values)).relu())))
        logits = self.linear(x.mean((2, 3)))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Images(torch.utils.data.Dataset):
    """Images in memory, (n, 3, 32, 32) uint8, normalised when asked for; cropped and flipped at random if `augment`."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, augment: bool = True) -> None:
        self.pixels, self.labels, self.augment = pixels, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> Tensor:
        """(B, 3, 32, 32) float32."""
        x = self.pixels[index].float() / 255
        x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        if not self.augment:
            return x
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        padded = nn.functional.pad(x, (4, 4, 4, 4))
        corners = torch.randint(0, 9, (len(x), 2)).tolist()
        return torch.stack([image[:, a : a + 32, b : b + 32] for image, (a, b) in zip(padded, corners, strict=True)])

    def __getitems__(self, index: list[int]) -> list[dict[str, Tensor]]:
        chosen = torch.tensor(index)
        pairs = zip(self.batch(chosen), self.labels[chosen], strict=True)
        return [{"pixel_values": x, "labels": y} for x, y in pairs]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def part(self, index: Tensor) -> Images:
        """The images at `index`."""
        return Images(self.pixels[index], self.labels[index], augment=self.augment)


def load(name: str, split: str, *, limit: int | None = None, augment: bool) -> Images:
    """A Hub data set or a local folder of parquet files; superclasses where there are any."""
    data = load_dataset(name, split=split)
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    image = next(c for c in ("image", "img") if c in data.column_names)
    label = next(c for c in ("coarse_label", "superclass", "label") if c in data.column_names)
    pixels = [np.asarray(x.convert("RGB")) for x in tqdm(data[image], desc=f"{Path(name).name} {split}", leave=False)]
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(data[label]), augment=augment)


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """(accuracy, NLL in nats) without augmentation."""
    model.eval()
    plain = Images(images.pixels, images.labels, augment=False)
    logits = torch.cat([model(plain.batch(part))["logits"] for part in torch.arange(len(plain)).split(500)]).double()
    accuracy = (logits.argmax(1) == images.labels).double().mean()
    return accuracy.item(), nn.functional.cross_entropy(logits, images.labels).item()


def train(trainer_class: type[Trainer], model: nn.Module, settings: dict[str, Any], images: Images, **more: Any) -> Trainer:
    """Train with SGD (momentum 0.9) and none of Trainer's own output."""
    arguments = PriorTrainingArguments if trainer_class is PriorTrainer else TrainingArguments
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    quiet["log_level"] = "error"
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, dataloader_pin_memory=False, **quiet, **settings)
        sgd = (torch.optim.SGD, {"lr": args.learning_rate, "momentum": 0.9})
        trainer = trainer_class(model=model, args=args, train_dataset=images, optimizer_cls_and_kwargs=sgd, **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def learn_prior(options: argparse.Namespace, images: Images) -> PriorModel:
    """SWAG from the pre-trained weights on, at a constant learning rate."""
    model = ResNet20(10)
    model.load_state_dict(load_file(options.weights))
    print(f"source, before: training accuracy {evaluate(model, images)[0]:.3f}")
    callback = SwagCallback(options.rank, start=0.25, variance_floor=options.variance_floor)
    settings = {
        "max_steps": options.source_steps,
        "learning_rate": options.source_learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": options.batch_size,
        "seed": 0,
    }
    train(Trainer, model, settings, images, callbacks=[callback])
    print(f"source, after:  training accuracy {evaluate(model, images)[0]:.3f}")
    local = Path(options.source)  # a path of this machine means nothing to others
    dataset = local.name if local.exists() else options.source
    prior = callback.prior(objective="supervised classification", dataset=dataset)
    prior.save_pretrained(options.output / "prior")
    return PriorModel.from_pretrained(options.output / "prior")


def under(method: str, learned: PriorModel, strength: float) -> PriorModel | None:
    """The prior of a method, with `strength` the typical variance of a weight."""
    if method == PLAIN:
        return None
    if method == ZERO:
        at_zero = {name: torch.zeros_like(t) for name, t in learned.mean.items()}
        flat = {name: torch.full_like(t, strength) for name, t in learned.mean.items()}
        return PriorModel.from_tensors(at_zero, flat, head_parameters=learned.config.head_parameters)
    if method == ISOTROPIC:
        return isotropic_prior(learned, variance=strength)
    prior = learned.truncated(0) if method == DIAGONAL else learned
    middle = median(torch.cat([v.flatten() for v in prior.rescaled(1.0).gaussian.marginal_variance().values()]).tolist())
    return prior.rescaled(strength / middle)


def finetune(
    method: str, learned: PriorModel, strength: float, images: Images, options: argparse.Namespace, seed: int
) -> nn.Module:
    """One fine-tuning from the learned prior's mean."""
    torch.manual_seed(seed)
    model = ResNet20(20)
    learned.initialize(model)
    prior = under(method, learned, strength)
    settings: dict[str, Any] = {
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": min(options.batch_size, len(images)),
        "seed": seed,
    }
    if prior is None:
        train(Trainer, model, settings | {"weight_decay": strength}, images)
        return model
    settings |= {"prior_initialize": False, "prior_head_variance": 1.0}
    train(PriorTrainer, model, settings, images, prior=prior)
    return model


def compare(
    options: argparse.Namespace, learned: PriorModel, pool: Images, test: Images, methods: Sequence[str] = METHODS
) -> Iterator[dict[str, Any]]:
    """Choose each method's strength on held-out images of the first seed, then fit and test it on every seed."""
    subsets = [torch.randperm(len(pool), generator=torch.Generator().manual_seed(s))[: options.n] for s in range(options.seeds)]
    fitting, validation = pool.part(subsets[0][options.n // 5 :]), pool.part(subsets[0][: options.n // 5])
    bar = tqdm(total=len(methods) * (3 + options.seeds), desc="fine-tuning")
    for method in methods:
        scores: dict[float, float] = {}
        for strength in WEIGHT_DECAYS if method == PLAIN else VARIANCES:
            scores[strength] = evaluate(finetune(method, learned, strength, fitting, options, 0), validation)[1]
            bar.update()
        best = min(scores, key=scores.__getitem__)
        for seed, subset in enumerate(subsets):
            model = finetune(method, learned, best, pool.part(subset), options, seed)
            bar.update()
            accuracy, nll = evaluate(model, test)
            yield {"method": method, "strength": best, "seed": seed, "n": options.n, "accuracy": accuracy, "nll": nll}
    bar.close()


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, and who has the lowest NLL."""
    lines = [f"{'':<24}{'accuracy':>18}{'NLL (nats)':>20}   chosen"]
    means = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = []
        for key in ("accuracy", "nll"):
            values = [row[key] for row in mine]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread}")
        means[method] = fmean(row["nll"] for row in mine)
        lines.append(f"{method:<24}{cells[0]:>18}{cells[1]:>20}   {mine[0]['strength']:g}")
    best = min(means, key=means.__getitem__)
    return "\n".join([*lines, f"lowest NLL: {best} ({means[best]:.3f}; plain fine-tuning {means[PLAIN]:.3f})"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file with the pre-trained ResNet-20")
    parser.add_argument(
        "--source", default="uoft-cs/cifar10", help="Hub data set or local parquet folder (default: %(default)s)"
    )
    parser.add_argument("--target", default="uoft-cs/cifar100", help="the same for the target task (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("example_output"), help="folder for the prior and results.json")
    parser.add_argument("--n", type=int, default=500, help="labelled target images (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="few-shot sets and head initialisations (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="source and target (default: %(default)s)")
    parser.add_argument("--source-steps", type=int, default=400, help="SWAG steps on the source task (default: %(default)s)")
    parser.add_argument("--source-learning-rate", type=float, default=0.02, help="constant (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=20, help="deviations kept (default: %(default)s)")
    parser.add_argument("--variance-floor", type=float, default=1e-6, help="smallest variance (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images: shows the path, not the result")
    options = parser.parse_args(arguments)
    if options.quick:
        options.n, options.seeds, options.steps, options.source_steps, options.rank = 40, 1, 3, 12, 3
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    started = time.perf_counter()
    limit = 200 if options.quick else None
    learned = learn_prior(options, load(options.source, "train", limit=limit, augment=True))
    print(learned)
    pool = load(options.target, "train", limit=limit, augment=True)
    test = load(options.target, "test", limit=limit, augment=False)
    rows = list(compare(options, learned, pool, test))
    print(f"\nCIFAR-100 superclasses, n = {options.n}, {len(test):,} test images, {options.seeds} seeds:\n{table(rows)}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    (options.output / "results.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    print(f"{time.perf_counter() - started:.0f} s; every number is in {options.output / 'results.json'}")


if __name__ == "__main__":
    main()
