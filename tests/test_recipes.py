"""learn_prior and `prior-hub learn`: a tiny local model and a tiny local data set in, a prior's folder out. No network."""

from __future__ import annotations

import gc
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from models import TOKENS, VOCABULARY, tiny_bert, tiny_resnet
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ConvNextImageProcessor,
    PreTrainedTokenizerFast,
)

from prior_hub import PriorHubError, PriorModel, PriorNotFoundError, SimCLR, learn_prior
from prior_hub.cli import main
from prior_hub.learning.recipes import ESTIMATORS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than rank")  # few steps, so that the tests are quick
PIXELS = 16


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Folders of models (resnet, bert, mlm, timm) and of data (images, texts)."""
    root = tmp_path_factory.mktemp("places")
    tiny_resnet(classes=3).save_pretrained(root / "resnet")
    processor = ConvNextImageProcessor(size={"shortest_edge": PIXELS}, do_resize=True, crop_pct=1.0)
    processor.save_pretrained(root / "resnet")
    timm.models.save_for_hf(timm.create_model("test_byobnet", num_classes=5), root / "timm", safe_serialization=True)
    config = json.loads((root / "timm" / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, PIXELS, PIXELS], "test_input_size": [3, PIXELS, PIXELS]}
    (root / "timm" / "config.json").write_text(json.dumps(config))

    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, **{f"w{i}": i + 3 for i in range(VOCABULARY - 3)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=TOKENS, **special)
    tiny_bert(classes=3).save_pretrained(root / "bert")
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, **settings)).save_pretrained(root / "mlm")
    for name in ("bert", "mlm"):
        tokenizer.save_pretrained(root / name)

    random = np.random.default_rng(0)
    pictures = [Picture.fromarray(random.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(24)]
    labels = [i % 3 for i in range(24)]
    features = Features({"image": Image(), "fine": ClassLabel(names=["a", "b", "c"]), "id": Value("int32")})
    (root / "images").mkdir()
    rows = Dataset.from_dict({"image": pictures, "fine": labels, "id": list(range(24))}, features=features)
    rows.to_parquet(root / "images" / "train.parquet")
    texts = [" ".join(f"w{random.integers(0, 20)}" for _ in range(1 + i % TOKENS)) for i in range(24)]
    (root / "texts").mkdir()
    words_and_labels = {"text": texts, "label": [("no", "yes", "perhaps")[i] for i in labels], "title": texts}
    Dataset.from_dict(words_and_labels).to_parquet(root / "texts" / "train.parquet")
    return root


QUICK = {"steps": 6, "batch_size": 4, "use_cpu": True, "rank": 2, "every_n_steps": 1}


# ---------------------------------------------------------------------------------------------------------- each estimator


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_gives_a_prior_that_says_where_it_is_from(places, tmp_path, estimator):
    data = None if estimator == "isotropic" else places / "images"
    prior = learn_prior(places / "resnet", data, estimator=estimator, output=tmp_path / "prior", license="mit", seed=3, **QUICK)
    stored = PriorModel.from_pretrained(tmp_path / "prior")
    assert stored.config.replace(weight_files={}) == prior.config
    config = stored.config
    assert (config.license, config.model_type, config.rank) == ("mit", "resnet", 2 if estimator == "swag" else 0)
    assert config.estimator["name"] == {"fisher": "diagonal-fisher", "isotropic": "isotropic"}.get(estimator, "swag")
    assert "torch" in config.libraries
    assert "transformers" in config.libraries
    assert not any("classifier" in name for name in config.parameters)
    stored.initialize(tiny_resnet(classes=7))
    if estimator == "isotropic":
        return
    assert config.head_parameters == ("classifier.1.weight", "classifier.1.bias")
    source = dict(config.source)
    assert source.pop("training_loss") > 0
    assert source == {
        "objective": "image classification",
        "dataset": "local folder images",
        "split": "train",
        "image_column": "image",
        "label_column": "fine",
        "num_examples": 24,
        "num_labels": 3,
        "seed": 3,
        "steps": 6,
        "batch_size": 4,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "augmentation": "flip and shift",
    }
    assert "`local folder" not in (tmp_path / "prior" / "README.md").read_text().split("---")[1]  # no Hub data set is claimed


@pytest.mark.parametrize(("objective", "called"), [("simclr", "SimCLR"), ("barlow-twins", "Barlow Twins")])
@pytest.mark.parametrize("model", ["resnet", "timm"])
def test_images_without_labels_give_a_prior_over_the_backbone_by_its_own_names(places, objective, called, model):
    prior = learn_prior(places / model, places / "images", objective=objective, **(QUICK | {"batch_size": 5}))
    source = prior.config.source
    assert source["objective"] == called
    assert source["views"]["size"] == [PIXELS, PIXELS]
    assert "label_column" not in source
    assert not any("projection" in name or name.startswith("backbone.") for name in prior.config.parameters)
    target = AutoModelForImageClassification.from_pretrained(places / model) if model == "resnet" else None
    if target is not None:
        covered = set(prior.match(target).pairs.values())
        assert covered == {n for n, _ in target.named_parameters() if not n.startswith("classifier")}


def test_images_are_compared_within_whole_batches_only(places, monkeypatch):
    sizes = []
    forward = SimCLR.forward

    def spied(self, pixel_values, other_view=None, return_loss=True):
        sizes.append(len(pixel_values))
        return forward(self, pixel_values, other_view, return_loss)

    monkeypatch.setattr(SimCLR, "forward", spied)
    learn_prior(places / "timm", places / "images", objective="simclr", **(QUICK | {"batch_size": 5, "steps": 9}))
    assert sizes[:9] == [5] * 9  # 24 images: a last batch of 4 would have other negatives


def test_what_cannot_be_learned_from_views_is_refused(places):
    with pytest.raises(ValueError, match="no likelihood"):
        learn_prior(places / "resnet", places / "images", objective="simclr", estimator="fisher")
    with pytest.raises(ValueError, match="learns from images"):
        learn_prior(places / "bert", places / "texts", objective="simclr", **QUICK)
    with pytest.raises(ValueError, match="do not fill one batch of 25"):
        learn_prior(places / "resnet", places / "images", objective="simclr", **(QUICK | {"batch_size": 25}))


def test_a_fisher_of_a_checkpoint_whose_head_fits_is_not_trained_first(places):
    prior = learn_prior(
        places / "resnet", places / "images", estimator="fisher", labels="expectation", max_examples=10, use_cpu=True
    )
    model = AutoModelForImageClassification.from_pretrained(places / "resnet")
    assert all(torch.equal(prior.mean[n], p) for n, p in model.named_parameters() if n in prior.mean)
    recorded = prior.config.estimator
    assert (recorded["num_examples"], recorded["examples_used"], recorded["labels"]) == (24, 10, "expectation")
    assert prior.config.source["num_examples"] == 24
    assert "steps" not in prior.config.source


def test_a_head_that_does_not_fit_is_made_anew_and_trained_also_for_the_fisher(places, tmp_path):
    shutil.copytree(places / "resnet", tmp_path / "other")
    tiny_resnet(classes=5).save_pretrained(tmp_path / "other")
    prior = learn_prior(tmp_path / "other", places / "images", estimator="fisher", **QUICK)
    assert prior.config.source["steps"] == 6
    assert prior.config.source["num_labels"] == 3
    with pytest.raises(
        ValueError, match=r"the head of .* does not fit the 3 classes of .* and is new: a Fisher needs a trained one"
    ):
        learn_prior(tmp_path / "other", places / "images", estimator="fisher", **QUICK | {"steps": 0})


def test_the_isotropic_prior_is_the_checkpoint_and_leaves_out_what_it_does_not_hold(places):
    prior = learn_prior(places / "mlm", estimator="isotropic", variance=0.25)
    checkpoint = BertForMaskedLM.from_pretrained(places / "mlm").bert
    stored = dict(checkpoint.named_parameters())
    assert prior.mean.keys() == stored.keys()  # the pooler is in no masked language model
    assert not any(name.startswith("pooler") for name in prior.mean)
    assert all(torch.equal(prior.mean[name], tensor) for name, tensor in stored.items())
    assert all((v == 0.25).all() for v in prior.variance.values())
    match = prior.match(tiny_bert())
    assert len(match.pairs) == len(prior.mean)


# ------------------------------------------------------------------------------------------------------------ each source


def test_text_classification_with_labels_that_are_words(places):
    prior = learn_prior(places / "bert", places / "texts", text_column="text", learning_rate=0.01, max_length=4, **QUICK)
    assert prior.config.source["objective"] == "text classification"
    assert (prior.config.source["optimizer"], prior.config.source["num_labels"]) == ("adamw", 3)
    prior.initialize(tiny_bert(classes=9))
    moved = [n for n, p in BertForSequenceClassification.from_pretrained(places / "bert").named_parameters() if n in prior.mean]
    assert moved


@pytest.mark.parametrize("estimator", ["swag", "fisher"])
def test_masked_language_models_give_a_prior_over_the_encoder(places, estimator):
    settings = QUICK | ({"steps": None} if estimator == "fisher" else {})
    prior = learn_prior(places / "mlm", places / "texts", objective="masked-lm", estimator=estimator, **settings)
    assert prior.config.source["objective"] == "masked language modelling"
    assert "bert.embeddings.word_embeddings.weight" in prior.mean
    assert not any(name.startswith("cls.") for name in prior.mean)
    prior.initialize(tiny_bert())


def test_timm_checkpoints_give_priors_for_timm_models(places):
    prior = learn_prior(places / "timm", places / "images", **QUICK)
    match = prior.match(timm.create_model("test_byobnet", num_classes=9))
    assert len(match.pairs) == len(prior.mean)
    assert not any("head.fc" in name for name in prior.mean)
    flat = learn_prior(places / "timm", estimator="isotropic")
    assert flat.match(timm.create_model("test_byobnet", num_classes=9)).pairs


def test_a_folder_of_images_by_class_is_a_data_set(places, tmp_path):
    for i, name in enumerate(["cat", "cat", "dog", "dog", "fox", "fox"]):
        (tmp_path / "animals" / name).mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 24, 3), 30 * i, dtype=np.uint8)
        Picture.fromarray(pixels).save(tmp_path / "animals" / name / f"{i}.png")
    prior = learn_prior(places / "resnet", tmp_path / "animals", augment=False, **QUICK)
    assert prior.config.source["augmentation"] == "none"
    assert (prior.config.source["num_examples"], prior.config.source["dataset"]) == (6, "local folder animals")


def test_the_same_seed_gives_the_same_prior_and_another_another(places):
    a, b, c = (learn_prior(places / "resnet", places / "images", seed=seed, max_examples=12, **QUICK) for seed in (1, 1, 2))
    assert all(torch.equal(a.mean[n], b.mean[n]) and torch.equal(a.variance[n], b.variance[n]) for n in a.mean)
    assert not all(torch.equal(a.mean[n], c.mean[n]) for n in a.mean)


# ------------------------------------------------------------------------------------------------------ what it refuses


def edited(places, tmp_path, **columns) -> Path:
    rows = Dataset.from_parquet(str(places / "images" / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    for name, values in columns.items():
        rows = rows.remove_columns(name) if values is None else rows.add_column(name, values)
    (tmp_path / "edited").mkdir()
    rows.to_parquet(tmp_path / "edited" / "train.parquet")
    return tmp_path / "edited"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_column": "class"}, r"'class' is not there. There are: image \(Image\), fine \(ClassLabel\), id \(int32\)"),
        ({"image_column": "fine"}, r"'fine' is no column of images. There are: image \(Image\)"),
        ({"text_column": "words"}, r"'words' is no column of texts. There are: image"),
        ({"objective": "masked-lm"}, r"cannot tell which column holds the images or texts"),
        ({"objective": "cubism"}, "expected one of 'supervised', 'masked-lm'"),
        ({"estimator": "laplace"}, "'swag', 'diagonal-swag', 'fisher', 'isotropic'"),
        ({"optimizer": "lion"}, "'sgd', 'adamw'"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dataset": None}, "estimator='swag' needs a data set"),
        ({"estimator": "isotropic"}, "takes no data set"),
        ({"split": "test"}, "test"),
    ],
)
def test_a_wrong_argument_is_a_value_error_that_says_what_there_is(places, arguments, message):
    settings = QUICK | {"dataset": places / "images"} | arguments
    with pytest.raises(ValueError, match=message):
        learn_prior(places / "resnet", **settings)


def test_two_columns_of_classes_or_texts_are_not_guessed_between(places, tmp_path):
    with pytest.raises(ValueError, match=r"cannot tell which column holds the classes: pass label_column.*id \(int32\)"):
        learn_prior(places / "resnet", edited(places, tmp_path, fine=None), **QUICK)
    named = Dataset.from_dict({"one": ["a", "b"], "two": ["c", "d"], "label": [0, 1]})
    (tmp_path / "pairs").mkdir()
    named.to_parquet(tmp_path / "pairs" / "train.parquet")
    with pytest.raises(ValueError, match=r"pass image_column or text_column.*one \(string\), two \(string\), label \(int64\)"):
        learn_prior(places / "bert", tmp_path / "pairs", **QUICK)


def test_data_without_labels_or_with_one_class_is_refused(places, tmp_path):
    with pytest.raises(PriorHubError, match="holds -1: this split has examples without labels"):
        learn_prior(places / "resnet", edited(places, tmp_path, test=[-1, 0] * 12), label_column="test", **QUICK)
    shutil.rmtree(tmp_path / "edited")
    with pytest.raises(PriorHubError, match="has one class only"):
        learn_prior(places / "resnet", edited(places, tmp_path, same=[1] * 24), label_column="same", **QUICK)
    shutil.rmtree(tmp_path / "edited")
    with pytest.raises(ValueError, match=r"holds 0.5: expected classes"):
        learn_prior(places / "resnet", edited(places, tmp_path, score=[0.5] * 24), label_column="score", **QUICK)


def test_an_empty_split_a_missing_model_and_another_kind_of_model_are_refused(places, tmp_path):
    with pytest.raises(ValueError, match=r"train\[:0\].* no data"):
        learn_prior(places / "resnet", places / "images", split="train[:0]", **QUICK)
    with pytest.raises(OSError, match="not-there"):
        learn_prior(tmp_path / "not-there", estimator="isotropic")
    for nowhere in (tmp_path / "nothing-here", "./nothing-here", "~/nothing-here"):
        with pytest.raises(PriorNotFoundError, match=r"no folder .*nothing-here"):
            learn_prior(places / "resnet", nowhere, **QUICK)
    with pytest.raises(ValueError, match="ResNet"):
        learn_prior(places / "resnet", places / "texts", text_column="text", **QUICK)
    shutil.copytree(places / "resnet", tmp_path / "hollow")
    config = json.loads((tmp_path / "hollow" / "config.json").read_text()) | {"embedding_size": 6, "hidden_sizes": [12]}
    (tmp_path / "hollow" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PriorHubError, match=r"holds 0 of the \d+ parameters of a ResNetForImageClassification"):
        learn_prior(tmp_path / "hollow", places / "images", **QUICK)


def test_the_folder_is_looked_at_before_anything_is_done(places, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for folder, message in (("file", "is a file"), ("full", "is not empty and holds no prior")):
        with pytest.raises(PriorHubError, match=message):
            learn_prior("there/is-no-such-model", "nor/data", output=tmp_path / folder)
    learn_prior(places / "resnet", estimator="isotropic", output=tmp_path / "prior")
    learn_prior(places / "resnet", estimator="isotropic", variance=2.0, output=tmp_path / "prior")  # a prior is replaced
    assert PriorModel.from_pretrained(tmp_path / "prior").config.estimator["variance"] == 2.0


def test_without_the_extra_it_says_what_to_install(places, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(PriorHubError, match=re.escape("pip install 'prior-hub[vision]'")):
        learn_prior(places / "resnet", places / "images", **QUICK)


# ------------------------------------------------------------------------------------------------------ the command line


def command(places, output, *more: str) -> list[str]:
    start = ["learn", "--base-model", str(places / "resnet"), "--output", str(output), "--cpu"]
    quick = ["--steps", "6", "--batch-size", "4", "--rank", "2", "--every-n-steps", "1", "--start", "0.5"]
    return [*start, *(quick if "isotropic" not in more else []), *more]


def test_learn_writes_the_prior_shows_it_and_says_what_is_next(places, tmp_path, capsys):
    folder = tmp_path / "prior"
    assert (
        main(
            command(
                places,
                folder,
                "--dataset",
                str(places / "images"),
                "--license",
                "mit",
                "--dataset-license",
                "cc0-1.0",
                "--progress",
            )
        )
        == 0
    )
    shown = capsys.readouterr()
    assert re.search(r"base model +not recorded", shown.out)
    assert "image classification" in shown.out
    assert f"next: prior-hub check {folder}" in shown.out
    assert "training: 100%" in shown.err
    assert main(["check", str(folder)]) == 0
    config = PriorModel.from_pretrained(folder).config
    assert (config.estimator["snapshots"], config.source["dataset_license"]) == (3, "cc0-1.0")


def test_learn_as_json_prints_one_object_errors_too(places, tmp_path, capsys):
    assert main(command(places, tmp_path / "prior", "--estimator", "isotropic", "--variance", "0.5", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["config"]["estimator"] == {"name": "isotropic", "variance": 0.5}
    arguments = command(places, tmp_path / "other", "--dataset", str(places / "images"), "--label-column", "class", "--json")
    assert main(arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["error"]) == (False, "ValueError")
    assert "There are: image (Image)" in found["message"]
    assert not (tmp_path / "other").exists()


@pytest.mark.hub
@pytest.mark.parametrize("estimator", ["isotropic", "swag"])
def test_learn_records_the_commit_that_the_base_model_is_from(places, hub, estimator):
    from hub_fixtures import fresh_repo_id
    from huggingface_hub import HfApi

    alice, name = HfApi(), fresh_repo_id("base")
    alice.create_repo(name)
    first = alice.upload_folder(repo_id=name, folder_path=places / "resnet").oid
    alice.create_tag(name, tag="v1")
    second = alice.upload_file(repo_id=name, path_in_repo="note.txt", path_or_fileobj=b"later").oid
    data = None if estimator == "isotropic" else places / "images"
    for revision, commit in ((None, second), ("v1", first), (first, first)):
        config = learn_prior(name, data, estimator=estimator, revision=revision, **QUICK).config
        assert (config.base_model, config.base_model_revision) == (name, commit)


@pytest.mark.hub
def test_learn_can_push_what_it_learned(places, tmp_path, hub, capsys, monkeypatch):
    from hub_fixtures import fresh_repo_id

    monkeypatch.setattr("prior_hub.plots.card_pictures", lambda prior, folder: {})  # they take seconds
    name = fresh_repo_id("learned")
    learn = command(places, tmp_path / "prior", "--estimator", "isotropic", "--push-to", name)
    assert main(learn) == 1
    assert "no licence" in (said := capsys.readouterr().err)
    assert "which is no name on the Hub" in said
    assert not (tmp_path / "prior").exists(), "it is said before anything is learned"
    assert main([*learn, "--license", "mit", "--allow-incomplete"]) == 0
    assert f"/{name}/commit/" in capsys.readouterr().out
    assert PriorModel.from_pretrained(name).config.estimator["name"] == "isotropic"


def test_every_argument_of_the_command_is_one_of_the_function_and_has_its_default():
    import inspect

    from prior_hub.cli import _parser
    from prior_hub.cli.make import _LEARN_NAMES

    known = inspect.signature(learn_prior).parameters
    assert {*_LEARN_NAMES, "base_model", "dataset"} == set(known)
    parsed = vars(_parser().parse_args(["learn", "--base-model", "m", "--output", "o"]))
    assert {name for name in _LEARN_NAMES if parsed[name] is not None} == {"output"}
