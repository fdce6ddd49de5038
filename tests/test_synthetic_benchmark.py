"""The experiment on synthetic samples, with a tiny model and real docstrings in place of what it would write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import synthetic
from benchmarks.quality.synthetic import Sample, Sizes
from tests.small_models import save_model

VERBS, NOUNS = ("Return", "Close", "Open", "Read", "Parse", "Write"), ("file", "socket", "header", "line", "table")
REAL = [
    Sample(f"def {verb.lower()}_{noun}_{i}(self):", f"{verb} the {noun} of number {i}{' and wait' * (i % 4)}.")
    for i in range(3)
    for verb in VERBS
    for noun in NOUNS
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = save_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    return model.eval(), tokenizer


def test_what_is_read_of_generated_text() -> None:
    assert synthetic.first_paragraph('\n    Close\n    it.\n\n    Later.\n    """\n    x = """') == "Close it."
    assert synthetic.first_paragraph('"""') == ""
    assert synthetic.first_paragraph("never closed") is None


def test_the_seed_decides_what_is_generated(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "first_paragraph", lambda text: text)
    monkeypatch.setattr(synthetic, "NEW_TOKENS", 4)
    signatures = [sample.signature for sample in REAL[:5]]
    first, again, other = (synthetic.generate(*tiny, signatures, 1.0, seed, batch=3) for seed in (0, 0, 1))
    assert len(first) == 5
    assert first == again != other


def test_scores_are_in_the_samples_order(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    copied = synthetic.tuned(model, tokenizer, REAL[:20], layers=1, seed=0)
    moved = {n for n, p in copied.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert moved
    assert all(name.startswith("model.layers.1.") for name in moved)
    models = {"generator": model, "tuned": copied}
    samples = [REAL[i] for i in (40, 3, 77, 15)]
    table = synthetic.ensemble_table(models, tokenizer, samples)
    states = synthetic.hidden_states(model, tokenizer, samples, "lm_head")
    for i, sample in enumerate(samples):
        prompt = tokenizer(sample.signature + synthetic.OPEN)["input_ids"]
        text = tokenizer(sample.docstring + synthetic.CLOSE)["input_ids"]
        ids = torch.tensor([prompt + text])
        labels = torch.tensor([[-100] * len(prompt) + text])
        with torch.no_grad():
            losses = [m(ids, labels=labels).loss.item() for m in models.values()]
            last = model.model(torch.tensor([text])).last_hidden_state[0].mean(0)
        assert table["ensemble_mean_nll"][i].as_py() == pytest.approx(np.mean(losses), rel=1e-4)
        assert table["tuned_mean_nll"][i].as_py() == pytest.approx(losses[1], rel=1e-4)
        assert torch.allclose(states[i], last, atol=1e-4)


def test_distances_are_those_to_the_nearest() -> None:
    real, features = torch.randn(20, 4).mul(torch.tensor([1.0, 10, 0.1, 1])), torch.randn(6, 4)
    apart = np.linalg.norm((features[:, None] - real[None]).numpy() / real.std(0).numpy(), axis=2)
    expected = np.sort(apart, axis=1)[:, :3].mean(1)
    assert synthetic.nearest_distance(features, real, k=3) == pytest.approx(expected, rel=1e-4)


def test_one_run(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sane: the docstring of another function. Hot: letters in any order, and a few that cannot be used."""
    docstrings = {sample.signature: sample.docstring for sample in REAL}

    def written(
        model: Any, tokenizer: Any, signatures: Sequence[str], temperature: float, seed: int
    ) -> list[str | None]:
        own = [docstrings[signature] for signature in signatures]
        if temperature < 1:
            return [text.replace("the", "a") for text in own[1:] + own[:1]]
        rng = np.random.default_rng(seed)
        return [None, "short", *("".join(rng.permutation(list(text))) for text in own[2:])]

    monkeypatch.setattr(synthetic, "generate", written)
    case, drawn = synthetic.measure(*tiny, REAL, Sizes(reference=40, held_out=20, control=24, tuned_layers=1), seed=0)
    hot = case["generated"]["hot"]
    assert (hot["unfinished"], hot["too short or long"], hot["scored"]) == (1, 1, 22)
    assert len(drawn["kinds"]) == 24 + 24 + 22
    auroc = case["auroc"]
    assert auroc["n-grams (control)"]["hot, sane"] > 0.95
    assert 0.2 < auroc["random (control)"]["synthetic, real"] < 0.8
    assert case["passes"]["n-grams (control)"]["hot"] < 0.2
    for kind in synthetic.KINDS:  # the more is let pass, the more passes; both let pass no more than one
        curve = [row[kind] for row in case["passes both, by quantile"].values()]
        assert curve == sorted(curve)
        assert case["passes"]["both"][kind] <= min(case["passes"][name][kind] for name in ("loss", "distance"))
    alike = case["likeness to the function's own docstring"]["hot"]
    assert -1 <= alike["rank correlation"][synthetic.GRAMS] <= 1
    assert alike["passes"]["samples"] + alike["does not"]["samples"] == 22
