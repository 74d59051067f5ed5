"""Text: padding, label columns, tied embeddings and rows that no batch touches, with the prior counted once in each.

References: autograd over one unpadded text after another, and a dense float64 solve for the prior's part.
"""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from models import (
    TOKENS,
    VOCABULARY,
    _seeded,
    dense_covariance,
    dense_penalty,
    quiet_arguments,
    random_prior,
    text_data,
    tiny_bert,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from prior_hub import PriorMatchError, PriorModel, PriorPenalty, PriorTrainer, SwagCallback

torch.set_num_threads(1)
ignoring_miscaled_heads = pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch")

EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
WORDS = ["[PAD]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(3, VOCABULARY))]


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tokenizer():
    """One number per word, [PAD] 0."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


def masked_bert(seed: int = 0, **config):
    """BertForMaskedLM: the decoder's weight is the word embedding's."""
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "pad_token_id": 0}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    size |= {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}
    return _seeded(seed, lambda: BertForMaskedLM(BertConfig(**(size | still | config))))


def rows_of_text(tokenizer, rows=16, seed=0, highest=VOCABULARY):
    """Texts of 2 to 6 words with a "label" column, as a tokenised data set has it; words below `highest` only."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(rows):
        length = 2 + int(torch.randint(TOKENS - 1, (), generator=generator))
        words = torch.randint(3, highest, (length,), generator=generator).tolist()
        data.append({**tokenizer(" ".join(WORDS[w] for w in words)), "label": i % 3})
        data[-1].pop("token_type_ids", None)
    return data


class Watch(TrainerCallback):
    """Weights and gradients right before each step of the optimizer."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        def look(*_):
            named = dict(model.named_parameters())
            self.seen.append(({n: p.detach().clone() for n, p in named.items()}, {n: p.grad.clone() for n, p in named.items()}))

        optimizer.optimizer.register_step_pre_hook(look)


def at(model, weights):
    """A float64 copy of a model at other weights."""
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(weights[name])
            parameter.grad = None
    return twin


def assert_gradients(found, expected):
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert float((found[name].double() - gradient).norm() / whole) < 1e-5, name  # float32, other order of summation


# ------------------------------------------------------------------------------------------------ padding, label columns


@ignoring_miscaled_heads
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_batches_of_any_padding_give_the_gradient_of_texts_one_by_one_and_the_prior_once(
    tmp_path, tokenizer, batch, accumulation
):
    data, model, watch = rows_of_text(tokenizer), tiny_bert(), Watch()
    assert len({len(row["input_ids"]) for row in data[:2]}) == 2  # the first batch is padded
    prior = random_prior(model)
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    arguments = quiet_arguments(tmp_path, learning_rate=0.02, prior_initialize=False, **settings)
    collate = DataCollatorWithPadding(tokenizer)
    trainer = PriorTrainer(
        model=model, prior=prior, args=arguments, train_dataset=data, data_collator=collate, callbacks=[watch]
    )
    trainer.train()
    assert trainer.prior_penalty.num_examples == 16
    for step, (weights, gradients) in enumerate(watch.seen):
        twin = at(model, weights)
        for row in data[8 * step : 8 * step + 8]:
            tokens = torch.tensor([row["input_ids"]])
            (twin(input_ids=tokens, labels=torch.tensor([row["label"]])).loss / 8).backward()
        _, dense = dense_penalty(prior, weights)
        expected = {n: p.grad + dense.get(n, torch.zeros(())) / 16 for n, p in twin.named_parameters()}
        assert_gradients(gradients, expected)


def test_embeddings_are_decayed_by_the_prior_alone(tmp_path):
    """AdamW with weight decay: only what the prior does not know is decayed, and the implicit step accepts it."""
    model = tiny_bert()
    prior = random_prior(model, variance=1e-6)
    settings = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-3, "max_steps": 2}
    trainer = PriorTrainer(model=model, prior=prior, args=quiet_arguments(tmp_path, **settings), train_dataset=text_data(16))
    trainer.train()
    assert trainer.prior_update == "implicit"
    optimizer = trainer.optimizer.optimizer
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert [n for n, p in model.named_parameters() if id(p) in decayed] == ["classifier.weight"]


# ------------------------------------------------------------------------------------------------------ tied embeddings


@pytest.fixture(scope="module")
def from_masked_words(tmp_path_factory, tokenizer):
    """A prior learned by masked words over texts of many lengths, through a folder."""
    folder = tmp_path_factory.mktemp("masked")
    callback = SwagCallback(rank=3, start=0, every_n_steps=1)
    arguments = quiet_arguments(folder, TrainingArguments, max_steps=8, learning_rate=0.5, per_device_train_batch_size=4)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0)
    data = [{k: v for k, v in row.items() if k != "label"} for row in rows_of_text(tokenizer, 32)]
    trainer = Trainer(model=masked_bert(), args=arguments, train_dataset=data, data_collator=collate, callbacks=[callback])
    trainer.train()
    callback.prior(objective="masked language model").save_pretrained(folder / "prior")
    return PriorModel.from_pretrained(folder / "prior")


def test_a_prior_of_masked_words_is_over_the_encoder_with_the_tied_embedding_once(from_masked_words):
    prior = from_masked_words
    assert EMBEDDINGS in prior.mean
    assert not any(name.startswith("cls.") for name in prior.mean)
    assert set(prior.config.head_parameters) == {n for n, _ in masked_bert().named_parameters() if n.startswith("cls.")}
    assert prior.config.tied_parameters == {"cls.predictions.decoder.weight": EMBEDDINGS}
    match = prior.match(tiny_bert())
    assert len(match.pairs) == len(prior.mean)
    assert set(match.new) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


def masked_rows(tokenizer):
    """Rows of one length with labels at every other word."""
    data = []
    for row in rows_of_text(tokenizer, 8, seed=2):
        tokens = (row["input_ids"] * 3)[:TOKENS]
        hidden = [2 if i % 2 else token for i, token in enumerate(tokens)]
        labels = [token if i % 2 else -100 for i, token in enumerate(tokens)]
        data.append({"input_ids": hidden, "attention_mask": [1] * TOKENS, "labels": labels})
    return data


@pytest.mark.parametrize("update", ["gradient", "implicit"])
def test_a_tied_embedding_is_held_once_though_two_layers_use_it(tmp_path, tokenizer, from_masked_words, update):
    data, model, watch = masked_rows(tokenizer), masked_bert(seed=4), Watch()
    prior = from_masked_words if update == "implicit" else random_prior(masked_bert())  # the learned one is stiff
    assert set(prior.mean) == set(from_masked_words.mean)
    assert model.cls.predictions.decoder.weight is model.get_parameter(EMBEDDINGS)
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.05, "prior_scale": 10.0}
    arguments = quiet_arguments(tmp_path, prior_count="labels", prior_initialize=False, prior_update=update, **settings)
    trainer = PriorTrainer(model=model, prior=prior, args=arguments, train_dataset=data, callbacks=[watch])
    trainer.train()
    assert trainer.prior_penalty.num_examples == 8 * TOKENS // 2
    (weights, gradients) = watch.seen[0]
    twin = at(masked_bert(seed=4), weights)
    batch = {k: torch.tensor([row[k] for row in data]) for k in data[0]}
    twin(**batch).loss.backward()
    if update == "gradient":
        _, dense = dense_penalty(prior, weights, scale=10.0)
        share = {n: g / 24 for n, g in dense.items()}
        assert_gradients(gradients, {n: p.grad + share.get(n, torch.zeros(())) for n, p in twin.named_parameters()})
        return
    assert_gradients(gradients, {n: p.grad for n, p in twin.named_parameters()})
    names = list(prior.mean)
    sigma = dense_covariance(prior, names, scale=10.0)
    mean = torch.cat([prior.mean[n].double().flatten() for n in names])
    moved = torch.cat([(weights[n].double() - 0.05 * twin.get_parameter(n).grad).flatten() for n in names])
    step = 0.05 / 24 * torch.eye(len(mean), dtype=torch.float64)
    expected = mean + sigma @ torch.linalg.solve(sigma + step, moved - mean)
    found = torch.cat([model.get_parameter(n).detach().double().flatten() for n in names])
    assert float((found - expected).norm() / (expected - moved).norm()) < 1e-4  # float32 weights


def test_masked_words_need_to_be_told_what_n_is_and_are_counted_as_they_are_masked(tmp_path, tokenizer, from_masked_words):
    data = [{k: v for k, v in row.items() if k != "label"} for row in rows_of_text(tokenizer, 400, seed=1)]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)

    def trainer(**settings):
        arguments = quiet_arguments(tmp_path, max_steps=1, prior_update="implicit", **settings)
        return PriorTrainer(
            model=masked_bert(), prior=from_masked_words, args=arguments, train_dataset=data, data_collator=collate
        )

    with pytest.raises(ValueError, match=r"labels have shape .*prior_count='labels'"):
        trainer().train()
    words = sum(len(row["input_ids"]) for row in data)
    counted = trainer(prior_count="labels").prior_penalty.num_examples
    assert abs(counted - 0.3 * words) < 5 * math.sqrt(0.21 * words)  # five standard errors


def test_another_vocabulary_is_an_error_that_names_the_embedding(from_masked_words):
    with pytest.raises(PriorMatchError, match=rf"differ in shape, the first is '{EMBEDDINGS}': \[24, 8\].*\[30, 8\]"):
        from_masked_words.match(tiny_bert(vocab_size=30))


# ---------------------------------------------------------------------------------------- rows that no batch touches


@ignoring_miscaled_heads
def test_rows_of_words_that_never_occur_are_held_by_the_prior_in_the_gradient_form(tmp_path, tokenizer):
    data, model, watch = rows_of_text(tokenizer, highest=12), tiny_bert(), Watch()
    prior = random_prior(model)
    arguments = quiet_arguments(tmp_path, max_steps=1, prior_initialize=False, per_device_train_batch_size=16)
    collate = DataCollatorWithPadding(tokenizer)
    PriorTrainer(model=model, prior=prior, args=arguments, train_dataset=data, data_collator=collate, callbacks=[watch]).train()
    weights, gradients = watch.seen[0]
    _, dense = dense_penalty(prior, weights)
    rows = dense[EMBEDDINGS][12:] / 16
    assert torch.allclose(gradients[EMBEDDINGS][12:].double(), rows, rtol=1e-3, atol=1e-5 * float(rows.norm()))
    moved = gradients[EMBEDDINGS][3:12].double() - dense[EMBEDDINGS][3:12] / 16
    assert float(moved.norm()) > 1e-3  # the data move the others


def test_rows_of_words_that_never_occur_go_to_the_mean_under_adamw_and_the_implicit_step(tmp_path, tokenizer):
    """No gradient, so Adam's step length is lr / eps: the prior takes them at once, and the others by their own metric."""
    data, model = rows_of_text(tokenizer, highest=12), tiny_bert()
    prior = random_prior(model, rank=0, variance=1e-3)
    start = model.get_parameter(EMBEDDINGS).detach().clone()
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 1, "per_device_train_batch_size": 16}
    arguments = quiet_arguments(tmp_path, prior_update="implicit", prior_initialize=False, **settings)
    collate = DataCollatorWithPadding(tokenizer)
    PriorTrainer(model=model, prior=prior, args=arguments, train_dataset=data, data_collator=collate).train()
    mean, found = prior.mean[EMBEDDINGS].double(), model.get_parameter(EMBEDDINGS).detach().double()
    variance = prior.variance[EMBEDDINGS].double() * prior.config.diagonal_weight
    length = 1e-3 / 1e-8  # lr / eps
    expected = mean + variance / (variance + length / 16) * (start - mean)
    assert torch.allclose(found[12:], expected[12:], rtol=1e-6, atol=1e-8)
    assert float((found[3:12] - mean[3:12]).abs().min(dim=1).values.max()) > 1e-4
    assert float((found[12:] - mean[12:]).abs().max()) < 1e-6


class Bag(nn.Module):
    """Words -> classes, by the mean of embeddings that may have sparse gradients."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Embedding(9, 4, sparse=sparse)
            self.head = nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.words(tokens).mean(1)), labels)


def test_sparse_gradients_are_refused_where_they_cannot_hold_the_prior_and_right_where_they_need_not():
    sparse, dense = Bag(sparse=True), Bag(sparse=False)
    prior = random_prior(dense, head=("head",))
    tokens, labels = torch.tensor([[1, 2], [2, 3]]), torch.tensor([0, 1])
    sparse(tokens, labels).backward()
    assert sparse.words.weight.grad.is_sparse
    with pytest.raises(
        ValueError, match=r"gradient of 'words.weight' is sparse .*sparse=False, or take the prior as an implicit"
    ):
        PriorPenalty(prior, sparse, num_examples=2).add_gradient_()
    for model in (sparse, dense):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        PriorPenalty(prior, model, num_examples=2).attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(tokens, labels).backward()
            optimizer.step()
    assert torch.allclose(sparse.words.weight, dense.words.weight, atol=1e-7)
    untouched = dense.words.weight.detach()[5:]
    assert not torch.allclose(untouched, Bag(sparse=False).words.weight[5:], atol=1e-3)  # held by the prior all the same
