"""Language models whose output layer is fused with the loss, against the same models as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.methods import Ensemble, GradMimic, Scorer
from assay.probe import Dot, Probe, Signals, SqNorm, tapped_parameters
from assay.tasks import CausalLM

transformers = pytest.importorskip("transformers")

VOCABULARY = 301


def llama(tied: bool, **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        **options,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def gpt2(tied: bool) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def gemma2(cap: float | None = 3.0) -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=cap,
    )
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config)


class Plain(nn.Module):
    """Not of transformers: it says nothing of its output layer."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(VOCABULARY, 16), scale
        self.head = nn.Linear(16, VOCABULARY)  # with a bias

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).cumsum(1)) * self.scale


def batch(*lengths: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def signals(model: nn.Module, task: CausalLM, inputs: dict[str, Tensor]) -> Signals:
    names = tapped_parameters(model, skip_unsupported=True)  # Gemma 2 scales its embedding
    generator = torch.Generator().manual_seed(2)
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn(parameters[name].shape, generator=generator) for name in names}
    each = {f"dot {name}": Dot({name: direction[name]}) for name in names}
    norms = {f"sqnorm {name}": SqNorm((name,)) for name in names}
    return Probe(model, task, factors="*", reductions={**each, **norms}, skip_unsupported=True)(inputs)


def is_fused(found: Signals) -> bool:
    return found.output_layer is not None


MODELS = {
    "llama": (lambda: llama(False), CausalLM()),
    "llama tied": (lambda: llama(True), CausalLM()),
    "gpt2 tied": (lambda: gpt2(True), CausalLM(reduction="sum")),
    "gemma without a cap": (lambda: gemma2(None), CausalLM()),
    "plain, by name, with a bias": (Plain, CausalLM(fused="head")),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_signal_is_that_of_the_unfused_model(name: str) -> None:
    make, task = MODELS[name]
    model, inputs = make(), batch(9, 2, 1, 12)  # one sample predicts a single token, one none
    fused = signals(model, task, inputs)
    plain = signals(model, CausalLM(task.reduction, fused=False), inputs)
    assert is_fused(fused)
    assert not is_fused(plain)
    torch.testing.assert_close(fused.losses, plain.losses, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert bool(fused.losses[2].isnan())
    assert fused.reduced.keys() == plain.reduced.keys()
    for key, value in plain.reduced.items():
        torch.testing.assert_close(fused.reduced[key], value, rtol=2e-4, atol=1e-5 * float(value.abs().max()), msg=key)
    assert fused.factors.keys() == plain.factors.keys()
    for layer, factors in plain.factors.items():
        torch.testing.assert_close(fused.factors[layer].inputs, factors.inputs)
        torch.testing.assert_close(fused.factors[layer].grads, factors.grads, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(fused.logits, plain.logits, rtol=1e-5, atol=1e-5)


def test_logits_and_their_gradients_are_not_made_until_read() -> None:
    found = signals(llama(True), CausalLM(), batch(6, 7))
    assert callable(vars(found)["logits"])
    assert callable(vars(found.factors["lm_head"])["grads"])
    copied = found.with_reduced({})
    assert callable(vars(copied)["logits"])
    assert found.logits.shape == (14, VOCABULARY)
    assert isinstance(vars(found)["logits"], Tensor)
    assert found.logits is found.logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_gradient_that_cancels(tied: bool) -> None:
    """The head's part and the embedding's part of one weight, summed before the norm is taken."""
    model = llama(tied)
    inputs = batch(8)
    gradient = {}

    class Keep:
        parameters = tuple(n for n in tapped_parameters(model) if "embed" in n or "head" in n)

        def __call__(self, parameter: str, value: Any) -> Tensor:
            gradient[parameter] = value
            return value.sqnorm()

    found = Probe(model, CausalLM(), reductions={"x": Keep()})(inputs)
    dense = sum(g.dense().double().square().flatten(1).sum(1) for g in gradient.values())
    torch.testing.assert_close(found.reduced["x"].double(), dense, rtol=1e-5, atol=0)


def test_a_soft_cap_is_noticed_and_the_model_runs_as_it_is() -> None:
    model, inputs = gemma2(), batch(7, 5)
    for _ in range(2):  # found out on the first batch, remembered on the second
        found = signals(model, CausalLM(), inputs)
        assert not is_fused(found)
        plain = signals(model, CausalLM(fused=False), inputs)
        torch.testing.assert_close(found.losses, plain.losses)
        for key, value in plain.reduced.items():
            torch.testing.assert_close(found.reduced[key], value, msg=key)


def test_what_cannot_be_fused_by_name_says_so() -> None:
    with pytest.raises(ValueError, match="not the output of its layer 'head'"):
        signals(Plain(scale=2.0), CausalLM(fused="head"), batch(5, 5))
    with pytest.raises(ValueError, match=r"'embed': expected the name of an nn\.Linear, found E"):
        signals(Plain(), CausalLM(fused="embed"), batch(5, 5))
    with pytest.raises(ValueError, match=r"'haed': expected the name of an nn\.Linear, found no such layer"):
        signals(Plain(), CausalLM(fused="haed"), batch(5, 5))
    assert not is_fused(signals(Plain(), CausalLM(), batch(5, 5)))


def test_the_model_is_left_as_it_was() -> None:
    model = llama(False)
    signals(model, CausalLM(), batch(4, 4))
    assert "forward" not in vars(model.lm_head)
    broken = batch(4, 4)
    broken["labels"] = torch.full((2, 4), VOCABULARY)
    with pytest.raises(ValueError, match=f"label {VOCABULARY} lies outside"):
        signals(model, CausalLM(), broken)
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(IndexError):  # in the model's own forward
        CausalLM().forward(model, {"input_ids": torch.full((2, 4), VOCABULARY), "labels": torch.zeros(2, 4).long()})
    assert "forward" not in vars(model.lm_head)


def test_bfloat16_model() -> None:
    model = llama(True).bfloat16()
    inputs = batch(9, 4)
    fused, plain = signals(model, CausalLM(), inputs), signals(model, CausalLM(fused=False), inputs)
    assert is_fused(fused)
    torch.testing.assert_close(fused.losses, plain.losses, rtol=1e-2, atol=1e-2)


def test_methods_score_fused_models_alike() -> None:
    first, second = llama(True), llama(True)
    with torch.no_grad():
        for p in second.parameters():
            p.add_(0.01 * torch.randn_like(p))
    inputs = batch(9, 5, 1)

    def scores(task: CausalLM) -> dict[str, Tensor]:
        return Scorer([GradMimic(first, second, task, cosine=True), Ensemble([first, second], task)])(inputs)

    fused, plain = scores(CausalLM()), scores(CausalLM(fused=False))
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-3, atol=1e-5, equal_nan=True, msg=name)
    assert math.isnan(fused["ensemble_nll"][2])
