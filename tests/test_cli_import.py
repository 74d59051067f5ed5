"""`prior-hub import`: its help teaches, its table says what was decided, its prior is that of `PriorModel.from_legacy`."""

import json
import shlex
import warnings

import pytest
import torch
from hub_fixtures import fresh_repo_id
from huggingface_hub import HfApi
from legacy_originals import network, paper_files, swa_checkpoint
from priors_for_tests import assert_same

from prior_hub import PriorModel
from prior_hub.cli import main
from prior_hub.learning.references import reference_model
from prior_hub.priors.legacy import CONVENTIONS


def test_its_help_teaches_every_convention(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["import", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "never unpickled" in text
    for formula in ("s v + e and s^2 Q^T Q", "s v + e and Q^T Q", "s v/2 + e and s Q^T Q/(2(k-1))", "s (v/2 + e)"):
        assert formula in text
    assert f"{{{','.join(CONVENTIONS)}}}" in text.replace(", ", ",")


def test_the_table_says_what_was_decided(tmp_path, capsys):
    paper_files(tmp_path / "files", n=8, rank=8)
    arguments = [
        "import",
        str(tmp_path / "files"),
        "--output",
        str(tmp_path / "prior"),
        "--base-model",
        "org/net",
        "--dataset",
        "org/data",
    ]
    assert main([*arguments, "--objective", "SimCLR", "--license", "mit"]) == 0
    text = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in text.splitlines())
    rows = {key.strip(): value.strip() for key, value in rows.items()}
    assert rows["convention"] == "swag"
    assert rows["covmat"] == "divided by sqrt(K-1)"
    assert rows["covmat told by"] == "Welford's relation"
    assert float(rows["welford ratio"]) == pytest.approx(7, rel=0.02)
    assert rows["recentred"] == "True"
    assert rows["snapshots"] == "8"
    assert rows["rows"] == "8 of 8, newest first"
    assert "state_dict of the model file" in rows["names"]
    assert rows["BatchNorm statistics"] == "6 buffers"
    prior = PriorModel.from_pretrained(tmp_path / "prior")
    assert rows["sha256 of prior_mean.pt"] == prior.config.estimator["files"]["prior_mean.pt"]
    expected = PriorModel.from_legacy(
        tmp_path / "files", base_model="org/net", license="mit", source={"objective": "SimCLR", "dataset": "org/data"}
    )
    assert_same(prior, expected)
    assert main(["check", str(tmp_path / "prior")]) == 0
    assert "note: no " not in capsys.readouterr().out


def test_every_option_reaches_the_import(tmp_path, capsys):
    paper_files(tmp_path, n=8, rank=8)
    options = "--convention tufts --rank 3 --scale 100 --eps 0.01 --covmat-form divided --recentre --variance-floor 1e-5 "
    options += "--dtype bfloat16 --trust-order --head none --json"
    kinds = [f"--{kind}={tmp_path / f'prior_{kind}.pt'}" for kind in ("mean", "variance", "covmat", "model")]
    assert main(["import", *kinds, *options.split(), "--output", str(tmp_path / "prior")]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = PriorModel.from_legacy(
        tmp_path,
        convention="tufts",
        rank=3,
        scale=100,
        eps=0.01,
        covmat="divided",
        recentre=True,
        variance_floor=1e-5,
        deviations_dtype=torch.bfloat16,
        trust_order=True,
        head=(),
    )
    assert_same(PriorModel.from_pretrained(tmp_path / "prior"), expected)
    assert answer["config"]["estimator"] == dict(expected.config.estimator)
    assert answer["warnings"] == []
    assert answer["pushed"] is None


def test_warnings_are_on_the_error_stream_or_in_the_answer(tmp_path, capsys):
    swa_checkpoint(tmp_path / "c.pt", update_bn=False)
    arguments = ["import", str(tmp_path / "c.pt"), "--output", str(tmp_path / "prior")]
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a program; pytest makes them errors
        assert main(arguments) == 0
    assert "bn_update was not run" in capsys.readouterr().err
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (warning,) = json.loads(captured.out)["warnings"]
    assert "bn_update was not run" in warning


def test_what_cannot_be_imported_exits_1_and_leaves_nothing(tmp_path, capsys):
    files, _ = paper_files(tmp_path / "files", n=12, rank=10)
    torch.save(files["covmat"] * 5, tmp_path / "files" / "prior_covmat.pt")
    arguments = ["import", str(tmp_path / "files"), "--output", str(tmp_path / "prior")]
    assert main(arguments) == 1
    assert "cannot tell whether covmat is divided" in capsys.readouterr().err
    assert main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "PriorFormatError"
    assert not (tmp_path / "prior").exists()
    for wrong in (["import", "--output", "x"], [*arguments, "--mean", "m.pt"]):
        assert main(wrong) == 1
        assert "name the files once" in capsys.readouterr().err
    assert main([*arguments, "--reference", "resnet50"]) == 1
    assert "expected torchvision:NAME" in capsys.readouterr().err
    assert main([*arguments, "--reference", "torchvision:resnt50"]) == 1
    assert "Did you mean resnet50" in capsys.readouterr().err
    assert main(["import", "no/such/thing", "--output", "x"]) == 1
    assert "no folder, no file" in capsys.readouterr().err


def test_references_of_torchvision_and_timm_have_the_size_of_the_papers_files():
    """23,508,032 values without the head, as the published vectors; torchvision's documentation gives 25,557,032 with it."""
    from prior_hub.priors.matching import canonical_parameters

    for name in ("torchvision:resnet50", "timm:resnet50"):
        sizes = {n: p.numel() for n, p in canonical_parameters(reference_model(name)).items()}
        assert sum(sizes.values()) == 25_557_032
        assert sum(size for n, size in sizes.items() if not n.startswith("fc.")) == 23_508_032


def test_a_reference_of_transformers_comes_from_its_configuration(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic")
    config.save_pretrained(tmp_path)
    found, expected = reference_model(f"transformers:{tmp_path}"), ResNetModel(config)
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert next(found.parameters()).is_meta


def small_resnet18():
    """torchvision's ResNet-18 without its head, with weights that are told apart."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(weights=None)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


@pytest.mark.slow
def test_files_of_a_torchvision_network_get_its_names_and_fit_timms(tmp_path, capsys):
    """The whole way at the size of a real network (11.2 million values): files, import, match, initialise."""
    import timm

    net = small_resnet18()
    paper_files(tmp_path / "files", n=3, rank=3, net=net, model=None, name="resnet18_prior")
    arguments = ["import", str(tmp_path / "files"), "--reference", "torchvision:resnet18", "--output", str(tmp_path / "prior")]
    assert main([*arguments, "--convention", "paper", "--rank", "2", "--dtype", "bfloat16"]) == 0
    assert "11,176,512 values" in capsys.readouterr().out
    prior = PriorModel.from_pretrained(tmp_path / "prior")
    assert prior.config.head_parameters == ("fc.weight", "fc.bias")
    model = timm.create_model("resnet18", num_classes=7)
    assert len(prior.match(model).pairs) == 60
    prior.initialize(model)
    assert torch.equal(model.layer4[1].conv2.weight, prior.mean["layer4.1.conv2.weight"])


@pytest.mark.hub
def test_every_example_of_the_help_does_what_it_shows(tmp_path, hub, capsys, monkeypatch):
    """The files are small ones of the tests; the reference of the examples is replaced by theirs."""
    import prior_hub.learning.references as references

    asked = []
    monkeypatch.setattr(references, "reference_model", lambda name: asked.append(name) or network(0, classes=3))
    monkeypatch.chdir(tmp_path)
    paper_files("resnet50_ssl_prior", n=8, rank=8)
    swa_checkpoint("swag-100.pt")
    for kind, name in (("mean", "m.pt"), ("variance", "v.pt")):
        (tmp_path / name).write_bytes((tmp_path / "resnet50_ssl_prior" / f"prior_{kind}.pt").read_bytes())
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    lines = [x.strip() for x in capsys.readouterr().out.split("examples:\n")[1].splitlines() if x.strip()]
    assert len(lines) == 4
    repo = fresh_repo_id("imported")
    expected = [("swag", 8), ("paper", 5), ("swag", 8), ("swag", 0)]
    for line, (convention, rank) in zip(lines, expected, strict=True):
        assert line.startswith("prior-hub import")
        words = [repo if word == "me/my-prior" else word for word in shlex.split(line)[1:]]
        assert main(words) == 0, f"{line}: {capsys.readouterr().err}"
        prior = PriorModel.from_pretrained("my_prior")
        assert (prior.config.estimator["convention"], prior.rank) == (convention, rank)
    assert asked == ["torchvision:resnet50", "torchvision:resnet50"]
    assert PriorModel.from_pretrained(repo).config.dtype["deviations"] == "bfloat16"
    capsys.readouterr()


@pytest.mark.hub
def test_files_of_a_hub_repository_are_imported_from_one_commit(tmp_path, hub, capsys):
    files, _ = paper_files(tmp_path / "files", n=8, rank=8)
    repo = HfApi().create_repo(fresh_repo_id("legacy")).repo_id
    (tmp_path / "files" / "README.md").write_text("---\nlicense: mit\n---\nfiles of old")
    commit = HfApi().upload_folder(repo_id=repo, folder_path=tmp_path / "files").oid
    assert main(["import", repo, "--output", str(tmp_path / "prior"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["config"]
    assert found["source"] == {"repository": repo, "commit": commit}
    assert torch.equal(
        torch.cat([m.reshape(-1) for m in PriorModel.from_pretrained(tmp_path / "prior").mean.values()]), files["mean"]
    )
    empty = HfApi().create_repo(fresh_repo_id("legacy")).repo_id
    assert main(["import", empty, "--output", str(tmp_path / "prior")]) == 1
    assert "nothing to import" in capsys.readouterr().err
    assert main(["import", "alice/there-is-no-such-thing", "--output", str(tmp_path / "x")]) == 1
    assert "Check the spelling" in capsys.readouterr().err
