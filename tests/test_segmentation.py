"""Semantic segmentation: a backbone's prior under a segmentation head, N over pixels, ignored pixels, averages of pixels.

Averages and NLLs are worked out pixel by pixel in numpy, from logits of models that hold a sample's weights by load_state_dict.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from models import Stream, image_data, quiet_arguments, random_prior, text_data, tiny_llama, tiny_resnet, tiny_vit
from torch import Tensor, nn

from prior_hub import PriorHubError, PriorTrainer, recompute_batch_norm, segmentation_metrics
from prior_hub.finetuning.counting import count_labels
from prior_hub.inference.average import BayesianModelAverage, ignore_index_of, nll_of
from prior_hub.inference.samples import Sample, list_samples
from prior_hub.priors.matching import canonical_parameters, head_parameter_names, persistent_buffers

torch.set_num_threads(1)

SIZE, CLASSES, IGNORED = 16, 3, 255
STAGES = {"embedding_size": 4, "hidden_sizes": [4, 4, 6], "depths": [1, 1, 1], "layer_type": "basic"}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [4, 8], "num_attention_heads": [1, 2]}
SEGFORMER |= {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 4}
SEGFORMER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
SEGFORMER |= {"drop_path_rate": 0.0}


def upernet(backbone: Any = None, *, seed: int = 0, auxiliary: bool = False, **more: Any) -> nn.Module:
    """UperNet over the ResNet of `resnet()`, about two thousand parameters."""
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ResNetConfig(**STAGES, out_features=["stage1", "stage2", "stage3"]) if backbone is None else backbone
    config = {"hidden_size": 4, "pool_scales": [1, 2], "auxiliary_in_channels": 6, "auxiliary_channels": 4}
    config |= {"use_auxiliary_head": auxiliary, "num_labels": CLASSES} | more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **config))


def resnet(seed: int = 0) -> nn.Module:
    return tiny_resnet(seed, classes=5, **STAGES)


def segformer(seed: int = 0, *, segments: bool = True) -> nn.Module:
    from transformers import SegformerConfig, SegformerForImageClassification, SegformerForSemanticSegmentation

    kind = SegformerForSemanticSegmentation if segments else SegformerForImageClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(SegformerConfig(**SEGFORMER, num_labels=CLASSES if segments else 5))


def pictures(rows: int = 6, seed: int = 0, *, ignored: float = 0.25) -> list[dict[str, Tensor]]:
    """Images with masks, of whose pixels a share is not to count, another number in each picture."""
    g = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(rows):
        image = torch.randn(3, SIZE, SIZE, generator=g)
        mask = (image.mean(0) * 2).round().clamp(-1, 1).long() + 1
        mask[torch.rand(SIZE, SIZE, generator=g) < ignored] = IGNORED
        data.append({"pixel_values": image, "labels": mask})
    return data


def bound(folder: Any, model: nn.Module, data: Any, *, prior: Any = None, **settings: Any) -> PriorTrainer:
    arguments = quiet_arguments(folder, **({"max_steps": 1} | settings))
    return PriorTrainer(model=model, prior=prior or random_prior(resnet()), args=arguments, train_dataset=data)


# ------------------------------------------------------------------------------------------------------------ matching


def covered(match: Any, model: nn.Module, prefix: str) -> None:
    """Everything with the prefix is under the prior, and nothing else."""
    inside = {name for name in canonical_parameters(model) if name.startswith(prefix)}
    assert inside
    assert set(match.pairs.values()) == inside
    assert set(match.new) == set(canonical_parameters(model)) - inside
    assert not match.marginalised
    assert not match.remarks


def test_a_classifiers_prior_binds_to_upernets_backbone_and_to_nothing_else():
    source, model = resnet(), upernet(auxiliary=True)
    match = random_prior(source, head=()).match(upernet())  # head=(): even if the classifier had gone unnoticed
    assert set(match.marginalised) == {"classifier.1.weight", "classifier.1.bias"}
    match = random_prior(source).match(model)
    covered(match, model, "backbone.")
    assert (match.strip, match.add) == ("resnet.", "backbone.")
    heads = {name.split(".")[0] for name in match.new}
    assert heads == {"decode_head", "auxiliary_head"}


def test_a_classifiers_prior_binds_to_segformers_encoder_and_to_nothing_else():
    model = segformer()
    match = random_prior(segformer(segments=False)).match(model)
    covered(match, model, "segformer.")
    assert (match.strip, match.add) == ("", "")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_byobnet"])
def test_a_timm_models_prior_binds_to_its_features_alone_and_under_upernet(name):
    """ConvNeXt's and ByobNet's stages.0 become stages_0 there; the last norm of ConvNeXt's head is not among the features."""
    timm = pytest.importorskip("timm")
    from transformers import TimmBackboneConfig

    source = timm.create_model(name, num_classes=5)
    prior = random_prior(source, rank=0)
    features = timm.create_model(name, features_only=True, pretrained=False)
    stages = list(range(len(features.feature_info.out_indices)))
    backbone = TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=stages, num_channels=3)
    whole = upernet(backbone)
    for model, prefix in ((features, ""), (whole, "backbone._backbone.")):
        match = prior.match(model)
        assert set(match.pairs.values()) == {n for n in canonical_parameters(model) if n.startswith(prefix)}
        assert all(n.startswith("head.norm.") for n in match.marginalised)
    prior.initialize(whole)
    mine = canonical_parameters(whole)
    assert all(torch.equal(mine[target], prior.mean[n]) for n, target in prior.match(whole).pairs.items())


def with_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm statistics that no other model has."""
    g = torch.Generator().manual_seed(7)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.5)
    return model


@pytest.mark.parametrize("name", [None, "test_byobnet"])
def test_batch_norm_statistics_of_the_backbone_travel_and_the_heads_stay(name):
    if name is None:
        source, model = with_statistics(resnet()), upernet()
        renamed = {f"resnet.{n.removeprefix('backbone.')}": n for n in persistent_buffers(model) if n.startswith("backbone.")}
    else:
        timm = pytest.importorskip("timm")
        source = with_statistics(timm.create_model(name, num_classes=5))
        model = timm.create_model(name, features_only=True, pretrained=False)
        renamed = {n.replace("stages_", "stages."): n for n in persistent_buffers(model)}
    buffers = {n: b.clone() for n, b in persistent_buffers(source).items()}
    before = {n: b.clone() for n, b in persistent_buffers(model).items()}
    random_prior(source, rank=0, buffers=buffers).initialize(model)
    after = persistent_buffers(model)
    assert len(renamed) > 3
    for theirs, mine in renamed.items():
        assert torch.equal(after[mine], buffers[theirs])
    for kept in set(after) - set(renamed.values()):
        assert torch.equal(after[kept], before[kept])


def test_a_segmentation_models_own_heads_stay_out_of_a_prior_learned_on_it():
    heads = {name.split(".")[0] for name in head_parameter_names(upernet(auxiliary=True))}
    assert heads == {"decode_head", "auxiliary_head"}
    assert {name.split(".")[0] for name in head_parameter_names(segformer())} == {"decode_head"}
    prior = random_prior(upernet(auxiliary=True))
    covered(prior.match(upernet(num_labels=7)), upernet(num_labels=7), "backbone.")


# ------------------------------------------------------------------------------------------------------------------- N


def counted_by_hand(data: list[dict[str, Tensor]]) -> int:
    return sum(int((np.asarray(row["labels"]) != IGNORED).sum()) for row in data)


@pytest.mark.parametrize("make", [upernet, segformer])
def test_n_is_the_number_of_pixels_that_are_not_ignored_or_of_images_as_asked(make, tmp_path):
    """UperNet's config says loss_ignore_index, SegFormer's semantic_loss_ignore_index."""
    data = pictures(5)
    prior = random_prior(resnet() if make is upernet else segformer(segments=False))
    pixels = counted_by_hand(data)
    assert pixels < 5 * SIZE * SIZE
    for count, n in (("labels", pixels), ("examples", 5)):
        trainer = bound(tmp_path, make(), data, prior=prior, prior_count=count, prior_scale=1e3)
        trainer.train()
        assert trainer.prior_penalty.num_examples == n
        logged = next(entry for entry in trainer.state.log_history if "prior_loss" in entry)
        assert logged["loss"] == pytest.approx(logged["nll"] + logged["prior_loss"], rel=1e-4)


def test_other_masks_ignore_other_pixels(tmp_path):
    data = [row | {"labels": torch.where(row["labels"] == IGNORED, 0, row["labels"])} for row in pictures(3)]
    model = upernet(loss_ignore_index=0)
    zeros = sum(int((row["labels"] == 0).sum()) for row in data)
    n = bound(tmp_path, model, data, prior_count="labels").prior_penalty.num_examples
    assert n == 3 * SIZE * SIZE - zeros


def test_token_labels_are_counted_as_the_causal_loss_does(tmp_path):
    """4 texts of 6 tokens: the first is no target, and two are ignored."""
    data = text_data(4, token_labels=True)
    data[1]["labels"][2] = data[3]["labels"][5] = -100
    model = tiny_llama()
    trainer = bound(tmp_path, model, data, prior=random_prior(model), prior_count="labels")
    assert trainer.prior_penalty.num_examples == 4 * 5 - 2
    asked: list[Any] = [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]} for row in data]
    assert int(trainer._get_num_items_in_batch(asked, torch.device("cpu"))) == 18  # transformers' own count
    trainer.train()


def test_one_label_per_example_counts_once_whatever_its_number(tmp_path):
    labels = [row | {"labels": 255 if i == 0 else -100 if i == 1 else i % 3} for i, row in enumerate(image_data(8))]
    collate = torch.utils.data.default_collate
    assert count_labels(labels, collate, batch_size=3) == 7
    many = [row | {"labels": torch.tensor([1.0, 0.0, 1.0])} for row in image_data(4)]
    trainer = bound(
        tmp_path,
        tiny_vit(problem_type="multi_label_classification"),
        many,
        prior=random_prior(tiny_vit()),
        prior_count="labels",
    )
    assert trainer.prior_penalty.num_examples == 4


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of a list, which counts how often it is asked and draws random numbers as augmentation does."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.asked = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        torch.rand(1)
        np.random.rand()  # noqa: NPY002
        return self.rows[index]


def test_labels_are_counted_once_and_leave_no_trace_in_the_random_states(tmp_path):
    data = Rows(pictures(5))
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), np.random.rand(2)  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    count = count_labels(data, torch.utils.data.default_collate, ignore_index=lambda _: IGNORED)
    assert count == counted_by_hand(data.rows)
    assert torch.equal(torch.rand(2), expected[0])
    assert np.array_equal(np.random.rand(2), expected[1])  # noqa: NPY002
    data.asked = 0
    trainer = bound(tmp_path, upernet(), data, prior_count="labels", per_device_train_batch_size=2)
    assert data.asked == 5
    trainer.train()  # binds again; one batch of two, and those that the loader fetches ahead
    assert data.asked < 10
    trainer.train_dataset = pictures(3, seed=8)
    trainer.train()
    assert trainer.prior_penalty.num_examples == counted_by_hand(trainer.train_dataset)


def test_ranks_count_a_part_each():
    data = pictures(5)
    parts = [
        count_labels(data, torch.utils.data.default_collate, ignore_index=lambda _: IGNORED, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    assert sum(parts) == counted_by_hand(data)
    assert parts[0] == counted_by_hand(data[::2])


def test_what_counts_must_be_said_and_the_error_names_both_words(tmp_path):
    data = pictures(4)
    with pytest.raises(ValueError, match=r"shape \(2, 16, 16\).*prior_count='labels'.*prior_count='examples'"):
        bound(tmp_path, upernet(), data).train()
    with pytest.raises(ValueError, match="prior_count is 'pixels', expected one of 'examples', 'labels', or None"):
        bound(tmp_path, upernet(), data, prior_count="pixels")
    with pytest.raises(ValueError, match="prior_num_examples=7 is N already: leave out prior_count='labels'"):
        bound(tmp_path, upernet(), data, prior_count="labels", prior_num_examples=7)
    for count in ("labels", "examples"):  # a stream may never end
        with pytest.raises(ValueError, match=r"no length.*prior_num_examples"):
            bound(tmp_path, upernet(), Stream(data), prior_count=count)
    nothing = [row | {"labels": torch.full((SIZE, SIZE), IGNORED)} for row in data]
    with pytest.raises(PriorHubError, match="N would be 0"):
        bound(tmp_path, upernet(), nothing, prior_count="labels")
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in data]
    with pytest.raises(PriorHubError, match=r"no tensor of labels in a batch \('pixel_values'\): pass prior_num_examples"):
        bound(tmp_path, upernet(), unlabelled, prior_count="labels")


# -------------------------------------------------------------------------------------------------------------- averages


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def members_of(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    """State dicts around the model's own, with statistics of their own."""
    g = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        state = {n: t.clone() for n, t in model.state_dict().items()}
        for t in state.values():
            if t.is_floating_point():
                t += 0.2 * torch.rand(t.shape, generator=g)
        found.append(state)
    return found


def sample(model: nn.Module, state: dict[str, Tensor]) -> Sample:
    parameters = dict(model.named_parameters())
    inside = {n: t for n, t in state.items() if n in parameters}
    return Sample(inside, {n: t for n, t in state.items() if n not in parameters})


def by_hand(make: Any, states: list[dict[str, Tensor]], images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(averaged probabilities, mean entropy) with numpy, logits enlarged to SIZE."""
    members = []
    for state in states:
        model = make()
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model.eval()(pixel_values=images).logits
        if logits.shape[-1] != SIZE:
            logits = nn.functional.interpolate(logits, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        members.append(softmax(logits.double().numpy()))
    entropies = [-(p * np.log(p)).sum(1) for p in members]
    return np.mean(members, axis=0), np.mean(entropies, axis=0)


@pytest.mark.parametrize("make", [upernet, segformer])
def test_average_of_known_members_is_the_mean_of_their_probabilities_in_each_pixel(make):
    """SegFormer's logits are smaller than the masks."""
    model, data = make(), pictures(3)
    states = members_of(model)
    images = torch.stack([row["pixel_values"] for row in data])
    expected, entropy = by_hand(make, states, images)
    average = BayesianModelAverage(model, [sample(model, s) for s in states])
    found = average.predict(torch.utils.data.DataLoader(data, batch_size=2), progress=False)
    assert found.log_probabilities.shape == (3, CLASSES, SIZE, SIZE)
    np.testing.assert_allclose(found.probabilities.numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.expected_entropy.numpy(), entropy, rtol=1e-4, atol=1e-5)
    total = -(expected * np.log(expected)).sum(1)
    np.testing.assert_allclose(found.mutual_information.numpy(), (total - entropy).clip(0), rtol=1e-2, atol=1e-5)


def test_nll_of_leaves_out_ignored_pixels_and_refuses_masks_of_another_size():
    g = np.random.default_rng(0)
    probabilities = softmax(g.normal(size=(2, CLASSES, 4, 5)))
    labels = g.integers(0, CLASSES, (2, 4, 5))
    labels[0, 1:3] = IGNORED
    kept = [(b, i, j) for b, i, j in itertools.product(range(2), range(4), range(5)) if labels[b, i, j] != IGNORED]
    expected = -np.mean([np.log(probabilities[b, labels[b, i, j], i, j]) for b, i, j in kept])
    logs = torch.from_numpy(np.log(probabilities))
    assert nll_of(logs, torch.from_numpy(labels), IGNORED).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(PriorHubError, match="do not fit"):
        nll_of(logs, torch.from_numpy(labels[:, :3]), IGNORED)


def test_the_ignored_label_is_the_models_for_pictures_and_no_class_elsewhere():
    from transformers import BeitConfig, BeitForImageClassification

    masks, classes = torch.zeros(2, 4, 4), torch.zeros(2)
    assert ignore_index_of(upernet(), masks) == ignore_index_of(segformer(), masks) == 255
    assert ignore_index_of(upernet(loss_ignore_index=0), masks) == 0
    assert ignore_index_of(nn.Linear(2, 2), masks) == -100
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 32}
    beit = BeitForImageClassification(BeitConfig(**config, num_labels=300))
    assert beit.config.semantic_loss_ignore_index == 255
    assert ignore_index_of(beit, classes) == -100  # class 255 counts


@pytest.mark.parametrize("make", [upernet, segformer])
def test_sampled_segmentation_is_evaluated_by_its_average_without_ignored_pixels(make, tmp_path):
    data, test = pictures(5), pictures(4, seed=9)
    prior = random_prior(resnet() if make is upernet else segformer(segments=False))
    settings = {
        "sampler": "baoa",
        "num_cycles": 1,
        "samples_per_cycle": 3,
        "max_steps": 6,
        "learning_rate": 0.1,
        "temperature": 100.0,
    }
    settings |= {"prior_count": "labels", "prior_head_variance": 0.1, "batch_eval_metrics": True}
    settings |= {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 4}  # statistics: four pictures, and one alone
    trainer = PriorTrainer(
        model=make(),
        prior=prior,
        args=quiet_arguments(tmp_path, **settings),
        train_dataset=data,
        compute_metrics=segmentation_metrics(CLASSES, IGNORED),
    )
    trainer.train()
    found = trainer.evaluate(test)
    states = [(s := member.read()).parameters | s.buffers for member in list_samples(trainer.samples_folder)]
    assert len(states) == 3
    expected, _ = by_hand(make, states, torch.stack([row["pixel_values"] for row in test]))
    labels = np.stack([row["labels"].numpy() for row in test])
    terms, right = [], []
    for b, i, j in np.argwhere(labels != IGNORED):
        terms.append(-math.log(expected[b, labels[b, i, j], i, j]))
        right.append(expected[b, :, i, j].argmax() == labels[b, i, j])
    assert found["eval_bma_nll"] == pytest.approx(np.mean(terms), rel=1e-4)
    assert found["eval_bma_loss"] == pytest.approx(np.mean(terms), rel=1e-4)  # one batch, so the mean of batches is the mean
    assert found["eval_bma_pixel_accuracy"] == pytest.approx(np.mean(right), abs=1e-9)


def test_an_auxiliary_head_beside_a_sampler_is_refused_and_trains_without_one(tmp_path):
    """Its loss, 0.4 of its own NLL, belongs to the MAP objective but is another likelihood."""
    data = pictures(4, ignored=0)
    with pytest.raises(ValueError, match=r"adds 0.4 times.*use_auxiliary_head=False"):
        bound(tmp_path, upernet(auxiliary=True), data, sampler="baoa", prior_count="labels")
    model = upernet(auxiliary=True)
    trainer = bound(tmp_path, model, data, prior_count="labels", per_device_train_batch_size=4, learning_rate=0.0)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "nll" in entry)
    batch = torch.stack([row["pixel_values"] for row in data])
    labels = torch.stack([row["labels"] for row in data])
    with torch.no_grad():
        features = model.train().backbone(batch).feature_maps
        main, auxiliary = (
            nn.functional.interpolate(head(features), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
            for head in (model.decode_head, model.auxiliary_head)
        )
    terms = [nn.functional.cross_entropy(z, labels).item() for z in (main, auxiliary)]
    assert terms[1] > 0.5
    assert logged["nll"] == pytest.approx(terms[0] + 0.4 * terms[1], rel=1e-4)


# ----------------------------------------------------------------------------------------------------- memory, BatchNorm


def test_stream_holds_at_most_block_batches():
    model, block = upernet(), 3
    states = members_of(model, 2)
    alive: list[Any] = []

    def loader() -> Any:
        for row in pictures(10):
            image = row["pixel_values"][None].clone()
            alive.append(weakref.ref(image))
            yield {"pixel_values": image}
            del image

    average = BayesianModelAverage(model, [sample(model, s) for s in states])
    most, seen = 0, 0
    for batch, prediction in average.stream(loader(), block=block, progress=False):
        del batch, prediction
        most = max(most, sum(reference() is not None for reference in alive))
        seen += 1
        assert len(alive) <= -(-seen // block) * block + 0  # no block is read before the one before it is given
    assert seen == 10
    assert most <= block - 1  # what has been given is not held


def test_a_last_batch_of_one_picture_does_not_end_the_statistics_of_a_pooling_head():
    """Pooled to one pixel it has no variance; the other batches are averaged."""
    model, data = upernet(), pictures(5)
    found = recompute_batch_norm(model, torch.utils.data.DataLoader(data, batch_size=2), progress=False)
    only = recompute_batch_norm(model, torch.utils.data.DataLoader(data[:4], batch_size=2), progress=False)
    for name in only:
        torch.testing.assert_close(found[name], only[name], rtol=0, atol=0)
    with pytest.raises(PriorHubError, match="larger batches"):
        recompute_batch_norm(model, torch.utils.data.DataLoader(data, batch_size=1), progress=False)
