"""Each token's part of an inner product with the gradient, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from assay.methods import GradMimic, Scorer
from assay.probe import Dot, Probe, TokenDot
from assay.probe.layers import find_rule
from assay.tasks import CausalLM, Classification
from tests.small_models import llama_config

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 19}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=19, n_positions=16, n_embd=16, n_layer=2, n_head=2),
    "llama": llama_config(vocab_size=19, num_hidden_layers=1, attention_bias=True, bos_token_id=0, eos_token_id=1),
    "tied": LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1),
    "qwen3": Qwen3Config(  # norms of every head
        **SIZES, intermediate_size=24, head_dim=8, num_key_value_heads=1, bos_token_id=0, eos_token_id=1
    ),
}


def make(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def batch():
    torch.manual_seed(1)
    ids = torch.randint(2, 19, (3, 7))
    mask = (torch.arange(7) < torch.tensor([7, 5, 4])[:, None]).long()
    labels = ids.masked_fill(torch.rand(3, 7) < 0.3, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def by_autograd(model, inputs, direction):
    """Every layer's output moves by s[b, t] times what the direction makes of its input: ∂ loss / ∂ s."""
    s = torch.zeros(inputs["input_ids"].shape, requires_grad=True)
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    names = dict.fromkeys(owners)
    tied = {id(own): name for name, own in model.named_parameters()}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        own = dict(module.named_parameters(recurse=False))
        steps = {local: direction[tied[id(parameter)]] for local, parameter in own.items()}

        def hook(module, args, output, own=own, steps=steps):
            module._forward_hooks, kept = {}, module._forward_hooks

            def run(parameters, args=args, module=module):
                return functional_call(module, parameters, args)

            _, moved = jvp(run, ({k: v.detach() for k, v in own.items()},), (steps,))
            module._forward_hooks = kept
            return (
                output + s.reshape(*s.shape, *[1] * (output.ndim - 2)) * moved
            )  # one row of positions for all samples

        handles.append(module.register_forward_hook(hook))
    losses = CausalLM(fused=False).forward(model, inputs).losses
    for handle in handles:
        handle.remove()
    return torch.autograd.grad(losses.sum(), s)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_autograds(name):
    model, inputs = make(CONFIGS[name]), batch()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    reductions = {"token": TokenDot(direction), "whole": Dot(direction)}
    reduced = Probe(model, CausalLM(), reductions=reductions)(inputs).reduced
    expected = by_autograd(model, inputs, direction)
    mask = inputs["attention_mask"].bool()
    assert (reduced["token"].isnan() == ~mask).all()
    scale = expected.abs().max()
    assert ((reduced["token"] - expected)[mask].abs() <= 1e-5 * scale).all()
    torch.testing.assert_close(reduced["token"].nansum(1), reduced["whole"], rtol=1e-4, atol=1e-5 * float(scale))


def test_the_shares_are_the_score():
    models = [make(CONFIGS["llama"], seed) for seed in (0, 1)]
    inputs = batch()
    scores = Scorer([GradMimic(*models, CausalLM(), tokens=True)])(inputs)
    torch.testing.assert_close(scores["mimic_tokens"].nansum(1), scores["mimic"], rtol=1e-4, atol=1e-6)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(11, 6), nn.Conv1d(6, 6, 3), nn.Linear(6, 11)

    def forward(self, input_ids):
        hidden = nn.functional.pad(self.embed(input_ids).mT, (2, 0))
        return self.head(self.conv(hidden).mT)


def test_layers_that_mix_positions_are_refused_by_name():
    models = [Mixing(), Mixing()]
    with pytest.raises(ValueError, match=r"layer 'conv' \(Conv1d\) is not made of single tokens'; .*'!conv'"):
        GradMimic(*models, CausalLM(), tokens=True)
    assert GradMimic(*models, CausalLM(), ["*", "!conv"], tokens=True).columns[-1].width is None


def test_samples_without_tokens_are_refused():
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    with pytest.raises(ValueError, match="tokens: Classification's samples are no tokens"):
        GradMimic(*models, Classification(), tokens=True)


class Pooled(nn.Module):
    """A layer that sees half of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pooled, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return self.head(hidden + self.pooled(hidden[:, ::2]).repeat_interleave(2, 1)[:, : hidden.shape[1]])


def test_a_layer_of_other_positions_is_refused_when_it_runs():
    model = Pooled()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    probe = Probe(model, CausalLM(), reductions={"token": TokenDot(direction)})
    with pytest.raises(
        ValueError, match=r"pooled.*layer 'pooled' \(Linear\) ran on \(2, 3, 6\), which are not the 6 tokens"
    ):
        probe({"input_ids": torch.randint(11, (2, 6))})


class AsWeight(nn.Module):
    """As many rows of a table as there are tokens are the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rows = nn.Embedding(11, 6), nn.Embedding(11, 6)

    def forward(self, input_ids):
        return self.embed(input_ids) @ self.rows(torch.arange(6)).T


def test_rows_that_are_a_weight_are_no_tokens():
    model = AsWeight()
    direction = {"rows.weight": torch.randn(11, 6)}
    probe = Probe(model, CausalLM(), reductions={"token": TokenDot(direction)})
    with pytest.raises(ValueError, match=r"layer 'rows' \(Embedding\) has no positions of its own"):
        probe({"input_ids": torch.randint(6, (2, 6))})


class Heads(nn.Module):
    """A norm of every head, with the heads before or after the tokens."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.head, self.first = nn.Embedding(11, 6), nn.LayerNorm(2), nn.Linear(6, 11), first

    def forward(self, input_ids):
        hidden = self.embed(input_ids).unflatten(2, (3, 2))
        if self.first:
            return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2).flatten(2))
        return self.head(self.norm(hidden).flatten(2))


@pytest.mark.parametrize("first", [True, False])
def test_as_many_heads_as_tokens_are_no_tokens(first):
    model = Heads(first)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    batches = [{"input_ids": torch.randint(11, (2, n))} for n in (3, 5)]
    for verify in (True, False):
        probe = Probe(model, CausalLM(), reductions={"token": TokenDot(direction)}, verify=verify)
        with pytest.raises(ValueError, match=r"layer 'norm' \(LayerNorm\) ran on \(2, 3, 3, 2\)"):
            probe(batches[0])
        if first:
            with pytest.raises(ValueError, match=r"layer 'norm' \(LayerNorm\) ran on \(2, 3, 5, 2\)"):
                probe(batches[1])
            continue
        probe(batches[1])  # tells the order
        found = probe(batches[0]).reduced["token"]
        expected = by_autograd(model, {**batches[0], "labels": batches[0]["input_ids"]}, direction)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_one_token_and_one_head():
    model = make(CONFIGS["qwen3"])
    inputs = {"input_ids": torch.randint(2, 19, (2, 1))}
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    reduced = Probe(model, CausalLM(), reductions={"token": TokenDot(direction)})(inputs).reduced
    assert reduced["token"].shape == (2, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_in_double_precision(name):
    models = [make(CONFIGS[name], seed).double() for seed in (0, 1)]
    scores = Scorer([GradMimic(*models, CausalLM(), tokens=True)])(batch())
    torch.testing.assert_close(scores["mimic_tokens"].nansum(1), scores["mimic"], rtol=1e-5, atol=1e-7)


def test_products_are_not_rounded_where_the_caller_allows_it():
    torch.manual_seed(0)
    layer, x, grads = nn.Linear(5, 6), torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    rule, direction = find_rule(layer), torch.randn(6, 5)
    expected = rule.dot_by_position(layer, "weight", x, grads, direction)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rule.dot_by_position(layer, "weight", x, grads, direction), expected)
        assert rule.dot_by_position(layer, "bias", x, grads, direction[:, 0]).dtype == torch.float32
