"""A prior from images without labels: SimCLR on CIFAR-10 with a ResNet-20 -> few-shot CIFAR-100.

    python examples/cifar_self_supervised.py --source uoft-cs/cifar10 --target uoft-cs/cifar100
    python examples/cifar_self_supervised.py --weights cifar10_resnet20.safetensors ...     # start there, not from scratch

1. SimCLR: two random views of each source image are to be told from the views of all others. transformers' Trainer trains it,
   SwagCallback takes snapshots: the prior, over the ResNet-20 without SimCLR's projection head, saved to OUTPUT/prior.
   No label is read. (Weights given with --weights may have seen labels: CIFAR-10's, if they are a classifier's.)
2. A linear probe says what was learned: logistic regression from features to the source's classes, fitted on --probe images,
   on features of the weights before and after. Here labels are read, and nothing but the probe learns from them.
3. The target task, CIFAR-100's 20 superclasses with n labelled images, is fine-tuned from the prior's mean: plainly, under an
   isotropic prior at the mean, and under the learned prior. The strength of each (weight decay, or the typical variance of
   a weight) is chosen on a fifth of the n images; the test set is used once, for the table.

Prints the probe's accuracies, and accuracy and NLL on the target's test set; writes OUTPUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cifar_resnet20 import ISOTROPIC, LOW_RANK, PLAIN, Images, ResNet20, compare, load, table
from datasets import load_dataset
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from prior_hub import PriorModel, SimCLR, SwagCallback, TwoViews, recompute_batch_norm

METHODS = (PLAIN, ISOTROPIC, LOW_RANK)


class Backbone(ResNet20):
    """ResNet-20 up to its 64 features; its parameters have the names that they have in the classifier."""

    def __init__(self) -> None:
        super().__init__(1)
        self.linear = nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, 64)."""
        return super().forward(pixel_values)["logits"]


def start(options: argparse.Namespace) -> Backbone:
    """The weights that SimCLR starts from."""
    torch.manual_seed(options.seed)
    backbone = Backbone()
    if options.weights is not None:
        kept = {name: t for name, t in load_file(options.weights).items() if not name.startswith("linear.")}
        backbone.load_state_dict(kept)
    return backbone


def learn_prior(options: argparse.Namespace) -> PriorModel:
    """SimCLR with SWAG, at a constant learning rate; from images alone."""
    images = load_dataset(options.source, split="train")
    if options.quick:
        images = images.select(range(min(200, len(images))))
    views = TwoViews(32, strength=0.5, blur=0.0)  # Chen et al.'s for CIFAR
    images.set_transform(views)
    model = SimCLR(start(options), num_features=64, temperature=0.5, projection=64)
    floor = options.variance_floor
    callback = SwagCallback(options.rank, start=0.5, variance_floor=floor, batch_norm_batches=30)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=options.source_steps,
            learning_rate=options.source_learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=options.source_batch_size,
            remove_unused_columns=False,  # the images are a column that the model does not know by name
            dataloader_drop_last=True,
            dataloader_num_workers=options.workers,
            dataloader_pin_memory=False,
            logging_steps=max(1, options.source_steps // 10),
            report_to="none",
            save_strategy="no",
            use_cpu=options.cpu,
            seed=options.seed,
        )
        sgd = (torch.optim.SGD, {"lr": args.learning_rate, "momentum": 0.9, "weight_decay": 5e-4})
        trainer = Trainer(model=model, args=args, train_dataset=images, optimizer_cls_and_kwargs=sgd, callbacks=[callback])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"NT-Xent: {losses[0]:.3f} nats at first, {losses[-1]:.3f} in the end (a guess: ", end="")
    print(f"{torch.tensor(2 * options.source_batch_size - 1).log().item():.3f})")
    local = Path(options.source)  # a path of this machine means nothing to others
    facts = {"augmentation": views.description, "steps": options.source_steps, "batch_size": options.source_batch_size}
    facts["start"] = "random weights" if options.weights is None else options.weights.stem
    prior = callback.prior(dataset=local.name if local.exists() else options.source, source=facts)
    prior.save_pretrained(options.output / "prior")
    return PriorModel.from_pretrained(options.output / "prior")


@torch.no_grad()
def probe(backbone: Backbone, train: Images, test: Images, device: torch.device) -> float:
    """Test accuracy of logistic regression on features; BatchNorm statistics are those of the images as they are."""
    backbone.to(device)

    def batches(images: Images) -> list[Tensor]:
        return [images.batch(index).to(device) for index in torch.arange(len(images)).split(250)]

    recomputed = recompute_batch_norm(backbone, batches(train), max_batches=10, progress=False)
    for name, buffer in recomputed.items():
        backbone.get_buffer(name).copy_(buffer)
    backbone.eval()
    inside, outside = (torch.cat([backbone(batch).cpu() for batch in batches(images)]) for images in (train, test))
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(regression.fit(inside.numpy(), train.labels.numpy()).score(outside.numpy(), test.labels.numpy()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="safetensors file of a ResNet-20 to start from (default: from scratch)")
    parser.add_argument(
        "--source", default="uoft-cs/cifar10", help="Hub data set or local parquet folder (default: %(default)s)"
    )
    parser.add_argument("--target", default="uoft-cs/cifar100", help="the same for the target task (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("example_output"), help="folder for the prior and results.json")
    parser.add_argument("--source-steps", type=int, default=2000, help="SimCLR steps (default: %(default)s)")
    parser.add_argument("--source-batch-size", type=int, default=256, help="images compared (default: %(default)s)")
    parser.add_argument("--source-learning-rate", type=float, default=0.05, help="constant (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=20, help="deviations kept (default: %(default)s)")
    parser.add_argument("--variance-floor", type=float, default=1e-6, help="smallest variance (default: %(default)s)")
    parser.add_argument("--probe", type=int, default=5000, help="labelled images of the probe (default: %(default)s)")
    parser.add_argument("--n", type=int, default=500, help="labelled target images (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="few-shot sets and head initialisations (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that make views (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of SimCLR (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="SimCLR on the CPU even if there is an accelerator")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images: shows the path, not the result")
    options = parser.parse_args(arguments)
    if options.quick:
        options.source_steps, options.source_batch_size, options.rank, options.cpu = 12, 16, 3, True
        options.probe, options.n, options.seeds, options.steps = 100, 40, 1, 3
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    started = time.perf_counter()
    learned = learn_prior(options)
    print(learned)
    limit = 200 if options.quick else None
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    train = load(options.source, "train", limit=options.probe, augment=False)
    test = load(options.source, "test", limit=limit, augment=False)
    after = Backbone()
    learned.initialize(after)
    probes = {"before": probe(start(options), train, test, device), "after": probe(after, train, test, device)}
    print(f"linear probe, {len(train):,} labelled images, {len(test):,} test images:")
    print(f"accuracy {probes['before']:.3f} before SimCLR, {probes['after']:.3f} after")
    pool = load(options.target, "train", limit=limit, augment=True)
    target = load(options.target, "test", limit=limit, augment=False)
    rows: list[dict[str, Any]] = list(compare(options, learned, pool, target, METHODS))
    print(f"\nCIFAR-100 superclasses, n = {options.n}, {len(target):,} test images, {options.seeds} seeds:\n{table(rows)}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    results = {"settings": settings, "probe": probes, "rows": rows}
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{time.perf_counter() - started:.0f} s; every number is in {options.output / 'results.json'}")


if __name__ == "__main__":
    main()
