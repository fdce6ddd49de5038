"""Classifiers of texts are tried out on two of them, alone and together."""

from __future__ import annotations

import pytest
import torch
import transformers

from assay.recipe.errors import EngineError
from assay.recipe.text_checks import check_padding, padding_token
from assay.recipe.trials import right_padded
from tests.small_architectures import TOKENS, config

SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"


def build(name, auto_class, **changes):
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def collate(padding, masked=True):
    def batch(texts):
        rows = [torch.tensor([3 + ord(c) % (TOKENS - 3) for c in text] + [2]) for text in texts]
        made = right_padded(rows, padding)
        return made if masked else made | {"attention_mask": torch.ones_like(made["attention_mask"])}

    return batch


class Slots:
    __slots__ = ("pad_token_id",)

    def __init__(self):
        self.pad_token_id = 9


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "qwen2", "gemma2", "t5"])
@pytest.mark.parametrize("auto_class", [SEQUENCE, TOKEN])
def test_a_texts_logits_are_its_own(name, auto_class):
    model = build(name, auto_class)
    check_padding("models.m", model, collate(padding_token(model)))


def test_narrow_types_may_round():
    check_padding("models.m", build("bert", SEQUENCE).bfloat16(), collate(0))


@pytest.mark.parametrize(
    ("name", "auto_class", "padding", "masked"),
    [("gpt2", SEQUENCE, 5, True), ("bert", SEQUENCE, 0, False), ("bert", TOKEN, 0, False)],
)
def test_what_sees_padding_is_refused(name, auto_class, padding, masked):
    with pytest.raises(EngineError, match=r"^models\.m: a text in a batch with a longer one gets other logits"):
        check_padding("models.m", build(name, auto_class), collate(padding, masked))


def test_a_model_that_cannot_run_is_refused():
    with pytest.raises(EngineError, match=r"models\.m: cannot be run on texts"):
        check_padding("models.m", build("vit", "AutoModelForImageClassification"), collate(0))


def test_the_padding_token_is_the_configs():
    assert padding_token(build("gpt2", SEQUENCE, pad_token_id=7)) == 7
    assert padding_token(build("gpt2", "AutoModelForCausalLM", pad_token_id=None)) == 0
    assert padding_token(torch.nn.Linear(2, 2)) == 0
    for given, expected in (({"pad_token_id": 7}, 7), (Slots(), 9), ({}, 0), ("gpt2", 0), (None, 0)):
        model = torch.nn.Linear(2, 2)
        model.config = given
        assert padding_token(model) == expected
