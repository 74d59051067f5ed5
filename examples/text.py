"""A prior for text: an encoder learns a source task, sentiment is learned from few labels under the prior it leaves.

    python examples/text.py                                        # ag_news -> sst2 from the Hub, an encoder from scratch
    python examples/text.py --model prajjwal1/bert-tiny            # a pre-trained encoder
    python examples/text.py --source folder/ag_news --target folder/sst2     # local folders of parquet files
    python examples/text.py --lora 4                               # source adapter -> target adapter, encoder frozen
    python examples/text.py --lora 4 --through                     # a prior over the encoder, taken through target adapters

1. The encoder: a small BERT with a word-piece vocabulary of its own, both made from the source texts, pre-trained by masked
   words without labels (or --model, as it comes).
2. The source task (--objective: topics, or masked words once more) is trained at a constant learning rate while SwagCallback
   takes snapshots: the prior, saved to OUTPUT/prior with its card. With --lora it is a prior over the weights of a LoRA
   adapter, which knows its rank and scaling and refuses an adapter of another kind.
3. The target task with n labelled sentences is fine-tuned by AdamW three ways from the same start, the prior's mean: plainly,
   under an isotropic prior at the mean, and under the learned prior. Learned priors are stiff: PriorTrainer chooses by itself
   whether the prior enters as a gradient or as an implicit step (prior_update='auto'). With --through the encoder is frozen,
   and the prior acts on W0 + s B A, the weights that the model computes with.
4. The strength of each (weight decay, or the typical variance of a weight under the prior) is chosen on a fifth of the n
   sentences, held out; then it is fitted again to all n. The test set is used once, for the table.

Prints accuracy and NLL on the test set, mean and standard deviation over seeds, and writes OUTPUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from prior_hub import PriorModel, PriorTrainer, PriorTrainingArguments, SwagCallback, isotropic_prior

WEIGHT_DECAYS = (0.0, 0.01, 0.1)
VARIANCES = (1e-2, 1e-1, 1.0)  # typical variance of a weight under a prior
PLAIN, ISOTROPIC, LEARNED = METHODS = ("plain fine-tuning", "isotropic at the mean", "learned, low rank")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def load(name: str, split: str, *, limit: int | None = None) -> Dataset:
    """Columns "text" and "label" of a Hub data set or a local folder of parquet files.

    For "test" the validation split is taken where the test labels are kept secret (-1, as in GLUE).
    """
    data = load_dataset(name, split=split)
    text = next((c for c in ("text", "sentence", "content") if c in data.column_names), None)
    if text is None or "label" not in data.column_names:
        raise SystemExit(f"{name} has the columns {', '.join(data.column_names)}: expected a text or sentence, and a label.")
    if split == "test" and min(data["label"]) < 0:
        return load(name, "validation", limit=limit)
    data = data.select_columns([text, "label"]).rename_column(text, "text") if text != "text" else data
    return data.select_columns(["text", "label"]).select(range(min(limit or len(data), len(data))))


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Lower-case word pieces, learned from the texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def encode(data: Dataset, tokenizer: Any, length: int) -> Dataset:
    """The texts as tokens, each as long as it is: batches are padded one by one."""

    def tokens(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(rows["text"], truncation=True, max_length=length)

    return data.map(tokens, batched=True, remove_columns="text", keep_in_memory=True, desc="words to tokens")


def train(trainer_class: type[Trainer], model: nn.Module, settings: dict[str, Any], data: Dataset, **more: Any) -> Trainer:
    """Train with AdamW, Trainer's default, and none of Trainer's own output."""
    arguments = PriorTrainingArguments if trainer_class is PriorTrainer else TrainingArguments
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, dataloader_pin_memory=False, log_level="error", **quiet, **settings)
        trainer = trainer_class(model=model, args=args, train_dataset=data, **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, tokenizer: Any) -> tuple[float, float]:
    """(accuracy, NLL in nats)."""
    model.eval()
    loader = torch.utils.data.DataLoader(data, batch_size=128, collate_fn=DataCollatorWithPadding(tokenizer))
    batches = [(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]) for batch in loader]
    logits, labels = (torch.cat(part) for part in zip(*batches))
    accuracy = (logits.argmax(1) == labels).double().mean()
    return accuracy.item(), nn.functional.cross_entropy(logits.double(), labels).item()


class Source:
    """The encoder, the source task, and the prior it leaves."""

    def __init__(self, options: argparse.Namespace, data: Dataset) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else None
        if self.tokenizer is None:
            self.tokenizer = make_tokenizer(data["text"], options.vocabulary)
        self.classes = max(data["label"]) + 1
        self.data = encode(data, self.tokenizer, options.length)
        self.unlabelled = self.data.remove_columns("label")
        self.masking = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=0.15, seed=0)
        self.folder = options.model or str(options.output / "encoder")

    def pre_train(self) -> None:
        """Masked words, without labels, from scratch."""
        options = self.options
        config = BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.hidden // 64),
            intermediate_size=4 * options.hidden,
            max_position_embeddings=options.length,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(config)
        trainer = train(Trainer, model, self.settings(options.mlm_steps), self.unlabelled, data_collator=self.masking)
        words = f"{len(self.tokenizer):,} word pieces, {sum(p.numel() for p in model.parameters()):,} weights"
        print(f"encoder: {words}, {trainer.state.global_step} steps of masked words")
        model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)

    def settings(self, steps: int) -> dict[str, Any]:
        """Of training on the source; the learning rate stays constant, as SWAG needs it."""
        return {
            "max_steps": steps,
            "learning_rate": self.options.source_learning_rate,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": min(100, steps // 4),
            "per_device_train_batch_size": self.options.batch_size,
            "train_sampling_strategy": "group_by_length",
            "seed": 0,
        }

    def model(self, kind: Any, **settings: Any) -> nn.Module:
        """The encoder with a head of its own kind; the head is new."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # that the head is new is meant
        try:
            return kind.from_pretrained(self.folder, **settings)
        finally:
            logging.set_verbosity(verbosity)

    def adapted(self, model: nn.Module) -> nn.Module:
        """A LoRA adapter over the frozen encoder; heads are trained as they are."""
        names = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        targets = [t for t in ("query", "value", "q_lin", "v_lin", "Wqkv") if t in names]
        heads = [name for name in ("classifier", "pre_classifier", "score") if hasattr(model, name)]
        config = LoraConfig(
            r=self.options.lora, lora_alpha=2 * self.options.lora, target_modules=targets, modules_to_save=heads
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's own
            return get_peft_model(model, config)

    def learn_prior(self) -> PriorModel:
        """SWAG on the source task, over the encoder or over a source adapter."""
        options, labelled = self.options, self.options.objective == "classification"
        torch.manual_seed(0)
        kind = AutoModelForSequenceClassification if labelled else AutoModelForMaskedLM
        model = self.model(kind, **({"num_labels": self.classes} if labelled else {}))
        if options.lora and not options.through:
            model = self.adapted(model)
        callback = SwagCallback(options.rank, start=0.4, variance_floor=options.variance_floor)
        collator = DataCollatorWithPadding(self.tokenizer) if labelled else self.masking
        data = self.data if labelled else self.unlabelled
        train(Trainer, model, self.settings(options.source_steps), data, data_collator=collator, callbacks=[callback])
        if labelled:
            some = self.data.select(range(min(1000, len(self.data))))
            print(f"source: training accuracy {evaluate(model, some, self.tokenizer)[0]:.3f} on {len(some)} texts")
        local = Path(options.source)  # a path of this machine means nothing to others
        objective = "supervised classification" if labelled else "masked language model"
        prior = callback.prior(objective=objective, dataset=local.name if local.exists() else options.source)
        prior.save_pretrained(options.output / "prior")
        return PriorModel.from_pretrained(options.output / "prior")

    def target_model(self, learned: PriorModel, classes: int, seed: int) -> nn.Module:
        """A classifier of the target's classes at the prior's mean, with a new head."""
        torch.manual_seed(seed)
        model = self.model(AutoModelForSequenceClassification, num_labels=classes)
        if not self.options.lora:
            learned.initialize(model)
        elif self.options.through:
            learned.initialize(model)  # W0 is the mean, and the new adapter is zero
            model = self.adapted(model)
        else:
            model = self.adapted(model)
            learned.initialize(model)
        return model


def under(method: str, learned: PriorModel, strength: float) -> PriorModel:
    """The prior of a method, with `strength` the typical variance of a weight."""
    if method == ISOTROPIC:
        return isotropic_prior(learned, variance=strength)
    middle = median(torch.cat([v.flatten() for v in learned.rescaled(1.0).gaussian.marginal_variance().values()]).tolist())
    return learned.rescaled(strength / middle)


def finetune(method: str, learned: PriorModel, strength: float, data: Dataset, source: Source, seed: int) -> tuple[Any, str]:
    """(the model, how the prior entered) after one fine-tuning from the learned prior's mean."""
    options = source.options
    model = source.target_model(learned, max(data["label"]) + 1, seed)
    settings: dict[str, Any] = {
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": min(options.batch_size, len(data)),
        "seed": seed,
    }
    more = {"data_collator": DataCollatorWithPadding(source.tokenizer)}
    if method == PLAIN:
        train(Trainer, model, settings | {"weight_decay": strength}, data, **more)
        return model, ""
    settings |= {"prior_initialize": False, "prior_head_variance": 1.0}
    trainer = train(PriorTrainer, model, settings, data, prior=under(method, learned, strength), **more)
    return model, str(trainer.prior_update)


def compare(source: Source, learned: PriorModel, pool: Dataset, test: Dataset) -> Iterator[dict[str, Any]]:
    """Choose each method's strength on held-out sentences of the first seed, then fit and test it on every seed."""
    options = source.options
    orders = [torch.randperm(len(pool), generator=torch.Generator().manual_seed(s)) for s in range(options.seeds)]
    subsets = [order[: options.n].tolist() for order in orders]
    fitting, held_out = pool.select(subsets[0][options.n // 5 :]), pool.select(subsets[0][: options.n // 5])
    bar = tqdm(total=len(METHODS) * (3 + options.seeds), desc="fine-tuning")
    for method in METHODS:
        scores: dict[float, float] = {}
        for strength in WEIGHT_DECAYS if method == PLAIN else VARIANCES:
            model, _ = finetune(method, learned, strength, fitting, source, seed=0)
            scores[strength] = evaluate(model, held_out, source.tokenizer)[1]
            bar.update()
        best = min(scores, key=scores.__getitem__)
        for seed, subset in enumerate(subsets):
            model, update = finetune(method, learned, best, pool.select(subset), source, seed)
            accuracy, nll = evaluate(model, test, source.tokenizer)
            bar.update()
            yield {"method": method, "seed": seed, "strength": best, "accuracy": accuracy, "nll": nll, "update": update} | {
                "held_out_nll": {str(k): v for k, v in scores.items()}
            }
    bar.close()


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, per method."""
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
        what = "weight decay" if method == PLAIN else f"variance, {mine[0]['update']} form"
        lines.append(f"{method:<24}{cells[0]:>18}{cells[1]:>20}   {mine[0]['strength']:g} ({what})")
    best = min(means, key=means.__getitem__)
    return "\n".join([*lines, f"lowest NLL: {best} ({means[best]:.3f}; plain fine-tuning {means[PLAIN]:.3f})"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", default="fancyzhx/ag_news", help="Hub data set or local parquet folder (default: %(default)s)"
    )
    parser.add_argument("--target", default="stanfordnlp/sst2", help="the same for the target task (default: %(default)s)")
    parser.add_argument("--model", help="Hub name or folder of a pre-trained encoder (default: one is made from scratch)")
    parser.add_argument(
        "--objective", choices=("classification", "mlm"), default="classification", help="source task (default: %(default)s)"
    )
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA adapters over a frozen encoder (default: none)")
    parser.add_argument("--through", action="store_true", help="with --lora: a prior over the encoder, through target adapters")
    parser.add_argument("--output", type=Path, default=Path("example_output"), help="folder for encoder, prior, results.json")
    parser.add_argument("--n", type=int, default=2000, help="labelled target sentences (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="few-shot sets and heads (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="source and target (default: %(default)s)")
    parser.add_argument("--mlm-steps", type=int, default=600, help="steps of masked words from scratch (default: %(default)s)")
    parser.add_argument("--source-steps", type=int, default=300, help="steps of the source task (default: %(default)s)")
    parser.add_argument("--source-learning-rate", type=float, default=5e-4, help="constant (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=10, help="deviations kept (default: %(default)s)")
    parser.add_argument("--variance-floor", type=float, default=1e-8, help="smallest variance (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4000, help="word pieces (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the encoder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="its depth (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="longest text, in word pieces (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few texts: shows the path, not the result")
    options = parser.parse_args(arguments)
    if options.through and not options.lora:
        parser.error("--through needs --lora RANK: it says what the target adapters are fine-tuned under.")
    if options.quick:
        options.n, options.seeds, options.steps, options.rank = 20, 1, 3, 3
        options.mlm_steps, options.source_steps, options.hidden, options.vocabulary, options.batch_size = 4, 8, 16, 200, 8
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    logging.disable_progress_bar()  # of loading the encoder, which is small and loaded often
    started = time.perf_counter()
    limit = 200 if options.quick else None
    source = Source(options, load(options.source, "train", limit=limit))
    if not options.model:
        source.pre_train()
    learned = source.learn_prior()
    print(learned)
    print(learned.match(source.target_model(learned, 2, seed=0)))
    pool = encode(load(options.target, "train", limit=limit), source.tokenizer, options.length)
    test = encode(load(options.target, "test", limit=limit), source.tokenizer, options.length)
    rows = list(compare(source, learned, pool, test))
    print(f"\n{options.target}, n = {options.n}, {len(test):,} test sentences, {options.seeds} seeds:\n{table(rows)}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    (options.output / "results.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    print(f"{time.perf_counter() - started:.0f} s; every number is in {options.output / 'results.json'}")


if __name__ == "__main__":
    main()
