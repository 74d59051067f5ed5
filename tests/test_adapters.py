"""Priors and LoRA adapters: over the adapter's own weights, and over base weights through the adapter.

References: a dense float64 solve for a Gaussian over A and B, torch's LowRankMultivariateNormal with autograd through
W0 + s B A written out here, and PEFT's own merged weights and files.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys

import pytest
import torch
from models import (
    TOKENS,
    VOCABULARY,
    _seeded,
    dense_penalty,
    quiet_arguments,
    random_prior,
    text_data,
    tiny_bert,
    tiny_resnet,
    tiny_vit,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

from prior_hub import (
    PriorMatchError,
    PriorModel,
    PriorPenalty,
    PriorTrainer,
    PriorTrainingArguments,
    PriorWarning,
    SwagCallback,
    SwagEstimator,
    isotropic_prior,
)
from prior_hub.finetuning import trainer as trainer_module
from prior_hub.finetuning.adapters import adapted_weights, initialize_through_adapters
from prior_hub.priors.matching import canonical_parameters

torch.set_num_threads(1)
# peft 0.19 asks the Hub for the base model's configuration whenever it saves, and there is none here
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")
ignoring_miscaled_heads = pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch")

QUERY_VALUE = {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
N = 16


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    gc.freeze()
    yield
    gc.unfreeze()


def tiny_gpt2(seed: int = 0):
    """GPT-2 for classification: its linear layers are Conv1D, which hold W as (in, out)."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": TOKENS, "vocab_size": VOCABULARY, "pad_token_id": 0}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return _seeded(seed, lambda: GPT2ForSequenceClassification(GPT2Config(**size, **still, num_labels=3)))


def adapted(model, name="default", *, seed=5, **config):
    """A LoRA model with A and B of noise (B is zero in a new one, where half of the formulas vanish)."""
    wrapped = get_peft_model(model, LoraConfig(**(QUERY_VALUE | config)), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for raw, parameter in wrapped.named_parameters():
            if ".lora_" in raw:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return wrapped


KINDS = {
    "Linear": (tiny_bert, {}),
    "Linear with rslora": (tiny_bert, {"use_rslora": True, "lora_dropout": 0.5}),
    "Linear of many ranks": (tiny_bert, {"rank_pattern": {"value": 3}, "alpha_pattern": {"query": 5}}),
    "Embedding": (tiny_bert, {"target_modules": ["word_embeddings", "query"]}),
    "Conv1D of GPT-2": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "modules_to_save": ["score"]},
    ),
    "Conv2d": (tiny_resnet, {"target_modules": ["convolution"], "modules_to_save": None}),
}


def layers_of(model):
    """(canonical name of W0, PEFT's layer) of every adapted layer, by a walk of this test's own."""
    found = {}
    for raw, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            found[raw.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"] = module
    return found


def written_out(layer):
    """W0 + s B A of one layer, differentiable in A and B: each kind's formula in full."""
    active = layer.active_adapters[0]
    scaling, base = layer.scaling[active], layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return base.weight + scaling * (layer.lora_embedding_B[active] @ layer.lora_embedding_A[active]).T
    a, b = layer.lora_A[active].weight, layer.lora_B[active].weight
    if isinstance(base, nn.Conv2d):
        return base.weight + scaling * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    return base.weight + scaling * ((b @ a).T if type(base).__name__ == "Conv1D" else b @ a)


def distribution(prior, names):
    """torch's own Gaussian, float64, over `names` in order."""
    config = prior.config
    variance = torch.cat([prior.variance[n].double().flatten() for n in names])
    diagonal = config.scale * config.diagonal_weight * variance + config.eps
    rows = torch.cat([prior.deviations[n].double().reshape(config.rank, -1) for n in names], dim=1)
    mean = torch.cat([prior.mean[n].double().flatten() for n in names])
    factor = (config.scale * config.low_rank_weight) ** 0.5 * rows.T
    return torch.distributions.LowRankMultivariateNormal(mean, factor, diagonal)


def nats_by_autograd(prior, model):
    """The penalty through the adapters, differentiable in A and B, from torch's density and `written_out`."""
    names = list(prior.mean)
    layers = layers_of(model)
    plain = canonical_parameters(model)
    weights = [written_out(layers[n]) if n in layers else plain[n] for n in names]
    gaussian = distribution(prior, names)
    return gaussian.log_prob(gaussian.mean) - gaussian.log_prob(torch.cat([w.flatten() for w in weights]))


# ------------------------------------------------------------------------------------- over the adapter's own weights


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A prior over a source adapter called "topics", by SwagCallback under Trainer, through a folder."""
    folder = tmp_path_factory.mktemp("adapter")
    model = adapted(tiny_bert(), "topics", init_lora_weights=False)
    settings = {"max_steps": 8, "learning_rate": 0.5, "gradient_accumulation_steps": 1}
    callback = SwagCallback(rank=3, start=0, every_n_steps=1)
    arguments = quiet_arguments(folder, TrainingArguments, **settings)
    Trainer(model=model, args=arguments, train_dataset=text_data(N), callbacks=[callback]).train()
    callback.prior(dataset="topics").save_pretrained(folder / "prior")
    return PriorModel.from_pretrained(folder / "prior")


def target(name="sentiment", **config):
    return adapted(tiny_bert(), name, seed=9, **config)  # same base, other adapter


def test_a_prior_learned_on_an_adapter_is_over_its_weights_only_by_the_names_of_pefts_own_files(learned):
    files = get_peft_model_state_dict(adapted(tiny_bert(), "other"), adapter_name="other")
    own = {name.removeprefix("base_model.model."): tuple(t.shape) for name, t in files.items()}
    head = {name for name in own if name.startswith("classifier")}
    assert len(head) == 2
    assert {name: tuple(t.shape) for name, t in learned.mean.items()} == {n: s for n, s in own.items() if n not in head}
    assert set(learned.config.head_parameters) == head
    recorded = learned.config.source["adapter"]
    assert (recorded["r"], recorded["lora_alpha"], recorded["scaling"]) == (2, 6, 3.0)
    assert recorded["target_modules"] == ["query", "value"]
    assert "| adapter | type LORA, r 2, lora_alpha 6" in learned.card()


def test_penalty_and_gradient_over_an_adapter_are_those_of_the_dense_gaussian_over_its_weights(learned):
    model = target()
    penalty = PriorPenalty(learned, model, num_examples=N, head_variance=0.5)
    assert penalty.adapters == {}  # the prior speaks of the adapter itself
    named = canonical_parameters(model)
    nats, dense = dense_penalty(learned, named)
    head = sum(float(p.detach().double().square().sum()) for n, p in named.items() if n.startswith("classifier"))
    assert float(penalty.penalty()) == pytest.approx(nats + head, rel=1e-6)  # head / (2 * 0.5)
    penalty.add_gradient_()
    for name, expected in dense.items():
        assert torch.allclose(named[name].grad.double(), expected / N, rtol=1e-4, atol=1e-6 * float(expected.norm())), name
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)
    model.zero_grad()
    penalty.loss().backward()
    for name, expected in dense.items():
        assert torch.allclose(named[name].grad.double(), expected / N, rtol=1e-4, atol=1e-6 * float(expected.norm())), name


@ignoring_miscaled_heads
@pytest.mark.parametrize("update", ["implicit", "gradient"])
def test_a_target_adapter_of_another_name_is_fine_tuned_under_it_and_saved_by_peft(learned, tmp_path, update):
    base = tiny_bert()
    model = adapted(copy.deepcopy(base), "sentiment", seed=9)
    head = canonical_parameters(model)["classifier.weight"].detach().clone()
    arguments = quiet_arguments(tmp_path, optim="adamw_torch", learning_rate=1e-3, max_steps=3, prior_update=update)
    wide = learned.rescaled(1e6)
    trainer = PriorTrainer(model=model, prior=wide, args=arguments, train_dataset=text_data(N))
    named = canonical_parameters(model)
    assert all(torch.equal(named[n], m) for n, m in learned.mean.items())  # starts at the mean
    assert torch.equal(named["classifier.weight"], head)  # with a head of its own
    trainer.train()
    assert trainer.prior_update == update
    assert all(not torch.equal(named[n], m) for n, m in learned.mean.items())
    for name, parameter in base.named_parameters():  # the base is as it was
        assert name.startswith("classifier") or torch.equal(parameter, named[name]), name
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter" / "sentiment")
    batch = {k: torch.stack([row[k] for row in text_data(4)]) for k in ("input_ids", "attention_mask")}
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


OTHERS = {
    "another rank": (
        {"r": 4, "lora_alpha": 12},
        r"on 'query' the prior's adapter has r = 2, the model's r = 4.*LoraConfig\(r=2, lora_al",
    ),
    "one rank of two": ({"rank_pattern": {"value": 4}}, r"on 'value' the prior's adapter has r = 2, the model's r = 4"),
    "fewer modules": (
        {"target_modules": ["query"]},
        r"on 'query', 'value', the model's on 'query'. Make the model's adapter with",
    ),
    "more modules": (
        {"target_modules": ["query", "value", "key"]},
        "other target_modules: .*the model's on 'key', 'query', 'value'",
    ),
    "another alpha": ({"lora_alpha": 2}, r"multiplied by 3 at 'bert.*query', the model's by 1 .*Make it with lora_alpha=6\."),
    "rslora": ({"use_rslora": True}, r"the model's by 4\.24264 .*Make it with lora_alpha=4\.24264, use_rslora=True"),
    "one alpha of two": ({"alpha_pattern": {"value": 2}}, r"multiplied by 3 at 'bert.*value', the model's by 1"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_an_adapter_of_another_make_is_refused_with_the_one_to_make(learned, case):
    config, message = OTHERS[case]
    model = target(**config)
    before = {n: p.detach().clone() for n, p in canonical_parameters(model).items()}
    with pytest.raises(PriorMatchError, match=message):
        learned.initialize(model)
    with pytest.raises(PriorMatchError, match=message):
        PriorPenalty(learned, model, num_examples=N)
    assert all(torch.equal(p, before[n]) for n, p in canonical_parameters(model).items())


def test_more_or_fewer_layers_and_models_without_the_adapter_are_refused(learned):
    with pytest.raises(
        PriorMatchError, match=r"the model has none that is active: wrap it first, with get_peft_model\(model, Lo"
    ):
        learned.match(tiny_bert())
    deeper = adapted(tiny_bert(num_hidden_layers=2))
    with pytest.raises(PriorMatchError, match="on 1 modules called 'query', the model's on 2: another number of layers"):
        learned.match(deeper)
    assert len(learned.match(adapted(tiny_bert(), layers_to_transform=[0])).pairs) == 4
    both = two_active(target("default", modules_to_save=None))
    with pytest.raises(PriorMatchError, match=r"2 are active in the model \('default', 'second'\): choose one with model.set_"):
        learned.match(both)
    names = canonical_parameters(both)
    path = "bert.encoder.layer.0.attention.self.query.lora_A"
    assert {f"{path}.default.weight", f"{path}.second.weight"} < set(names)  # each under its own name


def test_on_request_what_does_not_fit_is_left_out_but_never_another_scaling(learned):
    part = learned.match(target(target_modules=["query"]), on_mismatch="drop")
    assert len(part.pairs) == len(part.marginalised) == 2
    more = learned.match(target(target_modules=["query", "value", "key"]), on_mismatch="drop")
    assert len(more.pairs) == 4
    with pytest.raises(PriorMatchError, match="other scaling"):
        learned.match(target(target_modules=["query"], lora_alpha=2), on_mismatch="drop")


def test_of_two_adapters_the_active_one_is_bound_and_learned_from(learned):
    model = target("first")
    model.add_adapter("second", LoraConfig(**QUERY_VALUE))
    model.set_adapter("second")
    learned.initialize(model)
    name = "bert.encoder.layer.0.attention.self.query.lora_B.weight"
    raw = dict(model.named_parameters())
    path = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B"
    assert torch.equal(raw[f"{path}.second.weight"], learned.mean[name])
    assert not torch.equal(raw[f"{path}.first.weight"], learned.mean[name])
    estimator = SwagEstimator(2)
    estimator.update(model)
    assert set(estimator.mean()) == set(learned.mean)


def test_a_resumed_source_run_gives_the_same_prior_over_the_adapter_bit_for_bit(tmp_path):
    def prior(folder, resume=None, **settings):
        callback = SwagCallback(rank=2, start=1, every_n_steps=1)
        settings = {"max_steps": 6, "learning_rate": 0.5, "save_strategy": "steps", "save_steps": 4, **settings}
        arguments = quiet_arguments(folder, TrainingArguments, **settings)
        model = adapted(tiny_bert(), "topics")
        trainer = Trainer(model=model, args=arguments, train_dataset=text_data(N), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return callback.prior()

    whole = prior(tmp_path)
    resumed = prior(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert resumed.config.num_snapshots == whole.config.num_snapshots == 5
    for kind in ("mean", "variance", "deviations"):
        mine, theirs = getattr(resumed, kind), getattr(whole, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine), kind
    assert resumed.config.source == whole.config.source


def test_saved_modules_stay_out_of_the_prior_unless_the_head_is_named():
    model = adapted(tiny_bert(), modules_to_save=["classifier", "position_embeddings"])
    names = {}
    for head in ("auto", ("classifier",)):
        estimator = SwagEstimator(2, head=head)
        estimator.update(model)
        names[head] = set(estimator.mean())
    assert names["classifier",] - names["auto"] == {"bert.embeddings.position_embeddings.weight"}
    assert all(".lora_" in name for name in names["auto"])


def test_another_base_model_under_the_adapter_warns_and_one_rounded_to_bfloat16_does_not(learned):
    with pytest.warns(PriorWarning, match="the base model is another one than the prior's adapter was learned on"):
        match = learned.match(adapted(tiny_bert(seed=3)))
    assert "the base model is another one" in match.report()
    rounded = tiny_bert().to(torch.bfloat16)
    assert len(learned.match(adapted(rounded)).pairs) == 4  # warnings are errors here


def test_scalings_that_differ_between_layers_are_recorded_and_compared_each():
    config = {"rank_pattern": {"value": 3}, "alpha_pattern": {"query": 5}}
    model = adapted(tiny_bert(), **config)
    estimator = SwagEstimator(2)
    for _ in range(2):
        estimator.update(model)
    prior = estimator.prior()
    path = "bert.encoder.layer.0.attention.self"
    assert prior.config.source["adapter"]["scaling"] == {f"{path}.query": 2.5, f"{path}.value": 2.0}
    assert len(prior.match(target(**config)).pairs) == 4
    with pytest.raises(PriorMatchError, match=r"multiplied by 2\.5 at .*query', the model's by 3"):
        prior.match(target(rank_pattern={"value": 3}))


def test_what_a_stranger_wrote_about_an_adapter_is_no_crash(learned):
    model = target()
    for adapter in ("LORA", {"scaling": "much", "base_values": 3}, {"scaling": [1], "base_values": {"values": ["a"]}}):
        odd = PriorModel.from_tensors(learned.mean, learned.variance, source={"adapter": adapter})
        assert len(odd.match(model).pairs) == 4


@ignoring_miscaled_heads
def test_a_posterior_over_adapters_is_sampled_and_averaged(learned, tmp_path):
    settings = {"sampler": "baoa", "max_steps": 6, "num_cycles": 1, "samples_per_cycle": 2, "learning_rate": 0.1}
    arguments = quiet_arguments(tmp_path, prior_scale=1e3, **settings)
    trainer = PriorTrainer(
        model=target("mine"), prior=learned, args=arguments, train_dataset=text_data(N), eval_dataset=text_data(8)
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_bma_loss"] != metrics["eval_loss"]


# ------------------------------------------------------------------------------- over base weights, through the adapter


@pytest.mark.parametrize("kind", KINDS)
def test_effective_weights_are_those_that_peft_merges(kind):
    make, config = KINDS[kind]
    model = adapted(make().double(), **config)
    assert adapted_weights(model, canonical_parameters(model)) == {}  # where A and B themselves are covered
    covered = {n: p for n, p in canonical_parameters(model).items() if "lora_" not in n}
    found = adapted_weights(model, covered)
    assert set(found) == set(layers_of(model))
    effective = {name: weight.effective().detach() for name, weight in found.items()}
    changed = {name for name in found if not torch.allclose(effective[name], covered[name])}
    assert changed == set(found)
    merged = dict(model.merge_and_unload().named_parameters())
    for name, weight in effective.items():
        assert torch.allclose(weight, merged[name], rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_penalty_and_gradient_through_adapters_equal_autograd_through_the_explicit_formula(kind, rank):
    make, config = KINDS[kind]
    prior = random_prior(make(), rank=rank or 2, variance=0.1, scale=0.7, eps=1e-3)
    prior = prior if rank else prior.truncated(0)
    reference = prior if rank else PriorModel.from_tensors(
        prior.mean, prior.variance, {n: torch.zeros(2, *m.shape) for n, m in prior.mean.items()}, scale=0.7, eps=1e-3,
        diagonal_weight=prior.config.diagonal_weight, low_rank_weight=1.0,
    )  # fmt: skip
    model = adapted(make().double(), **config)
    penalty = PriorPenalty(prior, model, num_examples=N)
    assert set(penalty.adapters) == set(layers_of(model)) & set(prior.mean)
    expected = nats_by_autograd(reference, model)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in canonical_parameters(model).items() if p.grad is not None}
    assert set(wanted) == {n for n, p in canonical_parameters(model).items() if "lora_" in n}
    assert float(penalty.penalty()) == pytest.approx(expected.item(), rel=1e-10)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    value = penalty.add_gradient_(factor=1024.0)
    assert float(value) == pytest.approx(expected.item() / N, rel=1e-10)
    for name, parameter in canonical_parameters(model).items():
        if name in wanted:
            error = (parameter.grad - 1 - 1024 * wanted[name] / N).norm() / (1024 * wanted[name].norm() / N)
            assert float(error) < 1e-10, name
        else:
            assert parameter.grad is None or bool((parameter.grad == 1).all()), name
    model.zero_grad()
    penalty.loss().backward()
    for name, gradient in wanted.items():
        assert torch.allclose(canonical_parameters(model)[name].grad, gradient / N, rtol=1e-9, atol=1e-12), name


def test_a_base_weight_that_is_trained_beside_its_adapter_gets_the_gradient_of_the_effective_weight():
    prior = random_prior(tiny_bert(), variance=0.1)
    model = adapted(tiny_bert().double())
    base = canonical_parameters(model)["bert.encoder.layer.0.attention.self.query.weight"]
    for parameter in (base, canonical_parameters(model)["bert.embeddings.LayerNorm.weight"]):
        parameter.requires_grad_(True)
    nats_by_autograd(prior, model).backward()
    wanted = {n: p.grad.clone() for n, p in canonical_parameters(model).items() if p.grad is not None}
    assert len(wanted) == 6
    model.zero_grad()
    PriorPenalty(prior, model, num_examples=1).add_gradient_()
    for name, gradient in wanted.items():
        assert torch.allclose(canonical_parameters(model)[name].grad, gradient, rtol=1e-9, atol=1e-12), name


def test_only_the_adapter_is_covered_beside_the_base_and_the_head_prior_does_not_hold_it():
    prior = random_prior(tiny_bert(), variance=0.1)
    model = adapted(tiny_bert())
    with torch.no_grad():
        for name, parameter in canonical_parameters(model).items():
            if name.startswith("classifier"):
                parameter.zero_()
    penalty = PriorPenalty(prior, model, num_examples=N, head_variance=1e-3)
    lora = {n for n in canonical_parameters(model) if "lora_" in n}
    assert set(penalty.trained_parameters()) == lora | {"classifier.weight", "classifier.bias"}
    assert lora <= penalty.covered_names
    assert float(penalty.penalty()) == pytest.approx(float(PriorPenalty(prior, model, num_examples=N).penalty()), rel=1e-12)
    assert "2 weights under the prior are taken through their LoRA adapter, as W0 + s B A" in penalty.report()


class Watch(trainer_module.TrainerCallback):
    """Weights and gradients right before each step of the optimizer."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        def look(*_):
            named = canonical_parameters(model)
            trained = {n: p for n, p in named.items() if p.requires_grad}
            self.seen.append(
                ({n: p.detach().clone() for n, p in named.items()}, {n: p.grad.clone() for n, p in trained.items()})
            )

        optimizer.optimizer.register_step_pre_hook(look)


@ignoring_miscaled_heads
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_through_adapters_the_prior_counts_once_per_optimizer_step_under_accumulation_and_clipping(tmp_path, max_grad_norm):
    data, prior = text_data(N), random_prior(tiny_bert(), variance=0.1)
    runs = {}
    for batch, accumulation in ((8, 1), (2, 4)):
        watch, model = Watch(), adapted(tiny_bert())
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
        settings |= {"learning_rate": 0.05, "prior_initialize": False, "max_grad_norm": max_grad_norm}
        trainer = PriorTrainer(
            model=model, prior=prior, args=quiet_arguments(tmp_path, **settings), train_dataset=data, callbacks=[watch]
        )
        trainer.train()
        assert trainer.prior_update == "gradient"
        runs[accumulation] = watch.seen
        logged = [entry["prior_loss"] for entry in trainer.state.log_history if "prior_loss" in entry]
        replica = adapted(tiny_bert().double())
        for step, (weights, gradients) in enumerate(watch.seen):
            for name, parameter in canonical_parameters(replica).items():
                parameter.data.copy_(weights[name])
            replica.zero_grad()
            rows = data[8 * (step % 2) : 8 * (step % 2) + 8]
            tokens = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "attention_mask")}
            nll = replica(**tokens, labels=torch.tensor([row["labels"] for row in rows])).loss
            nats = nats_by_autograd(prior, replica)
            (nll + nats / N).backward()
            assert logged[step] == pytest.approx(nats.item() / N, rel=1e-5)
            expected = {n: p.grad for n, p in canonical_parameters(replica).items() if p.requires_grad}
            norm = float(torch.cat([g.flatten() for g in expected.values()]).norm())
            clip = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
            assert (clip < 1) == bool(max_grad_norm)
            for name, gradient in expected.items():
                error = (gradients[name] - clip * gradient).norm() / (clip * norm)
                assert float(error) < 1e-5, name  # float32
    assert len(runs[1]) == len(runs[4]) == 4
    moved = 0.0
    for (one, _), (four, _) in zip(runs[1], runs[4], strict=True):
        for name, weight in one.items():
            assert torch.allclose(weight, four[name], rtol=1e-4, atol=1e-6), name
            moved = max(moved, float((weight - runs[1][0][0][name]).norm()))
    assert moved > 0.01


def test_names_are_found_behind_ddp(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    prior, model = random_prior(tiny_bert(), variance=0.1), adapted(tiny_bert())
    expected = PriorPenalty(prior, model, num_examples=N).penalty()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        penalty = PriorPenalty(prior, DistributedDataParallel(model), num_examples=N)
        assert set(penalty.adapters) == set(layers_of(model))
        assert torch.equal(penalty.penalty(), expected)
    finally:
        dist.destroy_process_group()


def on_a_rank(rank, folder):
    """Half of the rows on each of two ranks; the gradients of A and B are left in a file."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        prior, model = random_prior(tiny_bert(), variance=0.1), adapted(tiny_bert())
        wrapped = DistributedDataParallel(model)
        rows = text_data(8)[rank::2]
        tokens = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "attention_mask")}
        wrapped(**tokens, labels=torch.tensor([row["labels"] for row in rows])).loss.backward()
        PriorPenalty(prior, wrapped, num_examples=N).add_gradient_()
        named = canonical_parameters(model)
        save_file({n: p.grad for n, p in named.items() if p.grad is not None}, f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_under_ddp_every_rank_has_the_gradient_of_one_process(tmp_path):
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    prior, model = random_prior(tiny_bert(), variance=0.1), adapted(tiny_bert().double())
    rows = text_data(8)
    tokens = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "attention_mask")}
    nll = model(**tokens, labels=torch.tensor([row["labels"] for row in rows])).loss
    (nll + nats_by_autograd(prior, model) / N).backward()
    for rank in range(2):
        gradients = load_file(tmp_path / f"{rank}.safetensors")
        for name, parameter in canonical_parameters(model).items():
            assert (name in gradients) == parameter.requires_grad
            if parameter.requires_grad:
                assert torch.allclose(gradients[name].double(), parameter.grad, rtol=1e-4, atol=1e-5), name


@ignoring_miscaled_heads
def test_training_through_an_adapter_lowers_the_penalty_of_a_displaced_base(tmp_path):
    """End to end with AdamW: the data see noise, so A and B go where the prior wants W."""
    base = tiny_bert()
    prior = isotropic_prior(base, variance=0.01)
    model = adapted(copy.deepcopy(base))  # W = W0 + noise
    arguments = quiet_arguments(tmp_path, optim="adamw_torch", learning_rate=0.02, max_steps=40, prior_initialize=False)
    trainer = PriorTrainer(model=model, prior=prior, args=arguments, train_dataset=text_data(N))
    before = float(trainer.prior_penalty.penalty())
    trainer.train()
    after = float(trainer.prior_penalty.penalty())
    assert after < 0.05 * before
    away = [(written_out(layer) - layer.get_base_layer().weight).detach() for layer in layers_of(model).values()]
    assert after == pytest.approx(sum(float(w.square().sum()) for w in away) / 0.02, rel=1e-3)


# -------------------------------------------------------------------------------------------------- where training starts


def test_training_starts_where_the_effective_weights_are_the_mean_and_what_peft_will_not_save_is_told(tmp_path):
    prior, model = random_prior(tiny_bert()), adapted(tiny_bert())
    with pytest.warns(
        PriorWarning, match=r"frozen base weights .* are set to the prior's mean, and PEFT saves the adapter only"
    ):
        trainer = PriorTrainer(model=model, prior=prior, args=quiet_arguments(tmp_path), train_dataset=text_data(N))
    assert float(trainer.prior_penalty.penalty()) < 1e-6
    merged = dict(model.merge_and_unload().named_parameters())
    for name, mean in prior.mean.items():
        assert torch.allclose(merged[name], mean, atol=1e-6), name


def test_a_base_that_is_the_mean_already_stays_to_the_bit_and_nothing_is_told(tmp_path):
    base = tiny_bert()
    prior = isotropic_prior(base, variance=0.1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**QUERY_VALUE))  # B = 0
    PriorTrainer(model=model, prior=prior, args=quiet_arguments(tmp_path), train_dataset=text_data(N))  # warnings are errors
    named = canonical_parameters(model)
    assert all(torch.equal(named[n], p) for n, p in base.named_parameters() if not n.startswith("classifier"))


def test_without_adapters_initializing_through_them_is_initializing():
    prior, model = random_prior(tiny_bert()), tiny_bert()
    match = initialize_through_adapters(prior, model)
    assert match == prior.match(model)
    assert all(torch.equal(dict(model.named_parameters())[n], m) for n, m in prior.mean.items())


def test_model_init_starts_every_run_at_the_mean_through_the_adapter(tmp_path):
    base = tiny_bert()
    prior = isotropic_prior(base, variance=0.1)
    trainer = PriorTrainer(
        model_init=lambda: get_peft_model(copy.deepcopy(base), LoraConfig(**QUERY_VALUE)),
        prior=prior, args=quiet_arguments(tmp_path, max_steps=1), train_dataset=text_data(N),
    )  # fmt: skip
    trainer.train()
    assert set(trainer.prior_penalty.adapters) == set(layers_of(trainer.model))


# ------------------------------------------------------------------------------------------------------------ stiffness


def dense_curvature(prior, model):
    """The largest eigenvalue of J^T Sigma^-1 J in A and B; J column by column, by autograd twice."""
    layers, names = layers_of(model), list(prior.mean)
    trained = [p for n, p in canonical_parameters(model).items() if p.requires_grad and "lora_" in n]
    weights = torch.cat([(written_out(layers[n]) if n in layers else canonical_parameters(model)[n]).flatten() for n in names])
    selector = torch.zeros_like(weights, requires_grad=True)
    pulled = torch.autograd.grad((weights * selector).sum(), trained, create_graph=True)
    flat = torch.cat([g.flatten() for g in pulled])
    columns = [torch.autograd.grad(flat[i], selector, retain_graph=True)[0] for i in range(len(flat))]
    jacobian = torch.stack(columns, dim=1)  # (P, number of trained values)
    return float(torch.linalg.eigvalsh(jacobian.T @ distribution(prior, names).precision_matrix @ jacobian)[-1])


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv1D of GPT-2", "Conv2d"])
def test_curvature_through_adapters_is_the_largest_of_the_dense_one_in_a_and_b(kind):
    make, config = KINDS[kind]
    prior = random_prior(make(), variance=0.1)
    model = adapted(make().double(), **config)
    dense = dense_curvature(prior, model) / N
    found = PriorPenalty(prior, model, num_examples=N).curvature()
    assert 0.9 * dense < found <= dense * (1 + 1e-6)  # power iteration, from below
    flat = isotropic_prior(make(), variance=0.01)
    layers = [layer for name, layer in layers_of(model).items() if name in flat.mean]
    if kind == "Linear":  # where all precisions are p the largest is p s^2 (|A|^2 + |B|^2) of one layer, in spectral norms
        norms = [[torch.linalg.matrix_norm(w["default"].weight, 2) for w in (la.lora_A, la.lora_B)] for la in layers]
        closed = max(100 * 9 * (a**2 + b**2).item() for a, b in norms)
        assert PriorPenalty(flat, model, num_examples=1).curvature() == pytest.approx(closed, rel=0.05)


def test_a_head_prior_that_is_too_stiff_beside_adapters_is_named():
    prior, model = isotropic_prior(tiny_bert(), variance=1.0), adapted(tiny_bert())
    penalty = PriorPenalty(prior, model, num_examples=10, head_variance=1e-6)
    with pytest.warns(PriorWarning, match="prior_head_variance from 1e-06 to") as caught:
        assert penalty.warn_if_unstable(0.01)
    words = str(caught[0].message).split()
    wider = float(words[words.index("prior_head_variance") + 4])
    assert "prior_scale" not in words
    assert not PriorPenalty(prior, model, num_examples=10, head_variance=wider).warn_if_unstable(0.01)


def test_a_prior_too_stiff_through_the_adapters_warns_with_settings_that_do_not():
    prior, model = random_prior(tiny_bert(), variance=1e-4, scale=2.0), adapted(tiny_bert())
    penalty = PriorPenalty(prior, model, num_examples=N)
    rate = 2.2 / penalty.curvature()
    assert not penalty.warn_if_unstable(0.9 * 2 / penalty.curvature())
    with pytest.warns(PriorWarning, match="too stiff for this learning rate, taken through the adapters") as caught:
        assert penalty.warn_if_unstable(rate)
    message = str(caught[0].message)
    assert "implicit' (" not in message  # which is not to be had
    words = message.split()
    slower = float(words[words.index("learning_rate") + 2])
    assert not penalty.warn_if_unstable(slower)
    wider = float(words[words.index("prior_scale") + 4])
    assert not PriorPenalty(prior, model, num_examples=N, scale=wider).warn_if_unstable(rate)


# --------------------------------------------------------------------------------------------------------- what is refused


def test_there_is_no_implicit_step_and_no_sampler_through_adapters(tmp_path):
    prior, model = random_prior(tiny_bert(), variance=0.1), adapted(tiny_bert())
    before = {n: p.detach().clone() for n, p in canonical_parameters(model).items()}

    def trainer(**settings):
        return PriorTrainer(model=model, prior=prior, args=quiet_arguments(tmp_path, **settings), train_dataset=text_data(N))

    for sampler in ("sgld", "sghmc", "baoa"):
        with pytest.raises(ValueError, match=f"sampler='{sampler}' needs a prior that is Gaussian in the parameters"):
            trainer(sampler=sampler)
    assert all(torch.equal(p, before[n]) for n, p in canonical_parameters(model).items())
    with pytest.raises(ValueError, match="prior_update='implicit' needs a prior that is Gaussian"):
        trainer(prior_update="implicit", prior_initialize=False).train()
    penalty = PriorPenalty(prior, model, num_examples=N)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="an implicit step needs"):
        penalty.attach(torch.optim.SGD(trained, lr=0.1))
    with pytest.raises(ValueError, match="an implicit step needs"):
        penalty.proximal_step_({})
    for of_samplers in (penalty.bound_gaussians, penalty.preconditioner):
        with pytest.raises(ValueError, match="a sampler needs"):
            of_samplers()


def test_weight_decay_does_not_pull_the_adapter_of_a_covered_weight(tmp_path):
    prior, model = random_prior(tiny_bert(), variance=0.1), adapted(tiny_bert())
    settings = {"weight_decay": 0.1, "optim": "adamw_torch", "prior_initialize": False}
    trainer = PriorTrainer(model=model, prior=prior, args=quiet_arguments(tmp_path, **settings), train_dataset=text_data(N))
    optimizer = trainer.create_optimizer()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {n for n, p in canonical_parameters(model).items() if id(p) in decayed}
    assert names == {"classifier.weight"}
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    refused = PriorTrainer(
        model=model, prior=prior, args=quiet_arguments(tmp_path, prior_initialize=False), train_dataset=text_data(N),
        optimizers=(own, None),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"decays 4 parameters that are under the prior \('bert.*lora_A.weight'"):
        refused.train()


def two_active(model):
    model.add_adapter("second", LoraConfig(**(QUERY_VALUE | {"modules_to_save": None})))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged(model):
    model.merge_adapter()
    return model


def eight_bit(model):
    """A layer as bitsandbytes leaves it: its weight in int8."""
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query.get_base_layer()
    layer.weight = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
    return model


def grouped():
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3))


def test_adapters_through_which_no_prior_can_be_taken_are_refused_by_their_kind():
    prior = random_prior(tiny_bert())
    bert_ia3 = IA3Config(target_modules=["query"], feedforward_modules=[], modules_to_save=["classifier"])
    tied = get_peft_model(tiny_masked_bert(), LoraConfig(r=2, target_modules=["word_embeddings"]))
    cases = [
        (prior, adapted(tiny_bert(), use_dora=True), r"a variant of LoRA \(DoRA\), whose weight is not W0 \+ s B A"),
        (
            prior,
            two_active(adapted(tiny_bert(), modules_to_save=None)),
            r"one of 2 that are active \('default', 'second'\).*set_adapter\('default'\)",
        ),
        (prior, merged(adapted(tiny_bert())), r"is merged into the base weights: call model.unmerge_adapter\(\)"),
        (prior, adapted(tiny_bert(), lora_bias=True), r"a bias of its own \(lora_bias=True\)"),
        (
            prior,
            get_peft_model(tiny_bert(), bert_ia3),
            r"is a peft.tuners.ia3.layer.Linear at .*through LoRA's Linear, Embedding",
        ),
        (prior, eight_bit(adapted(tiny_bert())), r"quantised.*torch.int8.*load the model unquantised"),
        (random_prior(tiny_masked_bert()), tied, r"'bert.embeddings.word_embeddings.weight' changes one use of a weight"),
    ]
    for given, model, message in cases:
        with pytest.raises(PriorMatchError, match=message):
            PriorPenalty(given, model, num_examples=N)
        if "quantised" not in message:
            free = canonical_parameters(model)["bert.embeddings.LayerNorm.weight"].requires_grad_(True)
            penalty = PriorPenalty(given, model, num_examples=N, through_adapters=False)  # conditions on W0
            assert penalty.trained_parameters() == {"bert.embeddings.LayerNorm.weight": free}
    with pytest.warns(UserWarning, match="groups > 1"):
        convolution = get_peft_model(grouped(), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(PriorMatchError, match="on a convolution of 2 groups"):
        PriorPenalty(random_prior(grouped(), head=("2",)), convolution, num_examples=N)


def tiny_masked_bert(seed: int = 0):
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "pad_token_id": 0}
    return _seeded(seed, lambda: BertForMaskedLM(BertConfig(**size, vocab_size=VOCABULARY, max_position_embeddings=TOKENS)))


def test_a_quantised_base_whose_weights_have_other_shapes_is_named_as_the_reason():
    model = adapted(tiny_bert())
    packed = model.base_model.model.bert.encoder.layer[0].attention.self.query.get_base_layer()
    packed.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)  # as 4-bit weights are packed
    with pytest.raises(
        PriorMatchError, match=r"the model's weights are quantised.*use a prior over the adapter's own parameters"
    ):
        PriorPenalty(random_prior(tiny_bert()), model, num_examples=N)


def test_a_prior_over_the_adapter_itself_does_not_mind_a_quantised_base(learned):
    penalty = PriorPenalty(learned, eight_bit(target()), num_examples=N)
    assert len(penalty.trained_parameters()) == 4
    with pytest.raises(PriorMatchError, match=r"^other rank"):  # and what does not fit is not blamed on it
        PriorPenalty(learned, eight_bit(target(r=4, lora_alpha=12)), num_examples=N)


def test_layers_without_a_weight_at_hand_are_quantised_ones(learned):
    """As GPTQ leaves them: packed numbers in buffers, and a bias that is under the prior."""

    class Packed(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(2, 8, dtype=torch.int32))
            self.bias = bias

    model = target()
    holder = model.base_model.model.bert.encoder.layer[0].attention.self.query
    holder.base_layer = Packed(holder.base_layer.bias)
    with pytest.raises(PriorMatchError, match=r"on a quantised layer \(Linear over Packed\), of which W0 is not at hand"):
        PriorPenalty(random_prior(tiny_bert()), model, num_examples=N)
    assert len(learned.match(model).pairs) == 4
    estimator = SwagEstimator(2)
    estimator.update(model)
    assert set(estimator.mean()) == set(learned.mean)


def test_asking_for_adapters_that_are_not_there_is_refused_and_so_is_doing_without():
    prior = random_prior(tiny_bert())
    with pytest.raises(PriorMatchError, match="through_adapters=True, but there is no active LoRA adapter"):
        PriorPenalty(prior, tiny_bert(), num_examples=N, through_adapters=True)
    with pytest.raises(PriorMatchError, match=f"all {len(prior.mean)} parameters under the prior are frozen.*through_adapters"):
        PriorPenalty(prior, adapted(tiny_bert()), num_examples=N, through_adapters=False)


def test_a_prior_through_adapters_cannot_be_kept_elsewhere():
    base = tiny_bert()
    prior = random_prior(base)
    with pytest.raises(ValueError, match=r"device \(prior_device\) is 'cpu': a prior that is taken through adapters"):
        PriorPenalty(prior, adapted(base), num_examples=1, device="cpu")


def test_adapters_that_are_switched_off_are_no_adapters():
    prior, model = random_prior(tiny_bert()), adapted(tiny_bert())
    with model.disable_adapter(), pytest.raises(PriorMatchError, match=r"all \d+ parameters .* are frozen"):
        PriorPenalty(prior, model, num_examples=N)


# -------------------------------------------------------------------------------------------------------- what is said


def test_the_choice_is_said_in_the_log_and_can_be_made_on_the_command_line(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(trainer_module.logger, "warning_advice", told.append)
    prior = isotropic_prior(tiny_bert(), variance=0.1)
    for choice, expected in ((None, 1), (True, 0)):
        told.clear()
        settings = {"prior_through_adapters": choice, "log_level": "warning"}
        model = get_peft_model(tiny_bert(), LoraConfig(**QUERY_VALUE))
        PriorTrainer(model=model, prior=prior, args=quiet_arguments(tmp_path, **settings), train_dataset=text_data(4))
        said = [text for text in told if "taken through their LoRA adapter" in text]
        assert len(said) == expected
        assert all("prior_through_adapters=False refuses that" in text for text in said)
    parser = HfArgumentParser(PriorTrainingArguments)
    for words, value in ((["--prior_through_adapters", "False"], False), ([], None)):
        (arguments,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
        assert arguments.prior_through_adapters is value


def test_bfloat16_adapters_warn_once(tmp_path):
    prior = random_prior(tiny_vit())
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(tiny_vit().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if "lora_" in n)
    penalty = PriorPenalty(prior, model, num_examples=N)
    with pytest.warns(PriorWarning, match="gradients are bfloat16"):
        penalty.add_gradient_()
    wide = PriorPenalty(prior, get_peft_model(tiny_vit().to(torch.bfloat16), config), num_examples=N)
    wide.add_gradient_()  # PEFT keeps A and B in float32 over a bfloat16 base: nothing is lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_whose_rounding_the_prior_would_notice_warns_with_what_it_costs(dtype):
    base = tiny_bert()
    prior = isotropic_prior(base, variance=1e-9)
    model = get_peft_model(base.to(dtype), LoraConfig(**QUERY_VALUE))
    with pytest.warns(PriorWarning, match="rounding alone puts them") as caught:
        penalty = PriorPenalty(prior, model, num_examples=1)
    said = float(str(caught[0].message).split("puts them ")[1].split()[0])
    of_adapted = (
        sum(float((written_out(la).detach() - prior.mean[n]).square().sum()) for n, la in layers_of(model).items()) / 2e-9
    )
    assert said == pytest.approx(of_adapted, rel=0.4)  # a sum of 128 squares, each with sd 0.9 of its mean: 0.08
    assert float(penalty.penalty()) > of_adapted
    isotropic = PriorPenalty(prior.rescaled(1e9), model, num_examples=1)  # warnings are errors here
    assert isotropic.adapters


@pytest.mark.slow
def test_peft_is_not_needed():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch\nfrom torch import nn\n"
        "from prior_hub import PriorPenalty, isotropic_prior\n"
        "import prior_hub.finetuning.adapters, prior_hub.priors.adapters\n"
        "model = nn.Sequential(nn.Linear(2, 2)); prior = isotropic_prior(model, head=())\n"
        "print(float(PriorPenalty(prior, model, num_examples=1).penalty()))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "0.0", result.stderr
