"""Layers whose parameters are followed operation by operation, against autograd one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from assay import ops
from assay.probe import Dense, Dot, Probe, Sketched, SqNorm, tapped_parameters
from assay.tasks import Classification
from tests.probe.probe_oracle import Collect, close, random_direction, state

SKETCHES = {"kronecker": ops.Kronecker(2, 3), "sparse": ops.Sparse(16)}


def check_followed(model: nn.Module, batch: Any, tolerance: float = 1e-9) -> None:
    """Gradients, dots, norms and sketches of every trainable parameter; the model is left as it was."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    model.double()
    names = tapped_parameters(model)
    direction, collect = random_direction(model, names), Collect(names)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    reductions: dict[str, Any] = {
        "collect": collect,
        **{f"dot {n}": Dot({n: direction[n]}) for n in names},
        **{f"norm {n}": SqNorm([n]) for n in names},
        **{f"{key} {n}": Sketched({n: shapes[n]}, s, True) for key, s in SKETCHES.items() for n in names},
    }
    before = state(model)
    probe = Probe(model, Classification(), reductions=reductions)
    signals = probe(batch)
    assert probe.coverage == 1
    assert state(model) == before
    exact = one_by_one(model, names, batch)
    largest = max(float(g.abs().max()) for g in exact.values())
    for name, gradient in exact.items():
        mine = collect.dense.get(name, torch.zeros_like(gradient))
        if float(gradient.abs().max()) < 1e-12 * largest:  # the bias of attention keys, but for rounding
            assert float(mine.abs().max()) < 1e-12 * largest
            continue
        close(mine, gradient, tolerance, name)
        close(signals.reduced[f"dot {name}"], (gradient * direction[name]).flatten(1).sum(1), tolerance, name)
        close(signals.reduced[f"norm {name}"], gradient.square().flatten(1).sum(1), tolerance, name)
        for key, sketch in SKETCHES.items():
            expected = Dense(gradient).sketch(sketch.named(name), shapes[name])
            close(signals.reduced[f"{key} {name}"], expected, 1e-5, name)


def one_by_one(model: nn.Module, names: list[str], batch: Any) -> dict[str, Tensor]:
    """Every sample's gradients, alone in its batch, in eval mode."""
    parameters = dict(model.named_parameters())
    training, found = model.training, []
    model.eval()
    for b in range(len(batch[1])):
        alone = tuple(x[b : b + 1] for x in batch[0]) if isinstance(batch[0], tuple) else batch[0][b : b + 1]
        loss = F.cross_entropy(model(alone), batch[1][b : b + 1])
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True)
        found.append(
            [torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, gradients, strict=True)]
        )
    model.train(training)
    return {name: torch.stack(each) for name, each in zip(names, zip(*found, strict=True), strict=True)}


def labelled(*inputs: Tensor) -> Any:
    return inputs[0] if len(inputs) == 1 else inputs, torch.arange(len(inputs[0])) % 3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).double()


class Head(nn.Module):
    """A body by a function, and class scores."""

    def __init__(self, use: Callable[[Any, Any], Tensor], width: int, **layers: nn.Module) -> None:
        super().__init__()
        self.use, self.layers, self.head = use, nn.ModuleDict(layers), nn.Linear(width, 3)

    def forward(self, x: Any) -> Tensor:
        h = self.use(self.layers, x).tanh()
        return self.head(h.flatten(1, -2).sum(1) if h.ndim > 2 else h)


# ---- attention


def _attend(m: Any, x: Tensor, **options: Any) -> Tensor:
    first: Tensor = m["attention"](x, x, x, **options)[0]
    return first


def _second(m: Any, x: Tensor) -> Tensor:
    return _attend(m, x.transpose(0, 1)).transpose(0, 1)


def _cross(m: Any, x: Tensor) -> Tensor:
    first: Tensor = m["attention"](x[:, :2], x, x)[0]
    return first


def _three(m: Any, x: Tensor) -> Tensor:
    first: Tensor = m["attention"](x, x.tanh()[..., :3], x.sin()[..., :2])[0]
    return first


def _masked(m: Any, x: Tensor) -> Tensor:
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[:, -1] = True
    causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).double()
    return _attend(m, x, key_padding_mask=padding, attn_mask=causal.isinf(), need_weights=False)


ATTENTION: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "self": (_attend, {}),
    "batch second": (_second, {"batch_first": False}),
    "without bias": (_attend, {"bias": False}),
    "to another": (_cross, {}),
    "other widths": (_three, {"kdim": 3, "vdim": 2}),
    "masked": (_masked, {}),
    "extra keys": (_attend, {"add_bias_kv": True, "add_zero_attn": True}),
    "twice": (lambda m, x: _attend(m, _attend(m, x).tanh()), {}),
}


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("name", ATTENTION)
def test_multihead_attention(name: str, size: int) -> None:
    """Its shortcut for the case without gradients is not taken: nothing before it is tapped."""
    use, options = ATTENTION[name]
    attention = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})
    check_followed(Head(use, 4, attention=attention), labelled(random(size, 5, 4)))


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_attention_with_a_frozen_part(frozen: str) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    attention.get_parameter(frozen).requires_grad_(False)
    check_followed(Head(_attend, 4, attention=attention), labelled(random(3, 5, 4)))


@pytest.mark.parametrize("mode", [True, False])
def test_a_transformers_layer_takes_no_shortcut(mode: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    model = Head(lambda m, x: m["encoder"](x), 4, encoder=encoder).train(mode)
    assert torch.backends.mha.get_fastpath_enabled()
    check_followed(model, labelled(random(3, 5, 4)))
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_as_a_function_with_the_weights_of_layers() -> None:
    """CLIP's pooling: a query for each sample and the projections of other layers."""

    def pool(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        pooled, _ = F.multi_head_attention_forward(
            x.mean(0, keepdim=True), x, x, 4, 2, None, torch.cat([m[n].bias for n in "qkv"]), None, None, False, 0.0,
            m["out"].weight, m["out"].bias, training=False, use_separate_proj_weight=True,
            q_proj_weight=m["q"].weight, k_proj_weight=m["k"].weight, v_proj_weight=m["v"].weight,
        )  # fmt: skip
        return pooled[0]

    layers = {name: nn.Linear(4, 4) for name in ("q", "k", "v", "out")}
    check_followed(Head(pool, 4, **layers), labelled(random(3, 5, 4)))


# ---- bags of embeddings


def ids(size: int, length: int) -> Tensor:
    return torch.randint(6, (size, length), generator=torch.Generator().manual_seed(1))


BAGS: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: nn.EmbeddingBag(6, 4, mode="sum"),
    "mean": lambda: nn.EmbeddingBag(6, 4, mode="mean"),
    "padding": lambda: nn.EmbeddingBag(6, 4, mode="mean", padding_idx=2),
}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", BAGS)
def test_bags_of_embeddings(name: str, size: int) -> None:
    check_followed(Head(lambda m, x: m["bag"](x), 4, bag=BAGS[name]()), labelled(ids(size, 7)))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", BAGS)
def test_bags_that_lie_end_to_end(name: str, last: bool) -> None:
    """Their lengths differ: a sample's ids are as many as its first says."""

    def bags(m: Any, x: Tensor) -> Tensor:
        bag = m["bag"]
        bag.include_last_offset = last
        lengths = x[:, 0].clamp(max=x.shape[1] - 1)
        flat = torch.cat([row[1 : 1 + n] for row, n in zip(x, lengths.tolist(), strict=True)])
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        out: Tensor = bag(flat, starts if last else starts[:-1])
        return out

    check_followed(Head(bags, 4, bag=BAGS[name]()), labelled(ids(5, 8)))


def test_weighted_bags() -> None:
    def weighted(m: Any, x: tuple[Tensor, Tensor]) -> Tensor:
        weights = m["scale"](x[1][..., None])[..., 0]  # samples decide the weights, and a layer does
        out: Tensor = m["bag"](x[0], per_sample_weights=weights)
        return out

    model = Head(weighted, 4, bag=nn.EmbeddingBag(6, 4, mode="sum"), scale=nn.Linear(1, 1))
    check_followed(model, labelled(ids(3, 7), random(3, 7)))


# ---- maps of two inputs, computed weights, subclasses


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(bias: bool) -> None:
    for shape in ((3, 4), (3, 5, 4)):
        model = Head(lambda m, x: m["map"](x, x[..., :2].tanh()), 3, map=nn.Bilinear(4, 2, 3, bias=bias))
        check_followed(model, labelled(random(*shape)))


PARAMETRISED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 6)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
    "by columns": lambda: parametrizations.weight_norm(nn.Linear(4, 6, bias=False), dim=1),
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_layers(name: str) -> None:
    layer = PARAMETRISED[name]()
    width = 4 if name == "orthogonal" else 6
    check_followed(Head(lambda m, x: m["map"](x), width, map=layer).eval(), labelled(random(3, 5, 4)), 1e-8)


def test_a_parametrised_convolution_that_runs_twice() -> None:
    """Speech models' positional convolution: weight norm over the kernel's places, grouped."""
    conv = parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1, groups=2), dim=2)
    model = Head(lambda m, x: m["conv"](m["conv"](x.mT).tanh()).mT, 4, conv=conv)
    check_followed(model, labelled(random(3, 5, 4)))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 + self.weight.mean() * x.sum(-1, keepdim=True)


class Shifted(nn.Embedding):
    """OPT's positions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., 0].gt(0).long() + 2)


class ChannelsFirst(nn.LayerNorm):
    """ConvNeXt's norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 1)).permute(0, 2, 1)


SUBCLASSES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "linear": (lambda: Doubled(4, 4), lambda m, x: m["own"](x)),
    "embedding": (lambda: Shifted(4, 4, padding_idx=0), lambda m, x: m["own"](x)),
    "layer norm": (lambda: ChannelsFirst(4), lambda m, x: m["own"](x.mT).mT),
    "its bias alone": (lambda: Doubled(4, 4), lambda m, x: m["own"](x)),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses_of_layers(name: str) -> None:
    make, use = SUBCLASSES[name]
    model = Head(use, 4, own=make())
    if name == "its bias alone":
        model.layers["own"].weight.requires_grad_(False)
    check_followed(model, labelled(random(3, 5, 4)))


def test_a_followed_weight_is_folded_as_soon_as_its_last_use_has_its_gradient() -> None:
    """Not at the end: a deep model's factors would all be kept."""
    model = Head(lambda m, x: m["b"](m["a"](x).tanh()), 4, a=Doubled(4, 4), b=SUBCLASSES["linear"][0]())
    order: list[str] = []

    class Watch:
        parameters = ("layers.a.bias", "layers.b.bias", "head.weight")

        def __call__(self, parameter: str, gradient: Any) -> Tensor:
            order.append(parameter)
            return gradient.sqnorm()

    Probe(model, Classification(), reductions={"x": Watch()}, verify=False)(
        (random(3, 5, 4).float(), torch.tensor([0, 1, 2]))
    )
    assert order == ["head.weight", "layers.b.bias", "layers.a.bias"]
