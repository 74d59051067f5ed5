"""The schema of prior_config.json: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from priors_for_tests import METADATA, SHAPES

from prior_hub.errors import PriorFormatError, PriorHubError, PriorWarning
from prior_hub.priors.config import MAX_CONFIG_BYTES, PriorConfig, parse_json
from prior_hub.registry.card import render_card

VALID = PriorConfig(
    parameters=SHAPES,
    rank=3,
    scale=0.3,
    diagonal_weight=0.5,
    low_rank_weight=0.25,
    eps=1e-9,
    dtype={"mean": "float32", "variance": "float64", "deviations": "bfloat16"},
    buffers=("bn.running_mean", "bn.num_batches_tracked"),
    libraries={"torch": "2.15.0"},
    weight_files={"prior-00001-of-00002.safetensors": "0" * 64, "prior-00002-of-00002.safetensors": "f" * 64},
    prior_hub_version="0.1.0",
    **METADATA,
)


def raw() -> dict[str, Any]:
    return json.loads(VALID.to_json())


def load(**changes: Any) -> PriorConfig:
    """The valid configuration with these keys changed, through JSON; ... removes a key."""
    return PriorConfig.from_json(
        json.dumps({k: v for k, v in (raw() | changes).items() if v is not ...}), where="here/prior_config.json"
    )


def refused(*words: str, **changes: Any) -> str:
    """The message with which these changes are refused: it names the file and has these words."""
    with pytest.raises(PriorFormatError) as caught:
        load(**changes)
    message = str(caught.value)
    assert "here/prior_config.json" in message
    for word in words:
        assert word in message
    assert len(message) < 1000, "an error must be readable, whatever the file holds"
    return message


# ---------------------------------------------------------------------------------------------------------- round trip
def test_json_keeps_every_field():
    again = PriorConfig.from_json(VALID.to_json())
    assert again == VALID
    assert again.to_json() == VALID.to_json()


def test_json_holds_the_number_of_values_and_floats_exactly():
    config = VALID.replace(scale=0.1 + 0.2, eps=5e-324, low_rank_weight=1 / 38)
    assert raw()["num_parameters"] == 4 * 3 + 4 + 1 + 2 * 4 == config.num_parameters
    again = PriorConfig.from_json(config.to_json())
    assert (again.scale, again.eps, again.low_rank_weight) == (0.1 + 0.2, 5e-324, 1 / 38)


def test_parameters_keep_their_order_and_odd_names():
    names = ["z", "a", "mean.x", "ü/\\ \"q\"", "line\nbreak", "日本", "0", "__metadata__"]  # fmt: skip
    config = PriorConfig(parameters=dict.fromkeys(names, (2,)), rank=0, diagonal_weight=1, low_rank_weight=0)
    assert list(PriorConfig.from_json(config.to_json()).parameters) == names


@pytest.mark.parametrize(
    "source",
    [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}, {"x": {1, 2}}, {1: "a", "1": "b"}, {"x": "\ud800"}],
    ids=["nan", "inf", "object", "set", "keys that collide in JSON", "half a surrogate pair"],
)
def test_a_source_that_json_cannot_hold_is_refused_when_it_is_written(source):
    with pytest.raises(PriorFormatError, match="source or estimator"):
        VALID.replace(source=source).to_json()


# ---------------------------------------------------------------------------------------------------------- versions
@pytest.mark.parametrize("version", ["2.0", "10.3", "0.9"])
def test_another_major_version_is_refused_with_the_way_out(version):
    refused(f"format {version}", "reads 1.x", "Upgrade prior_hub", format_version=version)


@pytest.mark.parametrize("version", ["1", 1.0, None, "1.0.0", "", "x.y", "-1.0", "1.99999999999", ["1.0"]])
def test_a_version_that_is_none_is_refused(version):
    refused("format_version is", "'1.0'", format_version=version)


def test_a_newer_minor_version_loads_warns_and_names_what_it_does_not_know():
    with pytest.warns(PriorWarning) as caught:
        config = load(format_version="1.7", rotations={"a": 1}, skew=[1])
    messages = [str(w.message) for w in caught]
    assert any("format 1.7" in m and "newer than 1.0" in m for m in messages)
    assert any("rotations, skew" in m and "Upgrade prior_hub" in m for m in messages)
    assert config.replace(format_version="1.0") == VALID


def test_unknown_keys_warn_are_named_and_are_left_out():
    with pytest.warns(PriorWarning, match=r"does not know.*ignores: extra") as caught:
        config = load(extra=1)
    assert len(caught) == 1
    assert config == VALID


def test_a_known_version_with_known_keys_warns_of_nothing():
    assert load() == VALID  # warnings are errors here


# ---------------------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"nothing", b"\xff\xfe{}", b'\xef\xbb\xbf{"format_version": "1.0"}', VALID.to_json()[:-20].encode()],
    ids=["empty", "cut", "word", "not UTF-8", "byte order mark", "truncated"],
)
def test_what_is_not_json_is_called_that(text):
    with pytest.raises(PriorFormatError, match=r"here is not valid JSON.*truncated"):
        PriorConfig.from_json(text, where="here")


@pytest.mark.parametrize("text", ["null", "[]", '"1.0"', "{}", "3", '{"model_type": "bert"}'])
def test_json_of_something_else_is_no_prior_configuration(text):
    with pytest.raises(PriorFormatError, match="here is no prior configuration: it has no 'format_version'"):
        PriorConfig.from_json(text, where="here")


def test_keys_given_twice_are_named():
    with pytest.raises(PriorFormatError, match="gives rank more than once"):
        parse_json('{"rank": 1, "scale": 1, "rank": 2}', where="x")
    with pytest.raises(PriorFormatError, match=r"gives a\.weight more than once"):
        parse_json('{"parameters": {"a.weight": [1], "a.weight": [2]}}', where="x")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_numbers_that_are_not_finite_are_refused_anywhere(constant):
    text = VALID.to_json().replace('"epochs": 3', f'"epochs": {constant}')
    with pytest.raises(PriorFormatError, match=re.escape(constant)):
        PriorConfig.from_json(text)


@pytest.mark.parametrize("deep", ["[" * 100_000 + "]" * 100_000, '{"a":' * 500 + "1" + "}" * 500], ids=["lists", "objects"])
def test_deep_nesting_is_refused(deep):
    text = VALID.to_json().replace('"epochs": 3', f'"epochs": {deep}')
    with pytest.raises(PriorFormatError, match="nested more than 100 deep"):
        PriorConfig.from_json(text)


def test_a_text_of_70_mb_is_refused_before_it_is_parsed(monkeypatch):
    def parsed(*_: Any, **__: Any) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(json, "loads", parsed)
    text = bytes(70_000_000)
    with pytest.raises(PriorFormatError, match=f"has {len(text)} bytes, more than the {MAX_CONFIG_BYTES}"):
        PriorConfig.from_json(text)


# ---------------------------------------------------------------------------------------------------------- fields
@pytest.mark.parametrize("key", ["parameters", "rank", "diagonal_weight", "low_rank_weight"])
def test_a_missing_key_is_named(key):
    refused(f"lacks {key}", **{key: ...})


@pytest.mark.parametrize("key", ["scale", "diagonal_weight", "low_rank_weight", "eps", "variance_floor"])
@pytest.mark.parametrize("value", [-1, -1e-300, 10**400, "1", None, True, [1]])
def test_settings_that_are_no_finite_number_of_the_right_sign_are_refused(key, value):
    refused(f"{key} is", "finite number", **{key: value})


def test_a_scale_of_zero_is_refused_and_other_settings_may_be_zero():
    refused("scale is 0", "> 0", scale=0)
    assert load(eps=0, low_rank_weight=0, variance_floor=0, diagonal_weight=0).eps == 0.0


@pytest.mark.parametrize("key", ["rank", "num_snapshots"])
@pytest.mark.parametrize("value", [-1, 1.5, "3", True, [3]])
def test_counts_that_are_no_natural_number_are_refused(key, value):
    refused(f"{key} is {value!r}", "integer >= 0", **{key: value})


@pytest.mark.parametrize("family", ["laplace", "", None, 3])
def test_another_family_is_refused(family):
    refused("family is", family=family)


@pytest.mark.parametrize(
    "shape", [[-1], [2, -3], [1.5], [True], ["2"], "23", 7, None, {"0": 1}, [[1]]], ids=lambda s: json.dumps(s)
)
def test_a_shape_that_is_no_list_of_natural_numbers_is_refused(shape):
    refused("'layer.weight'", "expected a list of integers >= 0", parameters=raw()["parameters"] | {"layer.weight": shape})


@pytest.mark.parametrize(
    "shape",
    [[2**60], [2**30, 2**30], [10**4000], [0, 2**60], [1] * 65, [10**4000] * 100],
    ids=["2**60", "2**30 x 2**30", "10**4000", "0 x 2**60", "65 axes", "a product of 400 000 digits"],
)
def test_impossible_sizes_are_refused_and_never_multiplied_out(shape, monkeypatch):
    product = math.prod

    def small_product(factors: Sequence[int]) -> int:
        assert len(factors) <= 64
        assert max(factors, default=0) <= 2**53
        return product(factors)

    monkeypatch.setattr(math, "prod", small_product)
    refused("impossible size at 'layer.weight'", parameters={"layer.weight": shape}, num_parameters=...)


def test_many_parameters_may_not_add_up_to_an_impossible_size():
    refused("impossible size", parameters={f"p{i}": [2**50] for i in range(9)}, num_parameters=...)


def test_scalars_and_empty_shapes_are_shapes():
    config = load(parameters={"s": [], "e": [0, 3]}, num_parameters=1, head_parameters=[], tied_parameters={}, buffers=[])
    assert config.parameters == {"s": (), "e": (0, 3)}
    assert config.num_parameters == 1


def test_a_number_of_parameters_that_the_shapes_do_not_make_is_refused():
    refused("num_parameters is 26", "make 25", num_parameters=26)


@pytest.mark.parametrize("kind", ["mean", "variance", "deviations"])
@pytest.mark.parametrize("dtype", ["int8", "F32", None, ["float32"], 3])
def test_an_unknown_type_is_refused(kind, dtype):
    refused(f"dtype of {kind} is", "float32", dtype=raw()["dtype"] | {kind: dtype})


def test_means_and_variances_are_not_stored_in_half_precision():
    refused("dtype of mean is 'bfloat16'", dtype=raw()["dtype"] | {"mean": "bfloat16"})


@pytest.mark.parametrize("key", ["head_parameters", "buffers"])
@pytest.mark.parametrize(
    ("value", "words"), [([3], "not a name"), ([""], "not a name"), ([["a"]], "not a name"), (["a", "a"], "twice")]
)
def test_lists_of_names_hold_names_once(key, value, words):
    refused(f"{key} ", words, **{key: value})


@pytest.mark.parametrize(
    "tied", [{"x": "nope"}, {"x": ["layer.weight"]}, {"x": None}, {"": "layer.weight"}, {"x": {}}], ids=json.dumps
)
def test_tied_parameters_lead_from_a_name_to_a_parameter(tied):
    refused("tied_parameters maps", tied_parameters=tied)


@pytest.mark.parametrize(
    "name",
    [
        "../prior.safetensors", "/etc/prior.safetensors", "a/prior.safetensors", "prior.safetensors/..", "model.safetensors",
        "prior.bin", "..\\prior.safetensors", "prior-1-of-2.safetensors", "prior.safetensors\n", "", "prior.safetensors\0",
    ],
)  # fmt: skip
def test_weight_files_have_the_names_of_the_format_and_no_other(name):
    refused("is no name for a prior's weights", weight_files={name: "0" * 64})


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n", None, 3, ["0" * 64]])
def test_a_hash_has_64_hex_digits(digest):
    refused("expected 64 hex digits", weight_files={"prior.safetensors": digest})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("parameters", [], "an object"), ("dtype", None, "an object"), ("source", "cifar10", "an object"),
        ("estimator", [], "an object"), ("libraries", 3, "an object"), ("weight_files", [], "an object"),
        ("tied_parameters", [], "an object"), ("head_parameters", {}, "a list"), ("buffers", "bn", "a list"),
        ("base_model", 3, "a string or null"), ("license", ["mit"], "a string or null"), ("model_type", {}, "a string or null"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_refused_and_says_which_is_right(key, value, kind):
    refused(f"{key} is {type(value).__name__}", f"expected {kind}", **{key: value})


# ---------------------------------------------------------------------------------------------------------- fuzz
ODD = st.sampled_from(
    [None, True, -1, 0, 2**53, 10**400, 1e308, -0.0, "", "NaN", "../x", "\ud800", "a\nb", "| <!-- --> |", "```", "1.0", [], {}]
)  # fmt: skip
VALUES = st.recursive(
    ODD | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, from the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@st.composite
def mutated_configs(draw: st.DrawFn) -> str:
    """A valid configuration with some of its places replaced, removed or added to, and perhaps some characters changed."""
    value = copy.deepcopy(raw())
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([p for p in places(value) if p]))
        inside = value
        for key in place[:-1]:
            inside = inside[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            inside[place[-1]] = draw(VALUES)
        elif action == "remove":
            del inside[place[-1]]
        elif isinstance(inside, dict):
            inside[draw(st.text(max_size=5))] = draw(VALUES)
    text = json.dumps(value)
    if draw(st.booleans()):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 8)))
        text = (
            text[:start]
            + draw(st.sampled_from(["", "0", '"', "}", "[", ",", "NaN", "é", "\\ud800", "-", "e9", "\0"]))
            + text[stop:]
        )
    return text


@settings(max_examples=300, deadline=None)
@given(mutated_configs())
def test_a_mutated_configuration_is_refused_as_such_or_is_one_that_can_be_written_and_described(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PriorWarning)
        try:
            config = PriorConfig.from_json(text)
        except PriorHubError:
            return
        render_card(config)
        try:
            written = config.to_json()
        except PriorFormatError:
            assert "\\ud" in text  # JSON may hold half a surrogate pair, a file may not
            return
        assert PriorConfig.from_json(written) == config
