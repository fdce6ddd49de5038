"""Language models whose output layer is fused with the loss, against the same models as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay import ops
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


def test_losses_that_nobody_asks_for_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ensemble's statistics hold its losses: one product with the output layer is enough."""
    products, losses = [], ops.linear_cross_entropy

    def count(*args: Any, **kwargs: Any) -> Tensor:
        products.append(1)
        return losses(*args, **kwargs)

    monkeypatch.setattr(ops, "linear_cross_entropy", count)
    models, inputs = [llama(False), llama(True)], batch(9, 2, 1, 12)
    scores = Scorer([Ensemble(models, CausalLM())])(inputs)
    assert not products
    with Probe(models[0], CausalLM(), factors=[]) as probe:
        found = probe(inputs)
    again = found.with_reduced({})
    assert (found.samples, len(products)) == (4, 0)
    own = [CausalLM(fused=False).forward(model, inputs).losses for model in models]
    torch.testing.assert_close(found.losses, own[0], equal_nan=True, rtol=1e-5, atol=1e-6)
    assert not found.losses.requires_grad
    assert torch.equal(again.losses.nan_to_num(-1), found.losses.nan_to_num(-1))
    assert found.row_losses is not None
    assert found.row_losses.shape == inputs["input_ids"].shape
    assert len(products) == 1  # for all who read them
    mean = torch.stack(own).mean(0).detach()
    torch.testing.assert_close(scores["ensemble_mean_nll"], mean, equal_nan=True, rtol=1e-5, atol=1e-6)


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


# ---- whatever a model does to its logits, its values are those of fused=False


def _in_place(z: Tensor, change: Any) -> Tensor:
    change(z)
    return z


def _caught(z: Tensor) -> Tensor:
    try:
        return z * 2
    except Exception:
        return z


def _put(z: Tensor, place: Any, value: Any) -> Tensor:
    z[place] = value
    return z


CHANGES: dict[str, Any] = {
    "cut": lambda z: z[..., :250],
    "cut to all": lambda z: z[..., :VOCABULARY],
    "mask": lambda z: _put(z, (..., slice(250, None)), -torch.inf),
    "mask of nothing": lambda z: _put(z, (..., slice(VOCABULARY, None)), -torch.inf),
    "mask in no_grad": lambda z: _in_place(z, lambda z: z.data[..., 250:].fill_(-torch.inf)),
    "masked_fill": lambda z: z.masked_fill(torch.arange(VOCABULARY) >= 250, -torch.inf),
    "where": lambda z: torch.where(torch.arange(VOCABULARY) >= 250, -torch.inf, z),
    "clamp": lambda z: z.clamp(-0.1, 20),
    "clamp that nothing reaches": lambda z: z.clamp(-1e4, 1e4),
    "clamp_": lambda z: z.clamp_(-0.1, 0.1),
    "soft cap": lambda z: 0.1 * torch.tanh(z / 0.1),
    "scale": lambda z: z * 2,
    "scale in place": lambda z: _in_place(z, lambda z: z.mul_(3)),
    "scale of some positions": lambda z: z * torch.linspace(1, 2, z.shape[1])[:, None],
    "scale of 1 as a tensor": lambda z: z * torch.ones(()),
    "cast down": lambda z: z.bfloat16(),
    "cast and back": lambda z: z.bfloat16().float(),
    "log_softmax": lambda z: z.log_softmax(-1),
    "pad": lambda z: torch.nn.functional.pad(z, (0, 3), value=2.0),
    "concatenate": lambda z: torch.cat([z, z[..., :2]], -1),
    "permute the vocabulary": lambda z: z.flip(-1),
    "permute the positions": lambda z: z.roll(1, 1),
    "by its own largest": lambda z: z / z.abs().amax((1, 2), keepdim=True),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy() * 2) + 0 * z,
    "a look at a value": lambda z: z if float(z.detach().flatten()[0]) > 1e9 else z + z,
    "an error that is caught": _caught,
    "addition of nothing": lambda z: z + 0,
    "a custom function": lambda z: Doubled.apply(z),
    "float": lambda z: z.float(),
    "scale of one": lambda z: z * 1.0 / 1,
}
UNCHANGED = ("float", "scale of one")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Changed(transformers.LlamaForCausalLM):  # type: ignore[misc]
    change: Any = staticmethod(lambda z: z)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def changed(change: Any) -> nn.Module:
    model = llama(False)
    model.__class__ = Changed
    model.change = change
    return model


def assert_same(found: Signals, plain: Signals) -> None:
    assert torch.equal(found.losses.nan_to_num(-1), plain.losses.nan_to_num(-1))
    assert found.reduced.keys() == plain.reduced.keys()
    for key, value in plain.reduced.items():
        assert torch.equal(found.reduced[key], value), key


@pytest.mark.parametrize("name", CHANGES)
def test_changed_logits_are_never_fused(name: str) -> None:
    """Losses, gradients and logits bit for bit, on the first batch and on later ones; the probe checks itself."""
    model, inputs = changed(CHANGES[name]), batch(7, 5, 1)
    for ids in inputs["input_ids"]:
        ids.clamp_(max=249)
    plain = signals(model, CausalLM(fused=False), inputs)
    for _ in range(2):
        found = signals(model, CausalLM(), inputs)
        assert is_fused(found) == (name in UNCHANGED)
        if name not in UNCHANGED:
            assert_same(found, plain)
            assert torch.equal(found.logits, plain.logits)
        else:
            torch.testing.assert_close(found.losses, plain.losses, equal_nan=True, rtol=1e-5, atol=1e-6)
    if name not in UNCHANGED:
        with pytest.raises(ValueError, match="not the output of its layer 'lm_head'"):
            CausalLM(fused="lm_head").forward(model, inputs)


def test_a_change_that_comes_with_a_later_batch() -> None:
    model = changed(lambda z: z if z.shape[1] < 6 else z / z.shape[1])
    assert is_fused(signals(model, CausalLM(), batch(5, 4)))
    long = batch(8, 5)
    found = signals(model, CausalLM(), long)
    assert not is_fused(found)
    assert_same(found, signals(model, CausalLM(fused=False), long))


def test_a_label_that_only_the_changed_logits_have() -> None:
    wide, narrow = changed(CHANGES["pad"]), changed(CHANGES["cut"])
    inputs = {"input_ids": torch.randint(200, (2, 6)), "labels": torch.full((2, 6), VOCABULARY + 1)}
    assert_same(signals(wide, CausalLM(), inputs), signals(wide, CausalLM(fused=False), inputs))
    inputs["labels"] = torch.full((2, 6), 255)
    with pytest.raises(ValueError, match=r"label 255 lies outside \[0, 250\)"):
        signals(narrow, CausalLM(), inputs)


def test_hooks_that_change_the_logits() -> None:
    inputs = batch(7, 5)
    for where in ("lm_head", ""):
        model = llama(True)

        def double(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return output * 2
            output.logits = output.logits * 2
            return output

        model.get_submodule(where).register_forward_hook(double)
        found = signals(model, CausalLM(), inputs)
        assert not is_fused(found)
        assert_same(found, signals(model, CausalLM(fused=False), inputs))


class Sliced(nn.Module):
    """Multiplies some of its hidden states, or all of them twice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.embed, self.head = how, nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids).cumsum(1)
        if self.how == "twice":
            self.head(h.tanh())
            return self.head(h)
        if self.how == "overwritten":
            z = self.head(h.detach())
            h.zero_()
            return z
        if self.how == "positions":
            return torch.cat([self.head(h[:, :2]), self.head(h[:, 2:])], 1)
        if self.how == "transposed":
            return self.head(h.transpose(0, 1)).transpose(0, 1)
        return nn.functional.linear(h, self.head.weight[:250], self.head.bias[:250])


@pytest.mark.parametrize("how", ["twice", "overwritten", "positions", "transposed", "rows"])
def test_models_that_slice_before_the_output_layer(how: str) -> None:
    torch.manual_seed(0)
    model, inputs = Sliced(how), {"input_ids": torch.randint(250, (4, 4))}
    options: dict[str, Any] = {"factors": (), "verify": False}
    found, plain = (Probe(model, task, **options)(inputs) for task in (CausalLM(), CausalLM(fused=False)))
    assert not is_fused(found)
    assert torch.equal(found.losses, plain.losses)
    assert torch.equal(found.logits, plain.logits)


def test_half_precision_logits_that_are_cast() -> None:
    model, inputs = changed(lambda z: z.float()).bfloat16(), batch(7, 5)
    found = signals(model, CausalLM(), inputs)
    assert not is_fused(found)
    assert_same(found, signals(model, CausalLM(fused=False), inputs))


def test_inkling_with_a_padded_vocabulary() -> None:
    """Its own forward cuts the logits to ``unpadded_vocab_size``."""
    config = transformers.InklingTextConfig(
        vocab_size=512,
        unpadded_vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.InklingForCausalLM(config)
    inputs = {"input_ids": torch.randint(257, (2, 6))}
    found, plain = (Probe(model, t, factors=())(inputs) for t in (CausalLM(), CausalLM(fused=False)))
    assert torch.equal(found.losses, plain.losses)
    assert not is_fused(found)


def test_the_check_does_not_run_the_fused_loss_it_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused operator whose losses and gradients are consistently wrong is found out."""
    from assay import ops

    real = ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda h, w, *rest, **kw: real(h * 1.5, w, *rest, **kw))
    with pytest.raises(RuntimeError, match="do not add up to autograd's"):
        Probe(llama(False), CausalLM())(batch(7, 5))
