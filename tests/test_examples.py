"""The examples run from top to bottom and print the numbers they claim."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_fixtures import fresh_repo_id
from huggingface_hub import HfApi
from PIL import Image

from prior_hub import PriorModel, isotropic_prior

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments, folder):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_fifteen_lines_learn_store_load_and_use_a_prior(tmp_path):
    printed = run("minimal.py", folder=tmp_path)
    assert "12 of 14 parameters under the prior" in printed
    assert float(re.search(r"test NLL (\d+\.\d+) nats", printed)[1]) < np.log(10)  # better than a guess
    prior = PriorModel.from_pretrained(tmp_path / "example_output" / "prior")
    assert prior.rank == 10
    assert prior.config.estimator["batch_norm"] == "recomputed at the mean"


def parquet(folder, *, classes, column, rows):
    """A data set in the shape of CIFAR's, of noise."""
    from datasets import Dataset

    g = np.random.default_rng(0)
    for split in ("train", "test"):
        images = []
        for _ in range(rows):
            file = io.BytesIO()
            Image.fromarray(g.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        labels = (np.arange(rows) % classes).tolist()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        from datasets import Features, Value
        from datasets import Image as ImageFeature

        features = Features({"image": ImageFeature(), "label": Value("int64"), column: Value("int64")})
        data = Dataset.from_dict({"image": images, "label": labels, column: labels}, features=features)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


@pytest.mark.slow
def test_cifar_resnet20_runs_on_local_folders_and_prints_the_table_of_its_numbers(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import cifar_resnet20 as example

    torch.manual_seed(0)
    model = example.ResNet20(10)
    assert sum(p.numel() for p in model.parameters()) == 269_722  # as published
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    parquet(tmp_path / "source", classes=10, column="other", rows=64)
    parquet(tmp_path / "target", classes=20, column="coarse_label", rows=64)
    folders = ("--source", tmp_path / "source", "--target", tmp_path / "target", "--output", tmp_path / "out")
    printed = run("cifar_resnet20.py", "--weights", tmp_path / "weights.safetensors", *folders, "--quick", folder=tmp_path)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == set(example.METHODS)
    for row in rows:  # one seed: the table holds each number itself
        line = next(line for line in printed.splitlines() if line.startswith(row["method"]))
        assert f"{row['accuracy']:.3f}" in line
        assert f"{row['nll']:.3f}" in line
    assert PriorModel.from_pretrained(tmp_path / "out" / "prior").rank == 3


@pytest.mark.slow
def test_cifar_posterior_compares_map_and_average_and_prints_the_table_of_its_numbers(tmp_path, monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import cifar_posterior as example

    torch.manual_seed(0)
    source = example.ResNet20(10)
    isotropic_prior(source, variance=1e-4).save_pretrained(tmp_path / "prior")
    parquet(tmp_path / "target", classes=20, column="coarse_label", rows=64)
    files = ("--prior", tmp_path / "prior", "--target", tmp_path / "target", "--output", tmp_path / "out")
    printed = run("cifar_posterior.py", *files, "--quick", folder=tmp_path)
    rows = json.loads((tmp_path / "out" / "posterior.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(example.METHODS)
    for row in rows:
        line = next(line for line in printed.splitlines() if line.startswith(f"| 20 | {row['method']} |"))
        assert f"| {row['accuracy']:.3f} | {row['nll']:.3f} | {row['ece']:.3f} |" in line
    average = rows[-1]
    assert [one["members"] for one in average["by_samples"]] == [1, 2, 3, 4]
    assert average["by_samples"][-1]["nll"] == average["nll"]
    assert average["disagreement"] > 0
    for name in ("reliability.png", "samples.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 300


def test_cifar_resnet20_reads_a_data_set_of_the_hub_by_name_and_records_it(hub, tmp_path, monkeypatch):
    if hub.xet:
        pytest.skip("the loopback Hub of this folder serves data sets")
    import torch
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import cifar_resnet20 as example

    parquet(tmp_path / "source", classes=10, column="other", rows=16)
    name = HfApi().create_repo(fresh_repo_id("images"), repo_type="dataset").repo_id
    HfApi().upload_folder(repo_id=name, folder_path=tmp_path / "source", repo_type="dataset")
    hub.clear_log()
    images = example.load(name, "train", limit=12, augment=False)
    assert hub.requests(rf"/datasets/{name}/resolve/.*/data/train-.*\.parquet$")
    local = example.load(str(tmp_path / "source"), "train", limit=12, augment=False)
    assert torch.equal(images.pixels, local.pixels)
    assert images.labels.tolist() == local.labels.tolist() == [*range(10), 0, 1]
    torch.manual_seed(0)
    save_file(example.ResNet20(10).state_dict(), tmp_path / "weights.safetensors")
    for source, recorded in ((name, name), (str(tmp_path / "source"), "source")):
        files = ["--weights", str(tmp_path / "weights.safetensors"), "--output", str(tmp_path / "out")]
        options = example.parse([*files, "--source", source, "--quick"])
        assert example.learn_prior(options, images).config.source["dataset"] == recorded


@pytest.mark.slow
@pytest.mark.parametrize("script", ["cifar_resnet20.py", "cifar_posterior.py", "segmentation.py", "text.py"])
def test_help_teaches(script, tmp_path):
    printed = run(script, "--help", folder=tmp_path)
    assert len(printed.split()) > 150
    assert "--quick" in printed


def masks(folder, *, rows):
    """Images and masks of noise, some pixels not to count."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    g = np.random.default_rng(1)
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        columns = {"image": [], "mask": []}
        for _ in range(rows):
            mask = g.integers(0, 2, (24, 32)).astype(np.uint8)
            mask[0, :5] = 255
            for name, array in (("image", g.integers(0, 256, (24, 32, 3), dtype=np.uint8)), ("mask", mask)):
                file = io.BytesIO()
                Image.fromarray(array).save(file, "PNG")
                columns[name].append({"bytes": file.getvalue(), "path": None})
        features = Features({"image": ImageFeature(), "mask": ImageFeature()})
        Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


@pytest.mark.slow
def test_segmentation_runs_on_local_folders_and_prints_the_table_of_its_numbers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import segmentation as example

    parquet(tmp_path / "source", classes=10, column="other", rows=64)
    masks(tmp_path / "target", rows=12)
    target = example.load_target(str(tmp_path / "target"), "test", size=(24, 32))
    assert target.labels.unique().tolist() == [0, 1, 255]
    assert (target.labels == 255).sum() == 12 * 5
    folders = ("--source", tmp_path / "source", "--target", tmp_path / "target", "--output", tmp_path / "out")
    printed = run("segmentation.py", *folders, "--quick", folder=tmp_path)
    assert "prefix 'resnet.' replaced by 'backbone.'" in printed
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(example.METHODS)
    for row in rows:  # one seed: the table holds each number itself
        line = next(line for line in printed.splitlines() if line.startswith(f"{row['method']}  "))
        assert all(f"{row[key]:.3f}" in line for key in ("mean_iou", "pixel_accuracy", "nll", "ece"))
        assert len(row["held_out_nll"]) == 4  # every method has as many settings to choose from
    with Image.open(tmp_path / "out" / "segmentation.png") as picture:
        assert picture.size[0] > 500
    assert PriorModel.from_pretrained(tmp_path / "out" / "prior").rank == 2


def texts(folder, *, column, classes, rows=60):
    """Sentences of made-up words; the label shows in some of them."""
    from datasets import Dataset

    g = np.random.default_rng(2)
    words = ["".join(g.choice(list("abcdefgh"), 4)) for _ in range(40)]
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        labels = (np.arange(rows) % classes).tolist()
        lines = [" ".join([*g.choice(words, g.integers(2, 9)), f"mark{label}"]) for label in labels]
        data = Dataset.from_dict({column: lines, "label": labels})
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


THROUGH = ("--lora", "2", "--through", "--objective", "mlm")


@pytest.mark.filterwarnings("ignore:the prior is too stiff for this learning rate, taken through the adapters")  # of 8 steps
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="whole encoder"),
        pytest.param(("--lora", "2"), id="adapter to adapter", marks=pytest.mark.slow),
        pytest.param(THROUGH, id="through adapters", marks=pytest.mark.slow),
    ],
)
def test_text_runs_on_local_folders_and_prints_the_table_of_its_numbers(options, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    import text as example

    texts(tmp_path / "source", column="text", classes=4)
    texts(tmp_path / "target", column="sentence", classes=2)
    folders = ("--source", tmp_path / "source", "--target", tmp_path / "target", "--output", tmp_path / "out")
    example.main([*map(str, folders), "--quick", *options])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(example.METHODS)
    for row in rows:  # one seed: the table holds each number itself
        line = next(line for line in printed.splitlines() if line.startswith(row["method"]))
        assert f"{row['accuracy']:.3f}" in line
        assert f"{row['nll']:.3f}" in line
        assert len(row["held_out_nll"]) == 3  # every method has as many settings to choose from
    prior = PriorModel.from_pretrained(tmp_path / "out" / "prior")
    assert prior.rank == 3
    assert prior.config.source["dataset"] == "source"
    assert not any(name.startswith(("classifier", "cls")) for name in prior.mean)
    if options == ("--lora", "2"):  # over the source adapter, and nothing else
        assert prior.config.source["adapter"]["r"] == 2
        assert all(".lora_" in name for name in prior.mean)
        assert len(prior.mean) == 2 * 2 * 2  # layers, modules, A and B
    else:
        assert "bert.embeddings.word_embeddings.weight" in prior.mean
    if options == THROUGH:
        assert [row["update"] for row in rows] == ["", "gradient", "gradient"]  # there is no implicit step


def test_text_takes_the_validation_split_where_test_labels_are_secret_and_names_missing_columns(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    import text as example

    (tmp_path / "glue" / "data").mkdir(parents=True)
    for split, labels in (("train", [0, 1]), ("validation", [1, 0]), ("test", [-1, -1])):
        data = Dataset.from_dict({"sentence": [f"{split} a", f"{split} b"], "label": labels, "idx": [0, 1]})
        data.to_parquet(tmp_path / "glue" / "data" / f"{split}-00000-of-00001.parquet")
    assert example.load(str(tmp_path / "glue"), "test")["text"] == ["validation a", "validation b"]
    (tmp_path / "odd").mkdir()
    Dataset.from_dict({"words": ["a"], "label": [0]}).to_parquet(tmp_path / "odd" / "train.parquet")
    with pytest.raises(SystemExit, match="has the columns words, label: expected a text or sentence, and a label"):
        example.load(str(tmp_path / "odd"), "train")
