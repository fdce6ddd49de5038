"""Classifiers and encoders of transformers: the class that the task wants, whole, with the labels that are theirs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from assay.recipe.errors import EngineError
from assay.recipe.model_labels import read_labels
from assay.recipe.models import TransformersSpec
from tests.small_architectures import save
from tests.small_models import edit_json, edit_weights

SEQUENCE, TOKEN, IMAGE, BASE = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
    "AutoModel",
)
NAMES = {"0": "bad", "1": "fair", "2": "good"}


def build(path, auto_class, **options):
    return TransformersSpec(kind="transformers", path=str(path), **options).build_for(auto_class)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def saved(root):
    save(root / "bert", "bert", SEQUENCE, id2label=NAMES)
    return root / "bert"


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "m")


CLASSES = [
    *((name, SEQUENCE) for name in ("bert", "distilbert", "gpt2", "llama", "qwen2", "gemma2")),
    ("bert", TOKEN),
    ("vit", IMAGE),
    ("resnet", IMAGE),
    ("clip", IMAGE),
    *((name, BASE) for name in ("bert", "llama", "t5", "vit", "resnet", "clip")),
]


@pytest.mark.parametrize(("name", "auto_class"), CLASSES)
def test_a_task_gets_the_class_it_wants_whole(tmp_path, name, auto_class):
    theirs = save(tmp_path, name, auto_class, size="10KB", **({} if auto_class == BASE else {"num_labels": 5}))
    assert (tmp_path / "model.safetensors.index.json").exists()
    spec = TransformersSpec(kind="transformers", path=str(tmp_path))
    own = spec.build_for(auto_class)
    assert type(own) is type(theirs)
    assert not own.training
    pairs = zip(own.state_dict().items(), theirs.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert spec.output_size(own) == (None if auto_class == BASE else 5)
    assert spec.label_names(own) is None


def test_labels_have_the_names_that_the_config_gives_them(saved):
    model = build(saved, SEQUENCE)
    spec = TransformersSpec(kind="transformers", path=str(saved))
    assert spec.label_names(model) == ("bad", "fair", "good")
    assert spec.output_size(model) == 3


NONSENSE = [
    ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "id2label has 3 labels, and 3 among them"),
    ({"id2label": ["a", "b", "c"]}, "id2label must map 0, 1, 2"),
    ({"id2label": {}}, "id2label must map 0, 1, 2"),
    ({"id2label": {"0": "a", "1": 5, "2": "c"}}, "the name of label 1 is no text"),
    ({"id2label": {"0": "a", "1": "x" * 10**6, "2": "c"}}, "the name of label 1 is no text"),
    (
        {"id2label": {"0": "a", "1": "b"}, "label2id": None},
        "classifier.weight 3×16 for 2×16, the shape that its config",
    ),
    ({"id2label": None, "label2id": None}, "classifier.weight 3×16 for 2×16, the shape that"),
    ({"label2id": {"bad": 2, "fair": 1, "good": 0}}, "label2id says that bad is 2, and id2label says otherwise"),
    ({"label2id": [1]}, "label2id must map"),
    ({"num_labels": 4}, "num_labels is 4, but id2label has 3"),
    ({"num_labels": 10**12, "id2label": None}, "num_labels is 1000000000000"),
    ({"num_labels": "3"}, "num_labels is 3; expected a number"),
]


@pytest.mark.parametrize(("changes", "message"), NONSENSE, ids=range(len(NONSENSE)))
def test_labels_of_nonsense_are_refused(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(EngineError) as caught:
        build(folder, SEQUENCE)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_labels_that_a_task_has_no_use_for_do_not_matter(folder):
    """Of the same folder without them: a base model is what it was."""
    edit_json(folder / "config.json", id2label=[1], num_labels=10**12, label2id="x")
    assert type(build(folder, BASE)).__name__ == "BertModel"


def test_names_may_stand_twice_and_label2id_may_be_left_at_its_defaults():
    twice = {"id2label": {"0": "crane", "1": "crane"}, "label2id": {"crane": 1}}
    assert read_labels("config.json", twice) == {"id2label": {"0": "crane", "1": "crane"}, "label2id": {"crane": 0}}
    read_labels("config.json", {"id2label": NAMES, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}})
    ordered = read_labels("config.json", {"id2label": {str(i): "x" for i in (10, *range(10))}})
    assert list(ordered["id2label"]) == [str(i) for i in range(11)]


HEADLESS = [
    ("bert", BASE, SEQUENCE, "lack classifier.bias, classifier.weight, which .* without the head of BertForSequence"),
    ("bert", "AutoModelForMaskedLM", SEQUENCE, "lack bert.pooler.* without the head of BertForSequence"),
    ("llama", "AutoModelForCausalLM", SEQUENCE, "lack score.weight, .* hold lm_head.weight"),
    ("vit", BASE, IMAGE, "without the head of ViTForImageClassification"),
    ("bert", SEQUENCE, "AutoModelForCausalLM", "lack cls.predictions"),
    ("resnet", BASE, SEQUENCE, "transformers has no model of the architecture resnet for this task"),
    ("bart", SEQUENCE, BASE, "bart is an encoder with a decoder"),
    ("llama", TOKEN, SEQUENCE, "was trained as LlamaForTokenClassification; this task needs one ForSequenceClassif"),
]


@pytest.mark.parametrize(("name", "saved_as", "wanted", "message"), HEADLESS)
def test_no_head_is_made_up(tmp_path, name, saved_as, wanted, message):
    save(tmp_path, name, saved_as)
    with pytest.raises(EngineError, match=message) as caught:
        build(tmp_path, wanted)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "saved_as", "wanted"),
    [
        ("bert", "AutoModelForMaskedLM", "BertModel"),
        ("llama", "AutoModelForCausalLM", "LlamaModel"),
        ("vit", IMAGE, "ViTModel"),
        ("t5", "AutoModelForSeq2SeqLM", "T5EncoderModel"),
    ],
)
def test_an_encoder_is_had_from_under_a_head(tmp_path, name, saved_as, wanted):
    theirs, own = save(tmp_path, name, saved_as), build(tmp_path, BASE)
    assert type(own).__name__ == wanted
    base = {k.removeprefix(f"{theirs.base_model_prefix}."): v for k, v in theirs.state_dict().items()}
    assert all(torch.equal(base[k], v) for k, v in own.state_dict().items())
    assert not any(k.startswith("pooler") for k in own.state_dict())


def test_what_is_left_over_below_a_head_is_named(tmp_path):
    save(tmp_path, "llama", "AutoModelForCausalLM")
    edit_weights(tmp_path / "model.safetensors", lambda t: t.update({"model.layers.7.x": torch.zeros(1)}))
    with pytest.raises(EngineError, match=r"hold model\.layers\.7\.x, which its config does not want"):
        build(tmp_path, BASE)


def test_a_classifier_that_needs_a_padding_token_has_one(tmp_path):
    save(tmp_path, "gpt2", SEQUENCE)
    edit_json(tmp_path / "config.json", pad_token_id=None)
    with pytest.raises(EngineError, match=r"GPT2ForSequenceClassification finds a text's last token by pad_token_id"):
        build(tmp_path, SEQUENCE)
    edit_json(tmp_path / "config.json", pad_token_id=97)
    with pytest.raises(EngineError, match="pad_token_id is 97, and the model knows the tokens below 97"):
        build(tmp_path, SEQUENCE)
    for nonsense in ("x", [1], {}, 1.5, -1, 10**30):
        edit_json(tmp_path / "config.json", pad_token_id=nonsense)
        with pytest.raises(EngineError, match=str(tmp_path)) as caught:
            build(tmp_path, SEQUENCE)
        assert len(str(caught.value)) < 500
    edit_json(tmp_path / "config.json", pad_token_id=97)
    build(tmp_path, BASE)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 97
