"""Classification: of numbers, texts and pairs of texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from assay.engine.local import run
from tests.recipe.tasks.word_models import TEXTS, recipe, save, scores, write

ARCHITECTURES = ["bert", "distilbert", "gpt2", "llama", "qwen2", "gemma2", "t5"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("pairs", [False, True])
def test_losses_are_those_of_transformers_alone(tmp_path: Any, name: str, pairs: bool) -> None:
    model, tokenizer = save(tmp_path / "m", name, num_labels=3)
    save(tmp_path / "ref", name, seed=1, num_labels=3)
    rows = [{"text": text, "other": TEXTS[i - 1], "label": i % 3} for i, text in enumerate(TEXTS)]
    write(tmp_path, rows)
    task = {"kind": "classification", "text_column": "text"} | ({"text_pair_column": "other"} if pairs else {})
    methods = [{"method": "grad_mimic", "model": "m", "reference": "ref"}]
    made = recipe(tmp_path, task, {"m": "m", "ref": "ref"}, methods=methods)
    assert run(made).rows_scored == len(TEXTS)
    for i, loss in enumerate(scores(tmp_path, "loss")):
        batch = tokenizer(TEXTS[i], TEXTS[i - 1] if pairs else None, return_tensors="pt")
        with torch.no_grad():
            expected = F.cross_entropy(model(**batch).logits, torch.tensor([i % 3]))
        assert loss == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
