"""Values without a batch dimension, and graphs that start before the taps, against torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay.probe import PerSampleGradient, Probe, SqNorm, tapped_parameters
from assay.tasks import CausalLM, Classification
from tests.probe.probe_oracle import check_probe, close, jacobian
from tests.probe.test_models import gpt2, llama, next_token, randomise, text_batch

transformers = pytest.importorskip("transformers")


def cross_entropy(run: Any, batch: Any) -> Tensor:
    return F.cross_entropy(run(batch[0]), batch[1], reduction="none")


def batch(size: int, length: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, length, 4, generator=generator).double(), torch.arange(size) % 3


class Bare(nn.Module):
    """Uses a parameter of its own in one way, behind a layer and before another."""

    def __init__(self, use: Callable[[Bare, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.own, self.twin = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.lift, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.register_buffer("table", torch.linspace(-1, 1, 40).view(10, 4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        h = self.use(self, self.lift(x)).tanh() + 0 * (self.own.sum() + self.twin.sum())
        return self.head(h[..., :4].sum(1))


def _iadd(m: Bare, h: Tensor) -> Tensor:
    h += m.own
    return h


USES: dict[str, tuple[Callable[[Bare, Tensor], Tensor], tuple[int, ...]]] = {
    "positions": (lambda m, h: h + m.own[: h.shape[1]], (9, 4)),
    "positions with a batch dimension of 1": (lambda m, h: h + m.own[:, : h.shape[1]], (1, 9, 4)),
    "positions by ids": (lambda m, h: h + m.own[torch.arange(h.shape[1])], (9, 4)),
    "positions by embedding()": (lambda m, h: h + F.embedding(torch.arange(h.shape[1]), m.own), (9, 4)),
    "per sample by embedding()": (lambda m, h: h + F.embedding((h[..., 0] > 0).long(), m.own), (2, 4)),
    "layer scale": (lambda m, h: h * m.own, (4,)),
    "a scaled part of a table": (lambda m, h: h + m.own * m.table[: h.shape[1]], (1,)),
    "a part of a table, by features": (lambda m, h: h + m.own * m.table[: h.shape[1]], (4,)),
    "a scalar": (lambda m, h: m.own * h, ()),
    "a quotient": (lambda m, h: h / (2 + m.own.tanh()), (4,)),
    "a reversed difference": (lambda m, h: m.own - h, (1, 1, 4)),
    "in place": (_iadd, (4,)),
    "a class token": (lambda m, h: torch.cat([m.own.expand(len(h), -1, -1), h], 1), (1, 1, 4)),
    "a prompt that is repeated": (lambda m, h: torch.cat([m.own.unsqueeze(0).repeat(len(h), 1, 1), h], 1), (2, 4)),
    "a mask token": (lambda m, h: torch.where(h > 0.3, m.own, h), (4,)),
    "twice": (lambda m, h: (h + m.own) * m.own, (4,)),
    "two together": (lambda m, h: h + m.own.sigmoid() * m.twin, (4,)),
    "through a layer": (lambda m, h: h + m.norm(m.own), (6, 4)),
    "through a layer, two ways": (lambda m, h: h * m.norm(m.own) + m.norm(h) * m.own, (6, 4)),
    "through a layer of (1, T, D)": (lambda m, h: h + m.lift(m.own[None]), (6, 4)),
    "a product": (lambda m, h: h @ m.own, (4, 4)),
    "a linear map": (lambda m, h: F.linear(h, m.own), (5, 4)),
    "a linear map with a bias": (lambda m, h: F.linear(h, m.own, m.twin.sum(1) * 0 + 1), (5, 4)),
    "its type alone": (lambda m, h: (h.type_as(m.own) * m.own).to(h), (4,)),
    "a product with a vector": (lambda m, h: h * (h @ m.own)[..., None], (4,)),
    "a sum and a product in one": (lambda m, h: h + torch.addmm(m.twin[0], h.sum(1), m.own)[:, None], (4, 4)),
    "a product on the right": (lambda m, h: (m.own @ h.mT).mT, (5, 4)),
    "a transposed weight": (lambda m, h: h @ m.own.T, (5, 4)),
    "some rows of a weight": (lambda m, h: F.linear(h, m.own[1:5], m.twin[0, :4]), (6, 4)),
    "a weight used twice": (lambda m, h: F.linear(F.linear(h, m.own).tanh(), m.own), (4, 4)),
    "a computed weight": (lambda m, h: F.linear(h, m.own.tanh() * m.twin.sum(0)), (5, 4)),
    "rows by ids": (lambda m, h: F.embedding((h[..., 0] > 0).long() + 1, m.own[1:], padding_idx=-1), (4, 4)),
    "a layer norm by hand": (lambda m, h: F.layer_norm(h, (4,), m.own, m.twin), (4,)),
    "an RMS norm by hand": (lambda m, h: F.rms_norm(h, (4,), m.own), (4,)),
    "a group norm by hand": (lambda m, h: F.group_norm(h.mT, 2, m.own, m.twin).mT, (4,)),
    "a batch norm by hand": (
        lambda m, h: F.batch_norm(h.mT, torch.ones(4).double(), torch.ones(4).double(), m.own, m.twin).mT,
        (4,),
    ),
    "a PReLU by hand": (lambda m, h: F.prelu(h.mT, m.own).mT, (4,)),
    "a convolution by hand": (
        lambda m, h: F.conv1d(h.mT, m.own, m.twin[:, 0, 0], padding="same", groups=2).mT,
        (4, 2, 3),
    ),
    "a convolution of a view": (lambda m, h: F.conv1d(h.mT, m.own.unsqueeze(1), None, 1, 2, 1, 4).mT, (4, 3)),
    "a convolution backwards": (lambda m, h: F.conv_transpose1d(h.mT, m.own, m.twin[0, :, 0], 2, 1, 1).mT, (4, 4, 3)),
    "a bilinear map": (lambda m, h: F.bilinear(h, h.tanh(), m.own, m.twin[:, 0, 0]), (4, 4, 4)),
    "scores' bias": (
        lambda m, h: F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], attn_mask=m.own)[:, 0],
        (6, 6),
    ),
    "attention to shared keys": (lambda m, h: (h[:, None] @ m.own.mT).softmax(-1)[:, 0] @ h, (1, 1, 6, 4)),
    "not in the loss": (lambda m, h: h + m.own.detach(), (4,)),
    "in no_grad for a number": (lambda m, h: h * 2 if float(m.own.detach().sum()) > 0 else h + m.own, (4,)),
}


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("name", USES)
def test_bare_parameters(name: str, size: int) -> None:
    use, shape = USES[name]
    model = randomise(Bare(use, *shape))
    if name == "a linear map with a bias":
        model.twin.requires_grad_(False)
    if name == "positions by embedding()" and size == 6:  # T = B: they could be the samples'
        with pytest.raises(RuntimeError, match="parameter 'own'"):
            check_probe(model, Classification(), batch(size), cross_entropy)
        return
    forward_mode = name not in ("scores' bias", "rows by ids")  # the one has none, the other's sees the padding
    options = {"tolerance": 1e-9, "forward_mode": forward_mode}
    if name == "a computed weight" and size > 1:  # of two parameters: an online pass takes both or neither
        options["online"] = ("all",)
    check_probe(model, Classification(), batch(size), cross_entropy, **options)


REFUSED: dict[str, tuple[Callable[[Bare, Tensor], Tensor], tuple[int, ...], str]] = {
    "a product of samples": (lambda m, h: torch.einsum("bti,io->bto", h, m.own), (4, 4), "einsum"),
    "a norm by hand": (lambda m, h: F.instance_norm(h.mT, weight=m.own).mT, (4,), "instance_norm"),
    "windows by row": (lambda m, h: (h.transpose(0, 1) + m.own).transpose(0, 1), (6, 1, 4), "add"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_uses_that_cannot_be_followed_are_named_or_left_out(name: str) -> None:
    use, shape, reason = REFUSED[name]
    model = randomise(Bare(use, *shape))
    names = tapped_parameters(model)
    reductions = {n: SqNorm([n]) for n in names}
    for verify in (True, False):
        with pytest.raises(RuntimeError, match=rf"parameter 'own'.*{reason}.*skip_unsupported=True"):
            Probe(model, Classification(), reductions=reductions, verify=verify)(batch(3))
        probe = Probe(model, Classification(), reductions=reductions, verify=verify, skip_unsupported=True)
        found, exact = probe(batch(3)).reduced, jacobian(model, cross_entropy, batch(3))
        assert list(probe.left_out) == ["own"]
        assert probe.coverage == pytest.approx(1 - model.own.numel() / sum(p.numel() for p in model.parameters()))
        for n in probe.parameters:
            close(found[n], exact[n].square().flatten(1).sum(1), 1e-9, n)
        assert not found["own"].any()
        with pytest.raises(ValueError, match=r"'ownn' matches no"):
            tapped_parameters(model, ["*", "!ownn"])
        assert tapped_parameters(model, ["*", "!own"]) == [n for n in names if n != "own"]


def test_a_use_that_no_function_of_torch_shows_is_found_out() -> None:
    """A custom autograd function takes the parameter: its gradient comes whole, on a way that was not followed."""

    class Add(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, own: Tensor) -> Tensor:
            return h.detach() + own.detach().as_subclass(Tensor)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            return grads[0], grads[0].sum((0, 1))

    model = randomise(Bare(lambda m, h: Add.apply(h, m.own), 4))
    with pytest.raises(RuntimeError, match="parameter 'own'"):
        Probe(model, Classification(), reductions={"n": SqNorm(tapped_parameters(model))}, verify=False)(batch(3))


def test_bare_parameters_inside_a_checkpoint() -> None:
    plain = randomise(Bare(lambda m, h: h + m.own[: h.shape[1]] * m.norm(h), 9, 4))
    kept = randomise(Bare(lambda m, h: checkpoint(plain.use, m, h, use_reentrant=False), 9, 4))
    names = tapped_parameters(plain)
    found, expected = (
        Probe(model, Classification(), reductions={n: SqNorm([n]) for n in names})(batch(3)).reduced
        for model in (kept, plain)
    )
    for name in names:
        close(found[name], expected[name], 1e-12, name)


def test_the_model_keeps_its_parameters() -> None:
    use, shape = USES["positions"]
    model = randomise(Bare(use, *shape))
    before = dict(model.named_parameters())
    Probe(model, Classification(), reductions={"n": SqNorm(["own"])})(batch(3))
    with pytest.raises(ValueError, match="expected"):
        Probe(model, Classification(), reductions={"n": SqNorm(["own"])})((batch(3)[0], torch.zeros(2).long()))
    after = dict(model.named_parameters())
    assert all(after[name] is p and p.requires_grad and p.grad is None for name, p in before.items())


def test_a_sum_is_spread_without_a_change_of_its_bits() -> None:
    model = gpt2().float().eval()
    texts = text_batch(7, 3, 5)
    names = tapped_parameters(model)
    signals = Probe(model, CausalLM(fused=False), reductions={"n": SqNorm(names)})(texts)
    assert torch.equal(signals.logits, model(**texts, use_cache=False).logits.flatten(0, 1))


class OutputAsWeight(nn.Module):
    """What a layer gives of values that no sample has a part in is a weight, and perhaps a summand too."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.use = nn.Parameter(torch.empty(5, 4)), use
        self.embed, self.norm, self.lift = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.lift(x).tanh()).sum(1)[:, :3]


OUTPUTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "prototypes": lambda m, h: h @ m.embed(torch.arange(5)).T,
    "a linear map": lambda m, h: F.linear(h, m.embed(torch.arange(5))),
    "a normalised weight": lambda m, h: F.linear(h, m.norm(m.own)),
    "a layer's output": lambda m, h: F.linear(h, m.lift(m.embed(torch.arange(4)))),
    "a weight and a summand": lambda m, h: F.linear(h + m.embed(torch.arange(6) % 5), m.embed(torch.arange(5))),
    "one value in both ways": lambda m, h: (lambda e: F.linear(h + e[:1], e) * e.tanh().sum(1))(
        m.embed(torch.arange(5))
    ),
}


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_layers_output_as_a_weight(name: str, size: int) -> None:
    model = randomise(OutputAsWeight(OUTPUTS[name]))
    names = tapped_parameters(model)
    exact = jacobian(model, cross_entropy, batch(size))
    for verify in (True, False) if size < 5 else (True,):  # five rows may be a sample's each: that takes the check
        probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in names}, verify=verify)
        found = probe(batch(size)).reduced
        for n in names:
            close(found[n], exact[n].square().flatten(1).sum(1), 1e-9, n)


# ---- whole models


def deberta(version: int) -> nn.Module:
    kind = "DebertaV2" if version == 2 else "Deberta"
    options = {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"} if version == 2 else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=8,
        num_labels=3,
        **options,
    )
    return randomise(getattr(transformers, f"{kind}ForSequenceClassification")(config))


@pytest.mark.parametrize("version", [1, 2])
def test_deberta(version: int) -> None:
    """Its layers see the samples and, on (1, 2k, D), relative positions, which it takes from behind an embedding's back
    and repeats for every head itself."""
    model = deberta(version)
    texts = text_batch(6, 4, 5)
    labelled = texts, torch.tensor([0, 2, 1])
    names = tapped_parameters(model)
    probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in names})
    found = probe(labelled).reduced
    assert probe.parameters == names
    for b in range(3):
        alone = {key: value[b : b + 1] for key, value in texts.items()}, labelled[1][b : b + 1]
        loss = Classification().forward(model.eval(), alone).losses.sum()
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names])
        largest = max(float(g.square().sum()) for g in gradients)
        for name, gradient in zip(names, gradients, strict=True):
            assert abs(float(found[name][b] - gradient.square().sum())) <= 1e-5 * largest, name


def test_mamba() -> None:
    """It runs a convolution and a projection with the weights alone, one of them reshaped and one on the left."""
    config = transformers.MambaConfig(
        vocab_size=13, hidden_size=8, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=2
    )
    model = randomise(transformers.MambaForCausalLM(config))
    texts = text_batch(6, 6, 6)
    options = {"tolerance": 2e-5, "forward_mode": False, "online": ()}
    check_probe(model, CausalLM(), texts, next_token, with_factors="*.in_proj", **options)


class Behind(nn.Module):
    """Takes the weight of a layer that it does not run."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.lift, self.head, self.equation = nn.Linear(4, 4), nn.Linear(4, 3), equation

    def forward(self, x: Tensor) -> Tensor:
        weight = self.lift.weight
        h = torch.einsum(self.equation, x, weight) if self.equation else F.linear(x, weight) * self.lift.bias
        return self.head(h.tanh().sum(1))


def test_a_weight_behind_its_layers_back_is_followed() -> None:
    model = randomise(Behind(""))
    check_probe(model, Classification(), batch(3), cross_entropy, with_factors="head", online=())
    with pytest.raises(RuntimeError, match=r"'lift\.weight': it is used behind its layer's back"):
        Probe(model, Classification())(batch(3))  # it has no factors


def test_a_weight_behind_its_layers_back_that_cannot_be_followed_is_named_or_left_out() -> None:
    model = randomise(Behind("bti,oi->bto"))
    reductions = {"n": SqNorm(["lift.weight", "head.weight"])}
    with pytest.raises(RuntimeError, match=r"'lift\.weight': it is used behind.*layers=\['\*', '!name'\]"):
        Probe(model, Classification(), reductions=reductions)(batch(3))
    probe = Probe(model, Classification(), reductions=reductions, skip_unsupported=True)
    found = probe(batch(3)).reduced["n"]
    assert list(probe.left_out) == ["lift.weight"]
    assert torch.equal(
        found, Probe(model, Classification(), reductions={"n": SqNorm(["head.weight"])})(batch(3)).reduced["n"]
    )


def test_what_turns_out_unsupported_later_is_an_error() -> None:
    """Scores of one table are made of the same layers."""

    class Late(Bare):
        def forward(self, x: Tensor) -> Tensor:
            h = self.lift(x)
            h = h + self.own if x.shape[1] == 6 else torch.einsum("bti,i->bti", h, self.own)
            return self.head(h.tanh().sum(1))

    model = randomise(Late(lambda m, h: h, 4))
    names = tapped_parameters(model, ["*", "!twin", "!norm"])
    probe = Probe(model, Classification(), reductions={"n": SqNorm(names)}, skip_unsupported=True)
    probe(batch(3, 6))
    assert not probe.left_out
    with pytest.raises(RuntimeError, match=r"parameter 'own'.*einsum"):
        probe(batch(3, 5))


@pytest.mark.parametrize("verify", [True, False])
def test_a_layers_output_that_is_modified_in_place(verify: bool) -> None:
    """A linear layer's output is a view, whose hooks torch forgets then."""

    def scaled(m: Bare, h: Tensor) -> Tensor:
        h = m.lift(h.contiguous())
        h /= 3
        g = F.linear(h, m.own, m.twin[0])
        g.mul_(2)
        return g

    model = randomise(Bare(scaled, 4, 4))
    names = tapped_parameters(model)
    found = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in names}, verify=verify)(batch(3)).reduced
    exact = jacobian(model, cross_entropy, batch(3))
    for name in names:
        close(found[name], exact[name].square().flatten(1).sum(1), 1e-9, name)


def test_what_turns_out_wrong_on_the_first_batch_is_left_out() -> None:
    """A weight that is tied to another behind its layer's back: its layer runs, and gives a part of the gradient."""
    model = randomise(Bare(lambda m, h: h @ m.lift.weight, 4))
    names = tapped_parameters(model, ["*", "!own", "!twin", "!norm"])
    seen: list[str] = []

    class Watch:
        parameters = names

        def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
            seen.append(parameter)
            return gradient.sqnorm()

    with pytest.raises(RuntimeError, match=r"parameter 'lift\.weight'.*do not add up"):
        Probe(model, Classification(), reductions={"n": Watch()})(batch(3))
    seen.clear()
    probe = Probe(model, Classification(), reductions={"n": Watch()}, skip_unsupported=True)
    found, exact = probe(batch(3)).reduced["n"], jacobian(model, cross_entropy, batch(3))
    assert list(probe.left_out) == ["lift.weight"]
    assert "do not add up" in probe.left_out["lift.weight"]
    rest = [n for n in names if n != "lift.weight"]
    assert sorted(seen) == sorted(rest)  # once each, and nothing of the other
    close(found, sum(exact[n].square().flatten(1).sum(1) for n in rest), 1e-9, "the rest")


# ---- layers that see all positions of all samples in one dimension


def test_flattened_positions() -> None:
    """OPT's final norm and a mixture's shared expert see (B·T, D)."""
    config = transformers.OPTConfig(
        vocab_size=13,
        hidden_size=8,
        ffn_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        word_embed_proj_dim=8,
        pad_token_id=1,
        attn_implementation="eager",
    )
    model = randomise(transformers.OPTForCausalLM(config))
    model.model.decoder.embed_positions.requires_grad_(False)  # a subclass of nn.Embedding
    for lengths in ((7, 3, 5), (6,)):
        check_probe(model, CausalLM(), text_batch(*lengths), next_token, tolerance=1e-5, forward_mode=False)


# ---- graphs that start before the taps


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_inputs_that_require_gradients(make: Callable[[], nn.Module], verify: bool) -> None:
    texts, names = text_batch(7, 3, 5), tapped_parameters(make())
    reductions = {n: SqNorm([n]) for n in names}
    expected = Probe(make(), CausalLM(), reductions=reductions)(texts)
    model = make()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for mode in (model.eval, model.train):
        mode()
        found = Probe(model, CausalLM(), reductions=reductions, verify=verify)(texts)
        for name in names:
            assert torch.equal(found.reduced[name], expected.reduced[name]), name


class Towers(nn.Module):
    """Two branches; a hook or the model itself makes tensors that ask for gradients at the start of one of them."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        y = x * 2
        if self.where == "input":
            y = y.requires_grad_()
        g = self.b(y)
        if self.where == "output":
            g = g.detach().requires_grad_() if not g.requires_grad else g
        return self.d(h + self.c(g.tanh()))


@pytest.mark.parametrize("layers", ["*", "b", "c", "d", ["b", "c"]])
@pytest.mark.parametrize("where", ["input", "output", "hook", "first hook"])
def test_hooks_that_ask_for_gradients(where: str, layers: Any) -> None:
    model = randomise(Towers(where))
    if where == "hook":
        model.b.register_forward_hook(lambda module, args, output: output.requires_grad_())
    if where == "first hook":
        model.a.register_forward_hook(lambda module, args, output: output.requires_grad_())
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    exact = jacobian(randomise(Towers("")), cross_entropy, (x, y))
    names = tapped_parameters(model, layers)
    reductions = {n: SqNorm([n]) for n in names}
    found = Probe(model, Classification(), reductions=reductions, verify=False)((x, y)).reduced
    for name in names:
        close(found[name], exact[name].square().flatten(1).sum(1), 1e-10, name)


def test_a_hook_of_the_users_comes_after_the_layer() -> None:
    """A hook that doubles a layer's output is not part of the layer."""
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: output * 2)
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    check_probe(model, Classification(), (x, y), cross_entropy)
    names = tapped_parameters(model)
    found = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in names}, verify=False)((x, y)).reduced
    exact = jacobian(model, cross_entropy, (x, y))
    for name in names:
        close(found[name], exact[name].square().flatten(1).sum(1), 1e-10, name)


def test_a_scaled_embedding_has_an_exact_formula() -> None:
    config = transformers.Gemma2Config(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        attn_implementation="eager",
    )
    model = randomise(transformers.Gemma2ForCausalLM(config))
    check_probe(model, CausalLM(), text_batch(7, 3, 5), next_token, tolerance=2e-5)
