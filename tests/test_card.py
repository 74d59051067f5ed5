"""The model card: its metadata is the Hub's, its code runs, its numbers are the configuration's, a person's words stay."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_fixtures import fresh_repo_id
from huggingface_hub import HfApi, ModelCard, get_session, hf_hub_download
from hypothesis import given, settings
from hypothesis import strategies as st
from priors_for_tests import SHAPES, TinyNet, random_prior
from test_storage import GOLDEN

from prior_hub.errors import PriorFormatError
from prior_hub.model import PriorModel, push_prior_to_hub
from prior_hub.registry.card import (
    BEGIN,
    END,
    PLACEHOLDER,
    card_metadata,
    prior_facts,
    read_card,
    render_card,
    split_card,
    update_card,
)

PRIOR = random_prior()
RENDERED = render_card(PRIOR.config)
BODY = b'[["layer.bias",[4]],["layer.weight",[4,3]],["temperature",[]]]'  # of SHAPES, the head left out
TAG = f"prior-arch-{hashlib.sha256(BODY).hexdigest()[:16]}"
MODEL_CARD = """---
# a comment of theirs
language: no
license: mit
library_name: transformers
pipeline_tag: image-classification
tags:
- vision
- bayesian
datasets: [imagenet-1k]
base_model: org/another
model-index:
- name: net
  results: []
date: 2024-01-31
version: 1.10
description: |
  tags:
  - these are words
---

# A model

It classifies.

---

| a | b |
|---|---|
"""


def config(**changes: Any):
    return PRIOR.config.replace(**changes)


def valid_on_the_hub(hub, card: str) -> dict:
    """What the Hub says of a card: {"errors": [], ...}."""
    body = {"content": card, "repoType": "model"}
    return get_session().post(f"{hub.endpoint}/api/validate-yaml", json=body).json()


# ---------------------------------------------------------------------------------------------------------- metadata
def test_the_metadata_say_what_the_configuration_says():
    assert card_metadata(PRIOR.config) == {
        "library_name": "prior-hub",
        "license": "apache-2.0",
        "base_model": "org/tiny-net",
        "datasets": ["org/tiny-images"],
        "tags": ["prior-hub", "prior", "bayesian", "transfer-learning", "swag", TAG],
        "prior_hub": {
            "format": "1.0",
            "rank": 3,
            "estimator": "swag",
            "objective": "cross entropy",
            "num_parameters": 25,  # 4*3 + 4 + 1 + 2*4
            "stored_bytes": 25 * 4 * 5,  # mean, variance and 3 deviations in float32
            "scale": 0.3,
            "architecture": TAG.removeprefix("prior-arch-"),
        },
    }


def test_what_is_not_known_is_left_out():
    bare = config(license=None, base_model=None, source={}, estimator={})
    assert card_metadata(bare).keys() == {"library_name", "tags", "prior_hub"}
    assert not {"estimator", "objective"} & card_metadata(bare)["prior_hub"].keys()
    assert "architecture" not in prior_facts(config(head_parameters=tuple(SHAPES)))
    assert "No licence is recorded" in render_card(bare)
    assert "no licence" not in RENDERED.lower()


@pytest.mark.hub
def test_the_hub_and_its_client_accept_the_metadata(hub):
    assert valid_on_the_hub(hub, RENDERED) == {"errors": [], "warnings": []}
    card = ModelCard(RENDERED)
    assert card.data.to_dict() == card_metadata(PRIOR.config)
    assert card.data.library_name == "prior-hub"


@pytest.mark.hub
@pytest.mark.parametrize(
    "name",
    [
        "./runs/net", "/home/me/net", "a/b/c", "me/my net", "net--x/y", "a..b", "-a/b", "a/b-", ".hidden", "ünï/code", "a/b.",
        "", "C:\\nets\\a", "x" * 97, "me/" + "x" * 97, "a b", "no\nline",
    ],
)  # fmt: skip
def test_names_that_are_none_of_the_hub_are_not_in_the_metadata(hub, name):
    card = render_card(config(base_model=name, source={"dataset": [name, "cifar10", 3, None]}))
    data, _ = split_card(card)
    assert "base_model" not in data
    assert data["datasets"] == ["cifar10"]
    assert valid_on_the_hub(hub, card)["errors"] == []


@pytest.mark.parametrize("name", ["resnet50", "timm/resnet50.a1_in1k", "org/a-b_c.d", "_x/y_", "a"])
def test_names_of_the_hub_are_in_the_metadata(name):
    data = card_metadata(config(base_model=name, source={"dataset": name}))
    assert (data["base_model"], data["datasets"]) == (name, [name])


@pytest.mark.hub
@pytest.mark.parametrize("dataset", [5, True, {"cifar10": 1}, None, [], [[]], 1.5])
def test_a_data_set_of_another_form_does_no_harm(hub, dataset):
    card = render_card(config(source={"dataset": dataset}))
    assert "datasets" not in split_card(card)[0]
    assert valid_on_the_hub(hub, card)["errors"] == []


@pytest.mark.hub
def test_a_licence_in_words_becomes_other_with_a_name(hub):
    card = render_card(config(license="Our Lab's Licence 1.0"))
    data, _ = split_card(card)
    assert (data["license"], data["license_name"]) == ("other", "Our Lab's Licence 1.0")
    assert valid_on_the_hub(hub, card) == {"errors": [], "warnings": []}


@pytest.mark.parametrize("name", ["SWAG", "Laplace approximation", None, 3, ["swag"], ""])
def test_the_estimator_is_a_tag_if_its_name_can_be_one(name):
    tags = card_metadata(config(estimator={"name": name}))["tags"]
    assert tags[4:-1] == {"SWAG": ["swag"], 3: ["3"]}.get(name if not isinstance(name, list) else None, [])


# ---------------------------------------------------------------------------------------------------------- text
def cells(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", card, re.MULTILINE))


def test_the_numbers_of_the_card_are_exactly_those_of_the_configuration():
    c = config(scale=0.1 + 0.2, eps=5e-324, low_rank_weight=1 / 38, variance_floor=1e-12, diagonal_weight=0.5)
    found = cells(render_card(c))
    for row, value in (
        ("scale", c.scale), ("a (diagonal_weight)", c.diagonal_weight), ("b (low_rank_weight)", c.low_rank_weight),
        ("eps", c.eps), ("variance_floor", c.variance_floor), ("rank K (rows of D)", c.rank), ("snapshots", c.num_snapshots),
        ("estimator: learning rate", c.estimator["learning_rate"]), ("epochs", c.source["epochs"]),
    ):  # fmt: skip
        assert float(found[row]) == value, row
    assert found["parameters under the prior"] == "4 tensors, 25 values"
    assert found["base model"] == f"org/tiny-net @ {c.base_model_revision}"
    assert found["stored as"] == "mean float32, variance float32, deviations float32"
    assert "25 weights of `org/tiny-net`, with a low-rank part of 3 deviations" in render_card(c)


def test_the_covariance_of_the_card_is_the_covariance_of_the_prior():
    (formula,) = re.findall(r"^    Sigma = (.*)$", RENDERED, re.MULTILINE)
    flat = [torch.cat([t.reshape(rows, -1).double() for t in kind.values()], 1)
            for kind, rows in ((PRIOR.variance, 1), (PRIOR.deviations, 3))]  # fmt: skip
    found = cells(RENDERED)
    python = formula.replace("D^T D", "(D.T @ D)").replace("variance)", "variance[0])")
    names = {
        "scale": float(found["scale"]), "a": float(found["a (diagonal_weight)"]), "b": float(found["b (low_rank_weight)"]),
        "eps": float(found["eps"]), "I": torch.eye(25).double(), "diag": torch.diag, "variance": flat[0], "D": flat[1],
    }  # fmt: skip
    sigma = eval(python, names)
    delta = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for name, t in PRIOR.mean.items()}
    x = torch.cat([t.reshape(-1).double() for t in delta.values()])
    theta = {name: PRIOR.mean[name].double() + delta[name].double() for name in delta}
    # float64 throughout; the condition number of Sigma is about 1e6
    assert PRIOR.penalty(theta).item() == pytest.approx((0.5 * x @ torch.linalg.solve(sigma, x)).item(), rel=1e-8)


def test_a_scale_that_nobody_chose_is_left_to_auto_and_another_is_taken_as_stored():
    assert 'prior_scale="auto"' in render_card(config(scale=1.0))
    assert "prior_scale=prior.scale" in render_card(config(scale=1e3))


def test_few_snapshots_are_named_as_a_limit_and_unknown_ones_are_not():
    assert "over 4 snapshots only" in render_card(config(num_snapshots=4))
    for snapshots in (24, None):
        assert "snapshots only" not in render_card(config(num_snapshots=snapshots))
    assert cells(render_card(config(num_snapshots=None)))["snapshots"] == "not recorded"
    assert cells(render_card(config(num_snapshots=None, rank=0)))["snapshots"] == "none"


def test_a_recipe_says_that_there_is_no_prior_yet_and_how_to_make_it():
    text = render_card(PRIOR.config, recipe="Fetch the files, then `prior-hub import`.\n")
    body = split_card(text)[1]
    order = [
        "**Not made here yet.**",
        "## How to make it\n\nFetch the files",
        "## How to use",
        "## What it is",
        "Nobody has made",
    ]
    places = [body.index(part) for part in order]
    assert places == sorted(places)
    assert update_card(text, text) == text
    made = update_card(text, RENDERED)  # once it is made, nothing of the recipe is left
    assert "Not made here yet" not in made
    assert "Fetch the files" not in made


def test_values_of_the_configuration_cannot_break_the_card():
    nasty = f"x | y\n{END}\n{BEGIN}\n# heading `code`\n---\n"
    c = config(base_model=nasty, model_type=nasty, source={nasty: nasty}, estimator={nasty: [nasty]}, libraries={nasty: nasty},
               head_parameters=(nasty,), base_model_revision=nasty)  # fmt: skip
    card = render_card(c, title=nasty)
    assert (card.count(BEGIN), card.count(END)) == (1, 1)
    assert all(line.count(" | ") == 1 for line in card.splitlines() if line.startswith("| ") and line != "| | |")
    assert update_card(card, render_card(c, title=nasty)) == card
    assert next(line for line in card.splitlines() if line.startswith("# ")).startswith("# x")


@pytest.mark.parametrize("subfolder", [None, "priors/swag", 'a"b'])
def test_the_line_that_loads_the_prior_is_python(subfolder):
    card = render_card(PRIOR.config, repo_id="org/name", subfolder=subfolder)
    (line,) = re.findall(r"^prior = PriorModel(.*)$", card, re.MULTILINE)

    class Loader:
        @staticmethod
        def from_pretrained(*args: str, **kwargs: str) -> tuple:
            return args, kwargs

    assert eval(f"Loader{line}", {"Loader": Loader}) == (("org/name",), {"subfolder": subfolder} if subfolder else {})


@pytest.mark.hub
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # torch's, where there is no accelerator
def test_the_code_of_the_card_runs_as_it_stands(hub, tmp_path, monkeypatch):
    repo = random_prior(scale=1e4).push_to_hub(fresh_repo_id("card")).repo_id
    card = ModelCard.load(repo).content
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert f'from_pretrained("{repo}")' in code
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    examples = [{"x": torch.randn(3, generator=generator), "labels": i % 2} for i in range(8)]
    names = {"model": TinyNet(), "train_dataset": examples}
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
    exec(code, names)
    assert names["trainer"].state.global_step == 3
    assert any(not torch.equal(p.cpu(), before[name]) for name, p in names["model"].named_parameters())
    metrics = names["trainer"].evaluate(examples)
    assert metrics["eval_runtime"] > 0
    random_prior(scale=1e4).push_to_hub(repo, evaluation={"task": "a-task", "dataset": "org/d", "metrics": metrics})
    results = ModelCard.load(repo).data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {"loss": metrics["eval_loss"]}


# ---------------------------------------------------------------------------------------------------------- rendering again
def test_rendering_again_changes_nothing():
    assert update_card(RENDERED, RENDERED) == RENDERED
    assert update_card(None, RENDERED) == update_card("", RENDERED) == RENDERED


def test_a_persons_text_and_keys_survive_and_the_rendered_part_is_new():
    data, body = split_card(RENDERED)
    text = yaml.safe_dump(data | {"language": "en", "tags": [*data["tags"], "mine"], "datasets": ["org/tiny-images", "more"]})
    edited = f"---\n{text}# kept too\n---\n\n# Mine\n\nBefore.\n\n{body.rstrip()}\n\nAfter.\n"
    newer = render_card(config(scale=9.5, license="mit"))
    once = update_card(edited, newer)
    found, _ = split_card(once)
    assert (found["language"], found["license"]) == ("en", "mit")
    assert found["tags"] == [*data["tags"], "mine"]
    assert found["datasets"] == ["org/tiny-images", "more"]
    assert "# kept too" in once
    before, section, after = re.fullmatch(f"(.*){BEGIN}(.*){END}(.*)", once, re.DOTALL).groups()
    assert before.endswith("---\n\n# Mine\n\nBefore.\n\n")
    assert after == "\n\nAfter.\n"
    assert "| scale | 9.5 |" in section
    assert update_card(once, newer) == once


def test_the_card_of_a_model_keeps_its_text_and_metadata_and_gains_a_section_and_tags():
    once = update_card(MODEL_CARD, RENDERED)
    old, new = yaml.safe_load(MODEL_CARD.split("---\n")[1]), split_card(once)[0]
    tags = ["vision", "bayesian", "prior-hub", "prior", "transfer-learning", "swag", TAG]
    assert new == old | {"tags": tags, "prior_hub": prior_facts(PRIOR.config)}
    body = MODEL_CARD.split("---\n", 2)[2]
    assert split_card(once)[1].startswith(body.strip() + "\n\n" + BEGIN)
    for line in MODEL_CARD.splitlines():
        assert line in once.splitlines(), "every line is still there, comments and `language: no` too"
    twice = update_card(once, render_card(config(license="cc-by-4.0", base_model="org/third")))
    assert split_card(twice)[0] == new, "nor does the second time take over its metadata"
    assert update_card(twice, render_card(config(license="cc-by-4.0", base_model="org/third"))) == twice


def test_a_readme_that_the_hub_made_with_a_new_repository_gets_the_metadata_of_the_prior():
    once = update_card("---\nlicense: apache-2.0\n---\n", RENDERED)
    assert split_card(once)[0] == card_metadata(PRIOR.config)
    assert split_card(once)[1] == split_card(RENDERED)[1]
    assert update_card(once, RENDERED) == once


@pytest.mark.parametrize("text", ["# Notes\n\nWords.\n", "Words", "\n\n# Notes\n"])
def test_a_readme_without_metadata_keeps_its_text(text):
    once = update_card(text, RENDERED)
    assert split_card(once)[1].startswith(text.strip())
    assert "prior-hub" in split_card(once)[0]["tags"]
    assert update_card(once, RENDERED) == once


@pytest.mark.parametrize("text", ["---\n---\n\n# Notes\n", "---\n\n---\n# Notes\n", "---\n# only a comment\n---\n# Notes\n"])
def test_empty_metadata_are_metadata(text):
    data, body = split_card(update_card(text, RENDERED))
    assert data["tags"][0] == "prior-hub"
    assert body.startswith("# Notes\n\n" + BEGIN)


def test_windows_line_ends_and_a_byte_order_mark_do_no_harm():
    once = update_card("\ufeff" + MODEL_CARD.replace("\n", "\r\n"), RENDERED)
    assert once.count("\n") == once.count("\r\n")
    assert once.replace("\r\n", "\n") == update_card(MODEL_CARD, RENDERED)


def test_half_a_section_is_a_persons_text():
    for wreck in (BEGIN, END, f"{END}\n\nwords\n\n{BEGIN}"):
        existing = f"---\nlibrary_name: prior-hub\n---\n\n{wreck}\n\nTheirs.\n"
        once = update_card(existing, RENDERED)
        again = update_card(once, render_card(config(scale=9.5)))
        for card, scale in ((once, PRIOR.scale), (again, 9.5)):
            assert f"{wreck}\n\nTheirs.\n" in card
            assert card.count("## How to use") == 1
            assert f"| scale | {scale} |" in card


def test_what_was_written_around_the_section_in_a_folder_is_kept_beside_what_is_on_the_hub():
    there = update_card(None, RENDERED).replace(BEGIN, f"On the Hub.\n\n{BEGIN}")
    here = RENDERED.replace(BEGIN, f"In the folder.\n\n{BEGIN}") + "\nBelow.\n"
    once = update_card(there, here)
    for words in ("On the Hub.", "In the folder.", "Below."):
        assert once.count(words) == 1
    assert update_card(once, here) == once


def test_the_name_in_the_loading_line_follows_the_repository():
    first = update_card(None, RENDERED, repo_id="org/one", subfolder="x")
    assert PLACEHOLDER not in first
    assert 'from_pretrained("org/one", subfolder="x")' in first
    mine = f'```python\nprior = PriorModel.from_pretrained("{PLACEHOLDER}")\n```\n'
    second = update_card(None, first + mine, repo_id="org/two")
    assert 'from_pretrained("org/two")' in second
    assert second.endswith(mine), "a person's own code is a person's text"


@pytest.mark.parametrize("block", ["a: [", "- a\n- b", "just words", "a: 1\na: {"])
def test_metadata_that_are_none_are_refused_and_the_file_is_named(tmp_path, block):
    (tmp_path / "README.md").write_text(f"---\n{block}\n---\n")
    with pytest.raises(PriorFormatError, match=r"metadata of the model card \(README.md\)"):
        PRIOR.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_is_not_utf_8_is_refused_and_named(tmp_path):
    (tmp_path / "README.md").write_bytes("# Überblick\n".encode("latin-1"))
    with pytest.raises(PriorFormatError, match=r"README.md is not UTF-8 text"):
        PRIOR.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


WORDS = st.text(st.sampled_from("ab#-|`: \n"), max_size=30)
KEYS = st.dictionaries(
    st.sampled_from(["language", "license", "library_name", "x-y", "on", "datasets", "tags"]),
    st.sampled_from([None, "no", "a: b", ["x", "y"], "mit", "prior-hub", 1.5, True, "multi\nline", "'q\"", {"k": ["v"]}]),
)


@settings(max_examples=200, deadline=None)
@given(data=KEYS, before=WORDS, after=WORDS, style=st.sampled_from([None, True, False]))
def test_any_card_keeps_its_words_and_keys_through_two_renderings(data, before, after, style):
    block = yaml.safe_dump(data, default_flow_style=style) if data else ""
    existing = f"---\n{block}---\n\n{before}\n\nX{after}\n"
    once = update_card(existing, RENDERED)
    twice = update_card(once, render_card(config(scale=9.5)))
    ours = data.get("library_name") == "prior-hub"
    for card in (once, twice):
        found, body = split_card(card)
        for key, value in data.items():
            if key == "tags" or (key == "datasets" and ours):
                assert all(v in found[key] for v in (value if isinstance(value, list) else [value]) if v is not None)
            elif not ours or key not in ("library_name", "license"):
                assert found[key] == value
        assert re.sub(f"{BEGIN}.*{END}", "", body, flags=re.DOTALL).split() == f"{before}\n\nX{after}".split()
    assert update_card(once, RENDERED) == once


FIRST = random_prior(license="Our Lab's Licence", base_model="org/a", source={"dataset": ["org/x", "org/both"]})
SECOND = random_prior(license=None, base_model=None, source={"dataset": ["org/both", "org/y"]}, estimator={"name": "isotropic"})


def edited_by_a_person(card: str) -> str:
    """With a tag, a data set, a key and a text of their own."""
    card = card.replace("- org/x\n", "- org/x\n- org/mine\n").replace("- swag\n", "- swag\n- mine\n")
    return card.replace("library_name:", "# a comment\nlanguage: no\nlibrary_name:") + "\nMine.\n"


def assert_only_the_second_is_described(card: str) -> None:
    data, body = split_card(card)
    language = "no" if "language: no\n" in card else "nl"
    assert data == card_metadata(SECOND.config) | {
        "language": False if language == "no" else language,  # YAML 1.1's `no`
        "datasets": ["org/mine", "org/both", "org/y"],
        "tags": ["prior-hub", "prior", "bayesian", "transfer-learning", "mine", TAG, "isotropic"],
    }
    assert f"# a comment\nlanguage: {language}\n" in card
    assert body.endswith("\nMine.\n")
    assert "Our Lab's Licence" not in card


def test_the_metadata_of_a_prior_that_is_replaced_go_and_a_persons_stay():
    card = edited_by_a_person(render_card(FIRST.config))
    once = update_card(card, render_card(SECOND.config), previous=FIRST.config)
    assert_only_the_second_is_described(once)
    assert update_card(once, render_card(SECOND.config), previous=SECOND.config) == once
    theirs = card.replace("license: other\nlicense_name: Our Lab's Licence\n", "license: mit\n")
    found, _ = split_card(update_card(theirs, render_card(SECOND.config), previous=FIRST.config))
    assert found["license"] == "mit", "a licence that a person wrote is not the prior's"
    plain, _ = split_card(update_card(render_card(FIRST.config), render_card(config(source={})), previous=FIRST.config))
    assert "datasets" not in plain


def test_a_models_card_loses_the_estimators_tag_of_the_prior_that_is_replaced():
    beside = update_card(MODEL_CARD, RENDERED)
    found, _ = split_card(update_card(beside, render_card(SECOND.config), previous=PRIOR.config))
    theirs, _ = split_card(MODEL_CARD)
    tags = ["vision", "bayesian", "prior-hub", "prior", "transfer-learning", TAG, "isotropic"]
    assert found == theirs | {"tags": tags, "prior_hub": prior_facts(SECOND.config)}


# ---------------------------------------------------------------------------------------------------------- folders and pushes
def test_a_folder_that_gets_another_prior_does_not_go_on_describing_the_first(tmp_path):
    FIRST.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(edited_by_a_person(path.read_text()))
    SECOND.save_pretrained(tmp_path)
    assert_only_the_second_is_described(path.read_text())


def test_a_configuration_that_cannot_be_read_does_not_stop_a_save(tmp_path):
    FIRST.save_pretrained(tmp_path)
    (tmp_path / "prior_config.json").write_text("{")
    SECOND.save_pretrained(tmp_path)
    assert "base_model" in split_card((tmp_path / "README.md").read_text())[0], "nobody can tell whose it is"


@pytest.mark.hub
@pytest.mark.parametrize("subfolder", [None, "deeper"])
def test_a_repository_that_gets_another_prior_does_not_go_on_describing_the_first(subfolder, tmp_path):
    path = f"{subfolder}/README.md" if subfolder else "README.md"
    for kind in ("object", "folder"):
        repo = FIRST.push_to_hub(fresh_repo_id("card"), subfolder=subfolder).repo_id
        text = read_card(Path(hf_hub_download(repo, path)))
        edited = edited_by_a_person(text).replace(
            "language: no", "language: nl"
        )  # the Hub takes `no` for False, and refuses it
        HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo=path, repo_id=repo)
        if kind == "folder":
            SECOND.save_pretrained(tmp_path)
        push_prior_to_hub(tmp_path if kind == "folder" else SECOND, repo, subfolder=subfolder, allow_incomplete=True)
        assert_only_the_second_is_described(read_card(Path(hf_hub_download(repo, path))))


def test_saving_twice_keeps_a_persons_card(tmp_path):
    PRIOR.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("library_name:", "language: en\nlibrary_name:") + "\nMine.\n")
    edited = path.read_text()
    PRIOR.save_pretrained(tmp_path)
    assert path.read_text() == edited
    random_prior(seed=1).save_pretrained(tmp_path)
    assert path.read_text().endswith("\nMine.\n")
    assert "| scale | 1.3 |" in path.read_text()


@pytest.mark.hub
def test_pushing_twice_keeps_a_persons_card_on_the_hub():
    repo = PRIOR.push_to_hub(fresh_repo_id("card")).repo_id
    text = ModelCard.load(repo).content
    edited = text.replace("library_name:", "language: en\nlibrary_name:") + "\nMine.\n"
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=repo)
    random_prior(seed=1).push_to_hub(repo)
    found = ModelCard.load(repo).content
    assert found.endswith("\nMine.\n")
    assert split_card(found)[0]["language"] == "en"
    assert "| scale | 1.3 |" in found


@pytest.mark.hub
def test_a_models_card_on_the_hub_stays_the_card_of_the_model():
    repo = HfApi().create_repo(fresh_repo_id("model")).repo_id
    card = MODEL_CARD.replace("language: no", "language: nl").encode()  # both servers take `no` for False, as PyYAML does
    HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    for seed in (0, 1):
        random_prior(seed, license="cc-by-4.0").push_to_hub(repo)
        info = HfApi().model_info(repo)
        assert (info.library_name, info.pipeline_tag) == ("transformers", "image-classification")
        assert {"prior-hub", "vision", "license:mit"} <= set(info.tags)
        assert "It classifies." in ModelCard.load(repo).content


def test_the_golden_card_is_read_and_a_persons_words_in_it_survive():
    golden = read_card(GOLDEN / "single" / "README.md")
    data, body = split_card(golden)
    assert (data["library_name"], data["license"], data["language"]) == ("prior-hub", "apache-2.0", "en")
    assert body.startswith("Golden: written once")
    assert golden == read_card(GOLDEN / "sharded" / "README.md")
    prior = PriorModel.from_pretrained(GOLDEN / "single")
    for row, value in (("scale", prior.scale), ("rank K (rows of D)", prior.rank), ("eps", prior.config.eps)):
        assert float(cells(golden)[row]) == value
    new = update_card(golden, render_card(prior.config.replace(scale=9.5)))
    assert "Golden: written once" in new
    assert new.endswith("A person wrote this below.\n")
    assert cells(new)["scale"] == "9.5"
    facts = prior_facts(prior.config.replace(scale=9.5))
    added = {"tags": [*data["tags"], f"prior-arch-{facts['architecture']}"], "prior_hub": facts}
    assert split_card(new)[0] == data | added, "a card that an older version wrote gains what this one knows"
