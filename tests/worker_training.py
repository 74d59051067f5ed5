"""Fine-tuning runs that test_distributed.py starts on two processes and repeats on one.

    torchrun --nproc_per_node 2 worker_training.py FOLDER

FOLDER holds model/NAME and prior/NAME of each scenario. They run under DDP ("ddp NAME") and then, sharded by transformers
when loaded, under FSDP2 ("fsdp NAME"). Every rank writes rank-RANK.json (facts and logs of each run) and
rank-RANK.safetensors ("RUN/KIND.name": final weights, the prior that SwagCallback learned), all in full shape.
A run on one process takes twice the accumulation steps, so that it sees the same micro-batches of two rows.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import image_data, quiet_arguments, tiny_resnet, tiny_vit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from worker_sharding import bytes_of

from prior_hub import PriorMatchError, PriorModel, PriorPenalty, PriorTrainer, SwagCallback
from prior_hub.distributed import copy_full_, is_sharded, local_tensor, reshard
from prior_hub.inference.samples import list_samples

ROWS, STEPS = 32, 6
WATCHED, CLIP = 3, 0.5  # steps of the runs whose gradients are kept, and the norm some are clipped to
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}  # also after the last step, right before on_train_end
# Older versions of transformers load a model sharded, but their Trainer then wraps it in DDP, which refuses shards.
NATIVE_FSDP2 = hasattr(PreTrainedModel, "is_distributed_loading_by_transformers")
# what is trained: (factory, settings). Heads: ViT divides by num_items_in_batch, ResNet ignores it, "unused" is no
# transformers model and accepts no such argument.
SCENARIOS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (tiny_vit, {"max_grad_norm": 0.5, "prior_head_variance": 0.5, **EVALUATING}),
    "resnet": (tiny_resnet, {"max_grad_norm": 1.0, "learning_rate": 0.005, **EVALUATING}),
    "unused": (lambda: Unused(), {"max_grad_norm": 0.5}),
    "implicit": (tiny_vit, {"max_grad_norm": 0.1, "prior_head_variance": 0.5, "prior_update": "implicit", **EVALUATING}),
    "adamw": (tiny_vit, {"optim": "adamw_torch", "prior_head_variance": 0.5, "prior_update": "implicit"}),
}
IMPLICIT = ("implicit", "adamw")  # the prior as a step of its own, far too stiff for a gradient
# chains; noise is drawn per shard, so that a sharded chain at a temperature is another one, and only "cold" is the same
CHAIN = {"num_cycles": 1, "samples_per_cycle": 2, "exploration": 0.34, "prior_head_variance": 0.5}
SCENARIOS |= {
    "baoa": (tiny_resnet, {"sampler": "baoa", "learning_rate": 0.3, **CHAIN}),
    "sghmc": (tiny_vit, {"sampler": "sghmc", "learning_rate": 0.005, **CHAIN}),
    "cold": (tiny_vit, {"sampler": "baoa", "learning_rate": 0.3, "temperature": 0.0, "sampler_metric": "full", **CHAIN}),
    "warm": (tiny_vit, {"sampler": "baoa", "learning_rate": 0.3, "sampler_metric": "full", **CHAIN}),
}
SAMPLED = ("baoa", "sghmc", "cold", "warm")
GRADIENT = tuple(name for name in SCENARIOS if name not in (*IMPLICIT, *SAMPLED))
# under FSDP2 only; its parameters can be shared nearly evenly
LONG = 20
SCENARIOS["long"] = (
    lambda: tiny_vit(hidden_size=16, intermediate_size=32),
    {"max_grad_norm": 0.5, "prior_head_variance": 0.5, "max_steps": LONG, "logging_steps": LONG},
)


class Unused(nn.Module):
    """A plain module with a layer that the forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.used, self.unused = nn.Linear(3 * 8 * 8, 3), nn.Linear(5, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.used(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Trajectory(TrainerCallback):
    """Keeps the weights before each step, in full shape."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.weights.append(weights(model))


class Watch(TrainerCallback):
    """Keeps weights and gradients right before each step of the optimizer, in full shape; may be led along other weights."""

    def __init__(self, path: list[dict[str, Tensor]] | None = None) -> None:
        self.path = path
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        def look(*_: Any) -> None:
            self.weights.append(weights(model))
            self.gradients.append(full({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))

        optimizer.optimizer.register_step_pre_hook(look)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.path is not None:
            reshard(model)
            for name, parameter in model.named_parameters():
                copy_full_(parameter, self.path[state.global_step][name])


def full(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if is_sharded(t) else t).detach().clone() for n, t in tensors.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights in full shape; after an evaluation FSDP2's root group would show full tensors of its own."""
    reshard(model)
    return full(dict(model.named_parameters()))


def load(name: str, folder: Path, sharded: bool) -> nn.Module:
    make, _ = SCENARIOS[name]
    model: Any = make()
    if not hasattr(model, "from_pretrained"):
        return model  # type: ignore[no-any-return]
    if not sharded:
        return type(model).from_pretrained(folder / "model" / name)
    from transformers.distributed import DistributedConfig

    return type(model).from_pretrained(folder / "model" / name, distributed_config=DistributedConfig(fsdp_size=2))


def train(
    name: str, folder: Path, accumulation: int, *, sharded: bool = False
) -> tuple[PriorTrainer, SwagCallback, dict[str, Any]]:
    """Fine-tune, learning a prior on the way: (trainer, callback, {"tensors": ..., "facts": ...})."""
    _, settings = SCENARIOS[name]
    swag, path = SwagCallback(rank=3, start=1, every_n_steps=1), Trajectory()
    place = f"{name}-{accumulation}-{sharded}" if name in SAMPLED else ""
    arguments = quiet_arguments(
        folder / "out" / place,
        gradient_accumulation_steps=accumulation,
        prior_initialize=False,
        **{"max_steps": STEPS, "logging_steps": 2, "learning_rate": 0.02, **settings},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = PriorTrainer(
            model=load(name, folder, sharded),
            prior=str(folder / "prior" / name),
            args=arguments,
            train_dataset=image_data(ROWS),
            eval_dataset=image_data(8, seed=5),
            callbacks=[swag, path],
        )
        swag.estimator.head = () if name == "unused" else "auto"
        trainer.train()
    model: Any = trainer.model
    evaluated = trainer.evaluate()["eval_loss"]  # before anything reshards
    reshard(model)
    again = trainer.evaluate()["eval_loss"]
    average = trainer.evaluate().get("eval_bma_loss")
    tensors = {f"weight.{n}": t for n, t in weights(model).items()}
    tensors |= {f"start.{n}": t for n, t in path.weights[0].items()}
    tensors |= prior_tensors(swag)
    stored = list_samples(trainer.samples_folder)
    if stored:
        last = stored[-1].read()
        tensors |= {f"sample.{n}": t for n, t in last.parameters.items()} | {
            f"statistic.{n}": t for n, t in last.buffers.items()
        }
    facts = {
        "samples": [sample.step for sample in stored],
        "average": average,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": sum(is_sharded(p) for p in model.parameters()),
        "parameters": len(list(model.parameters())),
        "empty_shards": sum(local_tensor(p).numel() == 0 for p in model.parameters()),
        "history": trainer.state.log_history,
        "eval_losses": [evaluated, again],
        "warnings": [str(w.message) for w in caught],
        "update": trainer.prior_update,
        "penalty": float(trainer.prior_penalty.penalty()),  # type: ignore[union-attr]
        "curvature": trainer.prior_penalty.curvature(),  # type: ignore[union-attr]
        "bytes": bytes_of(trainer.prior_penalty.gaussian),  # type: ignore[union-attr]
    }
    return trainer, swag, {"tensors": tensors, "facts": facts}


def watched(name: str, folder: Path, *, sharded: bool) -> dict[str, Any]:
    """Gradients with the prior ("ours"), of a plain Trainer at the same weights ("plain"), and ours clipped ("clipped")."""
    path: list[dict[str, Tensor]] | None = None
    tensors: dict[str, Tensor] = {}
    for kind in ("ours", "plain", "clipped"):
        watch, model = Watch(path), load(name, folder, sharded)
        settings = {"gradient_accumulation_steps": 2, "max_steps": WATCHED, "learning_rate": 0.005}
        settings["max_grad_norm"] = CLIP if kind == "clipped" else 0.0
        if kind == "plain":
            trainer_class, arguments_class, more = Trainer, TrainingArguments, {}
            if name == "resnet":
                model.accepts_loss_kwargs = False  # its loss ignores num_items_in_batch, and plain Trainer must be told
        else:
            trainer_class, arguments_class, more = PriorTrainer, None, {"prior": str(folder / "prior" / name)}
            settings["prior_initialize"] = False
        arguments = quiet_arguments(folder / "out", arguments_class, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer_class(model=model, args=arguments, train_dataset=image_data(ROWS), callbacks=[watch], **more).train()
        path = path or watch.weights
        for step in range(WATCHED):
            assert all(torch.equal(watch.weights[step][n], path[step][n]) for n in path[step])
            tensors |= {f"{kind}-{step}.{n}": t for n, t in watch.gradients[step].items()}
    tensors |= {f"weights-{step}.{n}": t for step in range(WATCHED) for n, t in path[step].items()}
    return {"tensors": tensors, "facts": {}}


def prior_tensors(swag: SwagCallback) -> dict[str, Tensor]:
    learned = swag.prior(dataset="synthetic")
    kinds = ("mean", "variance", "deviations", "buffers")
    return {f"{kind}.{n}": t for kind in kinds for n, t in getattr(learned, kind).items()}


def saved_and_resumed(name: str, trainer: PriorTrainer, swag: SwagCallback, folder: Path) -> dict[str, Any]:
    """SwagCallback's state through a checkpoint of this run; Trainer itself cannot resume models sharded when loaded."""
    trainer.args.output_dir = str(folder / "out" / name)
    checkpoint = folder / "out" / name / f"checkpoint-{STEPS}"
    if dist.get_rank() == 0:
        checkpoint.mkdir(parents=True)
    dist.barrier()
    trainer.evaluate()  # unsharded again
    swag.on_save(trainer.args, trainer.state, trainer.control, model=trainer.model)
    dist.barrier()
    trainer.evaluate()
    resumed = SwagCallback(rank=3, start=1, every_n_steps=1, batch_norm="last")
    resumed.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    tensors = prior_tensors(resumed)
    model: Any = trainer.model
    kept = [local_tensor(p).detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():  # another run's weights
            local_tensor(parameter).add_(1.0)
    try:
        resumed.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
        refused = ""
    except PriorMatchError as error:
        refused = str(error)
    with torch.no_grad():
        for parameter, own in zip(model.parameters(), kept, strict=True):
            local_tensor(parameter).copy_(own)
    facts = {"files": sorted(path.name for path in checkpoint.iterdir()), "refused": refused, "rank": dist.get_rank()}
    return {"tensors": tensors, "facts": facts}


def after_evaluation(trainer: PriorTrainer, folder: Path) -> dict[str, Any]:
    """FSDP2 leaves its root group unsharded after evaluate(): what comes next must find the shards all the same."""
    prior = PriorModel.from_pretrained(folder / "prior" / "vit")
    model: Any = trainer.model

    trainer.evaluate()
    unsharded = sum(not is_sharded(p) for p in model.parameters())
    penalty = PriorPenalty(prior, model, num_examples=ROWS)
    value = float(penalty.add_gradient_()) * ROWS
    reshard(model)  # now the gradients that the optimizer will use
    found = full({f"gradient.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    try:
        penalty.loss()
        refused = ""
    except NotImplementedError as error:
        refused = str(error)

    trainer.evaluate()
    arguments = quiet_arguments(folder / "out", gradient_accumulation_steps=2, max_steps=2, learning_rate=0.02)
    again = PriorTrainer(model=model, prior=prior, args=arguments, train_dataset=image_data(ROWS))
    trainer.evaluate()
    again.train()
    found |= {f"again.{n}": t for n, t in weights(model).items()}
    facts = {
        "unsharded": unsharded,
        "penalty": value,
        "loss refused": refused,
        "history": again.state.log_history,
    }
    return {"tensors": found, "facts": facts}


def version_1() -> dict[str, Any]:
    """What PriorPenalty says to a model in FSDP 1's wrapper."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    names = {n: p.detach().clone() for n, p in model.named_parameters()}
    prior = PriorModel.from_tensors(names, {n: torch.ones_like(p) for n, p in names.items()})
    said = []
    for original in (False, True):
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        try:
            PriorPenalty(prior, wrapped, num_examples=1)
            said.append("")
        except PriorMatchError as error:
            said.append(str(error))
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    return {"tensors": {}, "facts": {"said": said}}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}

    def keep(name: str, result: dict[str, Any]) -> None:
        facts[name] = result["facts"]
        tensors.update({f"{name}/{key}": t.contiguous() for key, t in result["tensors"].items()})

    for name in [name for name in SCENARIOS if name != "long"]:
        keep(f"ddp {name}", train(name, folder, 2)[2])
    for name in (*IMPLICIT, "cold", "warm") if NATIVE_FSDP2 else ():
        keep(f"fsdp {name}", train(name, folder, 2, sharded=True)[2])
    if NATIVE_FSDP2:
        _, swag, result = train("long", folder, 2, sharded=True)
        keep("fsdp long", result)
        swag.save_prior(folder / "written", dataset="synthetic")
    for name in GRADIENT:
        keep(f"watched ddp {name}", watched(name, folder, sharded=False))
    for name in ("vit", "resnet") if NATIVE_FSDP2 else ():
        trainer, swag, result = train(name, folder, 2, sharded=True)
        keep(f"fsdp {name}", result)
        keep(f"watched fsdp {name}", watched(name, folder, sharded=True))
        keep(f"resumed {name}", saved_and_resumed(name, trainer, swag, folder))
        if name == "vit":
            keep("after evaluation", after_evaluation(trainer, folder))
    keep("version 1", version_1())
    rank = dist.get_rank()
    save_file(tensors, folder / f"rank-{rank}.safetensors")
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
