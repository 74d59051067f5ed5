"""`prior-hub check --strict`: what a publisher is told, one thing at a time, from a prior that has nothing to put right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_fixtures import fresh_repo_id
from huggingface_hub import HfApi
from priors_for_tests import METADATA, edit_config, random_prior

from prior_hub.cli import main
from prior_hub.cli.common import printable
from prior_hub.model import PriorModel
from prior_hub.priors.config import PriorConfig
from prior_hub.registry.audit import audit_card, audit_config, audit_files, audit_values
from prior_hub.registry.card import render_card


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A folder with nothing to put right."""
    folder = tmp_path_factory.mktemp("ready") / "prior"
    random_prior().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(ready, tmp_path) -> Path:
    shutil.copytree(ready, tmp_path / "prior")
    return tmp_path / "prior"


def findings(folder: Path | str, capsys) -> list[str]:
    """What --strict has to say, and that its exit code says the same in both forms."""
    code = main(["check", str(folder), "--strict", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is (code == 0) is (not found["findings"])
    assert main(["check", str(folder), "--strict"]) == code
    text = capsys.readouterr().out
    for finding in found["findings"]:
        assert finding["do"], "each says what to do"
        assert printable(f"{finding['what']}: {finding['do']}") in text
    return [finding["what"] for finding in found["findings"]]


def test_a_prior_in_order_passes(folder, capsys):
    assert findings(folder, capsys) == []
    main(["check", str(folder), "--strict"])
    assert "ready to be published" in capsys.readouterr().out


def config_of(folder: Path) -> PriorConfig:
    return PriorConfig.from_json((folder / "prior_config.json").read_bytes())


def changed(folder: Path, **fields: object) -> None:
    """The configuration is changed, and the card rendered from it."""
    edit_config(folder, **fields)
    (folder / "README.md").write_text(render_card(config_of(folder)))


def moved_and_linked(path: Path) -> None:
    """The file lies in the folder above, and a link leads there."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no licence": (lambda f: changed(f, license=None), "no licence is recorded"),
    "a licence in words": (lambda f: changed(f, license="My own terms"), "is not in the Hub's form"),
    "no base model": (lambda f: changed(f, base_model=None), "no base model is recorded"),
    "a base model on somebody's disk": (lambda f: changed(f, base_model="/home/me/model"), "is no name on the Hub"),
    "no revision of it": (lambda f: changed(f, base_model_revision=None), "the revision of the base model"),
    "no data set": (lambda f: changed(f, source={"objective": "x"}), "no source data set"),
    "no licence of the data": (
        lambda f: changed(f, source={"objective": "x", "dataset": "org/data"}),
        "the licence of the source data set",
    ),
    "no objective": (
        lambda f: changed(f, source={"dataset": "org/d", "dataset_license": "mit"}),
        "the source task's objective",
    ),
    "no estimator": (lambda f: changed(f, estimator={}), "the estimator is not recorded"),
    "an estimator without arguments": (lambda f: changed(f, estimator={"name": "swag"}), "no arguments of the estimator"),
    "no versions": (lambda f: changed(f, libraries={}), "versions of libraries are not recorded: torch"),
    "no version of prior_hub": (lambda f: changed(f, prior_hub_version=None), "the version of prior_hub that made it"),
    "snapshots not counted": (lambda f: changed(f, num_snapshots=None), "the number of snapshots is not recorded"),
    "few snapshots": (lambda f: changed(f, num_snapshots=4), "over 4 snapshots only"),
    "a key nobody knows": (lambda f: edit_config(f, extra=1), "has keys this version of prior_hub does not know"),
    "no card": (lambda f: (f / "README.md").unlink(), "there is no model card"),
    "a card that is no text": (lambda f: (f / "README.md").write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
    "a card of 100 MB": (lambda f: (f / "README.md").write_bytes(b" " * 100_000_000), "no model card is so long"),
    "a card without metadata": (
        lambda f: (f / "README.md").write_text((f / "README.md").read_text().split("---\n", 2)[2]),
        "the card has no metadata",
    ),
    "a card whose YAML is none": (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "metadata are not valid"),
    "a card of billion laughs": (
        lambda f: (f / "README.md").write_text(
            "---\na: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{'b' * i}: &{'b' * i} [{','.join(['*' + ('b' * (i - 1) or 'a')] * 10)}]\n" for i in range(1, 10))
            + "---\n"
        ),
        "once its aliases",
    ),
    "a card of another licence": (
        lambda f: (f / "README.md").write_text((f / "README.md").read_text().replace("license: apache-2.0", "license: mit")),
        "the card's license is 'mit'",
    ),
    "a card of another prior": (lambda f: edit_config(f, scale=0.7), "rendered section is not that of this configuration"),
    "a card without our section": (
        lambda f: (f / "README.md").write_text((f / "README.md").read_text().split("<!--", 1)[0]),
        "no section rendered",
    ),
    "a pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "'pytorch_model.bin' is a pickle or an archive"),
    "weights of another prior": (
        lambda f: (f / "prior-00001-of-00002.safetensors").write_bytes(b""),
        "'prior-00001-of-00002.safetensors' is no file of this prior",
    ),
    "a file of some editor": (
        lambda f: (f / "notes.tmp").write_bytes(b""),
        "'notes.tmp' does not belong to a prior",
    ),
    "a save that was interrupted": (lambda f: (f / ".prior-staging-1234").mkdir(), "left from a save that was interrupted"),
    "a secret": (lambda f: (f / ".env").write_text("HF_TOKEN="), "'.env' may hold a secret"),
    "a card that is a link to elsewhere": (lambda f: moved_and_linked(f / "README.md"), "is a link to"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_one_thing_that_is_missing_or_doubtful_is_the_one_thing_said(folder, name, capsys):
    change, words = CHANGES[name]
    change(folder)
    found = findings(folder, capsys)
    assert len(found) == 1, found
    assert words in found[0]
    assert main(["check", str(folder)]) == 0  # without --strict these are notes at most
    capsys.readouterr()


def test_an_isotropic_prior_needs_no_data_set():
    config = PriorConfig(
        parameters={"a": (2,)}, rank=0, diagonal_weight=1, low_rank_weight=0, **METADATA | {"tied_parameters": {}}
    )
    config = config.replace(estimator={"name": "isotropic", "variance": 1e-4}, source={}, libraries={"torch": "2.11"})
    assert [f.what for f in audit_config(config.replace(prior_hub_version="0.1"))] == []


def test_doubtful_numbers_are_counted():
    prior = PriorModel.from_tensors(
        {"a": torch.tensor([1.0, 1e20, -1e30, 2.0])}, {"a": torch.tensor([1e-3, 1e-45, 1e-40, 1e-2])}, eps=1e-6
    )
    found = [finding.what for finding in audit_values(prior.gaussian, prior.diagnose(), 0.0)]
    assert found == ["2 variances are denormal numbers", "2 means are above 1.8e+19"]
    floored = replace(prior.diagnose(), share_at_floor=0.25)
    assert audit_values(prior.gaussian, floored, 1e-12)[0].what == "25.0 % of the variances are at the floor (1e-12)"
    remarked = replace(floored, remarks=("the deviations are all zero: the weights did not move.",))
    both = ["the deviations are all zero", "25.0 % of the variances are at the floor (1e-12)"]
    assert [f.what for f in audit_values(prior.gaussian, remarked, 1e-12)][:2] == both
    mostly = replace(floored, share_at_floor=0.6, remarks=("60 % of the variances are at the floor (1e-12): use a lower one.",))
    said = [f.what for f in audit_values(prior.gaussian, mostly, 1e-12) if "at the floor" in f.what]
    assert said == ["60 % of the variances are at the floor (1e-12)"], "once"


def test_a_persons_own_text_and_metadata_in_the_card_are_no_finding(folder):
    config, text = config_of(folder), (folder / "README.md").read_text()
    mine = (
        text.replace("library_name", "language: en\nlibrary_name").replace("\n---\n\n", "\n---\n\nWords of mine.\n\n")
        + "\nMore.\n"
    )
    assert audit_card(mine, config) == []


def test_a_prior_that_is_damaged_is_that_first(folder, capsys):
    (folder / "prior.safetensors").write_bytes(b"")
    assert main(["check", str(folder), "--strict"]) == 1
    assert "is not the file this prior was saved with" in capsys.readouterr().err


def test_what_a_stranger_wrote_does_not_move_the_cursor(folder, capsys):
    edit_config(folder, model_type="a\x1b[2Jb\u202ec", head_parameters=["x\x07"])
    for arguments in (["info"], ["check"], ["check", "--strict"]):
        main([*arguments, str(folder)])
        said = "".join(capsys.readouterr())
        assert not {"\x1b", "\x07", "\u202e"} & set(said)
    main(["info", str(folder)])
    assert r"a\x1b[2Jb\u202ec" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- on the Hub
@pytest.mark.hub
def test_a_repository_needs_a_tag_and_what_closes_it_is_noted(ready, capsys):
    repo = fresh_repo_id("strict")
    main(["push", str(ready), repo, "--private"])
    capsys.readouterr()
    assert findings(repo, capsys) == ["no tag points at this commit"]
    HfApi().create_tag(repo, tag="v1.0")
    assert findings(repo, capsys) == []
    main(["check", repo, "--strict", "--json"])
    assert any("private" in note for note in json.loads(capsys.readouterr().out)["notes"])
    HfApi().update_repo_settings(repo, gated="manual")
    main(["check", repo, "--strict", "--json"])
    assert any("gated (manual)" in note for note in json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.hub
def test_what_the_hubs_validator_says_of_the_card_is_said(hub, ready, capsys):
    repo = fresh_repo_id("strict")
    main(["push", str(ready), repo, "--tag", "v1.0"])
    capsys.readouterr()
    body = json.dumps({"errors": [{"message": '"datasets[0]" is no data set'}], "warnings": []})
    hub.add_fault("status", path="validate-yaml", times=-1, status=400, body=body, headers={"Content-Type": "application/json"})
    (found,) = findings(repo, capsys)
    assert "the card is not valid" in found
    assert '"datasets[0]" is no data set' in found
    assert "nothing was pushed" not in found


@pytest.mark.hub
def test_a_pickle_is_found_in_a_repository(ready, capsys):
    repo = fresh_repo_id("strict")
    main(["push", str(ready), repo])
    api = HfApi()
    api.upload_file(path_or_fileobj=b"x", path_in_repo="prior.pt", repo_id=repo)
    api.create_tag(repo, tag="v1.0")
    capsys.readouterr()
    assert findings(repo, capsys) == ["'prior.pt' is a pickle or an archive"]


def test_the_files_of_a_model_that_the_prior_lies_beside_are_no_secrets_and_belong_there():
    config = random_prior().config
    model = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"]
    model += ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.txt"]
    model += ["adapter_model.safetensors", "chat_template.jinja"]
    assert audit_files(model, config) == []
    for name in ("token", "hf_token.txt", "my-tokens.json", ".token"):
        assert "may hold a secret" in audit_files([name], config)[0].what, name
