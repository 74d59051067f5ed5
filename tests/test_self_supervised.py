"""Learning without labels: the losses against their papers, the prior over the backbone alone, and what it fits downstream."""

from __future__ import annotations

import itertools
import math
import pickle
import sys

import numpy as np
import pytest
import timm
import torch
from models import IMAGE_SIZE, quiet_arguments, tiny_resnet, tiny_vit
from PIL import Image
from safetensors.torch import load_file
from scipy.special import logsumexp
from test_distributed import start
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    ResNetBackbone,
    ResNetModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from worker_self_supervised import model as float64_model
from worker_self_supervised import views as float64_views

from prior_hub import (
    BarlowTwins,
    PriorMatchError,
    PriorModel,
    PriorPenalty,
    SelfSupervised,
    SimCLR,
    SwagCallback,
    SwagEstimator,
    TwoViews,
    isotropic_prior,
)
from prior_hub.learning.barlow_twins import barlow_twins_loss
from prior_hub.learning.self_supervised import pooled_features, projection_head
from prior_hub.learning.simclr import nt_xent
from prior_hub.priors.matching import canonical_parameters, head_parameter_names

torch.set_num_threads(1)


def projections(images=5, width=4, seed=0, dtype=torch.float64):
    """(2, B, D), the views of an image alike."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, images, width, generator=generator, dtype=torch.float64)
    return (centre + 0.7 * torch.randn(2, images, width, generator=generator, dtype=torch.float64)).to(dtype)


# ------------------------------------------------------------------------------------------------------------- NT-Xent


def algorithm_1(z, temperature):
    """Chen et al. 2020, Algorithm 1, as printed: 2k - 1 and 2k are the views of image k."""
    rows = [[float(x) for x in z[view, image]] for image in range(z.shape[1]) for view in (0, 1)]

    def similarity(i, j):
        dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return dot / math.sqrt(sum(a * a for a in rows[i])) / math.sqrt(sum(b * b for b in rows[j]))

    def part(i, j):
        below = sum(math.exp(similarity(i, k) / temperature) for k in range(len(rows)) if k != i)
        return -math.log(math.exp(similarity(i, j) / temperature) / below)

    images = range(len(rows) // 2)
    return sum(part(2 * k, 2 * k + 1) + part(2 * k + 1, 2 * k) for k in images) / len(rows)


@pytest.mark.parametrize("images", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
def test_nt_xent_equals_the_papers_double_loop(images, temperature):
    z = projections(images)
    loss, _ = nt_xent(z, temperature)
    assert float(loss) == pytest.approx(algorithm_1(z, temperature), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_and_its_accuracy_are_the_cross_entropy_and_accuracy_of_choosing_among_all_other_views(temperature):
    z = projections(9, width=3)
    flat = z.numpy().transpose(1, 0, 2).reshape(18, 3)  # view 0 and 1 of an image side by side
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in flat] for a in flat])
    losses, right = [], []
    for i in range(18):
        others = [k for k in range(18) if k != i]
        logits = cosine[i, others] / temperature
        losses.append(logsumexp(logits) - cosine[i, i ^ 1] / temperature)
        right.append(others[int(np.argmax(logits))] == i ^ 1)
    loss, accuracy = nt_xent(z, temperature)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-12)
    expected = np.array(right).reshape(9, 2).mean(1)
    assert accuracy.tolist() == expected.tolist()
    assert 0 < expected.mean() < 1


def test_gradients_of_both_losses_are_those_of_finite_differences():
    z = projections(4, width=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 0.4)[0], z)
    assert torch.autograd.gradcheck(lambda z: barlow_twins_loss(z, 0.3), z)


@pytest.mark.parametrize("loss", [lambda z: nt_xent(z, 0.3)[0], lambda z: barlow_twins_loss(z, 0.1)])
def test_neither_the_order_of_images_nor_that_of_views_matters(loss):
    z = projections(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert float(loss(z[:, order])) == pytest.approx(float(loss(z)), rel=1e-12)
    assert float(loss(z.flip(0))) == pytest.approx(float(loss(z)), rel=1e-12)
    mixed = z.clone()
    mixed[0] = z[0, order]  # views of other images are not
    assert float(loss(mixed)) > 1.05 * float(loss(z))


def test_equal_views_at_the_corners_of_a_simplex_are_the_minimum_of_nt_xent():
    """B unit vectors with products of -1/(B - 1) to one another; the value is that of the formula, the gradient zero."""
    images, temperature = 5, 0.5
    corners = torch.eye(images, dtype=torch.float64) - 1 / images
    z = torch.stack([corners, corners]).requires_grad_()
    loss, accuracy = nt_xent(z, temperature)
    gap = 1 / temperature * (1 + 1 / (images - 1))
    assert loss.item() == pytest.approx(math.log(1 + (2 * images - 2) * math.exp(-gap)), rel=1e-12)
    loss.backward()
    assert z.grad.abs().max() < 1e-14
    assert accuracy.tolist() == [1] * images
    assert all(nt_xent(projections(images, images, seed), temperature)[0].item() > loss.item() for seed in range(20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_lose_only_what_the_inputs_lost(dtype):
    z = projections(8, dtype=dtype)
    exact = {"simclr": algorithm_1(z.double(), 0.05), "barlow": float(barlow_twins_loss(z.double(), 0.1))}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(nt_xent(z, 0.05)[0]) == pytest.approx(exact["simclr"], rel=1e-5)  # bf16 sums: 1e-2
        assert float(nt_xent(z.float(), 0.05)[0]) == pytest.approx(exact["simclr"], rel=1e-5)
        assert float(barlow_twins_loss(z, 0.1)) == pytest.approx(exact["barlow"], rel=1e-5)


# -------------------------------------------------------------------------------------------------------- Barlow Twins


@pytest.mark.parametrize("weight", [0.0, 0.005, 1.0])
def test_barlow_twins_equals_the_formula_on_numpys_correlations(weight):
    z = projections(11, width=4)
    first, second = z.numpy()
    c = np.corrcoef(first, second, rowvar=False)[:4, 4:]
    expected = sum((1 - c[i, i]) ** 2 for i in range(4))
    expected += weight * sum(c[i, j] ** 2 for i, j in itertools.permutations(range(4), 2))
    assert float(barlow_twins_loss(z, weight)) == pytest.approx(expected, rel=1e-12)


def test_barlow_twins_of_equal_views_with_uncorrelated_features_is_zero():
    one = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64) * torch.tensor([2.0, 0.3]) + 5
    assert float(barlow_twins_loss(torch.stack([one, one]), 1.0)) == pytest.approx(0, abs=1e-24)
    with pytest.raises(ValueError, match="dataloader_drop_last"):
        barlow_twins_loss(torch.zeros(2, 1, 3), 1.0)


# ------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    start("worker_self_supervised.py", str(folder), processes=2)
    return folder


@pytest.mark.parametrize("name", ["simclr", "barlow"])
@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradient_of_one_with_the_whole_batch(two_processes, name):
    model = float64_model(name)
    loss = model(float64_views())["loss"]
    loss.backward()
    ranks = [load_file(two_processes / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert sum(float(r["loss"]) for r in ranks) / 2 == pytest.approx(loss.item(), rel=1e-12)
    for key, parameter in model.named_parameters():
        for found in ranks:
            torch.testing.assert_close(found[key], parameter.grad, rtol=1e-10, atol=1e-13)
    half = model(float64_views()[:5])["loss"]
    assert abs(half.item() - loss.item()) > 0.01 * loss.item()  # each rank by itself would learn something else


# ---------------------------------------------------------------------------------------------------------------- views


def picture(height=40, width=30, seed=0, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize("size", [32, 96, (24, 48)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
def test_views_have_the_size_asked_for_whatever_the_picture(size, mode):
    views = TwoViews(size)(picture(50, 70, mode=mode))
    assert views.shape == (2, 3, *((size, size) if isinstance(size, int) else size))
    assert views.dtype == torch.float32
    assert type(views) is torch.Tensor


def test_views_of_a_tensor_are_those_of_the_picture_and_grey_tensors_do_too():
    image = picture()
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    make = TwoViews(32)
    torch.manual_seed(0)
    views = make(image)
    torch.manual_seed(0)
    assert torch.equal(make(tensor), views)
    torch.manual_seed(0)
    assert torch.equal(make(np.array(image)), views)
    assert make(tensor[:1]).shape == (2, 3, 32, 32)


def test_views_differ_and_the_seed_makes_them_again():
    make = TwoViews(32)
    torch.manual_seed(1)
    views = make(picture())
    again = make(picture())
    assert (views[0] - views[1]).abs().mean() > 0.05
    assert (views - again).abs().mean() > 0.05
    torch.manual_seed(1)
    assert torch.equal(pickle.loads(pickle.dumps(make))(picture()), views)  # as in a worker of a data loader


def test_without_augmentation_a_view_is_the_normalised_image():
    make = TwoViews((40, 30), scale=(1, 1), strength=0, flip=0, grayscale=0, blur=0, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.4))
    image = picture()
    crop = make._view.transforms[0]
    crop.ratio = (30 / 40, 30 / 40)  # the whole image
    expected = (np.array(image).transpose(2, 0, 1) / 255 - np.array([[[0.5]], [[0.4]], [[0.3]]])) / np.array(
        [[[0.1]], [[0.2]], [[0.4]]]
    )
    for view in make(image):
        np.testing.assert_allclose(view.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "share"), [({"flip": 0.3}, 0.3), ({"grayscale": 0.4}, 0.4), ({"blur": 0.6}, 0.6), ({"jitter": 0.7}, 0.7)]
)
def test_each_change_happens_as_often_as_its_probability_says(settings, share):
    """On an image that shows the change; the bound is five standard errors of 400 draws."""
    still = {"scale": (1, 1), "strength": 1.0, "flip": 0.0, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
    make = TwoViews((8, 8), **(still | settings))
    make._view.transforms[0].ratio = (1, 1)
    image = picture(8, 8)
    plain = TwoViews((8, 8), **still)
    plain._view.transforms[0].ratio = (1, 1)
    unchanged = plain(image)[0]
    torch.manual_seed(0)
    changed = [not torch.equal(view, unchanged) for _ in range(200) for view in make(image)]
    assert np.mean(changed) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 400))


def test_the_blur_is_a_tenth_of_the_image():
    def kernel(size):
        return list(TwoViews(size)._view.transforms[4].transforms[0].kernel_size)

    assert [kernel(size)[0] for size in (8, 32, 96, 224)] == [3, 3, 9, 23]
    assert kernel((96, 224)) == [23, 9]  # torchvision's kernel is (width, height)


def dataset(rows=12, column="img"):
    datasets = pytest.importorskip("datasets")
    images = [picture(20, 16, seed) for seed in range(rows)]
    return datasets.Dataset.from_dict({column: images, "label": list(range(rows))})


def test_views_are_a_transform_of_a_data_set_and_leave_labels_out():
    data = dataset()
    data.set_transform(TwoViews(8))
    assert list(data[0]) == ["pixel_values"]
    assert data[0]["pixel_values"].shape == (2, 3, 8, 8)
    assert len(data[:5]["pixel_values"]) == 5
    other = dataset(column="photo")
    other.set_transform(TwoViews(8))
    with pytest.raises(KeyError, match=r"columns \['photo', 'label'\].*column=.*remove_unused_columns=False"):
        other[0]
    other.set_transform(TwoViews(8, column="photo"))
    assert other[0]["pixel_values"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 0}, "size is 0"),
        ({"scale": (0.5, 0.2)}, "two shares"),
        ({"strength": -1}, "strength is -1"),
        ({"blur": 1.5}, "blur is 1.5, expected a probability"),
    ],
)
def test_wrong_settings_of_the_views_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TwoViews(**({"size": 32} | settings))


def test_without_torchvision_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ImportError, match=r"pip install 'prior-hub\[vision\]'"):
        TwoViews(32)


# ------------------------------------------------------------------------------------------------------------ backbones


def timm_resnet(classes=0):
    return timm.create_model("test_resnet", num_classes=classes)


BACKBONES = {
    "timm": timm_resnet,
    "timm convolution after the pooling": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
    "timm unpooled": lambda: timm.create_model("test_resnet", num_classes=0, global_pool=""),
    "timm in transformers": lambda: TimmWrapperModel(TimmWrapperConfig(architecture="test_resnet")),
    "ViT": lambda: ViTModel(tiny_vit().config),
    "ViT without pooler": lambda: ViTModel(tiny_vit().config, add_pooling_layer=False),
    "ResNet": lambda: ResNetModel(tiny_resnet().config),
    "ResNet's backbone": lambda: ResNetBackbone(tiny_resnet().config),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_gives_one_vector_per_image_and_trains(name):
    torch.manual_seed(0)
    model = SimCLR(BACKBONES[name](), projection=6)
    size = IMAGE_SIZE if name.startswith(("ViT", "Res")) else 32
    views = torch.randn(3, 2, 3, size, size)
    assert model.features(views[:, 0]).shape == (3, model.num_features)
    output = model(pixel_values=views)
    output["loss"].backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert output["accuracy"].shape == (3,)


def test_pooling_is_what_each_output_says():
    vit = ViTModel(tiny_vit().config).eval()
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(SimCLR(vit).features(images), vit(images).pooler_output)
    bare = ViTModel(tiny_vit().config, add_pooling_layer=False).eval()
    torch.testing.assert_close(SimCLR(bare).features(images), bare(images).last_hidden_state.mean(1))
    first = SimCLR(bare, pool=lambda output: output.last_hidden_state[:, 0])
    torch.testing.assert_close(first.features(images), bare(images).last_hidden_state[:, 0])
    torch.testing.assert_close(pooled_features(torch.ones(2, 3, 4, 5)), torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"a dict: pass pool="):
        pooled_features({"logits": torch.ones(2, 3)})
    with pytest.raises(TypeError, match=r"shape \[3\]"):
        pooled_features(torch.ones(3))


def test_projections_are_each_views_own_and_two_views_by_keyword_are_the_stacked_ones():
    model = float64_model("simclr")
    views = float64_views()
    one = model(pixel_values=views)["loss"]
    assert model(pixel_values=views[:, 0], other_view=views[:, 1])["loss"].item() == one.item()
    z = model(views, return_loss=False)["projections"]
    each = [model.projection_head(model.backbone(views[:, view])) for view in (0, 1)]
    torch.testing.assert_close(z, torch.stack(each))  # view first, then image
    assert nt_xent(z, 0.3)[0].item() == one.item()


def test_what_is_not_two_views_or_not_features_is_refused_with_what_to_pass():
    model = float64_model("simclr")
    images = float64_views()[:, 0]
    for wrong in (images, float64_views()[:, :1]):
        with pytest.raises(ValueError, match="two views of each image, as TwoViews makes them"):
            model(wrong)
    with pytest.raises(ValueError, match="views differ in shape"):
        model(pixel_values=images, other_view=images[:3])
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    with pytest.raises(ValueError, match=r"Sequential does not say how many features.*num_features"):
        SimCLR(plain)
    with pytest.raises(ValueError, match=r"shape \[2, 7\].*expected \[2, 5\].*num_features=7"):
        SimCLR(plain, num_features=5)(torch.randn(1, 2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"head \(fc.weight, fc.bias\).*num_classes=0"):
        SimCLR(timm_resnet(10))
    with pytest.raises(ValueError, match=r"ViTForImageClassification with a head.*base_model"):
        SimCLR(tiny_vit())
    with pytest.raises(ValueError, match="temperature is 0"):
        SimCLR(plain, num_features=7, temperature=0)
    with pytest.raises(ValueError, match="redundancy_weight is -1"):
        BarlowTwins(plain, num_features=7, redundancy_weight=-1)
    with pytest.raises(ValueError, match="widths"):
        projection_head([4])


def test_the_projection_head_is_the_papers_mlp():
    kinds = [type(layer).__name__ for layer in projection_head((4, 8, 8, 2))]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    without = projection_head((4, 8, 2), batch_norm=False)
    assert [type(layer).__name__ for layer in without] == ["Linear", "ReLU", "Linear"]
    x = torch.randn(3, 4)
    w = [p.detach() for p in without.parameters()]
    torch.testing.assert_close(without(x), (x @ w[0].T + w[1]).clamp(min=0) @ w[2].T + w[3])


# ---------------------------------------------------------------------------------------------------- Trainer and priors


def arguments(folder, **settings):
    defaults = {
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "max_steps": 6,
    }
    return quiet_arguments(folder, TrainingArguments, **(defaults | settings))


def learned(model, folder, size, *, data=None, **settings):
    if data is None:
        data = dataset()
        data.set_transform(TwoViews(size))
    callback = SwagCallback(3, start=1, every_n_steps=1, variance_floor=1e-10)
    torch.manual_seed(0)
    trainer = Trainer(
        model=model, args=arguments(folder, **settings), train_dataset=data, eval_dataset=data, callbacks=[callback]
    )
    trainer.train()
    return callback.prior(dataset="org/images", source={"augmentation": TwoViews(size).description}), trainer


PAIRS = {
    "timm": (lambda: timm_resnet(), lambda: timm_resnet(7), 32),
    "transformers ViT": (
        lambda: ViTModel(tiny_vit().config, add_pooling_layer=False),
        lambda: tiny_vit(seed=1, classes=4),
        IMAGE_SIZE,
    ),
    "transformers ResNet": (lambda: ResNetModel(tiny_resnet().config), lambda: tiny_resnet(seed=1, classes=4), IMAGE_SIZE),
}


@pytest.mark.parametrize(("pair", "objective"), [*((pair, SimCLR) for pair in PAIRS), ("transformers ResNet", BarlowTwins)])
def test_a_prior_learned_without_labels_by_trainer_covers_all_of_a_classifier_but_its_head(pair, objective, tmp_path):
    make, downstream, size = PAIRS[pair]
    torch.manual_seed(0)
    backbone = make()
    model = objective(backbone, projection=8 if objective is SimCLR else (16, 8))
    prior, trainer = learned(model, tmp_path / "run", size)
    assert list(prior.mean) == [n for n, p in backbone.named_parameters() if p.requires_grad]  # its own names, no head
    assert prior.config.head_parameters
    assert all(name.startswith("projection_head.") for name in prior.config.head_parameters)
    assert not any("projection_head" in name for name in prior.buffers)
    assert set(prior.buffers) == {n for n, _ in backbone.named_buffers() if "running" in n or "num_batches" in n}
    assert prior.config.source["objective"] == {SimCLR: "SimCLR", BarlowTwins: "Barlow Twins"}[objective]
    evaluated = trainer.evaluate()
    assert math.isfinite(evaluated["eval_loss"])
    prior.save_pretrained(tmp_path / "prior")
    loaded = PriorModel.from_pretrained(tmp_path / "prior")
    assert loaded.config.source["augmentation"]["size"] == [size, size]
    classifier = downstream()
    match = loaded.match(classifier)
    assert (match.marginalised, match.remarks, match.strip) == ((), (), "")
    assert list(match.new) == head_parameter_names(classifier)
    loaded.initialize(classifier)
    parameters = canonical_parameters(classifier)
    for name, mean in loaded.mean.items():
        assert torch.equal(parameters[match.pairs[name]].detach(), mean)
    for name, buffer in loaded.buffers.items():
        assert torch.equal(classifier.get_buffer(match.rename(name)), buffer)
    penalty = PriorPenalty(loaded, classifier, num_examples=10)
    penalty.add_gradient_()  # at the mean: nothing to add
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in classifier.parameters())


def test_the_prior_is_that_of_the_weights_the_backbone_had(tmp_path):
    """Mean and variance of the snapshots, taken by hand."""
    snapshots = []

    class Watching(SwagCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            before = self.estimator.num_snapshots
            super().on_step_end(args, state, control, model, **kwargs)
            if self.estimator.num_snapshots > before:
                snapshots.append({n: p.detach().clone() for n, p in model.backbone.named_parameters()})

    model = SimCLR(ViTModel(tiny_vit().config, add_pooling_layer=False), projection=8)
    data = dataset()
    data.set_transform(TwoViews(IMAGE_SIZE))
    callback = Watching(2, start=1, every_n_steps=1)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=data, callbacks=[callback]).train()
    prior = callback.prior()
    assert len(snapshots) == 5
    for name in prior.mean:
        stacked = torch.stack([s[name].double() for s in snapshots])
        torch.testing.assert_close(prior.mean[name].double(), stacked.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(prior.variance[name].double(), stacked.var(0).clamp(min=1e-12), rtol=1e-3, atol=1e-12)
        expected = stacked[[4, 3]] - stacked.mean(0)
        torch.testing.assert_close(prior.deviations[name].double(), expected, rtol=1e-3, atol=1e-7)


def test_accumulation_averages_the_losses_of_its_parts_and_takes_no_item_count(tmp_path):
    torch.manual_seed(0)
    model = SimCLR(ViTModel(tiny_vit().config, add_pooling_layer=False), projection=8, batch_norm=False)
    start_at = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)} for _ in range(12)]
    settings = {"max_steps": 1, "gradient_accumulation_steps": 3, "learning_rate": 0.1}
    trainer = Trainer(model=model, args=arguments(tmp_path, **settings), train_dataset=rows)
    assert trainer.model_accepts_loss_kwargs is False
    trainer.train()
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.load_state_dict(start_at, strict=False)
    stacked = torch.stack([row["pixel_values"] for row in rows])
    model.zero_grad()
    losses = [model(part)["loss"] for part in stacked.split(4)]
    (sum(losses) / 3).backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses).item() / 3, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(moved[name], start_at[name] - 0.1 * parameter.grad, rtol=1e-5, atol=1e-6)


def test_evaluation_reports_loss_and_the_share_of_views_told(tmp_path):
    model = SimCLR(ViTModel(tiny_vit().config, add_pooling_layer=False), projection=8)
    rows = [{"pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)} for _ in range(8)]
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=rows,
        compute_metrics=lambda output: {"accuracy": output.predictions.mean()},
    )
    found = trainer.evaluate()
    model.eval()
    with torch.no_grad():
        parts = [model(torch.stack([r["pixel_values"] for r in rows[i : i + 4]])) for i in (0, 4)]
    assert found["eval_loss"] == pytest.approx(sum(p["loss"].item() for p in parts) / 2, rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(torch.cat([p["accuracy"] for p in parts]).mean().item())


def updated(model, head="auto", snapshots=3):
    estimator = SwagEstimator(2, head=head)
    for _ in range(snapshots):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.01 * torch.randn_like(p)
        estimator.update(model)
    return estimator


def test_a_state_read_from_a_file_still_knows_the_backbones_names_and_the_objective(tmp_path):
    model = BarlowTwins(ResNetModel(tiny_resnet().config), projection=(8,))
    estimator = updated(model)
    estimator.save(tmp_path / "state.safetensors", model=model)
    resumed = SwagEstimator(2)
    resumed.load(tmp_path / "state.safetensors")
    for one in (estimator.prior(), resumed.prior()):
        assert set(one.mean) == {n for n, _ in model.backbone.named_parameters()}
        assert one.config.source == {
            "objective": "Barlow Twins",
            "projection_head": [8, 8],
            "projection_head_batch_norm": True,
            "redundancy_weight": 0.005,
        }
        assert one.config.model_type == "resnet"
    assert resumed.prior(objective="something else").config.source["objective"] == "something else"


def test_an_isotropic_prior_of_a_self_supervised_model_is_over_its_backbone():
    model = SimCLR(ResNetModel(tiny_resnet().config))
    prior = isotropic_prior(model, variance=0.1)
    assert list(prior.mean) == [n for n, _ in model.backbone.named_parameters()]
    assert set(prior.buffers) == {n for n, _ in model.backbone.named_buffers()}
    assert (prior.config.source["objective"], prior.config.source["temperature"]) == ("SimCLR", 0.1)
    assert prior.match(tiny_resnet()).add == "resnet."


def test_a_head_named_by_the_user_keeps_the_names_apart():
    model = SimCLR(ResNetModel(tiny_resnet().config))
    whole = updated(model, head=()).prior()
    assert list(whole.mean) == [n for n, _ in model.named_parameters()]


# ------------------------------------------------------------------------------------------------------------- the seam


class Reconstruction(nn.Module):
    """An objective of one's own that is no SelfSupervised: an autoencoder."""

    prior_backbone = "encoder"
    prior_source: dict = {"objective": "reconstruction", "noise": 0.1}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 12)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    def forward(self, pixel_values, return_loss: bool = True):
        target = pixel_values.flatten(1)
        return {"loss": (self.decoder(self.encoder(pixel_values)) - target).square().mean()}


def test_any_module_that_returns_a_loss_and_says_where_its_backbone_is_can_be_the_source(tmp_path):
    rows = [{"pixel_values": torch.randn(3, 2, 2)} for _ in range(8)]
    prior, trainer = learned(Reconstruction(), tmp_path, 2, data=rows)
    assert {n: tuple(t.shape) for n, t in prior.mean.items()} == {"1.weight": (4, 12), "1.bias": (4,)}
    assert prior.config.head_parameters == ("decoder.weight", "decoder.bias")
    assert (prior.config.source["objective"], prior.config.source["noise"]) == ("reconstruction", 0.1)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_a_subclass_is_a_name_and_a_loss():
    class Alignment(SelfSupervised):
        objective = "alignment"

        def loss(self, projections):
            return {"loss": (projections[0] - projections[1]).square().mean()}

    model = Alignment(ResNetModel(tiny_resnet().config), projection=(None, 3))
    assert model.projection_head[0].out_features == 8
    views = torch.randn(4, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
    views[:, 1] = views[:, 0]
    assert model(views)["loss"].item() == pytest.approx(0, abs=1e-10)
    assert updated(model).prior().config.source["objective"] == "alignment"


class Teaching(nn.Module):
    """As DINO: a student learns what its own moving average says; the backbone is a part of a part."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.ModuleDict({"backbone": timm_resnet(), "head": nn.Linear(96, 4)}).requires_grad_(False)
        self.student = nn.ModuleDict({"backbone": timm_resnet(), "head": nn.Linear(96, 4)})

    def forward(self, pixel_values, return_loss: bool = True):
        says, learns = (part["head"](part["backbone"](pixel_values)) for part in (self.teacher, self.student))
        return {"loss": nn.functional.cross_entropy(learns, says.softmax(1))}


class Declared(Teaching):
    prior_backbone = "student.backbone"


def test_of_a_student_and_its_teacher_the_prior_is_over_the_students_backbone(tmp_path):
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32)} for _ in range(8)]
    prior, _ = learned(Declared(), tmp_path, 32, data=rows)
    backbone = timm_resnet()
    assert list(prior.mean) == [n for n, _ in backbone.named_parameters()]
    assert set(prior.buffers) == {n for n, _ in backbone.named_buffers()}
    assert prior.config.model_type == "ResNet"
    assert list(prior.match(timm_resnet(5)).new) == ["fc.weight", "fc.bias"]


def test_a_model_that_declares_nothing_is_told_where_its_head_is_and_its_prefix_is_stripped():
    torch.manual_seed(0)
    prior = updated(Teaching(), head=("student.head", "teacher")).prior()
    assert all(name.startswith("student.backbone.") for name in prior.mean)
    match = prior.match(timm_resnet(5))
    assert (match.strip, match.add, match.marginalised) == ("student.backbone.", "", ())
    assert match.new == ("fc.weight", "fc.bias")
    classifier = timm_resnet(5)
    prior.initialize(classifier)
    assert torch.equal(classifier.conv1[0].weight.detach(), prior.mean["student.backbone.conv1.0.weight"])


@pytest.mark.parametrize("wrong", ["nowhere", "encoder.9", "empty", "", 3])
def test_a_backbone_that_is_not_there_is_refused(wrong):
    model = Reconstruction()
    model.empty = nn.Identity()
    model.prior_backbone = wrong
    with pytest.raises(PriorMatchError, match=f"prior_backbone is {wrong!r}.*the model has decoder, encoder, empty"):
        head_parameter_names(model)


# ------------------------------------------------------------------------------------- objectives of libraries, as they are

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the a small large dog cat house sees finds and sleeps".split()]  # noqa: SIM905


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


TEXT = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
TEXT |= {"pad_token_id": 0, "max_position_embeddings": 12}
SPECIAL = {"bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
MASKED = {
    "BERT": (BertConfig(**TEXT), BertForMaskedLM, BertForSequenceClassification, "bert", "cls.predictions.decoder.weight"),
    "ModernBERT": (
        ModernBertConfig(**TEXT, **SPECIAL),
        ModernBertForMaskedLM,
        ModernBertForSequenceClassification,
        "model",
        "decoder.weight",
    ),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MASKED)
def test_a_masked_language_model_gives_a_prior_over_its_encoder_the_tied_embedding_once(name, tied, tmp_path):
    config, source, target, base, decoder = MASKED[name]
    config = type(config)(**(config.to_dict() | {"tie_word_embeddings": tied}))
    torch.manual_seed(0)
    model = source(config)
    words = tokenizer()
    texts = ["the small dog sees a cat", "a cat sleeps", "the large house and the dog", "the cat finds a small house"] * 3
    rows = [words(text) for text in texts]
    callback = SwagCallback(3, start=1, every_n_steps=1)
    args = arguments(tmp_path / "run", remove_unused_columns=True)
    collator = DataCollatorForLanguageModeling(words, mlm_probability=0.4)
    Trainer(model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[callback]).train()
    prior = callback.prior(objective="masked language modelling", dataset="org/text")

    encoder = getattr(model, base)
    embedding = encoder.get_input_embeddings().weight
    assert list(prior.mean) == [f"{base}.{n}" for n, _ in encoder.named_parameters()]
    assert [n for n, t in prior.mean.items() if t.shape == embedding.shape] == [
        f"{base}.{n}" for n, p in encoder.named_parameters() if p is embedding
    ]
    assert (decoder in prior.config.tied_parameters) == tied
    assert (decoder in prior.config.head_parameters) == (not tied)
    assert len(prior.config.head_parameters) > 2

    prior.save_pretrained(tmp_path / "prior")
    loaded = PriorModel.from_pretrained(tmp_path / "prior")
    classifier = target(config)
    match = loaded.match(classifier)
    assert (match.marginalised, match.remarks) == ((), ())
    downstream = dict(getattr(classifier, base).named_parameters())
    pooler = {f"{base}.{n}" for n in downstream if n.startswith("pooler.")}  # BERT's, which a masked model does not have
    assert set(match.pairs.values()) == {f"{base}.{n}" for n in downstream} - pooler
    loaded.initialize(classifier)
    for key, parameter in downstream.items():
        if f"{base}.{key}" not in pooler:
            assert torch.equal(parameter.detach(), loaded.mean[f"{base}.{key}"])


def test_a_masked_autoencoder_gives_a_prior_over_its_encoder_but_for_the_positions_it_does_not_train():
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "patch_size": 4}
    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(**shape, **decoder, decoder_intermediate_size=12, image_size=IMAGE_SIZE)
    positions = "vit.embeddings.position_embeddings"
    torch.manual_seed(0)
    for trained in (False, True):
        model = ViTMAEForPreTraining(config)
        model.vit.embeddings.position_embeddings.requires_grad_(trained)
        assert "loss" in model(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
        for head in ("auto", ("decoder",)):
            prior = updated(model, head).prior(objective="MAE")
            names = {f"vit.{n}" for n, _ in model.vit.named_parameters()}
            assert set(prior.mean) == (names if trained else names - {positions})
            match = prior.match(tiny_vit())
            assert match.marginalised == ()
            assert match.new == (*(() if trained else (positions,)), "classifier.weight", "classifier.bias")
    assert isinstance(tiny_vit(), ViTForImageClassification)
