"""Names: real architectures (on the meta device: names and shapes only), wrappers, tied weights, heads, and refusals."""

import contextlib
import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from prior_hub import PriorMatchError, PriorWarning, isotropic_prior, match_parameters
from prior_hub.priors.matching import (
    canonical_parameters,
    head_parameter_names,
    match_names,
    persistent_buffers,
    tied_names,
    without_head,
)

BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}


def shapes(model, *, head="auto"):
    """(shapes of the prior a model would give, its head), as the estimator records them."""
    left_out = head_parameter_names(model, head)
    return {n: tuple(p.shape) for n, p in canonical_parameters(model).items() if n not in left_out}, left_out


def meta(build):
    with torch.device("meta"):
        return build()


def test_timm_resnet50_meets_timm_wrapper_with_159_of_161_parameters():
    source = meta(lambda: timm.create_model("resnet50", pretrained=False))
    prior, head = shapes(source)
    assert head == ["fc.weight", "fc.bias"]
    target = meta(lambda: TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet50", num_labels=7)))
    match = match_parameters(prior, target, head_parameters=head)
    assert (len(match.pairs), len(match.new)) == (159, 2)
    assert (match.strip, match.add) == ("", "timm_model.")
    assert "159 of 161 parameters under the prior (23.5 M of 23.5 M values), prefix 'timm_model.' added" in match.report()


def test_hf_resnet_meets_its_classifier_and_an_upernet_backbone():
    prior, head = shapes(meta(lambda: ResNetModel(ResNetConfig(**RESNET))))
    assert head == []
    classifier = meta(lambda: ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=4)))
    match = match_parameters(prior, classifier)
    assert (match.add, len(match.pairs), match.new) == ("resnet.", len(prior), ("classifier.1.weight", "classifier.1.bias"))
    backbone = ResNetConfig(**RESNET, out_features=["stage1", "stage2"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=8, pool_scales=[1], use_auxiliary_head=False, num_labels=3)
    segmenter = meta(lambda: UperNetForSemanticSegmentation(config))
    match = match_parameters(prior, segmenter)
    assert (match.add, len(match.pairs)) == ("backbone.", len(prior))
    # and from the classifier's own prior, whose prefix is replaced
    own, own_head = shapes(classifier)
    match = match_parameters(own, segmenter, head_parameters=own_head)
    assert (match.strip, match.add, len(match.pairs)) == ("resnet.", "backbone.", len(own))


@pytest.mark.parametrize("wrap", ["plain", "compiled", "lora", "compiled lora"])
def test_bert_meets_sequence_classification_also_compiled_and_lora_wrapped(wrap):
    prior, _ = shapes(BertModel(BertConfig(**BERT)))
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    if "lora" in wrap:
        model = get_peft_model(model, LoraConfig(target_modules=["query"], r=2, modules_to_save=["classifier"]))
    if "compiled" in wrap:
        model = torch.compile(model, backend="eager")
    match = match_parameters(prior, model)
    assert match.add == "bert."
    assert len(match.pairs) == len(prior)
    assert "classifier.weight" in match.new
    assert set(match.frozen) == (set(match.pairs.values()) if "lora" in wrap else set())


def test_peft_names_are_those_of_the_base_model_and_the_trained_copy_of_saved_modules():
    base = BertForSequenceClassification(BertConfig(**BERT))
    expected = set(canonical_parameters(base))
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["query"], r=2, modules_to_save=["classifier"]))
    names = canonical_parameters(wrapped)
    assert expected <= set(names)
    assert all("lora_" in n for n in set(names) - expected)
    assert names["classifier.weight"].requires_grad


def test_names_are_the_same_behind_ddp_compile_fsdp_and_checkpoint_wrappers():
    class Holder(nn.Module):
        def __init__(self, part, inner):
            super().__init__()
            self.add_module(part, inner)

    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    names = list(canonical_parameters(model))
    for part in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        assert list(canonical_parameters(Holder(part, model))) == names
        assert list(persistent_buffers(Holder(part, model))) == list(persistent_buffers(model))
    assert list(canonical_parameters(nn.DataParallel(model))) == names
    own = Holder("module", model)  # a model may have a part called `module`: only DDP's is taken off
    assert list(canonical_parameters(own)) == [f"module.{n}" for n in names]


def test_student_and_teacher_is_ambiguous_and_the_error_says_what_to_pass():
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    prior = {n: tuple(p.shape) for n, p in network.named_parameters()}
    both = nn.ModuleDict({"student": copy.deepcopy(network), "teacher": copy.deepcopy(network)})
    with pytest.raises(PriorMatchError, match=r"more than one place.*'student\.'.*'teacher\.'.*name_map=") as caught:
        match_parameters(prior, both)
    rule = str(caught.value).split("name_map=")[1].rstrip(".")
    match = match_parameters(prior, both, name_map=eval(rule))
    assert len(match.pairs) == 4
    assert len({t.split(".")[0] for t in match.pairs.values()}) == 1


def test_exact_names_win_over_a_copy_under_a_prefix():
    """An EMA copy beside the network does not make the network's own names ambiguous."""
    network = nn.Sequential(nn.Linear(4, 8))
    network.ema = nn.Sequential(nn.Linear(4, 8))
    match = match_parameters({"0.weight": (8, 4), "0.bias": (8,)}, network)
    assert set(match.pairs.values()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("case", ["timm -> HF ResNet", "vit -> resnet", "bert -> resnet"])
def test_another_architecture_is_an_error_that_shows_both_kinds_of_names(case):
    sources = {
        "timm -> HF ResNet": lambda: timm.create_model("resnet18", pretrained=False),
        "vit -> resnet": lambda: ViTModel(
            ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        ),
        "bert -> resnet": lambda: BertModel(BertConfig(**BERT)),
    }
    prior, head = shapes(meta(sources[case]))
    config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    target = meta(lambda: ResNetForImageClassification(config))
    with pytest.raises(PriorMatchError, match=r"min_coverage=0\.5\).*names like") as caught:
        match_parameters(prior, target, head_parameters=head)
    expected = "pass name_map" if case.startswith("timm") else "another architecture"
    assert expected in str(caught.value)


def model_type(model):
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def matched(source, target, **options):
    """Match the prior of one model to another, the way `PriorModel.match` does."""
    prior, head = shapes(source)
    return match_parameters(prior, target, head_parameters=head, model_type=model_type(source), **options)


@pytest.mark.parametrize(
    ("source", "target", "count", "example"),
    [
        ("resnet50", "resnet101", 153, "'layer3.6.conv1.weight' like 'layer3.1.conv1.weight'"),
        ("resnet18", "resnet34", 48, "'layer1.2.conv1.weight' like 'layer1.0.conv1.weight'"),
        (2, 4, 32, "'encoder.layer.2.attention.self.query.weight' like 'encoder.layer.0.attention.self.query.weight'"),
    ],
)
def test_a_prior_for_a_shallower_model_of_the_family_binds_with_a_warning_that_counts(source, target, count, example):
    def build(size):
        if isinstance(size, str):
            return meta(lambda: timm.create_model(size))
        return meta(lambda: BertModel(BertConfig(**(BERT | {"num_hidden_layers": size}))))

    with pytest.warns(PriorWarning, match=rf"^{count} of the model's \d+ parameters have no place.*smaller model") as caught:
        match = matched(build(source), build(target))
    assert len(caught) == 1
    assert example in str(caught[0].message)
    assert f"warning: {count} of the model's" in match.report()
    assert matched(build(source), build(source)).remarks == ()


def test_a_prior_of_another_type_of_model_binds_with_a_warning_that_names_both():
    roberta = meta(lambda: RobertaForSequenceClassification(RobertaConfig(**BERT)))
    for source in (BertModel, BertForSequenceClassification):  # names with a prefix and without
        prior = isotropic_prior(source(BertConfig(**BERT)))
        with pytest.warns(PriorWarning, match="the prior is of a model of type 'bert', this one is 'roberta'"):
            match = prior.match(roberta)
        assert "warning: the prior is of a model of type 'bert'" in match.report()


def small(kind, **more):
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(**common, **more)


def clip():
    image = {"image_size": 32, "patch_size": 8}
    text = small(dict)
    return meta(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=text | image)))


def upernet():
    backbone = ResNetConfig(**RESNET, out_features=["stage1", "stage2"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=8, pool_scales=[1], auxiliary_in_channels=16)
    return meta(lambda: UperNetForSemanticSegmentation(config))


def wrapped_resnet50():
    return meta(lambda: TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet50", num_labels=7)))


SMALL_VIT = {"image_size": 32, "patch_size": 8}
LEGITIMATE = {
    "another head": (
        lambda: meta(lambda: ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=3))),
        lambda: meta(lambda: ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=9))),
    ),
    "timm ResNet into TimmWrapper": (lambda: meta(lambda: timm.create_model("resnet50")), wrapped_resnet50),
    "TimmWrapper into timm ResNet": (wrapped_resnet50, lambda: meta(lambda: timm.create_model("resnet50"))),
    "ResNet into UperNet's backbone": (lambda: meta(lambda: ResNetModel(ResNetConfig(**RESNET))), upernet),
    "UperNet's backbone into ResNet": (upernet, lambda: meta(lambda: ResNetModel(ResNetConfig(**RESNET)))),
    "ViT into a classifier": (
        lambda: meta(lambda: ViTModel(small(ViTConfig, **SMALL_VIT))),
        lambda: meta(lambda: ViTForImageClassification(small(ViTConfig, **SMALL_VIT))),
    ),
    "Bert into LoRA": (
        lambda: meta(lambda: BertModel(BertConfig(**BERT))),
        lambda: get_peft_model(BertForSequenceClassification(BertConfig(**BERT)), LoraConfig(target_modules=["query"], r=2)),
    ),
    "CLIP's image half into CLIP": (
        lambda: meta(lambda: CLIPVisionModel(small(CLIPVisionConfig, image_size=32, patch_size=8))),
        clip,
    ),
}


@pytest.mark.parametrize("case", LEGITIMATE)
def test_the_same_network_elsewhere_is_no_other_architecture(case):
    source, target = (build() for build in LEGITIMATE[case])
    match = matched(source, target)  # any warning is an error
    assert (match.remarks, "warning" in match.report()) == ((), False)
    assert match.pairs


def test_copies_heads_frozen_parts_and_what_the_user_left_out_are_no_deeper_model():
    def layers(count):
        return nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))

    prior, head = {"0.weight": (3, 3), "0.bias": (3,)}, ["1.weight", "1.bias"]
    assert match_parameters(prior, layers(2), head_parameters=head).remarks == ()  # the head the prior records
    with pytest.warns(PriorWarning, match=r"^2 of the model's 6 parameters .*'2.weight' like '0.weight', '2.bias'"):
        assert match_parameters(prior, layers(3), head_parameters=head).remarks
    deep_head = nn.ModuleDict({"classifier": layers(2)})  # the second layer of a head by its usual name
    assert match_parameters({"classifier.0.weight": (3, 3), "classifier.0.bias": (3,)}, deep_head).remarks == ()
    ensemble = nn.ModuleList([layers(1), layers(1)])
    assert match_parameters(prior, ensemble, name_map={"^": "0."}).remarks == ()
    frozen = layers(3)
    frozen[2].requires_grad_(False)
    assert match_parameters(prior, frozen, head_parameters=head).remarks == ()
    both = {f"{i}.{name}": shape for i in (0, 1) for name, shape in (("weight", (3, 3)), ("bias", (3,)))}
    assert match_parameters(both, layers(2), name_map=lambda name: name if name[0] == "0" else None).remarks == ()
    with pytest.warns(PriorWarning, match="^2 of the model's 4 parameters"):
        match_parameters(prior, layers(2), name_map={"^": ""})


def test_a_same_named_same_shaped_head_for_other_classes_does_not_bind():
    def build():
        return ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=3))

    source, target = meta(build), meta(build)
    _, head = shapes(source)
    everything = {n: tuple(p.shape) for n, p in canonical_parameters(source).items()}  # a prior that stored its head
    match = match_parameters(everything, target, head_parameters=head)
    assert match.excluded_head == ("classifier.1.weight", "classifier.1.bias")
    assert not set(match.pairs.values()) & set(head)
    assert match_parameters(everything, target, head_parameters=head, include_head=True).excluded_head == ()


def test_head_names_are_found_where_a_library_says_so_and_refused_where_nobody_does():
    assert head_parameter_names(timm.create_model("vit_tiny_patch16_224", num_classes=5)) == [
        "head.weight",
        "head.bias",
    ]
    assert head_parameter_names(meta(lambda: timm.create_model("resnet18", num_classes=0))) == []
    masked = BertForMaskedLM(BertConfig(**BERT))
    assert all(n.startswith("cls.") for n in head_parameter_names(masked))
    assert "bert.embeddings.word_embeddings.weight" not in head_parameter_names(masked)  # tied to the decoder
    lora = get_peft_model(BertForSequenceClassification(BertConfig(**BERT)), LoraConfig(target_modules=["query"], r=2))
    assert set(head_parameter_names(lora)) == {"classifier.weight", "classifier.bias"}

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.top = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(PriorMatchError, match=r"head=\('name',\).*top-level modules: body, top.*head=\(\)"):
        head_parameter_names(Mine())
    assert head_parameter_names(Mine(), ("top",)) == ["top.weight", "top.bias"]
    assert head_parameter_names(Mine(), ()) == head_parameter_names(Mine(), None) == []
    with pytest.raises(PriorMatchError, match="head='toop' names no parameter"):
        head_parameter_names(Mine(), ["toop"])


def test_parameters_the_model_lacks_are_marginalised_and_frozen_ones_conditioned_on():
    prior = {"a.weight": (4, 4), "a.bias": (4,), "b.weight": (4, 4)}
    match = match_names(prior, {"a.weight": (4, 4), "a.bias": (4,), "c": (2,)}, frozen=["a.bias", "c"])
    assert match.marginalised == ("b.weight",)
    assert match.frozen == ("a.bias",)
    assert (match.new, match.new_frozen) == (("c",), ("c",))
    assert "marginalised" in match.report()
    assert "frozen" in match.report()


def test_shape_mismatch_is_an_error_by_default_and_dropped_on_request():
    prior, model = {"a": (64, 4), "b": (8, 4)}, {"a": (64, 4), "b": (9, 4)}
    with pytest.raises(
        PriorMatchError, match=r"1 parameters differ in shape.*'b': \[8, 4\] in the prior, \[9, 4\].*on_mismatch='drop'"
    ):
        match_names(prior, model)
    match = match_names(prior, model, on_mismatch="drop")
    assert (match.dropped, match.pairs, match.new) == ({"b": "b"}, {"a": "a"}, ("b",))


def test_low_coverage_is_an_error_with_the_number_to_pass():
    prior = {"small": (10,), "large": (90,)}
    with pytest.raises(PriorMatchError, match=r"only 1 of 2.*10 of 100 values.*min_coverage of 0\.10 or less"):
        match_names(prior, {"small": (10,)})
    assert match_names(prior, {"small": (10,)}, min_coverage=0.05).covered_values == 10
    with pytest.raises(PriorMatchError, match="none of the 2"):
        match_names(prior, {"other": (3,)})


def test_name_map_takes_rules_pairs_and_callables():
    prior = {"layer1.weight": (2, 2), "layer2.weight": (3, 3)}
    model = {"stages.0.weight": (2, 2), "stages.1.weight": (3, 3)}
    rules = {r"^layer1\.": "stages.0.", r"^layer2\.": "stages.1."}
    expected = {"layer1.weight": "stages.0.weight", "layer2.weight": "stages.1.weight"}
    for name_map in (rules, list(rules.items()), lambda n: expected[n]):
        assert match_names(prior, model, name_map=name_map).pairs == expected
    partial = match_names(prior, model, name_map=lambda n: None if "layer1" in n else expected[n])
    assert partial.marginalised == ("layer1.weight",)
    with pytest.raises(PriorMatchError, match=r"'layer1\.weight' to 'nowhere'"):
        match_names(prior, model, name_map=lambda n: "nowhere")
    with pytest.raises(PriorMatchError, match=r"both map to 'stages\.0\.weight'"):
        match_names({"x": (2, 2), "y": (2, 2)}, model, name_map=lambda n: "stages.0.weight")


def test_tied_weights_are_accepted_under_either_name():
    model = BertForMaskedLM(BertConfig(**BERT))
    tied = tied_names(model)
    assert tied["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"
    shape = tuple(model.bert.embeddings.word_embeddings.weight.shape)
    by_alias = match_names({"decoder": shape}, {"embedding": shape}, aliases={"decoder": "embedding"})
    assert by_alias.pairs == {"decoder": "embedding"}
    by_prior = match_names({"embedding": shape}, {"decoder": shape, "x": (1,)}, tied_parameters={"decoder": "embedding"})
    assert by_prior.pairs == {"embedding": "decoder"}


def test_a_prior_that_is_all_head_needs_include_head():
    with pytest.raises(PriorMatchError, match="include_head=True"):
        match_names({"fc.weight": (2, 2)}, {"fc.weight": (2, 2)}, head_parameters=["fc.weight"])
    assert match_names({"fc.weight": (2, 2)}, {"fc.weight": (2, 2)}, head_parameters=["fc.weight"], include_head=True).pairs


part = st.text("abcdef", min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(
    names=st.lists(st.lists(part, min_size=2, max_size=4).map(".".join), min_size=2, max_size=12, unique=True),
    strip=st.lists(part, max_size=2),
    add=st.lists(part, max_size=2),
    extra=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_prefix_on_either_side_is_found_or_refused_but_never_bound_wrongly(names, strip, add, extra, seed):
    """Every network name under one prefix in the prior and another in the model: pairs are the true ones, or an error."""
    match = None
    g = torch.Generator().manual_seed(seed)
    size = {n: tuple(torch.randint(1, 5, (2,), generator=g).tolist()) for n in names}
    old, new = "".join(f"{s}." for s in strip), "".join(f"{a}." for a in add)
    model = {new + n: s for n, s in size.items()} | {f"zz_head{i}.weight": (7, 7) for i in range(extra)}
    with contextlib.suppress(PriorMatchError):  # names that really are interchangeable are refused
        match = match_names({old + n: s for n, s in size.items()}, model, min_coverage=0.9)
    if match is None:
        return
    if (match.strip, match.add) == (old, new):
        assert match.pairs == {old + n: new + n for n in names}
    else:  # another prefix fits at least as many values
        assert match.covered_values >= sum(a * b for a, b in size.values())


@settings(max_examples=50, deadline=None)
@given(
    names=st.lists(st.lists(part, min_size=2, max_size=4).map(".".join), min_size=1, max_size=12, unique=True),
    strip=st.lists(part, max_size=2),
    add=st.lists(part, max_size=2),
)
def test_with_distinct_shapes_every_prefix_is_found(names, strip, add):
    size = {n: (i + 1, 3) for i, n in enumerate(names)}
    old, new = "".join(f"{s}." for s in strip), "".join(f"{a}." for a in add)
    match = match_names({old + n: s for n, s in size.items()}, {new + n: s for n, s in size.items()})
    assert match.pairs == {old + n: new + n for n in names}


def test_heads_of_real_classes_are_found_or_asked_for():
    import transformers as tf

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = meta(
        lambda: tf.SiglipForImageClassification(tf.SiglipConfig(text_config=small, vision_config=small | {"image_size": 32}))
    )
    assert set(head_parameter_names(siglip)) == {"classifier.weight", "classifier.bias"}
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    questions = meta(lambda: tf.T5ForQuestionAnswering(tf.T5Config(**t5)))
    assert set(head_parameter_names(questions)) == {"qa_outputs.weight", "qa_outputs.bias"}
    generator = tf.T5ForConditionalGeneration(tf.T5Config(**t5))
    assert head_parameter_names(generator) == (
        ["lm_head.weight"] if generator.lm_head.weight is not generator.shared.weight else []
    )
    assert head_parameter_names(tf.T5EncoderModel(tf.T5Config(**t5))) == []
    segmenter = tf.UperNetConfig(
        backbone_config=ResNetConfig(**RESNET, out_features=["stage1", "stage2"]),
        hidden_size=8,
        pool_scales=[1],
        auxiliary_in_channels=16,
    )
    names = head_parameter_names(meta(lambda: UperNetForSemanticSegmentation(segmenter)))
    assert {n.split(".")[0] for n in names} == {"decode_head", "auxiliary_head"}

    class Own(tf.PreTrainedModel):  # a user's model without base_model_prefix
        config_class = tf.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.net, self.classifier = nn.Linear(3, 3), nn.Linear(3, 2)

    assert head_parameter_names(Own(tf.BertConfig())) == ["classifier.weight", "classifier.bias"]

    class Unknown(Own):
        def __init__(self, config):
            super().__init__(config)
            self.top = self.classifier
            del self.classifier

    with pytest.raises(PriorMatchError, match="cannot tell which part of Unknown"):
        head_parameter_names(Unknown(tf.BertConfig()))


def test_every_head_counts_auxiliary_distilled_and_behind_an_identity():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc, self.classifier, self.aux_classifier = (
                nn.Linear(2, 2),
                nn.Identity(),
                nn.Linear(2, 2),
                nn.Linear(2, 2),
            )

    assert {n.split(".")[0] for n in head_parameter_names(Net())} == {"classifier", "aux_classifier"}
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)  # not on "meta": timm 1.0.11 cannot
    assert {n.split(".")[0] for n in head_parameter_names(distilled)} == {"head", "head_dist"}


def test_a_part_called_module_or_base_layer_is_the_models_own():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.base_layer, self.fc = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    assert {n.split(".")[0] for n in canonical_parameters(Holder())} == {"module", "base_layer", "fc"}
    assert head_parameter_names(Holder()) == ["fc.weight", "fc.bias"]
    both = torch.compile(nn.DataParallel(Holder()), backend="eager")
    assert list(canonical_parameters(both)) == list(canonical_parameters(Holder()))


def test_of_two_adapters_the_active_one_gives_the_saved_modules():
    config = LoraConfig(target_modules=["query"], r=2, modules_to_save=["classifier"])
    model = get_peft_model(BertForSequenceClassification(BertConfig(**BERT)), config)
    model.add_adapter("second", config)
    model.set_adapter("second")
    names = canonical_parameters(model)
    saved = model.base_model.model.classifier.modules_to_save["second"]
    assert names["classifier.weight"] is saved.weight


def test_one_large_tensor_of_another_architecture_is_not_enough():
    prior = {"embeddings.weight": (1000, 8)} | {f"layer.{i}.weight": (8, 8) for i in range(6)}
    gpt = {"wte.weight": (1000, 8)} | {f"h.{i}.c_attn.weight": (8, 24) for i in range(6)}
    with pytest.raises(PriorMatchError, match="only 1 of 7"):
        match_names(prior, gpt)
    assert match_names(prior, gpt, min_coverage=0.1).pairs == {"embeddings.weight": "wte.weight"}


def test_a_module_under_two_names_is_not_ambiguous():
    model = nn.Module()
    model.left = nn.Linear(3, 3)
    model.right = model.left
    match = match_parameters({"weight": (3, 3), "bias": (3,)}, model)
    assert set(match.pairs.values()) == {"left.weight", "left.bias"}


def test_thousands_of_equal_shapes_are_matched_in_seconds():
    import time

    names = {f"layers.{i}.experts.{j}.weight": (4, 4) for i in range(40) for j in range(75)}
    start = time.perf_counter()
    match = match_names(names, {f"model.{n}": s for n, s in names.items()})
    assert match.add == "model."
    assert time.perf_counter() - start < 15  # quadratic voting took 26 s on this shape; this takes well under one


def test_include_head_needs_a_prior_that_holds_it():
    with pytest.raises(PriorMatchError, match="does not hold the source task's head"):
        match_names({"body.weight": (2, 2)}, {"body.weight": (2, 2)}, head_parameters=["fc.weight"], include_head=True)


def test_the_first_rule_that_matches_the_beginning_of_a_name_is_applied():
    prior, model = {"a.b": (1,), "c.a": (2,)}, {"x.b": (1,), "c.a": (2,)}
    match = match_names(prior, model, name_map={r"a\.": "x.", r"^": ""})
    assert match.pairs == {"a.b": "x.b", "c.a": "c.a"}


def test_only_buffers_of_a_state_dict_travel():
    model = nn.BatchNorm1d(2)
    model.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert set(persistent_buffers(model)) == {"running_mean", "running_var", "num_batches_tracked"}


def test_buffers_of_the_head_are_told_from_those_of_the_body():
    head, body = ["decode.norm.weight"], ["body.norm.weight", "body.conv.weight"]
    names = ["decode.norm.running_mean", "decode.plain.running_mean", "body.norm.running_mean", "body.plain.running_mean"]
    assert without_head(names, head, body) == names[2:]
