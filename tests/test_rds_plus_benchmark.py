"""The experiment on RDS+, with a random model and two kinds of text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

import assay
from assay.methods import EmbeddingSimilarity, RDSPlus
from assay.tasks import CausalLM
from benchmarks.quality.multiplier.corpus import Corpus
from benchmarks.quality.rds_plus import BEST, batches, by_embeddings, compared
from benchmarks.quality.worth import found
from tests.small_models import TEXTS, byte_tokenizer, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("model")))
    return loaded.eval()


def numbers_in(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()[:48].ljust(48)))


def corpus() -> Corpus:
    """Of 60 pieces 10 are of words, the others of numbers; the target is of the same words."""
    rng = np.random.default_rng(0)
    kinds = np.where(np.arange(60) % 6 == 0, "words", "numbers")
    words = [TEXTS[i % 4] + " " + TEXTS[4] for i in range(60)]
    texts = [
        words[i] if kind == "words" else " ".join(map(str, rng.integers(0, 99, 12))) for i, kind in enumerate(kinds)
    ]
    pool, target = (torch.stack([numbers_in(text) for text in own]) for own in (texts, words[:8]))
    return Corpus(pool, kinds, "words", target, target[:1], target[:1])


def test_the_shortcut_is_the_methods_own_score(model: torch.nn.Module) -> None:
    data, tokenizer, task = corpus(), byte_tokenizer(pad_token="<eos>"), CausalLM()
    pool, target = (
        batches([bytes(row).decode() for row in part.to(torch.uint8).numpy()], tokenizer)
        for part in (data.pool, data.target)
    )
    targets = {"target": [batch.main for batch in target]}
    methods = [
        RDSPlus(model, task, targets, name="a"),
        EmbeddingSimilarity(model, task, targets, within="max", name="b"),
    ]
    numbers = by_embeddings(methods, pool, data.of_domain)
    mean = EmbeddingSimilarity(model, task, targets, name="c")
    table = assay.score(pool, [method.fit() for method in (*methods, mean)])
    for column, row in (("a", "a, the nearest query"), ("b", "b, the nearest query"), ("c", "b, mean over queries")):
        assert numbers[row] == pytest.approx(found(data.of_domain, table[column].to_numpy(), BEST))


def test_words_are_found_among_numbers(model: torch.nn.Module) -> None:
    numbers = compared(corpus(), model, byte_tokenizer(pad_token="<eos>"), seed=0)
    assert numbers["BM25 (control)"]["AUROC"] > 0.95
    assert numbers["histogram of bytes (control)"]["AUROC"] > 0.95
    assert numbers["plain states, mean over queries"]["AUROC"] > 0.8
    assert 0.2 < numbers["random (control)"]["AUROC"] < 0.8
    assert 0 <= numbers["RDS+, queries in turns"]["share of the best"] <= 10 / 12
