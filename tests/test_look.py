"""`prior-hub info`, `plot` and what they rest on: conventions, architectures by name, and a prior's profile."""

import json
import re

import pytest
import torch
from hub_fixtures import fresh_repo_id
from huggingface_hub import HfApi
from models import dense_covariance, tiny_vit
from models import random_prior as prior_of
from priors_for_tests import random_prior

from prior_hub import LowRankGaussian, PriorModel, PriorNotFoundError
from prior_hub.cli import main
from prior_hub.learning.references import named_model
from prior_hub.priors.conventions import scale_convention
from prior_hub.priors.legacy import CONVENTIONS, convention_weights
from prior_hub.priors.profile import network_blocks, profile


@pytest.fixture
def vit(tmp_path):
    """(folder of a prior, folder of the model's config.json, the prior)."""
    model = tiny_vit()
    model.config.architectures = ["ViTForImageClassification"]
    model.config.save_pretrained(tmp_path / "model")
    prior = prior_of(model, base_model="org/tiny-vit", source={"dataset": "org/data"}, model_type="vit")
    prior.save_pretrained(tmp_path / "prior")
    return tmp_path / "prior", tmp_path / "model", prior


def printed(capsys, *arguments, code=0):
    assert main([str(a) for a in arguments]) == code
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- info


def test_info_needs_no_weights_and_shows_size_scale_convention_and_provenance(tmp_path, capsys):
    prior = random_prior(0, deviations=torch.bfloat16)
    prior.save_pretrained(tmp_path)
    sizes = {"mean": 25 * 4, "variance": 25 * 4, "deviations": 3 * 25 * 2}
    stored = {kind: sum(t.numel() * t.element_size() for t in getattr(prior, kind).values()) for kind in sizes}
    (tmp_path / "prior.safetensors").unlink()
    text = " ".join(printed(capsys, "info", tmp_path).split())
    for part in (
        "org/tiny-net @ 01234567",
        "objective cross entropy, dataset org/tiny-images",
        "350 B to download in 1 file, as much in memory: mean 100 B (float32), variance 100 B (float32), deviations 150 B (bf",
        "swag: SWAG (Maddox et al. 2019, eq. 6)",
        "Sigma = s * (diag(v) / 2 + D^T D / (2 * (K - 1))) + e * I",
        "estimator swag learning rate 0.05, batch norm recomputed",
        f"torch {torch.__version__.split('+')[0]}",
    ):
        assert part in text, part
    found = json.loads(printed(capsys, "info", tmp_path, "--json"))
    assert found["size"] == {"download_bytes": 350, "memory_bytes": 350, "files": 1, **sizes}
    assert stored == sizes
    assert found["convention"]["name"] == "swag"
    assert found["config"]["estimator"] == {"name": "swag", "learning_rate": 0.05, "batch_norm": "recomputed"}
    assert len(found["config"]["weight_files"]["prior.safetensors"]) == 64


def test_info_says_which_parameters_of_a_model_are_under_the_prior(vit, capsys):
    folder, model, prior = vit
    (folder / "prior.safetensors").unlink()
    text = " ".join(printed(capsys, "info", folder, "--model", model).split())
    count = len(prior.config.parameters)
    assert f"{count} of {count + 2} parameters under the prior" in text
    assert "new: classifier.weight, classifier.bias" in text
    found = json.loads(printed(capsys, "info", folder, "--model", model, "--json"))["match"]
    assert (found["fits"], found["class"]) == (True, "ViTForImageClassification")
    assert found["pairs"] == {name: name for name in prior.config.parameters}
    assert found["covered_values"] == prior.num_parameters


def test_info_exits_1_for_a_model_that_the_prior_does_not_fit(vit, capsys):
    folder, model, _ = vit
    text = " ".join(printed(capsys, "info", folder, "--model", "resnet18", code=1).split())
    assert "resnet18: does not fit: none of the" in text
    assert "org/tiny-vit" in text  # and still says what it is
    found = json.loads(printed(capsys, "info", folder, "--model", "resnet18", "--json", code=1))
    assert (found["ok"], found["match"]["fits"]) == (False, False)
    assert main(["info", str(folder), "--model", str(model / "no-such-folder")]) == 1
    assert "configuration cannot be read" in capsys.readouterr().err


@pytest.mark.hub
def test_info_with_a_model_downloads_two_configurations_and_no_weights(vit, hub, capsys):
    _, model, _ = vit
    names = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8192}
    large = prior_of(tiny_vit(**names))
    assert sum(t.numel() * 4 for t in large.deviations.values()) > 1_000_000
    prior, base = fresh_repo_id("prior"), fresh_repo_id("model")
    large.push_to_hub(prior)
    config = json.loads((model / "config.json").read_text()) | names
    HfApi().create_repo(base)
    HfApi().upload_file(path_or_fileobj=json.dumps(config).encode(), path_in_repo="config.json", repo_id=base)
    HfApi().upload_file(path_or_fileobj=b"\0" * 500_000, path_in_repo="model.safetensors", repo_id=base)
    hub.clear_log()
    found = json.loads(printed(capsys, "info", prior, "--model", base, "--json"))
    assert found["match"]["fits"]
    assert found["match"]["covered_values"] == large.num_parameters
    assert sum(entry["sent"] for entry in hub.requests()) < 30_000
    assert not [entry["target"] for entry in hub.requests() if "safetensors" in entry["target"]]


# -------------------------------------------------------------------------------------------------------- conventions


def imported(convention, scale, eps, rows):
    """A prior with the weights of a convention, as `from_legacy` writes them."""
    weights = convention_weights(convention, scale, eps, rows)
    estimator = {"name": "swag", "convention": convention, "imported_scale": scale}
    prior = random_prior(0, rows, {"w": (5,)}, mean=torch.float64, deviations=torch.float64, **weights)
    return PriorModel(prior.gaussian, prior.config.replace(estimator=estimator))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("scale", "eps", "rows"), [(3.0, 0.1, 4), (0.5, 0.0, 2), (2.0, 0.1, 0)])
def test_the_formula_of_a_convention_is_the_covariance(convention, scale, eps, rows):
    prior = imported(convention, scale, eps, rows)
    found = scale_convention(prior.config)
    assert found.name == ("diagonal" if convention == "swag" and not rows else convention)
    v = prior.variance["w"]
    d = prior.deviations["w"] if rows else torch.zeros(0, 5, dtype=torch.float64)
    names = {"s": scale, "e": eps, "v": v, "K": max(rows, 2), "I": torch.eye(5), "diag": torch.diag, "DTD": d.T @ d}
    text = re.sub(r"[DQ]\^T [DQ]", "DTD", found.formula.removeprefix("Sigma = "))
    assert torch.allclose(eval(text, names), dense_covariance(prior), rtol=1e-12)


def test_other_weights_are_said_as_they_are():
    own = scale_convention(random_prior(0, 3, low_rank_weight=0.7, diagonal_weight=0.2).config)
    assert (own.name, own.formula) == ("own", "Sigma = s * (0.2 * diag(v) + 0.7 * D^T D) + e * I")
    swag = random_prior(0, 6)
    assert scale_convention(swag.config).name == "swag"
    small = scale_convention(swag.compressed(rank=2).config)
    assert (small.name, small.formula) == ("principal", "Sigma = s * (diag(v) / 2 + D^T D / (2 * (6 - 1))) + e * I")
    assert scale_convention(swag.truncated(3).config).name == "swag"
    assert scale_convention(swag.truncated(0).config).name == "diagonal"
    moved = imported("paper", 3.0, 0.1, 4).rescaled(5.0)
    assert "imported at scale 3.0, and rescaled here as SWAG's" in scale_convention(moved.config).words


# --------------------------------------------------------------------------------------------------- models by name


def test_a_model_is_found_by_folder_by_timms_name_and_by_library(vit, tmp_path):
    _, folder, _ = vit
    names = [n for n, _ in tiny_vit().named_parameters()]
    found = named_model(str(folder))
    assert [n for n, _ in found.named_parameters()] == names
    assert all(p.is_meta for p in found.parameters())
    for name in ("resnet18", "timm:resnet18", "torchvision:resnet18"):
        model = named_model(name)
        assert model.conv1.weight.shape == (64, 3, 7, 7)
        assert model.conv1.weight.is_meta
    wrapped = {"architecture": "resnet18", "num_classes": 7, "model_args": {"num_classes": 7}, "pretrained_cfg": {"tag": "x"}}
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps(wrapped))
    model = named_model(str(tmp_path / "timm"))
    assert model.timm_model.conv1.weight.is_meta
    bare = json.loads((folder / "config.json").read_text())
    del bare["architectures"]
    (folder / "config.json").write_text(json.dumps(bare))
    assert type(named_model(str(folder))).__name__ == "ViTModel"
    with pytest.raises(PriorNotFoundError, match="no model"):
        named_model(str(tmp_path))


# ------------------------------------------------------------------------------------------------------ the profile


@pytest.mark.parametrize("rank", [0, 3])
def test_a_profile_is_that_of_the_dense_covariance(rank, monkeypatch):
    shapes = {"net.stem.weight": (40, 30), "net.layers.0.weight": (7, 5), "net.layers.0.bias": (5,), "net.layers.1.scale": ()}
    prior = random_prior(1, rank, shapes, scale=2.0, eps=1e-4)
    monkeypatch.setattr("prior_hub.priors.profile._NUMBERS", 1)  # pieces of 4096 entries at most
    found = profile(prior.gaussian)
    g = prior.gaussian
    for tensor in found.tensors:
        variance = dense_covariance(prior, [tensor.name]).diagonal()
        diagonal = g.scale * g.diagonal_weight * prior.variance[tensor.name].double().flatten() + g.eps
        assert tensor.size == len(variance)
        assert tensor.diagonal == pytest.approx(float(diagonal.sum()), rel=1e-9)
        assert tensor.low_rank == pytest.approx(float((variance - diagonal).sum()), rel=1e-6, abs=1e-12)
        assert tensor.square == pytest.approx(float(prior.mean[tensor.name].double().square().sum()), rel=1e-9)
        expected = variance.sqrt().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), interpolation="nearest")
        assert tensor.deviation == pytest.approx(expected.tolist(), rel=2e-3)  # half a bin
    whole = dense_covariance(prior)
    low_rank = sum(t.low_rank for t in found.tensors)
    assert found.low_rank_share == pytest.approx(low_rank / float(whole.trace()), rel=1e-9)
    assert found.spectrum == pytest.approx(g.spectrum(), rel=1e-9)
    diagnosis = prior.diagnose()
    assert found.effective_rank == pytest.approx(diagnosis.effective_rank)
    assert found.low_rank_share == pytest.approx(diagnosis.low_rank_share)
    blocks = {b.name: b for b in found.blocks()}
    assert list(blocks) == ["stem", "layers.0", "layers.1"]
    one = blocks["layers.0"]
    names = ["net.layers.0.weight", "net.layers.0.bias"]
    variance = dense_covariance(prior, names).diagonal()
    mean = torch.cat([prior.mean[n].double().flatten() for n in names])
    assert one.parameters == tuple(names)
    assert one.total == pytest.approx(float(variance.mean().sqrt()), rel=1e-9)
    assert one.freedom == pytest.approx(float(variance.mean().sqrt() / mean.square().mean().sqrt()), rel=1e-9)
    assert one.diagonal**2 + one.low_rank**2 == pytest.approx(one.total**2)


@pytest.mark.parametrize("pieces", [1, 37])
def test_a_profile_does_not_depend_on_the_pieces(pieces, monkeypatch):
    g = torch.Generator().manual_seed(0)
    n = 20_000
    gaussian = LowRankGaussian({"w": torch.randn(n, generator=g)}, {"w": torch.rand(n, generator=g)}, {"w": torch.randn(4, n)})
    whole = profile(gaussian)
    monkeypatch.setattr(
        "prior_hub.priors.profile.pieces", lambda size, rows: ((i, min(i + 37 * 17, size)) for i in range(0, size, 37 * 17))
    )
    cut = profile(gaussian)
    assert cut.tensors[0].deviation == whole.tensors[0].deviation
    assert cut.tensors[0].low_rank == pytest.approx(whole.tensors[0].low_rank)
    assert cut.spectrum == pytest.approx(whole.spectrum)


def test_blocks_are_the_layers_of_networks_as_their_libraries_name_them():
    resnet = [n for n, _ in named_model("resnet50").named_parameters()]
    stages = [f"layer{i}.{j}" for i, count in ((1, 3), (2, 4), (3, 6), (4, 3)) for j in range(count)]
    assert list(network_blocks(resnet)) == ["conv1", "bn1", *stages, "fc"]
    assert network_blocks(resnet)["layer1.1"] == tuple(n for n in resnet if n.startswith("layer1.1."))
    vit = [n for n, _ in named_model("vit_tiny_patch16_224").named_parameters()]
    assert list(network_blocks(vit)) == [
        *("cls_token", "pos_embed", "patch_embed"),
        *(f"blocks.{i}" for i in range(12)),
        *("norm", "head"),
    ]
    deep = [f"model.layers.{i}.{part}" for i in range(300) for part in ("a.weight", "b.weight", "norm.weight")]
    assert list(network_blocks(deep)) == [f"layers.{i}" for i in range(300)]
    assert [n for names in network_blocks(deep).values() for n in names] == deep
    assert network_blocks(["weight"]) == {"weight": ("weight",)}
    assert network_blocks(["a.weight", "a.bias"]) == {"weight": ("a.weight",), "bias": ("a.bias",)}
    assert network_blocks([]) == {}


# ---------------------------------------------------------------------------------------------------------- the picture


def test_plot_writes_the_picture_and_as_json_its_numbers(tmp_path, capsys):
    prior = random_prior(0, 3)
    prior.save_pretrained(tmp_path / "prior")
    output = tmp_path / "new" / "picture.png"
    text = printed(capsys, "plot", tmp_path / "prior", "--output", output)
    assert str(output) in text
    assert output.read_bytes().startswith(b"\x89PNG")
    options = ("--what", "spectrum", "--scale", "7", "--json")
    found = json.loads(printed(capsys, "plot", tmp_path / "prior", "--output", output, *options))
    assert found["what"] == "spectrum"
    expected = profile(prior.rescaled(7.0).gaussian)
    assert found["scale"] == 7
    assert found["spectrum"] == list(expected.spectrum)
    assert [t["deviation"] for t in found["tensors"]] == [list(t.deviation) for t in expected.tensors]
    assert [b["freedom"] for b in found["blocks"]] == [b.freedom for b in expected.blocks()]


def test_plot_says_what_it_cannot_draw(tmp_path, capsys, monkeypatch):
    random_prior(0, 0).save_pretrained(tmp_path)
    assert main(["plot", str(tmp_path), "--what", "spectrum", "--output", str(tmp_path / "x.png")]) == 1
    assert "no low-rank part" in capsys.readouterr().err
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "x.docx")]) == 1
    said = capsys.readouterr().err
    assert "docx" in said
    assert ".png, .svg or .pdf" in said
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "x")]) == 1  # matplotlib would write x.png
    assert "has no ending" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "none"), "--output", str(tmp_path / "x..")]) == 1  # before a prior is looked for
    assert "names no kind of picture" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "x.png")]) == 1
    assert 'pip install "prior-hub[plots]"' in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))
