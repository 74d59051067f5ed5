"""The fuzzers of this folder for a second or two each; `make fuzz` runs them for ten minutes."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from targets import TARGETS, Finding, Targets, doubled, independent, match_once, mutate, pairs_of, scratch

from prior_hub.errors import PriorHubError
from prior_hub.priors import storage, tensor_files


@pytest.fixture(scope="module")
def targets():
    with scratch() as root:
        yield Targets(Path(root))


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "matcher"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**64 - 1), data=st.data())
def test_a_mutated_input_is_refused_or_is_what_an_independent_reader_finds(targets, target, seed, data):
    seeds = targets.seeds(target)
    targets.run(target, mutate(target, data.draw(st.sampled_from(seeds)), seeds, random.Random(seed)))


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "matcher"])
def test_the_inputs_it_starts_from_are_accepted(targets, target):
    for data in targets.seeds(target)[: 3 if target == "legacy" else None]:
        before = targets.accepted
        targets.run(target, data)
        assert targets.accepted == before + 1


@settings(max_examples=300, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_names_and_shapes_bind_rightly_or_are_refused(rng):
    with contextlib.suppress(PriorHubError):
        match_once(rng)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
@example(b"")
@example(b"\x02" + bytes(7) + b"{}")
def test_any_bytes_are_a_safetensors_file_for_both_readers_or_for_none(tmp_path, content):
    """Where ours accepts a file the reference reader does: what is stricter here may only refuse more."""
    from safetensors import SafetensorError, deserialize

    path = tmp_path / "x"
    path.write_bytes(content)
    try:
        ours = tensor_files.read_header(path, tensor_files.Limits(10_000, 10_000))[0]
    except tensor_files.PriorFormatError:
        return
    try:
        theirs = dict(deserialize(content))
    except SafetensorError as error:
        raise AssertionError("accepted here, refused by safetensors") from error
    assert {k: list(e.shape) for k, e in ours.items()} == {k: v["shape"] for k, v in theirs.items()}


# ------------------------------------------------------------------------------------------- the fuzzers can fail
def test_the_independent_reader_sees_what_is_there_twice():
    assert doubled(pairs_of(b'{"a": 1, "a": 1}'))
    assert doubled(pairs_of(b'[{"b": {"a": 1, "a": 2}}]'))
    assert not doubled(pairs_of(b'{"a": {"a": 1}, "b": {"a": 1}}'))


def test_a_reader_that_takes_a_key_twice_would_be_found(targets, monkeypatch):
    monkeypatch.setattr(tensor_files, "parse_json", lambda text, **_: json.loads(text))
    content = targets.seeds("reader")[0]
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    key = json.dumps({"mean.layer.bias": json.loads(header)["mean.layer.bias"]})[1:-1].encode()
    twice = header[:-1] + b"," + key + b"}"
    with pytest.raises(Finding, match="key twice"):
        targets.run("reader", len(twice).to_bytes(8, "little") + twice + content[8 + length :])


def test_a_reader_that_overlooks_nan_would_be_found(targets, monkeypatch):
    monkeypatch.setattr(tensor_files, "_not_finite", lambda *_: (0, 0))
    content = targets.seeds("reader")[0]
    (_, _, data) = independent(content)["mean.layer.bias"]
    assert content.count(data) == 1
    with pytest.raises(Finding, match="not finite"):
        targets.run("reader", content.replace(data, data[:4] + b"\x00\x00\xc0\x7f" + data[8:]))


def test_an_index_that_is_not_compared_would_be_found(targets, monkeypatch):
    monkeypatch.setattr(storage, "_locate", lambda headers, *_: {key: file for file, keys in headers.items() for key in keys})
    with pytest.raises(Finding):
        targets.run("index", targets.seeds("index")[0].replace(b"mean.layer.bias", b"mean.layer.base"))
