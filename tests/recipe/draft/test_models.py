"""What is said of a model before it is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from assay.recipe.draft.models import model_facts
from assay.recipe.errors import EngineError
from tests.small_models import byte_tokenizer, edit_json, save_model
from tests.small_project import save_mlp


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama")


def test_a_language_model(llama):
    facts = model_facts(str(llama))
    assert (facts.kind, facts.use, facts.name) == ("transformers", "causal_lm", "LlamaForCausalLM")
    assert (facts.positions, facts.chat, facts.regression) == (128, False, False)
    assert facts.shapes["model.norm.weight"] == (32,)


@pytest.mark.parametrize(
    ("name", "more", "use", "outputs", "regression"),
    [
        ("GPT2LMHeadModel", {}, "causal_lm", None, False),
        ("BertForSequenceClassification", {}, "text classification", 2, False),
        ("BertForSequenceClassification", {"id2label": {"0": "x"}}, "text classification", 1, True),
        ("BertForSequenceClassification", {"problem_type": "regression"}, "text classification", 2, True),
        ("BertForTokenClassification", {"id2label": {"0": "O", "1": "B"}}, "token_classification", 2, False),
        ("ViTForImageClassification", {"num_labels": 7}, "image classification", 7, False),
        ("CLIPModel", {}, "contrastive", None, False),
        ("SiglipModel", {}, "contrastive", None, False),
        ("Siglip2Model", {}, "contrastive", None, False),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, "unknown", None, False),
        ("BertModel", {}, "unknown", None, False),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "unknown", None, False),
    ],
)
def test_the_class_in_a_config_says_the_use(llama, tmp_path, name, more, use, outputs, regression):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "config.json", architectures=[name], **more)
    facts = model_facts(str(tmp_path))
    assert (facts.use, facts.outputs, facts.regression) == (use, outputs, regression)


def test_a_chat_template_is_seen_in_both_places(llama, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    assert model_facts(str(tmp_path)).chat
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", chat_template="{{ messages }}")
    assert model_facts(str(tmp_path)).chat


def test_linear_layers(tmp_path):
    save_mlp(tmp_path / "a.safetensors", 0)
    facts = model_facts(str(tmp_path / "a.safetensors"))
    assert (facts.kind, facts.use, facts.outputs, facts.regression) == ("mlp", "numbers", 3, False)
    save_file({"0.weight": torch.ones(1, 4)}, tmp_path / "b.safetensors")
    assert model_facts(str(tmp_path / "b.safetensors")).regression


def test_what_is_no_model_is_named(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"x")
    for path, message in (
        (tmp_path / "x.safetensors", "no linear layers"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "pickled", "may be a pickle, which is never opened"),
        ("org/name", "assay downloads nothing: fetch it with `hf download org/name"),
        (tmp_path / "nowhere", "no such file or folder"),
    ):
        with pytest.raises(EngineError, match=message):
            model_facts(str(path))


def test_an_adapter_has_its_base_model_beside_it(llama, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": str(llama), "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    facts = model_facts(str(tmp_path))
    assert (facts.path, facts.adapter, facts.use) == (str(llama), str(tmp_path), "causal_lm")
    for name in ("lora-1", "lora-2"):
        shutil.copytree(tmp_path, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("runs"))
    several = model_facts(str(tmp_path / "runs" / "lora-*"))
    assert (several.path, several.adapter, several.several) == (str(llama), str(tmp_path / "runs" / "lora-*"), True)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path="org/base")
    with pytest.raises(EngineError, match="is a LoRA adapter of org/base, which is no folder here"):
        model_facts(str(tmp_path))
